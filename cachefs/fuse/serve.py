"""The server process: told what to do by its supervisor, in JSON lines on a control socket.

    first line: the spec ──> prepared ──serve──> ready, then beats ──stop, SIGTERM──> exit 0
                      └────> failed, exit                      └──── unmounted ────> exit 0

The protocol is in docs/design/0004-filesystem.md. The supervisor may die; the server goes on
serving then, until it is unmounted or gets SIGTERM. What it does last is `os._exit`: no thread that
waits for a hung origin or disk may hold it up, and nothing it has is worth more than its time (the
store stays valid wherever it is left).
"""

import argparse
import gc
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

from weightstream import metrics
from weightstream.cachefs.files.entries import Change
from weightstream.cachefs.fuse.assembly import Assembly, assemble
from weightstream.cachefs.fuse.lines import Channel, ChannelClosed
from weightstream.cachefs.fuse.mounts import MountSpec, name_of
from weightstream.cachefs.origin.urls import shown
from weightstream.errors import WeightstreamError
from weightstream.log import configure, get_logger, mask_secrets

if TYPE_CHECKING:
    from weightstream.cachefs.fuse.kernel.server import Options

log = get_logger("weightstream.cachefs.fuse.serve")

_BEAT_S = 1.0
_CLOSE_S = 2.5
_TELL_KERNEL_S = 5.0


class Driver(Protocol):
    """What serves the kernel: `KernelServer`, or libfuse."""

    ready: threading.Event
    ended: threading.Event
    on_event: Callable[[], None]

    def start(self, resume: Mapping[str, Any] | None) -> None:
        """Begin to serve; returns at once."""

    def init(self) -> Mapping[str, Any]:
        """Return what the next server must know, once it is ready."""
        ...

    def stop(self) -> None:
        """Answer nothing more."""

    def changed(self, changes: Sequence[Change]) -> None:
        """Hear that names lead to something else."""

    def settle(self, longest_s: float) -> bool:
        """Wait until the kernel has been told of all changes."""
        ...

    def is_healthy(self) -> bool:
        """Say whether requests get anywhere."""
        ...

    def gauges(self) -> Mapping[str, int]:
        """Return what is under way."""
        ...


class Control:
    """The control socket, for many threads; silent once the supervisor is gone."""

    def __init__(self, end: socket.socket) -> None:
        self._channel = Channel(end)
        self._lock = threading.Lock()
        self._is_open = True
        self._waiting: list[dict[str, Any]] = []

    @property
    def fileno(self) -> int:
        """Return the descriptor to wait for; -1 once it is closed."""
        return self._channel.fileno if self._is_open else -1

    def say(self, **message: Any) -> None:
        """Send a line, if anybody is there."""
        with self._lock:
            if not self._is_open:
                return
            try:
                self._channel.send(message)
            except ChannelClosed:
                self._close()

    def hear(self) -> list[dict[str, Any]]:
        """Return the lines that have arrived."""
        with self._lock:
            try:
                return self._channel.receive() if self._is_open else []
            except ChannelClosed:
                self._close()
                return []

    def _close(self) -> None:
        self._is_open = False
        self._channel.close()


class Process:
    """One run of the server."""

    def __init__(self, fuse_fd: int, control: Control) -> None:
        self._fuse_fd = fuse_fd
        self._control = control
        self._wake_in, self._wake_out = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._stopping = False
        self._said_ready = False
        self._next_beat_s = 0.0
        self._spec: MountSpec | None = None
        self._driver: Driver | None = None
        self._assembly: Assembly | None = None

    def run(self) -> int:
        """Serve until told to stop, or unmounted; return the exit code."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.set_wakeup_fd(self._wake_out, warn_on_full_buffer=False)
        while not self._stopping:
            for message in self._control.hear():
                if (code := self._obey(message)) is not None:
                    return code
            if self._control.fileno < 0 and not self._serves():
                return 0  # the supervisor died before it had mounted
            self._look_after()
            self._wait()
        return self._end()

    def _obey(self, message: dict[str, Any]) -> int | None:
        """Do what a line says; return the exit code if this is the end."""
        if self._spec is None:
            return self._prepare(MountSpec.from_json(message))
        match message.get("command"):
            case "serve":
                return self._serve(message.get("resume"))
            case "stop":
                self._stopping = True
            case _:
                work = threading.Thread(
                    target=self._answer, args=(message,), daemon=True, name="weightstream-command"
                )
                work.start()
        return None

    def _prepare(self, spec: MountSpec) -> int | None:
        self._spec = spec
        try:
            # The supervisor's lines in the same log are dated; journald has its own clock.
            dated = not os.environ.get("JOURNAL_STREAM")
            configure(spec.load_settings().log_level, dated=dated)
            self._assembly = assemble(spec, self._changed)
            self._driver = self._make_driver(spec, self._assembly)
        except WeightstreamError as error:
            return self._failed(error)
        gc.freeze()  # what was imported stays; collections need not look at it again
        self._control.say(event="prepared")
        return None

    def _make_driver(self, spec: MountSpec, assembly: Assembly) -> Driver:
        if spec.driver == "kernel":
            from weightstream.cachefs.fuse.kernel.server import KernelServer

            options = _options(spec, assembly)
            driver: Driver = KernelServer(self._fuse_fd, assembly.tree, assembly.content, options)
        else:
            from weightstream.cachefs.fuse.libfuse import LibfuseDriver

            driver = LibfuseDriver(spec, assembly)
        driver.on_event = self._wake
        return driver

    def _changed(self, changes: Sequence[Change]) -> None:
        """Hear from the tree; before there is a driver the kernel knows nothing that changes."""
        if self._driver is not None:
            self._driver.changed(changes)

    def _serve(self, resume: Mapping[str, Any] | None) -> int | None:
        assert self._driver is not None
        try:
            self._driver.start(resume)
        except WeightstreamError as error:  # libfuse mounts by itself, and may not be able to
            return self._failed(error)
        return None

    def _failed(self, error: WeightstreamError) -> int:
        message = mask_secrets(" ".join(str(error).split()))
        self._control.say(event="failed", error=message, exit_code=error.exit_code)
        return error.exit_code

    # ---- while it serves

    def _serves(self) -> bool:
        return self._driver is not None and self._driver.ready.is_set()

    def _look_after(self) -> None:
        driver = self._driver
        if driver is None:
            return
        if driver.ended.is_set():
            self._control.say(event="unmounted")
            self._stopping = True
        elif driver.ready.is_set():
            if not self._said_ready:
                self._said_ready = True
                self._control.say(event="ready", init=dict(driver.init()))
            self._beat(driver)

    def _beat(self, driver: Driver) -> None:
        now = time.monotonic()
        if now >= self._next_beat_s and driver.is_healthy():
            self._next_beat_s = now + _BEAT_S
            self._control.say(event="beat")

    def _wait(self) -> None:
        if self._stopping:
            return
        poll = select.poll()
        poll.register(self._wake_in, select.POLLIN)
        if self._control.fileno >= 0:
            poll.register(self._control.fileno, select.POLLIN)
        for fd, _ in poll.poll(_BEAT_S * 1000):
            if fd == self._wake_in:
                os.read(self._wake_in, 4096)

    def _wake(self) -> None:
        with suppress(BlockingIOError):  # full: whoever reads wakes up anyway
            os.write(self._wake_out, b"\0")

    def _on_signal(self, *_: object) -> None:
        self._stopping = True

    # ---- commands

    def _answer(self, message: dict[str, Any]) -> None:
        number = message.get("id")
        try:
            answer = self._do(message)
        except WeightstreamError as error:
            text = mask_secrets(" ".join(str(error).split()))
            self._control.say(id=number, error=text, exit_code=error.exit_code)
        except Exception as error:  # a bug: whoever asked must hear of it
            log.exception("unexpected, doing %s", message.get("command"))
            self._control.say(id=number, error=f"internal error: {error!r}", exit_code=70)
        else:
            self._control.say(id=number, **answer)

    def _do(self, message: Mapping[str, Any]) -> dict[str, Any]:
        assert self._assembly is not None
        assert self._driver is not None
        command = message.get("command")
        if command == "status":
            return {"gauges": dict(self._driver.gauges())}
        if command == "metrics":
            return {"metrics": metrics.samples()}
        if command == "refresh":
            folders = self._assembly.tree.refresh(str(message.get("path") or ""))
            self._driver.settle(_TELL_KERNEL_S)
            return {"folders": folders}
        raise WeightstreamError(f"the server knows no command {command!r}")

    # ---- the end

    def _end(self) -> int:
        """Leave everything as it is, within bounds; what was not answered is asked again."""
        if self._driver is not None:
            self._driver.stop()
        if self._assembly is not None:
            close = threading.Thread(
                target=self._assembly.close, daemon=True, name="weightstream-close"
            )
            close.start()
            close.join(_CLOSE_S)
        return 0


def _options(spec: MountSpec, assembly: Assembly) -> "Options":
    from weightstream.cachefs.fuse.kernel.server import Options

    settings = assembly.settings
    run = settings.run_directory
    return Options(
        uri=shown(assembly.tree.uri),
        directory=spec.directory,
        store=assembly.store.path if assembly.store.writable else None,
        journal=run / name_of(spec.directory) if run.is_dir() else None,
        read_ahead_bytes=settings.read_ahead,
        deadline_s=settings.deadline_s,
    )


def main() -> None:
    """Run the server of one mount."""
    parser = argparse.ArgumentParser(prog="weightstream-server")
    parser.add_argument("--fuse-fd", type=int, default=-1)
    parser.add_argument("--control-fd", type=int, required=True)
    given = parser.parse_args()
    for fd in (given.fuse_fd, given.control_fd):
        if fd >= 0:
            os.set_inheritable(fd, False)
    code = 70
    try:
        code = Process(given.fuse_fd, Control(socket.socket(fileno=given.control_fd))).run()
    except BaseException:
        log.exception("the server ends: this is a bug")
    finally:
        logging.shutdown()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
