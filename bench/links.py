"""Shaped links: two network namespaces, a veth pair between them, HTB on the server's end.

The namespaces are made here and carry only the benchmark's own traffic; nothing of the host's
network changes. They go away when the block ends, however it ends; what a killed run left behind
goes away when the next one begins.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from weightstream.bench.errors import BenchError

_SERVER_ADDRESS = "10.213.0.1"
_CLIENT_ADDRESS = "10.213.0.2"
# Of a full frame as HTB counts it (1514 bytes: Ethernet header and 1500 of IP), 1448 are payload:
# 20 bytes of IP, 20 of TCP and 12 of timestamps go off.
_PAYLOAD_PART = 1448 / 1514


@dataclass(frozen=True, slots=True)
class Link:
    """A link between server and client; `gbit` is None for the unshaped loopback."""

    name: str
    gbit: float | None = None

    @property
    def payload_bytes_s(self) -> float:
        """Return the most that TCP can carry over it."""
        return (self.gbit or 0.0) * 1e9 / 8 * _PAYLOAD_PART


@dataclass(frozen=True, slots=True)
class Net:
    """Where a link's two ends are, and what to put before a command to run it there."""

    address: str
    server_prefix: tuple[str, ...] = ()
    client_prefix: tuple[str, ...] = ()

    @property
    def client_network(self) -> tuple[str, ...]:
        """Return what changes the network only: `ip netns exec` hides mounts from each other."""
        return (
            ("nsenter", f"--net=/run/netns/{self.client_prefix[-1]}") if self.client_prefix else ()
        )


LOOPBACK = Link("loopback")


def parse_link(text: str) -> Link:
    """Read `loopback`, `2` or `2gbit`."""
    if text == "loopback":
        return LOOPBACK
    match = re.fullmatch(r"([0-9.]+)(?:gbit)?", text)
    if match is None or float(match[1]) <= 0:
        raise BenchError(f"link {text!r}: use loopback or a rate in Gbit/s")
    return Link(f"{match[1]}gbit", float(match[1]))


def why_not(link: Link) -> str:
    """Return why the link cannot be made here, or nothing."""
    if link.gbit is None:
        return ""
    if os.geteuid() != 0:
        return "shaped links need root (network namespaces)"
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    return f"{' and '.join(missing)} missing: apt-get install iproute2" if missing else ""


@contextmanager
def connect(link: Link) -> Iterator[Net]:
    """Make the link, and take it away again."""
    if link.gbit is None:
        yield Net("127.0.0.1")
        return
    if reason := why_not(link):
        raise BenchError(reason)
    _remove_stale()
    server, client = f"wsbench{os.getpid()}s", f"wsbench{os.getpid()}c"
    try:
        _make_pair(server, client)
        _shape(server, "eth0", link.gbit)
        inside = ("ip", "netns", "exec")
        yield Net(_SERVER_ADDRESS, (*inside, server), (*inside, client))
    finally:
        for name in (server, client):
            _run("ip", "netns", "delete", name, check=False)


def _make_pair(server: str, client: str) -> None:
    for name in (server, client):
        _run("ip", "netns", "add", name)
    _run(
        "ip", "-n", server, "link", "add", "eth0", "type", "veth",
        "peer", "name", "eth0", "netns", client,
    )  # fmt: skip
    for name, address in ((server, _SERVER_ADDRESS), (client, _CLIENT_ADDRESS)):
        _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _run("ip", "-n", name, "link", "set", device, "up")


def _shape(namespace: str, device: str, gbit: float) -> None:
    """Limit what leaves `device`; the burst is one millisecond of the rate, 64 KiB at least."""
    rate = f"{gbit * 1000:.0f}mbit"
    burst = str(max(64 << 10, int(gbit * 1e9 / 8 / 1000)))
    tc = ("tc", "-n", namespace)
    _run(*tc, "qdisc", "add", "dev", device, "root", "handle", "1:", "htb", "default", "1")
    _run(
        *tc, "class", "add", "dev", device, "parent", "1:", "classid", "1:1", "htb",
        "rate", rate, "ceil", rate, "burst", burst, "cburst", burst, "quantum", "200000",
    )  # fmt: skip


def _remove_stale() -> None:
    """Delete the namespaces of benchmark processes that are no more."""
    for line in _run("ip", "netns", "list").splitlines():
        match = re.match(r"(wsbench(\d+)[sc])\b", line)
        if match and not Path(f"/proc/{match[2]}").exists():
            _run("ip", "netns", "delete", match[1], check=False)


def _run(*command: str, check: bool = True) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    if check and result.returncode != 0:
        raise BenchError(f"{' '.join(command)}: {result.stderr.strip()}")
    return result.stdout
