"""Members by a tracker: this node registers there and hears who else did."""

import json
import logging
import os
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from weightstream.errors import UsageError
from weightstream.p2p.identity import Identity
from weightstream.p2p.members.addresses import Address, is_host, is_port, resolve, unique
from weightstream.p2p.members.line import Answer, Line, request, talk_until
from weightstream.p2p.members.sources import MOST_ADDRESSES, Names, SourceError

log = logging.getLogger(__name__)

MEMBERS_PATH = "/v1/members"
REGISTER_S = 5.0
"""Between two registrations: a third of their time to live."""

_ANSWER_S = 3.0
_MOST_BODY_BYTES = 4 << 20
_PAUSE_S = 0.2  # a tracker that always has news is still asked five times a second only


@dataclass(frozen=True, slots=True)
class TrackerUrl:
    """Where a tracker is."""

    address: Address
    is_secure: bool


def parse_tracker(text: str, where: str) -> TrackerUrl:
    """Return `http(s)://host:port`; raises `UsageError`, which says `where` it stood."""
    try:
        parts = urlsplit(text)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)
    except ValueError as error:
        raise UsageError(f"bad {where}: no such URL can be: {error}") from error
    good = parts.scheme in ("http", "https") and is_host(parts.hostname) and is_port(port)
    if not good or parts.path not in ("", "/") or parts.query or "@" in parts.netloc:
        raise UsageError(f"bad {where}: a tracker is tracker:http://host:port, without a path")
    return TrackerUrl(Address(parts.hostname or "", port), parts.scheme == "https")


class TrackerSource:
    """Registers every five seconds and long-polls in between."""

    every_s: float | None = _PAUSE_S

    def __init__(
        self, url: TrackerUrl, identity: Identity, port: int, told: Address | None
    ) -> None:
        self._url = url
        self._identity = identity
        self._port = port
        self._told = told
        self._context = ssl.create_default_context() if url.is_secure else None
        self._line: Line | None = None
        self._stop = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoch = 0
        self._register_s = 0.0
        self._names = Names()

    def look(self) -> tuple[Address, ...]:
        """Return who is registered, at once or when that changes; waits some seconds at most."""
        now_s = time.monotonic()
        try:
            if now_s >= self._register_s:
                answer = self._ask("POST", MEMBERS_PATH, self._about, 0.0)
                self._register_s = now_s + REGISTER_S
            else:
                wait_s = self._register_s - now_s
                path = f"{MEMBERS_PATH}?wait={self._epoch}&seconds={wait_s:.1f}"
                answer = self._ask("GET", path, lambda line: b"", wait_s)
        except OSError as error:
            self._hang_up()
            raise SourceError(
                f"the tracker {self._url.address} does not answer: {error.strerror or error}"
            ) from error
        return self._parse(answer)

    def interrupt(self) -> None:
        """Make a look that waits, or is to come, end now."""
        os.eventfd_write(self._stop, 1)

    def close(self) -> None:
        """Let go of the connection."""
        self._hang_up()
        os.close(self._stop)

    def _ask(self, method: str, path: str, body: Callable[[Line], bytes], wait_s: float) -> Answer:
        line = self._line
        if line is None:
            host = self._url.address.host
            line = self._line = Line(
                resolve(self._url.address)[0], self._context, host, _MOST_BODY_BYTES
            )
        signer = self._identity.signer

        def make() -> bytes:
            headers = {"Host": str(self._url.address)}
            if signer is not None:
                headers["Authorization"] = signer.sign(method, path)
            return request(method, path, headers, body(line))

        return talk_until(line, line.talk(make), time.monotonic() + wait_s + _ANSWER_S, self._stop)

    def _about(self, line: Line) -> bytes:
        told = self._told or Address(line.local_host, self._port)
        return json.dumps(
            {
                "node": self._identity.node,
                "host": told.host,
                "port": told.port,
                "zone": self._identity.zone,
            }
        ).encode()

    def _parse(self, answer: Answer) -> tuple[Address, ...]:
        where = f"the tracker {self._url.address}"
        if answer.status != 200:
            self._register_s = 0.0
            raise SourceError(f"{where} answered {answer.status} {answer.said}".strip())
        try:
            found = json.loads(answer.body)
            entries = [Address(entry["host"], entry["port"]) for entry in found["members"]]
            self._epoch = int(found["epoch"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            self._register_s = 0.0
            raise SourceError(f"{where} answered what is no list of members") from error
        good = [a for a in entries[:MOST_ADDRESSES] if is_host(a.host) and is_port(a.port)]
        return unique(n for a in good for n in self._names.numbers(a)[:1])

    def _hang_up(self) -> None:
        """Begin anew, with a registration: the tracker may have lost everything."""
        self._register_s = 0.0
        if self._line is not None:
            self._line.close()
            self._line = None
