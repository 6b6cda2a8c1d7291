"""A real link of a given rate and delay between an S3 server and its clients; root only.

Two network namespaces and a veth pair, made by `weightstream.bench.links`. Unlike the proxy's
faults, an outage here is silence: packets vanish, no connection is reset.
"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.kit.s3 import S3Server

from weightstream.bench.links import Link, connect, why_not

_PORT = 9000


@dataclass(frozen=True, slots=True)
class Wire:
    """A server at one end; run clients at the other with `client_prefix`."""

    server: S3Server
    link: Link
    client_prefix: tuple[str, ...]

    def cut(self) -> None:
        """Let every packet vanish from now on."""
        self._set("down")

    def mend(self) -> None:
        """Let packets pass again."""
        self._set("up")

    def delay(self, seconds: float) -> None:
        """Add a delay to everything that clients send, and so to each round trip.

        Skips the test where the kernel has no netem.
        """
        what = ("tc", "qdisc", "replace", "dev", "eth0", "root", "netem", "delay")
        try:
            _run(*self.client_prefix, *what, f"{seconds * 1000:.0f}ms", "limit", "100000")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no netem in this kernel: {error.stderr.decode().strip()}")

    def _set(self, state: str) -> None:
        _run(*self.client_prefix, "ip", "link", "set", "eth0", state)


@contextmanager
def wire(root: Path, gbit: float) -> Iterator[Wire]:
    """Start a server behind a shaped link; skip the test where that is not permitted."""
    link = Link(f"{gbit}gbit", gbit)
    if reason := why_not(link):
        pytest.skip(reason)
    if subprocess.run(["unshare", "--net", "true"], capture_output=True, timeout=10).returncode:
        pytest.skip("network namespaces are not permitted here")
    with (
        connect(link) as net,
        S3Server(root, net.address, _PORT, net.server_prefix) as server,
    ):
        yield Wire(server, link, net.client_prefix)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=30)
