"""A Ray cluster whose nodes are network namespaces with shaped links, and an S3 server beside it.

    origin (nginx) ── switch ── head (no CPUs; controller and proxy) , worker 1, worker 2, ...

What drives the cluster runs as a process in the head's namespace: `Cluster.drive`.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightstream.bench.certificates import Certificates, make_certificates
from weightstream.bench.cluster.net import ORIGIN, Network, Plan, network
from weightstream.bench.errors import BenchError
from weightstream.bench.servers import Server, nginx

HEAD = 1
PORT = 6379
_START_S = 60.0
_ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Replicas that wait with these imported; without idle workers it changes nothing.
    "RAY_preload_python_modules": "torch,ray.serve._private.replica,aiohttp,fastapi",
}


@dataclass(frozen=True, slots=True)
class Shape:
    """What the cluster is to be; rates in Mbit/s."""

    workers: int
    cpus: float = 2
    mbit: int = 1000
    origin_mbit: int = 1000


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster that runs."""

    net: Network
    folder: Path
    env: dict[str, str]

    @property
    def address(self) -> str:
        """Return the address for `ray.init`."""
        return f"{self.net.address(HEAD)}:{PORT}"

    def origin_bytes(self) -> int:
        """Return what left the origin so far, headers included."""
        return self.net.sent_bytes(ORIGIN)

    def drive(self, module: str, *arguments: str, timeout_s: float = 600.0) -> Any:
        """Run a module in the head's namespace; return the JSON of its last line."""
        command = [*self.net.prefix(HEAD), sys.executable, "-m", module, *arguments]
        ended = subprocess.run(
            command, env=self.env | {"RAY_ADDRESS": self.address}, capture_output=True, text=True,
            timeout=timeout_s,
        )  # fmt: skip
        if ended.returncode != 0:
            raise BenchError(f"{module} {' '.join(arguments)}:\n{ended.stderr[-4000:]}")
        return json.loads(ended.stdout.splitlines()[-1])


@contextmanager
def cluster(shape: Shape, root: Path, bucket: str, folder: Path) -> Iterator[Cluster]:
    """Start it, and take it away again; the origin serves `root/bucket`."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        net = stack.enter_context(network(Plan(shape.workers + 1, mbit=shape.mbit)))
        net.set_rate(ORIGIN, shape.origin_mbit)
        certificates = make_certificates(folder / "tls", ("127.0.0.1", net.address(ORIGIN)))
        server = stack.enter_context(_origin(net, root, bucket, folder, certificates))
        env = os.environ | _ENVIRONMENT | _client(server)
        for end in range(HEAD, HEAD + shape.workers + 1):
            stack.enter_context(_node(net, end, 0 if end == HEAD else shape.cpus, folder, env))
        running = Cluster(net, folder, env)
        running.drive("weightstream.bench.serve.ready", str(shape.workers + 1))
        yield running


@contextmanager
def _origin(
    net: Network, root: Path, bucket: str, folder: Path, certificates: Certificates
) -> Iterator[Server]:
    with nginx(
        root, bucket, folder / "nginx", certificates, net.address(ORIGIN), net.prefix(ORIGIN)
    ) as server:
        yield server


def _client(server: Server) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": server.endpoint(tls=False),
        "AWS_ACCESS_KEY_ID": "bench",
        "AWS_SECRET_ACCESS_KEY": "bench-secret",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@contextmanager
def _node(
    net: Network, end: int, cpus: float, folder: Path, env: Mapping[str, str]
) -> Iterator[None]:
    """Run a raylet, the head's services beside it, until the block ends.

    In a process namespace of its own, so that everything on the node ends with it, agents too.
    """
    home = folder / f"node-{end}"
    home.mkdir()
    own = {
        "WEIGHTSTREAM_STORE": str(home / "store"),
        "WEIGHTSTREAM_RUN_DIRECTORY": str(home / "run"),
    }
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            [*net.prefix(end), *_ray_start(net, end, cpus, folder)],
            env={**env, **own}, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            _wait_for(process, home / "log")
            yield
        finally:
            process.kill()
            process.wait(10)


def _ray_start(net: Network, end: int, cpus: float, folder: Path) -> Sequence[str]:
    role = (
        ("--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={folder / 'ray'}")
        if end == HEAD
        else (f"--address={net.address(HEAD)}:{PORT}",)
    )
    return (
        "unshare", "--pid", "--fork", "--kill-child", "--mount-proc",
        sys.executable, "-m", "ray.scripts.scripts", "start", *role, "--block",
        f"--node-ip-address={net.address(end)}", f"--num-cpus={cpus:g}",
        f"--object-store-memory={100 << 20}", "--disable-usage-stats",
    )  # fmt: skip


def _wait_for(process: subprocess.Popen[bytes], log: Path) -> None:
    """Return when the node has joined: two that import Ray at once on two cores may time out."""
    deadline = time.monotonic() + _START_S
    while b"Ray runtime started" not in log.read_bytes():
        if process.poll() is not None or time.monotonic() > deadline:
            raise BenchError(f"ray start failed: {log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.1)
