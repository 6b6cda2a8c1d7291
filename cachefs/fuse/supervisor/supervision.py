"""What the process behind a mount does: it holds /dev/fuse and keeps a server running.

It does no file system work and imports no more than it needs, so there is little that could break
it or make it grow. What it does:

* starts a server, mounts when that is prepared, and tells whoever waits (a pipe, systemd);
* replaces a server that died or fell silent. Its own descriptor keeps the connection open, so
  readers wait for the new server and do not get an error;
* ends the mount within seconds when told to, whatever server and origin do;
* replaces itself by another version: it executes that in its own place, with the descriptors, and
  the new one replaces the server (`upgrade.py`).

All of it is one thread and one loop. The state is three things: the attachment (how the mount hangs
in the kernel), `_current` (the server that serves) and `_incoming` (the one that is to be next). A
server becomes the current one by `_promote`, once it is prepared and no other is current.
"""

import errno
import os
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from weightstream import __version__
from weightstream.cachefs.fuse.mounts import Record, RunDirectory, started
from weightstream.cachefs.fuse.supervisor import systemd
from weightstream.cachefs.fuse.supervisor.adoption import Inheritance, Orphan, inherit
from weightstream.cachefs.fuse.supervisor.attachment import Attachment, KernelAttachment, attachment
from weightstream.cachefs.fuse.supervisor.backoff import Backoff
from weightstream.cachefs.fuse.supervisor.commands import Commands
from weightstream.cachefs.fuse.supervisor.handover import Handover, Job
from weightstream.cachefs.fuse.supervisor.loop import Loop
from weightstream.cachefs.fuse.supervisor.mount_log import MountLog
from weightstream.cachefs.fuse.supervisor.reporting import Reporter
from weightstream.cachefs.fuse.supervisor.server_process import Server
from weightstream.errors import MountError

SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}

# Told to end, a mount has ended within five seconds. Files that are open get this long to be
# finished with, then their server is stopped, then killed, then left to the kernel.
_USERS_S = 1.5
_STOP_S = 1.5
_END_S = 4.5
_CHORES_S = 60.0


class Supervisor:
    """Runs one mount."""

    def __init__(self, job: Job, loop: Loop, lock: int, handover: Handover | None = None) -> None:
        self.job = job
        self.loop = loop
        self.lock = lock
        self.run = RunDirectory(Path(job.run))
        self.log = MountLog(job.log)
        self.attachment: Attachment = attachment(job.spec, job.source)
        self.state = "starting"
        self.init: dict[str, Any] = {}
        self.restarts = 0
        self.mounted_at_s = 0.0
        self._current: Server | None = None
        self._incoming: Server | None = None
        self._orphan: Orphan | None = None
        self._backoff = Backoff()
        self._unserved_s: float | None = None  # monotonic, since when nobody has been
        self._exit_code = 0
        deserted = "whoever asked for the mount went away"
        self._reporter = Reporter(loop, job.report, lambda: self._fail(deserted, 7))
        self.commands = Commands(self, handover)
        loop.on_signals(set(SIGNALS), self._on_signal)
        loop.after(_CHORES_S, self._chores)
        self._pet_watchdog()

    # Beginning

    def begin(self) -> None:
        """Start a server for a new mount, or for one that outlived its supervisor."""
        record = self.run.record(self.job.spec.directory)
        kept = systemd.kept_fuse()
        try:
            found = inherit(self.job, record, kept)
            if found is None:
                if kept >= 0:
                    systemd.drop_fuse()  # who still waits for that connection gets an error
                self.attachment.open()
            else:
                self._take_over(found)
            self._start_server(restart=found is not None)
        except MountError as error:
            self._fail(str(error), error.exit_code)

    def _take_over(self, found: Inheritance) -> None:
        self.attachment, self._orphan = found.attachment, found.orphan
        self.init = dict(found.record.init)
        self.restarts = found.record.restarts
        self.mounted_at_s = found.record.mounted_at_s
        if self._orphan is None:  # readers wait already: there is no way back
            self.state = "restarting"
            self.restarts += 1
        self.log(f"taking over the mount at {self.job.spec.directory}")

    def resume(self, handover: Handover, current: Server) -> None:
        """Go on where a predecessor executed this program, and replace its server."""
        if self.job.spec.driver == "kernel":
            self.attachment = KernelAttachment(self.job.spec, self.job.source, handover.device)
        self.init = dict(handover.init)
        self.restarts = handover.restarts
        self.mounted_at_s = handover.mounted_at_s
        self._current = current
        self.state = "ready"
        self._note()
        self._start_server(restart=True)

    def _start_server(self, restart: bool) -> None:
        spec = replace(self.job.spec, restart=restart)
        device = self.attachment.device
        try:
            self._incoming = Server.start(
                self.loop, self, self.job.limits, spec, device, self.job.program
            )
        except OSError as error:
            raise MountError(f"cannot start a server: {error}") from error
        self.log(f"server {self._incoming.child.pid} started")
        self._note()

    # What happens to servers

    def on_prepared(self, server: Server) -> None:
        """Let it serve, once the one before it has stopped."""
        if self.state == "stopping":
            server.kill("came too late")
        elif self._current is not None:
            self._current.stop()  # `on_exit` goes on
        else:
            self._promote(server)

    def _promote(self, server: Server) -> None:
        self._incoming, self._current = None, server
        if self._orphan is not None:
            self._orphan.kill()
            self._orphan = None
            self.restarts += 1
        try:
            if not self.attachment.outlives_server:
                self.attachment.open()
            if not self.init:
                self.attachment.attach()
        except MountError as error:
            self._fail(str(error), error.exit_code)
            return
        server.serve(self.init or None)

    def on_ready(self, server: Server) -> None:
        """Tell everybody who waits."""
        if self.attachment.outlives_server:
            self.init = server.init or self.init
            systemd.keep_fuse(self.attachment.device)
        self.state = "ready"
        self._unserved_s = None
        self.mounted_at_s = self.mounted_at_s or time.time()
        self._note()
        where = f"{self.job.source} at {self.job.spec.directory}"
        self.log(f"server {server.child.pid} serves {where}")
        self._reporter.mounted(self.report())
        self.commands.upgraded()

    def on_answer(self, answer: dict[str, Any]) -> None:
        """Pass an answer on to who asked."""
        self.commands.on_answer(answer)

    def on_exit(self, server: Server) -> None:
        """Replace a server that ended, or end with it."""
        self.log(f"server {server.child.pid} ended: {server.ending()}")
        self.commands.on_server_exit()
        incoming = server is self._incoming
        if incoming:
            self._incoming = None
        else:
            self._current = None
        if self.state == "stopping":
            self._finish_if_alone()
        elif self.state == "starting":
            self._fail(*(server.failure or (self._last_words(server), 7)))
        elif incoming:
            self._incoming_failed(server)
        elif self._incoming is not None:
            if self._incoming.phase == "prepared":
                self._promote(self._incoming)
        else:
            self._current_ended(server)

    def _last_words(self, server: Server) -> str:
        log = f"; see {self.job.log}" if self.job.log else ""
        return f"the server of {self.job.spec.directory} ended: {server.ending()}{log}"

    def _incoming_failed(self, server: Server) -> None:
        error = server.failure[0] if server.failure else self._last_words(server)
        self.log(f"the new server failed: {error}", "ERROR")
        if self._current is not None:
            self.commands.upgrade_failed(error)
        else:
            self._restart(0.0)

    def _current_ended(self, server: Server) -> None:
        """Restart the server, unless it ended because somebody unmounted."""
        attached = self.attachment.is_alive() or self.attachment.is_visible()
        libfuse_died = not self.attachment.outlives_server and not server.said_unmounted
        if attached or libfuse_died:
            self._restart(server.lived_s())
            return
        self.log(f"{self.job.spec.directory} was unmounted")
        self.stop()

    # Restarting

    def _restart(self, lived_s: float) -> None:
        self.restarts += 1
        self.state = "restarting"
        now_s = time.monotonic()
        if self._unserved_s is None:
            self._unserved_s = now_s
        elif now_s - self._unserved_s > self.job.limits.patience_s:
            self._let_readers_go()
        wait_s, self._backoff = self._backoff.after(lived_s)
        self._note()
        self.loop.after(wait_s, self._replace)

    def _replace(self) -> None:
        if self.state != "restarting":
            return
        try:
            resumable = self.attachment.outlives_server and self.attachment.is_alive()
            if not resumable or not self.init:
                self._renew()
            self._start_server(restart=True)
        except (MountError, OSError) as error:
            self.log(f"cannot restart: {error}", "ERROR")
            self._restart(0.0)

    def _renew(self) -> None:
        """Begin a new connection at the same directory: the old one died with those who had it."""
        if self.init:
            self.log("the connection to the kernel was lost: mounting again", "ERROR")
            systemd.drop_fuse()
            self.init = {}
        self.attachment.close()
        self.attachment.open()

    def _let_readers_go(self) -> None:
        """Give an error to who waits for a server that does not come."""
        patience_s = self.job.limits.patience_s
        self.log(f"no server for {patience_s:g} s: reads fail from now on", "ERROR")
        try:
            self.attachment.abort()
        except OSError as error:
            self.log(f"cannot end the connection: {error}", "ERROR")
        self._unserved_s = None

    # Ending

    def stop(self, force: bool = False) -> None:
        """End the mount, and then this process; within five seconds."""
        if self.state == "stopping":
            return
        self.state = "stopping"
        systemd.notify("STOPPING=1")
        self._note()
        if self._incoming is not None:
            self._incoming.kill("was not needed any more")
        in_use = self._unmount(force)
        self.loop.after(_END_S, self._abandon)
        self.loop.after(_USERS_S if in_use and not force else 0.0, self._stop_server)

    def _unmount(self, force: bool) -> bool:
        """Take the mount out of the table; return whether it was in use."""
        try:
            self.attachment.detach(lazy=False)
            return False
        except OSError as error:
            busy = error.errno == errno.EBUSY
            said = "is in use" if busy else f"cannot be unmounted: {error}"
            self.log(f"{self.job.spec.directory} {said}", "WARNING")
        try:
            if force:
                self.attachment.abort()
            else:
                self.attachment.detach(lazy=True)
        except OSError as error:
            self.log(f"cannot unmount {self.job.spec.directory}: {error}", "ERROR")
        return True

    def _stop_server(self) -> None:
        if self._current is not None:
            self._current.stop(_STOP_S)
        self._finish_if_alone()

    def _abandon(self) -> None:
        """Leave servers behind that not even SIGKILL ended; free who waits for them."""
        for server in filter(None, (self._current, self._incoming)):
            self.log(f"server {server.child.pid} cannot be killed", "ERROR")
        try:
            self.attachment.abort()
        except OSError as error:
            self.log(f"cannot end the connection: {error}", "ERROR")
        self._finish()

    def _finish_if_alone(self) -> None:
        if self._current is None and self._incoming is None:
            self._finish()

    def _finish(self) -> None:
        if self.state == "ended":
            return
        self.state = "ended"
        self.attachment.close()
        self.commands.close()
        if self._orphan is None:
            systemd.drop_fuse()
            self.run.forget(self.job.spec.directory)
        self.run.unlock(self.job.spec.directory, self.lock)
        self.loop.stop(self._exit_code)

    def _fail(self, error: str, exit_code: int) -> None:
        """End before there was a mount, or leave one that was to be taken over as it was."""
        self._exit_code = exit_code
        self._reporter.failed(error, exit_code)
        if self._orphan is None:
            self.stop()
            return
        self.state = "stopping"
        if self._incoming is not None:
            self._incoming.kill("was not needed any more")
        self._finish_if_alone()

    # Chores

    def report(self) -> dict[str, Any]:
        """Return what `mounts` shows."""
        values = asdict(self._record())
        del values["init"], values["server_started"]
        since_s = values.pop("mounted_at_s")
        return {**values, "uptime_s": max(0.0, time.time() - since_s) if since_s else 0.0}

    @property
    def current(self) -> Server | None:
        """Return the server that serves."""
        return self._current

    @property
    def is_settled(self) -> bool:
        """Return whether a server serves and no other is to come."""
        server = self._current
        serves = server is not None and server.phase == "ready" and server.is_open
        return self.state == "ready" and serves and self._incoming is None

    def _record(self) -> Record:
        server_pid = self._current.child.pid if self._current else 0
        if self._orphan is not None:
            server_pid = self._orphan.pid
        return Record(
            directory=self.job.spec.directory,
            uri=self.job.source,
            driver=self.job.spec.driver,
            state=self.state,
            version=__version__,
            supervisor_pid=os.getpid(),
            server_pid=server_pid,
            server_started=started(server_pid) if server_pid else 0,
            log=self.job.log,
            mounted_at_s=self.mounted_at_s,
            restarts=self.restarts,
            init=self.init,
        )

    def _note(self) -> None:
        try:
            self.run.write(self._record())
        except OSError as error:
            self.log(f"cannot note the mount's state: {error}", "WARNING")

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGHUP and not os.isatty(2):
            return  # a terminal that closes ends what runs in it, and nothing else
        self.log(f"{signal.Signals(number).name}: unmounting")
        self.stop()

    def _chores(self) -> None:
        self.log.trim()
        self.loop.after(_CHORES_S, self._chores)

    def _pet_watchdog(self) -> None:
        every_s = systemd.watchdog_s()
        if every_s is not None:
            systemd.notify("WATCHDOG=1")
            self.loop.after(every_s, self._pet_watchdog)
