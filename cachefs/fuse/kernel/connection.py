"""Answers and notifications, written to /dev/fuse. Here, and only here, errors become numbers."""

import errno
import logging
import os
import time

from weightstream import metrics
from weightstream.cachefs.fuse.kernel.protocol import Notify
from weightstream.cachefs.fuse.kernel.wire import OUT, Parts, op_name
from weightstream.errors import WeightstreamError

log = logging.getLogger(__name__)

_UNSUPPORTED = metrics.FUSE_ERRORS.labels("EOPNOTSUPP")
_QUIET_S = 10.0
_MOST_COMPLAINTS = 256


class Refusal(WeightstreamError):
    """An answer that is an error and no failure: no such name, no such attribute, read-only."""

    def __init__(self, number: int) -> None:
        super().__init__(os.strerror(number))
        self.errno = number


class Connection:
    """The writing half of one /dev/fuse descriptor. Thread-safe: a reply is one system call."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.is_muted = False
        """Set when the server ends: what is not answered then is asked again of the next one."""
        self._complaints = Complaints()

    def reply(self, unique: int, parts: Parts = ()) -> bool:
        """Answer a request; say whether the kernel still wanted to know."""
        length = OUT.size + sum(map(len, parts))
        return self._write(OUT.pack(length, 0, unique), parts)

    def say_unsupported(self, unique: int) -> None:
        """Answer EOPNOTSUPP, cheaply: some programs ask it of every file."""
        _UNSUPPORTED.inc()
        self._write(OUT.pack(OUT.size, -errno.EOPNOTSUPP, unique), ())

    def refuse(self, unique: int, opcode: int, what: object, error: WeightstreamError) -> bool:
        """Answer with an error; `what` is the file it is about."""
        number = error.errno
        metrics.FUSE_ERRORS.labels(errno.errorcode.get(number, str(number))).inc()
        if number == errno.EIO and not self.is_muted:
            self._complaints.say(f"{op_name(opcode)} of {what}: {error}")
        return self._write(OUT.pack(OUT.size, -number, unique), ())

    def notify(self, code: Notify, payload: bytes = b"") -> None:
        """Tell the kernel something unasked. Raises `OSError`."""
        os.writev(self.fd, [OUT.pack(OUT.size + len(payload), code, 0), payload])

    def _write(self, header: bytes, parts: Parts) -> bool:
        if self.is_muted:
            return False
        try:
            os.writev(self.fd, [header, *parts])
        except OSError as error:
            # ENOENT: interrupted, its process was killed, or the connection was aborted.
            # ENODEV: unmounted.
            if error.errno not in (errno.ENOENT, errno.ENODEV, errno.ECONNABORTED):
                log.warning("the kernel refuses an answer: %s", error)
                self._fail(header)
            return False
        return True

    def _fail(self, header: bytes) -> None:
        """Answer EIO where the real answer could not be written: nobody may wait for ever."""
        _, _, unique = OUT.unpack(header)
        try:
            os.writev(self.fd, [OUT.pack(OUT.size, -errno.EIO, unique)])
        except OSError as error:
            log.debug("nor EIO: %s", error)


class Complaints:
    """Logs the same warning once in a while: what cannot be read is read a thousand times."""

    def __init__(self) -> None:
        self._said_s: dict[str, float] = {}

    def say(self, text: str) -> None:
        """Log a warning, unless it was logged a moment ago."""
        now = time.monotonic()
        if now - self._said_s.get(text, -_QUIET_S) < _QUIET_S:
            return
        if len(self._said_s) >= _MOST_COMPLAINTS:
            self._said_s.clear()
        self._said_s[text] = now
        log.warning("%s", text)
