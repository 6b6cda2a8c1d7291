"""One run of the agent: what it opens, in which order, and how it ends."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from weightstream import __version__
from weightstream.cachefs.agent.control import ControlServer
from weightstream.cachefs.agent.node import Agent, PeeringOf
from weightstream.cachefs.agent.process import Aside, Lock, Signals, close_within, forget_sockets
from weightstream.cachefs.fuse.mounts import RunDirectory
from weightstream.cachefs.fuse.supervisor import systemd
from weightstream.log import get_logger
from weightstream.settings import Settings

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Orders:
    """What the command line asks of an agent."""

    roots: tuple[str, ...] = ()
    """Origins that it may read for peers, whatever clients ask for."""
    directories: tuple[str, ...] = ()
    """Where `mount` mounts: the agent is ready when those are there."""
    api: tuple[str, int] | None = None
    token: str = ""


def run(
    settings: Settings,
    orders: Orders,
    peering_of: PeeringOf,
    mount: Callable[[], None],
    tell: Callable[[str], None],
) -> int:
    """Run until SIGTERM or SIGINT; return the exit code. To be called on the main thread."""
    RunDirectory(settings.run_directory).prepare()
    lock = Lock(settings.run_directory)
    signals = Signals()
    agent = Agent(settings, orders.roots, peering_of)
    threading.Thread(target=agent.prepare, daemon=True, name="weightstream-preparing").start()
    control: ControlServer | None = None
    try:
        control = ControlServer(agent, orders.directories, orders.api, orders.token)
        mounting = Aside(mount, signals.wake)
        name = signals.wait(lambda: mounting.is_over)
        mounting.check()
        if not name:
            systemd.notify("READY=1", f"STATUS=serving from {settings.run_directory}")
            port = f", API on port {control.port}" if control.port else ""
            tell(f"agent {__version__} is ready in {settings.run_directory}{port}")
            name = signals.wait()
        log.info("%s: ending", name)
        systemd.notify("STOPPING=1")
    finally:
        forget_sockets(settings.run_directory)
        closes = [agent.close] if control is None else [control.close, agent.close]
        if not close_within(closes):
            log.warning("not everything ended in time")
        lock.release()
    return 0
