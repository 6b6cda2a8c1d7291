"""A switch with N nodes and an origin: network namespaces, every link shaped both ways by HTB.

    origin ── gate ─┐
    node 0 ── gate ─┼─ switch        each link between gate and switch: `rate` up and down
    node 1 ── gate ─┘

Gates and switch are routers, so that no link's queue lies in the sender's own stack. Linux lets a
socket keep two packets in a queue of its own machine (TCP small queues), finds that queue through
namespaces and bridges too, and makes packets small when the shortest round trip was long: streams
that began while the link was full got a tenth of what the others had, as on no real network. What
a router receives is no socket's any more.

The origin may cap what it sends to each client, as object stores do.
"""

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from weightstream.bench.errors import BenchError

_PAYLOAD_PART = 1448 / 1514
_PREFIX = "wscl"
_NET = "10.214.0"
_GATE, _SWITCH = f"{_NET}.254", f"{_NET}.253"
ORIGIN = 0
"""The origin's number; nodes count from 1."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What the network is to be; rates in Mbit/s."""

    nodes: int
    mbit: int = 200
    client_cap_mbit: int | None = None
    """Most that the origin sends to one client."""
    congestion: str = "cubic"
    """TCP's congestion control at every end: Linux's default, whatever this machine's own is. Set
    by the route: a namespace may not choose what its host does not allow."""

    @property
    def payload_bytes_s(self) -> float:
        """Return the most that TCP carries over one link."""
        return self.mbit * 1e6 / 8 * _PAYLOAD_PART


@dataclass(frozen=True, slots=True)
class Network:
    """A network that is up; ends are counted as in `Plan`."""

    plan: Plan
    tag: str

    @staticmethod
    def address(end: int) -> str:
        """Return the IPv4 address of an end."""
        return f"{_NET}.{end + 1}"

    def prefix(self, end: int) -> tuple[str, ...]:
        """Return what to put before a command to run it at an end."""
        return ("ip", "netns", "exec", f"{self.tag}{end}")

    def sent_bytes(self, end: int) -> int:
        """Return what left an end so far, headers included."""
        return int(_run(*self.prefix(end), "cat", "/sys/class/net/eth0/statistics/tx_bytes"))

    def set_rate(self, end: int, mbit: float) -> None:
        """Change a node's link, both ways."""
        for where, device in ((f"{self.tag}{end}g", "net"), (f"{self.tag}sw", f"p{end}")):
            _run(
                "tc", "-n", where, "class", "change", "dev", device, "parent", "1:", "classid",
                "1:1", "htb", "rate", f"{mbit}mbit", "ceil", f"{mbit}mbit", "burst", "128k",
                "cburst", "128k",
            )  # fmt: skip


@contextmanager
def network(plan: Plan) -> Iterator[Network]:
    """Make the network, and take it away again."""
    if os.geteuid() != 0:
        raise BenchError("shaped networks need root (network namespaces)")
    _remove_stale()
    net = Network(plan, f"{_PREFIX}{os.getpid()}x")
    switch = f"{net.tag}sw"
    ends = range(plan.nodes + 1)
    try:
        _add_router(switch, _SWITCH)
        for end in ends:
            _plug_in(net, end)
        if plan.client_cap_mbit is not None:
            _cap_clients(net, plan.client_cap_mbit)
        yield net
    finally:
        for name in (*(f"{net.tag}{end}{kind}" for end in ends for kind in ("", "g")), switch):
            subprocess.run(("ip", "netns", "delete", name), capture_output=True, timeout=30)


def _plug_in(net: Network, end: int) -> None:
    here, gate, switch, port = f"{net.tag}{end}", f"{net.tag}{end}g", f"{net.tag}sw", f"p{end}"
    address = net.address(end)
    _run("ip", "netns", "add", here)
    _add_router(gate, _GATE)
    _connect(here, "eth0", gate, "host")
    _connect(gate, "net", switch, port)
    _run("ip", "-n", here, "address", "add", f"{address}/32", "dev", "eth0")
    _run("ip", "-n", here, "link", "set", "lo", "up")
    to_gate = ("via", _GATE, "dev", "eth0", "onlink", "src", address)
    _run("ip", "-n", here, "route", "add", f"{_NET}.0/24", *to_gate, "congctl", net.plan.congestion)
    _run("ip", "-n", gate, "route", "add", f"{_NET}.0/24", "via", _SWITCH, "dev", "net", "onlink")
    _run("ip", "-n", gate, "route", "add", f"{address}/32", "dev", "host")
    _run("ip", "-n", switch, "route", "add", f"{address}/32", "via", _GATE, "dev", port, "onlink")
    _shape(gate, "net", net.plan.mbit)
    _shape(switch, port, net.plan.mbit)


def _add_router(namespace: str, address: str) -> None:
    """Make a namespace that forwards, known to its neighbours by `address`."""
    _run("ip", "netns", "add", namespace)
    _run("ip", "netns", "exec", namespace, "sysctl", "-qw", "net.ipv4.ip_forward=1")
    _run("ip", "-n", namespace, "link", "set", "lo", "up")
    _run("ip", "-n", namespace, "address", "add", f"{address}/32", "dev", "lo")


def _connect(a: str, device_a: str, b: str, device_b: str) -> None:
    _run(
        "ip", "-n", a, "link", "add", device_a, "type", "veth", "peer", "name", device_b,
        "netns", b,
    )  # fmt: skip
    for namespace, device in ((a, device_a), (b, device_b)):
        _run("ip", "-n", namespace, "link", "set", "dev", device, "up")


def _shape(namespace: str, device: str, mbit: float) -> None:
    tc = ("tc", "-n", namespace)
    _run(*tc, "qdisc", "add", "dev", device, "root", "handle", "1:", "htb", "default", "1")
    _run(
        *tc, "class", "add", "dev", device, "parent", "1:", "classid", "1:1", "htb",
        "rate", f"{mbit}mbit", "ceil", f"{mbit}mbit", "burst", "128k", "cburst", "128k",
    )  # fmt: skip
    _run(
        *tc, "qdisc", "add", "dev", device, "parent", "1:1", "handle", "10:", "bfifo", "limit",
        "1000000",
    )  # fmt: skip


def _cap_clients(net: Network, mbit: int) -> None:
    """Give each client a class of its own under the origin's link."""
    tc = ("tc", "-n", f"{net.tag}{ORIGIN}g")
    for end in range(1, net.plan.nodes + 1):
        number = f"1:{end + 1:x}"
        _run(
            *tc, "class", "add", "dev", "net", "parent", "1:", "classid", number, "htb",
            "rate", f"{mbit}mbit", "ceil", f"{mbit}mbit", "burst", "64k", "cburst", "64k",
        )  # fmt: skip
        _run(
            *tc, "filter", "add", "dev", "net", "parent", "1:", "protocol", "ip", "u32", "match",
            "ip", "dst", f"{net.address(end)}/32", "flowid", number,
        )  # fmt: skip


def _remove_stale() -> None:
    for line in _run("ip", "netns", "list").splitlines():
        match = re.match(rf"({_PREFIX}(\d+)x\w+)\b", line)
        if match and not Path(f"/proc/{match[2]}").exists():
            subprocess.run(("ip", "netns", "delete", match[1]), capture_output=True, timeout=30)


def _run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    if result.returncode != 0:
        raise BenchError(f"{' '.join(command)}: {result.stderr.strip()}")
    return result.stdout
