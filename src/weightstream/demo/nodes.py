"""Two nodes on one machine: each an agent with a store of its own on an address of loopback.

They know each other by a list and a secret, and speak mutual TLS, as nodes of a cluster do.
"""

import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from weightstream.cachefs.agent.asking import NoAgent, prefetch_there, status
from weightstream.cachefs.fetch import Progress
from weightstream.cachefs.store import Store
from weightstream.demo.processes import ChildFailed, start, stop
from weightstream.demo.server import S3Server, free_port
from weightstream.settings import Settings, load_settings

_READY_S = 30.0


@dataclass(frozen=True, slots=True)
class Fetched:
    """What it took to bring a file to a node, and who sent how much of it."""

    size_bytes: int
    elapsed_s: float
    received_bytes: int  # from peers
    origin_bytes: int  # answers to listings and all
    is_right: bool  # the store has what the file has


@dataclass(frozen=True, slots=True)
class Node:
    """One node: where its store is, and where its agent is met."""

    home: Path
    address: str  # host:port, for peers

    def environment(self) -> dict[str, str]:
        """Return what any process on this node runs with."""
        return {
            "WEIGHTSTREAM_STORE": str(self.home / "store"),
            "WEIGHTSTREAM_RUN_DIRECTORY": str(self.home / "run"),
        }

    @property
    def log(self) -> Path:
        """Return where its agent's messages go."""
        return self.home / "agent.log"

    @property
    def last_words(self) -> str:
        """Return the last line of them."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no message"

    @property
    def settings(self) -> Settings:
        """Return the same, for this process."""
        return load_settings({"store": self.home / "store", "run_directory": self.home / "run"})

    def fetch(
        self, uri: str, file: Path, server: S3Server, progress: Callable[[Progress], None]
    ) -> Fetched:
        """Have the node's agent bring `uri` into its store, and compare it with `file`."""
        before_bytes = server.sent_bytes()
        try:
            report = prefetch_there(uri, self.settings, progress)
            received_bytes = int(status(self.home / "run")["peers"]["bytes"]["received"])
        except NoAgent as error:
            raise ChildFailed(f"the agent at {self.address}: {error}") from error
        sent_bytes = server.sent_bytes() - before_bytes
        right = self._holds(uri, file)
        return Fetched(report.bytes_total, report.elapsed_s, received_bytes, sent_bytes, right)

    def _holds(self, uri: str, file: Path) -> bool:
        with Store.open(self.settings) as store:
            for info in store.blobs():
                if info.blob.uri == uri and info.complete:
                    with store.open_blob(info.blob) as stored:
                        return stored.map()[:] == file.read_bytes()
        return False

    def members(self) -> int:
        """Return how many agents this node's agent knows, itself among them; 0 before it runs."""
        try:
            return len(status(self.home / "run")["peers"]["members"])
        except NoAgent:
            return 0


def make_nodes(work: Path, count: int) -> tuple[Node, ...]:
    """Return nodes with empty stores, each on a host address of its own: 127.0.0.1, 127.0.0.2."""
    hosts = (f"127.0.0.{i + 1}" for i in range(count))
    return tuple(Node(work / f"node-{host}", f"{host}:{free_port(host)}") for host in hosts)


@dataclass(frozen=True, slots=True)
class Agents:
    """The agents of some nodes, each in a process."""

    running: Mapping[Node, "subprocess.Popen[bytes]"]

    def wait_acquainted(self) -> None:
        """Return when each knows all others; raises `ChildFailed` when one ends, or takes long."""
        deadline = time.monotonic() + _READY_S
        while strangers := [n for n in self.running if n.members() < len(self.running)]:
            ended = [node for node, process in self.running.items() if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                node = (ended or strangers)[0]
                raise ChildFailed(f"the agent at {node.address} met no peer: {node.last_words}")
            time.sleep(0.05)


@contextmanager
def agents(work: Path, nodes: Sequence[Node], environment: Mapping[str, str]) -> Iterator[Agents]:
    """Run every node's agent until the block ends; they may not know each other yet."""
    secret = work / "secret"
    secret.touch(mode=0o600)
    secret.write_text(secrets.token_hex(32))
    common = {
        "WEIGHTSTREAM_CLUSTER_SECRET_FILE": str(secret),
        "WEIGHTSTREAM_PEER_ENCRYPTION": "on",
        "WEIGHTSTREAM_PEERS": ",".join(node.address for node in nodes),
    }
    command = (sys.executable, "-m", "weightstream.cli", "agent")
    running = {}
    with ExitStack() as stack:
        for node in nodes:
            own = node.environment() | {"WEIGHTSTREAM_PEER_LISTEN": node.address}
            process = start(command, env={**environment, **common, **own}, stderr=node.log)
            stack.callback(stop, process)
            running[node] = process
        yield Agents(running)
