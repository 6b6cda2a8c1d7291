"""A supervisor that becomes another version of itself, under a mount that is in use.

The process stays (systemd and `ps` see the same one), and so do its child, the server, and its
descriptors; only the program in it is another. The new program starts a server of its own version
and hands over to that when it is prepared. When anything goes wrong before, the old server has
never stopped.
"""

import os
import signal
import socket
from dataclasses import replace
from typing import Protocol

from weightstream.cachefs.fuse.lines import Channel
from weightstream.cachefs.fuse.supervisor.children import Child
from weightstream.cachefs.fuse.supervisor.commands import Supervised
from weightstream.cachefs.fuse.supervisor.control import Client
from weightstream.cachefs.fuse.supervisor.handover import Handover, Job, command
from weightstream.cachefs.fuse.supervisor.loop import Loop
from weightstream.cachefs.fuse.supervisor.server_process import Server
from weightstream.cachefs.fuse.supervisor.supervision import SIGNALS, Supervisor
from weightstream.errors import MountError

_CHECK_S = 30.0


class Asked(Protocol):
    """Who is to hear of an upgrade: the control socket."""

    @property
    def listener(self) -> int:
        """Return the descriptor of the control socket."""
        ...

    def upgrade_failed(self, error: str) -> None:
        """Hear that nothing has changed."""

    def on_server_exit(self) -> None:
        """Answer for a server whose answers will not come here."""


class Upgrade:
    """Tries whether the new program runs at all, then executes it."""

    def __init__(self, owner: Supervised, asked: Asked, client: Client, program: str) -> None:
        """`program` is the Python of the version to become; "" for the same."""
        self._owner = owner
        self._asked = asked
        self._client = client
        self._program = program
        self._child: Child | None = None

    def begin(self) -> None:
        """Have the new program read what it would get: an exec cannot be undone."""
        owner = self._owner
        line, descriptor = command(replace(owner.job, report=-1), self._handover(), self._program)
        line.insert(line.index("--job-fd"), "--check")
        try:
            child = Child.spawn(line, [descriptor])
        except OSError as error:
            self._asked.upgrade_failed(f"cannot run {line[0]}: {error.strerror}")
            return
        finally:
            os.close(descriptor)
        self._child = child
        timer = owner.loop.after(_CHECK_S, child.kill)

        def ended(_: int) -> None:
            if child.ended():
                timer.cancel()
                owner.loop.forget(child.pidfd)
                child.close()
                self._checked(child)

        owner.loop.watch(child.pidfd, ended)

    def _checked(self, child: Child) -> None:
        if child.exit_code != 0:
            self._asked.upgrade_failed(f"the new version does not run: {child.ending()}")
        elif not self._owner.is_settled:
            self._asked.upgrade_failed("its server ended meanwhile; try again when it is ready")
        else:
            self._execute()

    def _execute(self) -> None:
        owner = self._owner
        owner.log("replacing this program and its server")
        self._asked.on_server_exit()  # their answers would come to another program
        handover = self._handover()
        line, job = command(replace(owner.job, report=-1), handover, self._program)
        kept = [
            handover.lock,
            handover.listener,
            handover.device,
            handover.client,
            handover.server_channel,
            job,
        ]
        kept = [descriptor for descriptor in kept if descriptor >= 0]
        # An exec drops signal handlers; a signal that comes before the new ones are there waits.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            for descriptor in kept:
                os.set_inheritable(descriptor, True)
            os.execv(line[0], line)
        except OSError as error:
            for descriptor in kept:
                os.set_inheritable(descriptor, False)
            os.close(job)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            self._asked.upgrade_failed(f"cannot run {line[0]}: {error.strerror}")

    def _handover(self) -> Handover:
        owner = self._owner
        server = owner.current
        if server is None:
            raise MountError("no server runs")
        received, unsent = server.channel.kept()
        return Handover(
            lock=owner.lock,
            listener=self._asked.listener,
            device=owner.attachment.device,
            init=owner.init,
            restarts=owner.restarts,
            mounted_at_s=owner.mounted_at_s,
            client=self._client.fileno if self._client.is_open else -1,
            server_pid=server.child.pid,
            server_channel=server.channel.fileno,
            received=received.decode("latin-1"),
            unsent=unsent.decode("latin-1"),
        )


def resumed(job: Job, handover: Handover, loop: Loop) -> Supervisor:
    """Return the supervisor that goes on where another one executed this program."""
    kept = (handover.lock, handover.listener, handover.device, handover.client)
    for descriptor in (*kept, handover.server_channel):
        if descriptor >= 0:
            os.set_inheritable(descriptor, False)
    supervisor = Supervisor(job, loop, handover.lock, handover)
    channel = Channel(
        socket.socket(fileno=handover.server_channel),
        handover.received.encode("latin-1"),
        handover.unsent.encode("latin-1"),
    )
    child = Child(handover.server_pid)
    current = Server.resume(loop, supervisor, job.limits, child, channel)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    supervisor.resume(handover, current)
    return supervisor
