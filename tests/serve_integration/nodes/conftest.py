"""A cluster of three nodes with agents, before a real S3 server whose bytes are counted."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tests.kit.proxy import FaultProxy
from tests.kit.ray_cluster import NodeSpec, RayCluster, RunningNode
from tests.kit.s3 import S3Server, client_env

from weightstream.serve_integration.nodes.daemon import Daemon

SETTINGS = {"chunk_size": "1MiB", "store_min_free_bytes": "0"}
"""Of every agent of these tests."""


class LastingProxy(FaultProxy):
    """A proxy for a whole module of tests: its threads outlive the tests that begin them."""

    def _spawn(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True, name="pytest-proxy")
        self._threads.append(thread)
        thread.start()


@pytest.fixture(scope="module")
def origin(s3: S3Server) -> Iterator[FaultProxy]:
    """What all nodes of the cluster read through."""
    with LastingProxy(s3.address) as running:
        yield running


@pytest.fixture(scope="module")
def cluster(origin: FaultProxy) -> Iterator[RayCluster]:
    """A head and two workers; whatever a test leaves running on them is ended."""
    with RayCluster([NodeSpec(cpus=2), NodeSpec(cpus=2)], env=client_env(origin.url)) as running:
        try:
            yield running
        finally:
            end_all(running.directory)


def daemon(node: RunningNode, name: str = "agent") -> Daemon:
    """Return a daemon of a node, seen from here: all nodes are on this machine."""
    return Daemon(node.home / "run" / "serve", name)


def daemons(directory: Path) -> list[Daemon]:
    return [Daemon(one.parent, one.stem) for one in directory.glob("*/run/serve/*.pid")]


def end_all(directory: Path) -> None:
    """End what is left, so that no test leaves a process behind."""
    for one in daemons(directory):
        one.stop()


def kill(node: RunningNode, name: str = "agent") -> int:
    """Kill -9 a daemon of a node; return its process id, when it is gone."""
    marker = daemon(node, name).running()
    assert marker is not None
    os.kill(marker.pid, signal.SIGKILL)
    eventually(lambda: daemon(node, name).running() is None)
    return marker.pid


def eventually(happened: Callable[[], object], timeout_s: float = 60.0) -> None:
    until_s = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < until_s, "did not happen"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Say whether a process runs; one that init has not buried yet does not."""
    with suppress(FileNotFoundError, ProcessLookupError):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state not in "ZX"
    return False
