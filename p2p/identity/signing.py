"""Signatures of requests: who asks knows the secret, just asked, and asks for the first time.

    Authorization: Weightstream1 <node> <milliseconds since 1970> <nonce> <HMAC-SHA256>

The HMAC is over method, path (with its query), node, time and nonce. Bodies and answers are not
signed: that is what TLS is for.
"""

import hashlib
import hmac
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from weightstream.p2p.identity.name import is_node_name

SCHEME = "Weightstream1"
WINDOW_S = 30
"""How far the clocks of two nodes may be apart, the time on the way included."""

_NONCE_BYTES = 12
_MAC_BYTES = 32
_MOST_HEADER_CHARACTERS = 512
# Some 100 bytes each: 13 MB. Enough for 2,000 requests a second over the whole window of a minute.
_MOST_NONCES = 1 << 17


@dataclass(frozen=True, slots=True)
class _Claim:
    node: str
    milliseconds: int
    nonce: str
    mac: bytes

    @property
    def second(self) -> int:
        return self.milliseconds // 1000


class Signer:
    """Signs requests of a node, and checks those of others. Thread-safe."""

    def __init__(
        self,
        key: bytes,
        node: str,
        now_s: Callable[[], float] = time.time,
        most_nonces: int = _MOST_NONCES,
    ) -> None:
        self._key = key
        self._node = node
        self._now_s = now_s
        self._seen = _Nonces(most_nonces)

    def sign(self, method: str, path: str) -> str:
        """Return the Authorization header of one request; it is good for one."""
        milliseconds = int(self._now_s() * 1000)
        nonce = secrets.token_hex(_NONCE_BYTES)
        mac = self._mac(method, path, self._node, milliseconds, nonce)
        return f"{SCHEME} {self._node} {milliseconds} {nonce} {mac.hex()}"

    def refusal(self, header: str | None, method: str, path: str) -> str | None:
        """Return why a request is refused, without a word about the key; None when it is fine."""
        if header is None:
            return "it is not signed"
        claim = _parse(header)
        if claim is None:
            return "its signature makes no sense"
        mac = self._mac(method, path, claim.node, claim.milliseconds, claim.nonce)
        if not hmac.compare_digest(mac, claim.mac):
            return f"its signature is wrong ({claim.node}: another secret, or another request)"
        now_s = self._now_s()
        late_s = now_s - claim.milliseconds / 1000
        if abs(late_s) > WINDOW_S:
            return (
                f"it was signed {abs(late_s):.0f} s {'ago' if late_s > 0 else 'ahead'} by the "
                f"clock of {claim.node}; {WINDOW_S} s are allowed"
            )
        return self._seen.refusal(claim, now_s)

    def _mac(self, method: str, path: str, node: str, milliseconds: int, nonce: str) -> bytes:
        # no part but the path may hold a line feed, and a request's line cannot
        text = f"{method}\n{path}\n{node}\n{milliseconds}\n{nonce}"
        return hmac.digest(self._key, text.encode("utf-8", "surrogateescape"), hashlib.sha256)


class _Nonces:
    """Nonces of the window, by the second that they name; the oldest second goes when it is full.

    What named a second that is forgotten is refused, so forgetting shortens the window and never
    lets a replay in. Only who knows the secret can fill it.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._by_second: dict[int, set[str]] = {}
        self._count = 0
        self._forgotten = -1

    def refusal(self, claim: _Claim, now_s: float) -> str | None:
        with self._lock:
            self._forget(int(now_s) - WINDOW_S - 1)
            if claim.second <= self._forgotten:
                return f"it was signed too long ago for a node as busy as this ({claim.node})"
            seen = self._by_second.setdefault(claim.second, set())
            if claim.nonce in seen:
                return f"it came before ({claim.node})"
            seen.add(claim.nonce)
            self._count += 1
            while self._count > self._most:
                self._forget(min(self._by_second))
            return None

    def _forget(self, second: int) -> None:
        """Forget what named this second or an earlier one."""
        if second <= self._forgotten:
            return
        self._forgotten = second
        for old in [s for s in self._by_second if s <= second]:
            self._count -= len(self._by_second.pop(old))


def _parse(header: str) -> _Claim | None:
    parts = header.split(" ")
    if len(header) > _MOST_HEADER_CHARACTERS or len(parts) != 5 or parts[0] != SCHEME:
        return None
    _, node, milliseconds, nonce, mac = parts
    plain = milliseconds.isascii() and milliseconds.isdigit() and len(milliseconds) <= 16
    if not plain or not is_node_name(node) or len(nonce) != 2 * _NONCE_BYTES:
        return None
    try:
        bytes.fromhex(nonce)
        found = bytes.fromhex(mac)
    except ValueError:
        return None
    if len(found) != _MAC_BYTES or not nonce.isascii() or " " in nonce:
        return None
    return _Claim(node, int(milliseconds), nonce, found)
