"""From which addresses members take part: the process talks to nobody else.

A member that is out for a moment keeps its connections: one that fails a hello may be busy.
"""

import logging
import socket
from collections.abc import Callable, Iterable

from weightstream.p2p.members import Member

log = logging.getLogger(__name__)

_GONE_S = 10.0
_AGAIN_S = 60.0
"""So long a name's addresses are good: a replaced node has another."""


def resolve(host: str) -> tuple[str, ...]:
    """Return a host's addresses as numbers; none when its name is unknown."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        log.info("%s is not found: %s", host, error)
        return ()
    return tuple(dict.fromkeys(str(address[0]) for *_, address in found))


class Addresses:
    """One thread's."""

    def __init__(self, resolve: Callable[[str], tuple[str, ...]] = resolve) -> None:
        self._resolve = resolve
        self._found: dict[str, tuple[tuple[str, ...], float]] = {}
        self._seen_s: dict[str, float] = {}

    def of(self, member: Member, now_s: float) -> tuple[str, ...]:
        """Return where a member is."""
        found, until_s = self._found.get(member.host, ((), 0.0))
        if now_s >= until_s:
            found = self._resolve(member.host)
            self._found[member.host] = found, now_s + _AGAIN_S
        return found

    def admitted(self, members: Iterable[Member], now_s: float) -> frozenset[str]:
        """Return where members are now, or were a moment ago."""
        for member in members:
            self._seen_s.update(dict.fromkeys(self.of(member, now_s), now_s))
        gone = [host for host, seen_s in self._seen_s.items() if now_s - seen_s > _GONE_S]
        for host in gone:
            del self._seen_s[host]
        return frozenset(self._seen_s)
