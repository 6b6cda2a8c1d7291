"""Addresses as people write them, and as sockets take them."""

import ipaddress
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass

from weightstream.errors import UsageError

_NAME = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_-]+)*\.?")


@dataclass(frozen=True, slots=True, order=True)
class Address:
    """A host, by number or name, and a port."""

    host: str
    port: int

    @property
    def is_numeric(self) -> bool:
        """Say whether no name has to be resolved."""
        return is_number(self.host)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def is_number(host: str) -> bool:
    """Say whether a host is an IP address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_host(host: object) -> bool:
    """Say whether this may be a host, in a setting or in a message."""
    return isinstance(host, str) and (is_number(host) or _NAME.fullmatch(host) is not None)


def is_port(port: object) -> bool:
    """Say whether somebody can listen there."""
    return isinstance(port, int) and not isinstance(port, bool) and 0 < port < 1 << 16


def parse_address(text: str, where: str) -> Address:
    """Return `host:port` or `[IPv6]:port`; raises `UsageError`, which says `where` it stood."""
    host, separator, port = text.strip().rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if bare == host and ":" in host:
        raise UsageError(f"bad {where} {text.strip()[:80]!r}: write [IPv6 address]:port")
    if not (separator and port.isascii() and port.isdigit() and len(port) < 6):
        raise UsageError(f"bad {where} {text.strip()[:80]!r}: it is host:port")
    if not is_host(bare) or not is_port(int(port)):
        raise UsageError(f"bad {where} {text.strip()[:80]!r}: no such host or port can be")
    return Address(bare, int(port))


def resolve(address: Address) -> tuple[Address, ...]:
    """Return every number that a name stands for, the preferred one first. Blocks.

    Raises `OSError`, which says why there is none.
    """
    if address.is_numeric:
        return (address,)
    found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    return unique(Address(str(entry[4][0]), address.port) for entry in found)


def unique(addresses: Iterable[Address]) -> tuple[Address, ...]:
    """Return the addresses in order, each once."""
    return tuple(dict.fromkeys(addresses))
