"""One server process as its supervisor sees it: a child, a control socket and a phase.

    starting ──prepared──> prepared ──serve──> serving ──ready──> ready ──stop──> stopping
       └─────────────┴───────────┴─ no progress within the phase's limit: SIGKILL ─┘

Every phase ends by itself or by its limit, and every end is the process's exit: `on_exit` is called
exactly once, with the process reaped and its descriptors closed.
"""

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from weightstream.cachefs.fuse.lines import Channel, ChannelClosed
from weightstream.cachefs.fuse.mounts import MountSpec
from weightstream.cachefs.fuse.supervisor.children import Child, python
from weightstream.cachefs.fuse.supervisor.loop import READABLE, WRITABLE, Loop, Timer

SERVER = "weightstream.cachefs.fuse.serve"


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a server may take; the settings' deadlines lie within."""

    # It opens the store (which may be large) and asks the origin, whose own deadline is in the
    # settings and is added to this.
    prepare_s: float = 60.0
    ready_s: float = 30.0
    # It says `beat` every second. A machine that swaps or is suspended can silence a healthy one
    # for some seconds; readers who wait would rather wait than lose their server.
    silence_s: float = 20.0
    stop_s: float = 3.0
    # Readers who wait while no server comes up get an error after this.
    patience_s: float = 120.0


class Owner(Protocol):
    """Whom a server tells what happens to it."""

    def on_prepared(self, server: "Server") -> None:
        """Hear that it could serve."""

    def on_ready(self, server: "Server") -> None:
        """Hear that it serves."""

    def on_answer(self, answer: dict[str, Any]) -> None:
        """Hear its answer to a command."""

    def on_exit(self, server: "Server") -> None:
        """Hear that its process has ended."""


class Server:
    """A server process; made by `start`, or by `resume` in a supervisor that replaced another."""

    def __init__(
        self, loop: Loop, owner: Owner, limits: Limits, child: Child, channel: Channel, phase: str
    ) -> None:
        self._loop = loop
        self._owner = owner
        self._limits = limits
        self.child = child
        self.channel = channel
        self.phase = phase
        self.init: dict[str, Any] = {}
        self.failure: tuple[str, int] | None = None
        self.said_unmounted = False
        self.killed_for = ""
        self._timer: Timer | None = None
        self._ready_s: float | None = None
        self._open = True
        loop.watch(child.pidfd, self._on_child)
        loop.watch(channel.fileno, self._on_channel)

    @classmethod
    def start(
        cls,
        loop: Loop,
        owner: Owner,
        limits: Limits,
        spec: MountSpec,
        device: int,
        program: Sequence[str] = (),
    ) -> "Server":
        """Start a process; `device` is -1 for a driver that opens its own. Raises `OSError`."""
        ours, theirs = socket.socketpair()
        arguments = ["--control-fd", str(theirs.fileno())]
        keep = [theirs.fileno()]
        if device >= 0:
            arguments += ["--fuse-fd", str(device)]
            keep.append(device)
        command = [*program, *arguments] if program else python(SERVER, *arguments)
        with theirs:
            child = Child.spawn(command, keep)
        server = cls(loop, owner, limits, child, Channel(ours), "starting")
        server._within(limits.prepare_s, "was not prepared")
        server.send(spec.to_json())
        return server

    @classmethod
    def resume(
        cls, loop: Loop, owner: Owner, limits: Limits, child: Child, channel: Channel
    ) -> "Server":
        """Take over a process that serves already."""
        server = cls(loop, owner, limits, child, channel, "ready")
        server._ready_s = time.monotonic()
        server._within(limits.silence_s, "did not answer")
        return server

    @property
    def is_open(self) -> bool:
        """Return whether it can be talked to."""
        return self._open

    def serve(self, resume: dict[str, Any] | None) -> None:
        """Have it serve; `resume` is what an earlier server negotiated."""
        self.phase = "serving"
        self._within(self._limits.ready_s, "did not serve")
        self.send({"command": "serve", "resume": resume})

    def stop(self, within_s: float | None = None) -> None:
        """Have it exit, by force when it does not."""
        self.phase = "stopping"
        self._within(self._limits.stop_s if within_s is None else within_s, "did not stop")
        self.send({"command": "stop"})

    def kill(self, reason: str) -> None:
        """End it at once. A process that waits for a dead disk ends when the disk lets it."""
        self.killed_for = self.killed_for or reason
        self._cancel_timer()
        self.child.kill()

    def send(self, message: dict[str, Any]) -> None:
        """Send a line. One that cannot be sent is not missed: the process has ended or will."""
        if not self._open:
            return
        try:
            self.channel.send(message)
        except ChannelClosed:
            self._close_channel()
        else:
            self._watch_channel()

    def ending(self) -> str:
        """Say how the process ended."""
        reason = f", because it {self.killed_for}" if self.killed_for else ""
        return f"{self.child.ending()}{reason}"

    def lived_s(self) -> float:
        """Return for how long it has served; 0 when it never did."""
        return 0.0 if self._ready_s is None else time.monotonic() - self._ready_s

    def _on_child(self, _: int) -> None:
        if not self.child.ended():
            return
        self._drain()  # its last words are often the reason
        self._cancel_timer()
        self._close_channel()
        self._loop.forget(self.child.pidfd)
        self.child.close()
        self._owner.on_exit(self)

    def _drain(self) -> None:
        while self._open and self._receive():
            pass

    def _on_channel(self, events: int) -> None:
        if events & WRITABLE:
            self.send_waiting()
        if events & ~WRITABLE:
            self._receive()

    def send_waiting(self) -> None:
        """Send what could not be sent before."""
        try:
            self.channel.flush()
        except ChannelClosed:
            self._close_channel()
        else:
            self._watch_channel()

    def _receive(self) -> bool:
        try:
            messages = self.channel.receive()
        except ChannelClosed:
            self._close_channel()
            return False
        for message in messages:
            self._on_message(message)
        return bool(messages)

    def _on_message(self, message: dict[str, Any]) -> None:
        event = message.get("event")
        if "id" in message:
            self._owner.on_answer(message)
        elif event == "failed":
            self.failure = (str(message.get("error")), int(message.get("exit_code", 1)))
        elif event == "unmounted":
            self.said_unmounted = True
        elif event == "prepared" and self.phase == "starting":
            self.phase = "prepared"
            self._cancel_timer()
            self._owner.on_prepared(self)
        elif event == "ready" and self.phase == "serving":
            self.phase = "ready"
            self.init = dict(message.get("init") or {})
            self._ready_s = time.monotonic()
            self._within(self._limits.silence_s, "did not answer")
            self._owner.on_ready(self)
        elif self.phase == "ready":
            self._within(self._limits.silence_s, "did not answer")

    def _within(self, limit_s: float, complaint: str) -> None:
        """Kill it unless something happens within the limit."""
        self._cancel_timer()
        reason = f"{complaint} for {limit_s:g} s"
        self._timer = self._loop.after(limit_s, lambda: self.kill(reason))

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _watch_channel(self) -> None:
        events = READABLE | (WRITABLE if self.channel.is_waiting else 0)
        self._loop.watch(self.channel.fileno, self._on_channel, events)

    def _close_channel(self) -> None:
        if self._open:
            self._open = False
            self._loop.forget(self.channel.fileno)
            self.channel.close()
