"""A shaped link carries what it says, and leaves nothing behind."""

import os
import shutil
import subprocess
import sys

import pytest

from weightstream.bench.errors import BenchError
from weightstream.bench.links import LOOPBACK, Link, connect, parse_link, why_not

SERVE = """
import socket, sys
listener = socket.create_server((sys.argv[1], 9000))
print("up", flush=True)
connection, _ = listener.accept()
block = bytes(1 << 20)
for _ in range(int(sys.argv[2])):
    connection.sendall(block)
"""
FETCH = """
import socket, sys, time
connection = socket.create_connection((sys.argv[1], 9000), 5)
buffer, total, begun = bytearray(1 << 20), 0, 0.0
while count := connection.recv_into(buffer):
    begun = begun or time.monotonic()
    total += count
print(total / (time.monotonic() - begun))
"""

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("tc") is None,
    reason="needs root and iproute2",
)


def namespaces() -> str:
    return subprocess.run(
        ["ip", "netns", "list"], capture_output=True, text=True, check=True
    ).stdout


def test_names_of_links() -> None:
    assert parse_link("loopback") == LOOPBACK
    assert parse_link("2") == parse_link("2gbit") == Link("2gbit", 2.0)
    with pytest.raises(BenchError, match="rate in Gbit/s"):
        parse_link("fast")


def test_payload_rate_leaves_headers_out() -> None:
    assert Link("1gbit", 1.0).payload_bytes_s == pytest.approx(119.6e6, rel=0.001)


def test_loopback_needs_nothing() -> None:
    assert why_not(LOOPBACK) == ""
    with connect(LOOPBACK) as net:
        assert (net.address, net.server_prefix, net.client_prefix) == ("127.0.0.1", (), ())


@needs_root
def test_rate_is_the_link_s() -> None:
    link = Link("0.4gbit", 0.4)
    with connect(link) as net:
        serve = [*net.server_prefix, sys.executable, "-c", SERVE, net.address, "40"]
        server = subprocess.Popen(serve, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "up\n"
            fetch = [*net.client_prefix, sys.executable, "-c", FETCH, net.address]
            rate = float(subprocess.run(fetch, capture_output=True, check=True, timeout=30).stdout)
        finally:
            server.kill()
            server.communicate()
    assert rate == pytest.approx(link.payload_bytes_s, rel=0.05)


@needs_root
def test_namespaces_go_away_when_the_block_fails() -> None:
    mine = f"wsbench{os.getpid()}"

    def fail_inside() -> None:
        with connect(Link("1gbit", 1.0)):
            assert mine in namespaces()
            raise RuntimeError("in the block")

    with pytest.raises(RuntimeError, match="in the block"):
        fail_inside()
    assert mine not in namespaces()


@needs_root
def test_what_a_killed_run_left_goes_away() -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    stale = f"wsbench{dead.pid}s"
    subprocess.run(["ip", "netns", "add", stale], check=True)
    with connect(Link("1gbit", 1.0)):
        pass
    assert stale not in namespaces()
