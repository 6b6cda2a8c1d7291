"""The supervisor's log: one line per event of a mount's life, beside what the server writes."""

import os
import time
from contextlib import suppress

# A mount lives for months; its log must not fill the disk. The last part is kept in NAME.1.
_MOST_BYTES = 16 << 20
_STDERR = 2  # not sys.stderr, which keeps what it could not write and fails again at exit


class MountLog:
    """Writes to stderr, which is a file unless somebody runs the mount in the foreground."""

    def __init__(self, path: str) -> None:
        """`path` is that file's, "" without one."""
        self._path = path
        # journald has its own clock
        self._dated = not os.environ.get("JOURNAL_STREAM")

    def __call__(self, text: str, level: str = "INFO") -> None:
        """Write one line. A disk that is full is no reason to end a mount."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S ") if self._dated else ""
        line = f"{stamp}{level} supervisor: {text}\n"
        with suppress(OSError):
            os.write(_STDERR, line.encode(errors="backslashreplace"))

    def trim(self) -> None:
        """Begin the file anew when it is large; who writes to it goes on (it is opened to append).

        Lines written between the copy and the cut are lost; a log may lose a line in 16 MiB.
        """
        if not self._path:
            return
        try:
            size = os.stat(self._path).st_size
            if size <= _MOST_BYTES:
                return
            with open(self._path, "rb") as source, open(f"{self._path}.1", "wb") as kept:
                source.seek(size - _MOST_BYTES)
                kept.write(source.read(_MOST_BYTES))
            os.truncate(self._path, 0)
        except OSError as error:
            self(f"cannot shorten the log: {error}", "WARNING")
