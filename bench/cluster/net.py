"""A switch with N nodes and an origin: network namespaces, every link shaped both ways by HTB.

    origin ── gate ─┐
    node 0 ─────────┼─ switch        each link: `rate` up and down
    node 1 ─────────┘

Gate and switch are routers, so that the origin's queue and those to the nodes do not lie in the
sender's own stack. Linux lets a socket keep two packets in a queue of its own machine (TCP small
queues), finds that queue through namespaces and bridges too, and makes packets small when the
shortest round trip was long: streams that began while the origin's link was full got a tenth of
what the others had, as from no origin that is another machine. What a router receives is no
socket's any more. What a node sends does queue in its own stack, as on a real one.

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
_MOST_NODES = 250
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

    def uplink(self, end: int) -> tuple[str, str]:
        """Return the namespace and device where what an end sends is shaped."""
        return (self.gate, "net") if end == ORIGIN else (f"{self.tag}{end}", "eth0")

    @property
    def gate(self) -> str:
        """Return the namespace of the router before the origin."""
        return f"{self.tag}gate"

    def sent_bytes(self, end: int) -> int:
        """Return what left an end so far, headers included."""
        namespace, device = self.uplink(end)
        path = f"/sys/class/net/{device}/statistics/tx_bytes"
        return int(_run("ip", "netns", "exec", namespace, "cat", path))

    def set_rate(self, end: int, mbit: float) -> None:
        """Change a node's link, both ways."""
        for where, device in (self.uplink(end), (f"{self.tag}sw", f"p{end}")):
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
    if plan.nodes > _MOST_NODES:
        raise BenchError(f"{plan.nodes} nodes: at most {_MOST_NODES} have an address")
    _remove_stale()
    net = Network(plan, f"{_PREFIX}{os.getpid()}x")
    switch = f"{net.tag}sw"
    ends = range(plan.nodes + 1)
    try:
        _add_router(switch, _SWITCH)
        _add_router(net.gate, _GATE)
        for end in ends:
            _plug_in(net, end)
        if plan.client_cap_mbit is not None:
            _cap_clients(net, plan.client_cap_mbit)
        yield net
    finally:
        for name in (*(f"{net.tag}{end}" for end in ends), net.gate, switch):
            subprocess.run(("ip", "netns", "delete", name), capture_output=True, timeout=30)


def _plug_in(net: Network, end: int) -> None:
    here, switch, port = f"{net.tag}{end}", f"{net.tag}sw", f"p{end}"
    address = net.address(end)
    _run("ip", "netns", "add", here)
    _run("ip", "-n", here, "link", "set", "lo", "up")
    if end == ORIGIN:
        _connect(here, "eth0", net.gate, "host")
        _connect(net.gate, "net", switch, port)
        _route(net.gate, f"{address}/32", "host")
        _route(net.gate, f"{_NET}.0/24", "net", "via", _SWITCH)
        _route(switch, f"{address}/32", port, "via", _GATE)
    else:
        _connect(here, "eth0", switch, port)
        _route(switch, f"{address}/32", port)
    _run("ip", "-n", here, "address", "add", f"{address}/32", "dev", "eth0")
    first = _GATE if end == ORIGIN else _SWITCH
    _route(
        here, f"{_NET}.0/24", "eth0",
        "via", first, "src", address, "congctl", net.plan.congestion,
    )  # fmt: skip
    _shape(*net.uplink(end), net.plan.mbit)
    _shape(switch, port, net.plan.mbit)


def _route(namespace: str, to: str, device: str, *options: str) -> None:
    onlink = ("onlink",) if "via" in options else ()
    _run("ip", "-n", namespace, "route", "add", to, *options, "dev", device, *onlink)


def _add_router(namespace: str, address: str) -> None:
    """Make a namespace that forwards, known to its neighbours by `address`."""
    _run("ip", "netns", "add", namespace)
    for name, value in (
        ("ip_forward", 1),
        ("conf/all/rp_filter", 0),
        ("conf/default/rp_filter", 0),
    ):
        path = f"/proc/sys/net/ipv4/{name}"
        _run("ip", "netns", "exec", namespace, "sh", "-c", f"echo {value} > {path}")
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
    tc = ("tc", "-n", net.gate)
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
