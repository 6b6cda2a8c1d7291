"""`weightstream serve compact` in a process of its own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

from tests.kit.ray_cluster import RayCluster, wait_until

_LIMIT_S = 200


def compact(cluster: RayCluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    return subprocess.run(
        _line(cluster, arguments),
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=_LIMIT_S,
        check=False,
    )


def dry_run(cluster: RayCluster) -> Any:
    """Return what a dry run says, as JSON."""
    done = compact(cluster, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@contextlib.contextmanager
def watching(cluster: RayCluster) -> Iterator[list[str]]:
    """Run it with --watch for the block; yields what it says, as it says it."""
    said: list[str] = []
    line = _line(cluster, ("--watch",))
    with subprocess.Popen(
        line, env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as running:
        reader = threading.Thread(
            target=lambda: said.extend(running.stderr or ()), name="pytest-watching"
        )
        reader.start()
        try:
            yield said
            assert running.poll() is None, said
            running.send_signal(signal.SIGTERM)
            wait_until(lambda: running.poll() is not None, "it ends")
        finally:
            running.kill()
            reader.join(30)
    assert running.returncode == 0, said


def _line(cluster: RayCluster, arguments: tuple[str, ...]) -> list[str]:
    address = ["--address", cluster.address]
    return [sys.executable, "-m", "weightstream.cli", "serve", "compact", *address, *arguments]


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONWARNINGS": "ignore"}
