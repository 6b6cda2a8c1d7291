"""What is done on a node itself: find its agent or start one, start the tracker, end both.

Runs in a task of zero CPUs, and so in the environment of the node's raylet: the store, the run
directory and the credentials are the node's own.
"""

import re
import secrets
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from weightstream.cachefs.agent import asking
from weightstream.cachefs.agent.asking import NoAgent
from weightstream.cachefs.agent.finding import CONTROL_SOCKET
from weightstream.cachefs.fuse.mounts import RunDirectory
from weightstream.errors import ClusterError
from weightstream.serve_integration.nodes.daemon import Daemon, Marker, alone, write_private
from weightstream.serve_integration.nodes.orders import Orders
from weightstream.serve_integration.registry import Agent
from weightstream.settings import Settings, load_settings

START_S = 90.0
"""An agent that does not answer so long after its start is given up; it takes 1 to 2 s."""

_PEERS_S = 10.0  # then it is up, whether or not it has heard its peers
_STOP_S = 30.0
_ANSWERS_S = 5.0  # how long one that runs may take to answer before it counts as hung
_POLL_S = 0.05
_PORT_SAID = re.compile(r"the tracker listens at \S+:(\d+)")
_FOLDER = "serve"

Way = Literal["started", "kept", "restarted", "found", "stopped", "none", "failed"]
"""What was done: `kept` ran since an earlier `up`; `found` is somebody else's, and stays theirs."""


@dataclass(frozen=True, slots=True)
class NodeReport:
    """What `up` or `down` did on one node."""

    node_id: str
    host: str
    way: Way
    agent: Agent | None = None
    error: str = ""
    """Why it failed; or what a running agent still waits for."""


def bring_up(orders: Orders, node_id: str, host: str) -> NodeReport:
    """Find the node's agent, or start one and wait until it is ready.

    Raises `ClusterError` with the end of its log when it does not come up; then none is left.
    """
    settings = load_settings(dict(orders.settings))
    RunDirectory(settings.run_directory).prepare()
    folder = _folder()
    daemon = Daemon(folder, "agent")
    with alone(folder, START_S):
        ours = daemon.running()
        if ours is None and _answers(settings.run_directory, 0.0):
            return NodeReport(node_id, host, "found", _describe(settings, node_id, host, None))
        if ours is not None and _is_good(ours, orders, settings):
            return NodeReport(node_id, host, "kept", _describe(settings, node_id, host, ours))
        daemon.stop()
        marker = daemon.start(_agent_line(orders, settings, folder, host), orders.key)
        waits_for = _await_ready(daemon, marker, settings.run_directory)
        agent = _describe(settings, node_id, host, marker)
    way: Way = "started" if ours is None else "restarted"
    return NodeReport(node_id, host, way, agent, f"waits for {waits_for}" if waits_for else "")


def take_down(node_id: str, host: str) -> NodeReport:
    """End what `up` started on this node; leave an agent alone that it only found."""
    folder = _folder()
    with alone(folder, START_S + _STOP_S):
        stopped = [Daemon(folder, name).stop() for name in ("agent", "tracker")]
        for name in ("token", "secret"):
            (folder / name).unlink(missing_ok=True)
    return NodeReport(node_id, host, "stopped" if any(stopped) else "none")


def bring_tracker_up(host: str, port: int, key: str, secret: str, secret_file: str) -> int:
    """Keep the tracker that runs here with this key, or start one; return its port.

    `port` is wanted, so that agents find a tracker again which died; 0 is any. Raises
    `ClusterError` with the end of its log.
    """
    folder = _folder()
    daemon = Daemon(folder, "tracker")
    with alone(folder, START_S):
        ours = daemon.running()
        if ours is not None and ours.key == key and port:
            return port
        daemon.stop()
        listen = f"{_bracketed(_listen_host(host))}:{_free(host, port)}"
        line = [*_weightstream("tracker"), "--listen", listen]
        if file := _secret_file(folder, secret, secret_file):
            line += ["-o", f"cluster_secret_file={file}"]
        marker = daemon.start(line, key)
        said: int = _await(daemon, marker, lambda: _port_said(daemon))
    return said


def _folder() -> Path:
    """Return the folder for the daemons' files: in the node's run directory, this user's alone.

    Whatever `-o` says: `down` has to find them without.
    """
    run = load_settings().run_directory
    RunDirectory(run).prepare()
    folder = run / _FOLDER
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _weightstream(command: str) -> list[str]:
    return [sys.executable, "-m", "weightstream.cli", command]


def _agent_line(orders: Orders, settings: Settings, folder: Path, host: str) -> list[str]:
    """Return the agent's command; what the node or the orders set wins over what is made up."""
    token = folder / "token"
    write_private(token, secrets.token_urlsafe(24))
    local = _bracketed(_listen_host(host))
    line = [*_weightstream("agent"), "--api", f"{local}:0", "--api-token-file", str(token)]
    for origin in orders.allow:
        line += ["--allow", origin]
    made_up: dict[str, str] = {}
    if orders.tracker and not settings.peers:
        made_up["peers"] = f"tracker:{orders.tracker}"
        if not settings.cluster_secret_file:
            made_up["cluster_secret_file"] = _secret_file(folder, orders.secret, "")
    if settings.peer_listen == Settings.model_fields["peer_listen"].default:
        made_up["peer_listen"] = f"{local}:0"
    for name, value in (made_up | dict(orders.settings)).items():
        line += ["-o", f"{name}={value}"]
    return line


def _secret_file(folder: Path, secret: str, given: str) -> str:
    if given or not secret:
        return given
    write_private(folder / "secret", secret)
    return str(folder / "secret")


def _is_good(ours: Marker, orders: Orders, settings: Settings) -> bool:
    return ours.key == orders.key and _answers(settings.run_directory, _ANSWERS_S)


def _answers(run_directory: Path, patience_s: float) -> bool:
    """Say whether an agent answers; without patience only when its socket is there."""
    deadline_s = time.monotonic() + patience_s
    while True:
        try:
            if (run_directory / CONTROL_SOCKET).exists():
                asking.status(run_directory)
                return True
        except NoAgent:
            pass
        if time.monotonic() >= deadline_s:
            return False
        time.sleep(_POLL_S)


def _await_ready(daemon: Daemon, marker: Marker, run_directory: Path) -> str:
    """Wait until the agent answers, and a little for its peers; return what it still lacks."""

    def status() -> Mapping[str, Any] | None:
        try:
            return asking.status(run_directory)
        except NoAgent:
            return None

    lacking: list[str] = _await(daemon, marker, status)["waits_for"]
    deadline_s = time.monotonic() + _PEERS_S
    while lacking and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)
        lacking = _await(daemon, marker, status)["waits_for"]
    return ", ".join(lacking)


def _await(daemon: Daemon, marker: Marker, look: Callable[[], Any]) -> Any:
    """Return what `look` finds; end the daemon, and raise, when it ends or stays silent."""
    deadline_s = time.monotonic() + START_S
    while (found := look()) is None:
        cause = ""
        if daemon.running() != marker:
            cause = "ended"
        elif time.monotonic() > deadline_s:
            cause = f"did not answer within {START_S:g} s"
        if cause:
            daemon.stop()
            raise ClusterError(f"the {daemon.name} {cause}: {daemon.tail()}")
        time.sleep(_POLL_S)
    return found


def _describe(settings: Settings, node_id: str, host: str, ours: Marker | None) -> Agent:
    """Return where the running agent is; without an API over TCP, nobody reaches it from afar."""
    try:
        api = asking.api(settings.run_directory)
    except NoAgent:  # of an earlier version
        api = {"port": 0}
    address, token = "", ""
    if api["port"]:
        local = str(api["host"])
        reached = host if local in ("", "0.0.0.0", "::") else local
        address, token = f"{_bracketed(reached)}:{api['port']}", str(api["token"])
    socket_path = str(settings.run_directory / CONTROL_SOCKET)
    return Agent(node_id, socket_path, address, token, ours.pid if ours is not None else 0)


def _port_said(daemon: Daemon) -> int | None:
    said = _PORT_SAID.search(daemon.log.read_text(errors="replace"))
    return int(said[1]) if said else None


def _listen_host(host: str) -> str:
    """Return the node's own address; where Ray knows the node by another's (NAT), all of them."""
    return host if _can_listen(host, 0) else "::" if ":" in host else "0.0.0.0"


def _free(host: str, port: int) -> int:
    """Return the port when it can be had, else 0."""
    return port if _can_listen(_listen_host(host), port) else 0


def _can_listen(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError:
        return False
    return True


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
