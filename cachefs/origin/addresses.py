"""All addresses of an endpoint, used in turn.

Object stores answer a name with several addresses, each with its own bandwidth; a client that
sticks to the first one gets a fraction. So connections go round robin, and an address that refused
or timed out is tried last for a while.
"""

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

RESOLVE_TTL_S = 60.0
DEAD_S = 30.0
RESOLVE_TIMEOUT_S = 15.0


@dataclass(frozen=True, slots=True)
class Address:
    """One socket address of a host."""

    family: int
    sockaddr: tuple[Any, ...]


Resolve = Callable[[str, int], tuple[Address, ...]]


def resolve(host: str, port: int) -> tuple[Address, ...]:
    """Ask the resolver, for a bounded time: getaddrinfo itself takes no timeout."""
    outcome: list[tuple[Address, ...] | OSError] = []
    worker = threading.Thread(
        target=lambda: outcome.append(_getaddrinfo(host, port)), name="ws-resolve", daemon=True
    )
    worker.start()
    worker.join(RESOLVE_TIMEOUT_S)
    if not outcome:
        raise TimeoutError(f"resolving {host} took longer than {RESOLVE_TIMEOUT_S:.0f} s")
    if isinstance(outcome[0], OSError):
        raise outcome[0]
    return outcome[0]


def _getaddrinfo(host: str, port: int) -> tuple[Address, ...] | OSError:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        return error if isinstance(error, OSError) else socket.gaierror(str(error))
    return tuple(dict.fromkeys(Address(family, tuple(addr)) for family, *_, addr in found))


def in_turn(
    addresses: tuple[Address, ...], turn: int, dead_until_s: dict[Address, float], now_s: float
) -> tuple[Address, ...]:
    """Return the addresses in the order to try them: rotated by `turn`, dead ones last."""
    first = turn % len(addresses) if addresses else 0
    rotated = addresses[first:] + addresses[:first]
    return tuple(sorted(rotated, key=lambda each: dead_until_s.get(each, 0.0) > now_s))


class AddressBook:
    """Resolved names and the health of their addresses. Thread-safe."""

    def __init__(self, resolve: Resolve = resolve) -> None:
        self._resolve = resolve
        self._lock = threading.Lock()
        self._known: dict[tuple[str, int], tuple[float, tuple[Address, ...]]] = {}
        self._dead_until_s: dict[Address, float] = {}
        self._turn = 0

    def candidates(self, host: str, port: int) -> tuple[Address, ...]:
        """Return the addresses to try for one new connection, best first."""
        now_s = time.monotonic()
        with self._lock:
            until_s, addresses = self._known.get((host, port), (0.0, ()))
        if until_s < now_s:
            addresses = self._refresh(host, port, addresses)
        with self._lock:
            self._turn += 1
            return in_turn(addresses, self._turn, self._dead_until_s, now_s)

    def _refresh(self, host: str, port: int, stale: tuple[Address, ...]) -> tuple[Address, ...]:
        try:
            addresses = self._resolve(host, port)
        except OSError:
            if not stale:
                raise
            addresses = stale  # a resolver that hiccups must not break a load that runs
        with self._lock:
            self._known[host, port] = (time.monotonic() + RESOLVE_TTL_S, addresses)
        return addresses

    def report(self, address: Address, alive: bool) -> None:
        """Remember whether a connection to the address could be made."""
        with self._lock:
            if alive:
                self._dead_until_s.pop(address, None)
            else:
                self._dead_until_s[address] = time.monotonic() + DEAD_S
