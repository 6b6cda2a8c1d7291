"""Reads that wait on a thread of libfuse's, and end when the process behind them gets a signal.

libfuse knows that the kernel has interrupted a request and tells only who asks, on the thread of
that request; fuse-python does not ask. So we do, by its C function, twice a second while a read
waits for bytes.
"""

import ctypes
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from weightstream.cachefs.blob import Extent
from weightstream.cachefs.files.entries import File
from weightstream.errors import WeightstreamError

if TYPE_CHECKING:
    from weightstream.cachefs.files.content import Content

_ASK_S = 0.5


def read_unless(
    is_interrupted: Callable[[], bool], content: "Content", file: File, extent: Extent
) -> bytes:
    """Return bytes; raise what went wrong, `LoadCancelled` when the reader got a signal."""
    done = threading.Event()
    found = b""
    failure: WeightstreamError | None = None

    def reply(views: Sequence[memoryview], error: WeightstreamError | None) -> None:
        nonlocal found, failure
        found, failure = b"".join(views), error
        done.set()

    ticket = content.read(file, extent, reply)
    while not done.wait(_ASK_S):  # bounded: every ticket has a deadline
        if is_interrupted():
            content.cancel(ticket)
    if failure is not None:
        raise failure
    return found


def interrupted_question() -> Callable[[], bool]:
    """Return how to ask whether the request of this thread was interrupted; for handlers only."""
    path = loaded_libfuse()
    function = getattr(ctypes.CDLL(path), "fuse_interrupted", None) if path else None
    if function is None:
        return lambda: False
    return lambda: bool(function())


def loaded_libfuse(maps: Path = Path("/proc/self/maps")) -> str:
    """Return the path of the libfuse that this process has loaded; nothing where there is none.

    fuse-python brings one of its own, under a name that only the table of mappings knows.
    """
    lines = (line.split(maxsplit=5) for line in maps.read_text().splitlines())
    paths = (fields[5] for fields in lines if len(fields) == 6)
    return next((path for path in paths if Path(path).name.startswith("libfuse")), "")
