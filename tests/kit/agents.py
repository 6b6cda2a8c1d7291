"""Nodes as their users run them: `weightstream agent` in a process, a store and a list of peers."""

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.kit.processes import Child
from tests.kit.s3 import SECRET_KEY, free_port

from weightstream.cachefs.agent.asking import NoAgent, status
from weightstream.cachefs.store import Store
from weightstream.settings import load_settings

_PATIENCE_S = 60.0


class AgentProcess:
    """`weightstream agent`; a context manager."""

    def __init__(self, env: Mapping[str, str], *arguments: str) -> None:
        command = [sys.executable, "-m", "weightstream.cli", "agent", *arguments]
        self.child = Child(command, env)
        self.pid = self.child.pid

    def wait_ready(self) -> "AgentProcess":
        self.child.wait_for(lambda: "is ready in" in self.said())
        return self

    def said(self) -> str:
        return self.child.stderr()

    def kill(self) -> None:
        """Kill -9."""
        self.child.kill()

    def terminate(self) -> int:
        """SIGTERM; return the exit code."""
        os.kill(self.pid, signal.SIGTERM)
        outcome = self.child.result(10)
        assert "Traceback" not in outcome.stderr, outcome.stderr
        assert SECRET_KEY not in outcome.stderr + outcome.stdout
        return outcome.returncode

    def __enter__(self) -> "AgentProcess":
        return self

    def __exit__(self, *error: object) -> None:
        self.child.__exit__(None, None, None)


@dataclass
class Node:
    """One node: what commands on it run with, and its agent."""

    env: dict[str, str]
    agents: list[AgentProcess] = field(default_factory=list)
    """Every agent it ever had; the last one is its agent now."""

    @property
    def store(self) -> Path:
        return Path(self.env["WEIGHTSTREAM_STORE"])

    @property
    def run_directory(self) -> Path:
        return Path(self.env["WEIGHTSTREAM_RUN_DIRECTORY"])

    @property
    def address(self) -> str:
        """Where its agent listens for peers."""
        return self.env["WEIGHTSTREAM_PEER_LISTEN"]

    @property
    def agent(self) -> AgentProcess:
        return self.agents[-1]

    def start(self, *arguments: str) -> AgentProcess:
        self.agents.append(AgentProcess(self.env, *arguments))
        return self.agent

    def peers(self) -> dict[str, int]:
        """Return how many members its agent knows, itself among them, and the bytes by way."""
        said = status(self.run_directory)["peers"]
        return {"members": len(said["members"]), **said["bytes"]}

    def prefetch(self, uri: str) -> Child:
        command = [sys.executable, "-m", "weightstream.cli", "prefetch", uri, "--json"]
        return Child(command, self.env)

    def data(self, uri: str) -> bytes:
        """Return a file of its store, which has to be complete."""
        with Store.open(load_settings({"store": self.store})) as store:
            (info,) = [info for info in store.blobs() if info.blob.uri == uri]
            with store.open_blob(info.blob) as stored:
                assert stored.complete
                return bytes(stored.map()[:])

    def end(self) -> None:
        """Kill whatever agent is left."""
        for agent in self.agents:
            agent.__exit__()


def make_nodes(
    count: int, folder: Path, env: Mapping[str, str], host: str = "127.0.0.1"
) -> list[Node]:
    """Return nodes without agents that share a secret and will know each other by a list.

    `host` may have `{}` for the node's number from 2.
    """
    secret = folder / "secret"
    secret.write_text("a secret of the whole cluster")
    secret.chmod(0o600)
    addresses = [f"{host.format(i + 2)}:{free_port()}" for i in range(count)]
    common = {
        "WEIGHTSTREAM_STORE_MIN_FREE_BYTES": "0",
        "WEIGHTSTREAM_CHUNK_SIZE": "1MiB",
        "WEIGHTSTREAM_PEERS": ",".join(addresses),
        "WEIGHTSTREAM_CLUSTER_SECRET_FILE": str(secret),
    }
    return [
        Node({
            **env,
            **common,
            "WEIGHTSTREAM_STORE": str(folder / f"store{i}"),
            "WEIGHTSTREAM_RUN_DIRECTORY": str(folder / f"run{i}"),
            "WEIGHTSTREAM_PEER_LISTEN": address,
        })
        for i, address in enumerate(addresses)
    ]  # fmt: skip


def wait_acquainted(nodes: Sequence[Node]) -> None:
    """Return when every node's agent knows all others."""
    for node in nodes:
        node.agent.child.wait_for(lambda node=node: _members(node) >= len(nodes), _PATIENCE_S)  # type: ignore[misc]


def _members(node: Node) -> int:
    try:
        return node.peers()["members"]
    except NoAgent:
        return 0
