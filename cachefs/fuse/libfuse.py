"""The fuse-python driver as the server process sees it: started, ready, ended.

libfuse mounts by itself (by system call as root, else through fusermount) and loops in a thread of
ours. Its complaints go to stderr; the last of them is the message of the error that `start` raises.
"""

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from weightstream.cachefs.files.entries import Change
from weightstream.cachefs.fuse.kernel.device import set_read_ahead
from weightstream.cachefs.fuse.mount_table import privileged
from weightstream.errors import MountError

if TYPE_CHECKING:
    from weightstream.cachefs.fuse.assembly import Assembly
    from weightstream.cachefs.fuse.mounts import MountSpec

# The kernel asks again for names and attributes after this, which costs no listing: the tree's own
# TTL decides when the origin is asked. libfuse knows one time for all, and no invalidation.
KERNEL_TTL_S = 1.0
_MOUNT_S = 20.0
_STDERR = 2
_REMEDY = "pip install 'weightstream[fuse]'"


class LibfuseDriver:
    """Serves one mount; see `serve.Driver`."""

    def __init__(self, spec: "MountSpec", assembly: "Assembly") -> None:
        try:  # it is an extra, and loads libfuse
            from weightstream.cachefs.fuse.pythonfuse import PythonFuse
        except ImportError as error:
            raise MountError(
                f"the driver fuse-python cannot be used: {error}; {_REMEDY}"
            ) from error

        self._directory = spec.directory
        self._allow_other = spec.allow_other
        self._uri = assembly.tree.uri
        self._content = assembly.content
        self._read_ahead = assembly.settings.read_ahead
        self._failure = ""
        self.ready = threading.Event()
        self.ended = threading.Event()
        """Set when the file system is not mounted any more."""
        self.on_event: Callable[[], None] = lambda: None
        """Called when one of the two is set."""
        self._fuse = PythonFuse(
            spec.directory, assembly.tree, assembly.content, assembly.store.path, self._set_ready
        )

    def start(self, resume: Mapping[str, Any] | None) -> None:
        """Mount and serve. Raises `MountError` when it cannot be mounted."""
        with _captured_stderr() as said:
            threading.Thread(target=self._run, daemon=True, name="weightstream-libfuse").start()
            deadline_s = time.monotonic() + _MOUNT_S
            while not self.ready.wait(0.02) and not self.ended.is_set():
                if time.monotonic() > deadline_s:
                    raise MountError(f"{self._directory}: no answer from the kernel")
        if not self.ready.is_set():
            cause = _last_line(said) or self._failure
            raise MountError(f"cannot mount at {self._directory}: {cause}")
        if privileged():
            set_read_ahead(self._directory, self._read_ahead)

    def init(self) -> dict[str, Any]:
        """Return nothing: no other server can go on where this one ends."""
        return {}

    def stop(self) -> None:
        """Do nothing: whoever waits hears ENOTCONN from the kernel when the process ends."""

    def is_healthy(self) -> bool:
        """Say that it is: requests have threads of their own, and reads have deadlines."""
        return True

    def gauges(self) -> dict[str, int]:
        """Return what is open and what is under way."""
        return {**self._content.gauges(), "open_files": self._fuse.versions.opens()}

    def changed(self, changes: Sequence[Change]) -> None:
        """Hear from the tree that names lead to something else now."""
        self._fuse.changed(changes)

    def settle(self, longest_s: float) -> bool:
        """Return once the kernel has forgotten what it knew of names: it does so by itself."""
        time.sleep(min(longest_s, KERNEL_TTL_S))
        return True

    def _set_ready(self) -> None:
        self.ready.set()
        self.on_event()

    def _run(self) -> None:
        arguments = ["weightstream", self._directory, "-f", "-o", ",".join(self._mount_options())]
        try:
            self._fuse.main(arguments)
        except Exception as error:  # FuseError is a plain Exception; libfuse has said why on stderr
            self._failure = str(error)
        self._fuse.close()
        self.ended.set()
        self.on_event()

    def _mount_options(self) -> list[str]:
        options = [
            f"fsname={_escaped(self._uri)}", "subtype=weightstream", "nonempty", "use_ino",
            f"entry_timeout={KERNEL_TTL_S}", f"attr_timeout={KERNEL_TTL_S}", "negative_timeout=0",
            "max_background=64", "congestion_threshold=48", "nosuid", "nodev",
        ]  # fmt: skip
        return [*options, "allow_other"] if self._allow_other else options


def _escaped(text: str) -> str:
    """Return a value for an option list, where commas part and backslashes escape."""
    return text.replace("\\", "\\\\").replace(",", "\\,")


@contextmanager
def _captured_stderr() -> Iterator[list[str]]:
    """Collect what anybody writes to stderr, the C library and fusermount too; pass it on."""
    said: list[str] = []
    kept = os.dup(_STDERR)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), _STDERR)
        try:
            yield said
        finally:
            os.dup2(kept, _STDERR)
            os.close(kept)
            file.seek(0)
            text = file.read()
            said += text.decode(errors="replace").splitlines()
            if text:
                os.write(_STDERR, text)


def _last_line(said: Sequence[str]) -> str:
    return next((line.strip() for line in reversed(said) if line.strip()), "")
