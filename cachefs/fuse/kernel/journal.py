"""What the next server must know, in a file: one JSON array a line, appended before it is said.

It outlives the process and not the machine, as mounts do, so nothing is synced. A disk that is full
costs the next server this knowledge (what it does not know is ESTALE, and the kernel looks names up
again), never this server a request.
"""

import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

log = logging.getLogger(__name__)

Record: TypeAlias = Sequence[str | int]


class Journal:
    """One file with one owner, whose lock guards every call."""

    def __init__(self, path: Path | None) -> None:
        """Without a path nothing is kept."""
        self._path = path
        self._fd = -1
        self.length = 0
        """How many records the file has."""

    def begin(self) -> None:
        """Start an empty file."""
        self._open(os.O_TRUNC)
        self.length = 0

    def load(self) -> list[list[str | int]]:
        """Go on with the file that is there; return what it says, but for a line cut short."""
        self._open(0)
        data = self._read()
        whole = data[: data.rfind(b"\n") + 1]
        if self._fd >= 0 and len(whole) != len(data):
            os.ftruncate(self._fd, len(whole))
        records = [record for line in whole.splitlines() if (record := _parse(line)) is not None]
        self.length = len(records)
        return records

    def append(self, records: Iterable[Record]) -> None:
        """Write records, in one piece."""
        lines = [json.dumps(record, separators=(",", ":")) for record in records]
        if lines:
            self._write("\n".join([*lines, ""]).encode())
            self.length += len(lines)

    def replace(self, records: Iterable[Record]) -> None:
        """Write these records and forget all others; a crash leaves the old file or the new one."""
        if self._path is None or self._fd < 0:
            return
        kept, old = self._path, self._fd
        self._path = kept.with_suffix(kept.suffix + ".partial")
        self.begin()
        self.append(records)
        if self._fd >= 0:
            os.replace(self._path, kept)
            os.close(old)
        self._path = kept

    def close(self) -> None:
        """Close the file and leave it."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def _open(self, flags: int) -> None:
        if self._path is None:
            return
        flags |= os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            self._fd = os.open(self._path, flags, 0o600)
        except OSError as error:
            self._give_up(error)

    def _read(self) -> bytes:
        if self._fd < 0:
            return b""
        try:
            with open(self._fd, "rb", closefd=False) as file:
                return file.read()
        except OSError as error:
            self._give_up(error)
            return b""

    def _write(self, data: bytes) -> None:
        if self._fd < 0:
            return
        try:
            if os.write(self._fd, data) != len(data):
                raise OSError("no space is left")
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        log.warning(
            "open files will be ESTALE should the server of this mount end: cannot write %s: %s",
            self._path, error.strerror or error,
        )  # fmt: skip
        self.close()


def _parse(line: bytes) -> list[str | int] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    good = isinstance(record, list) and all(isinstance(field, str | int) for field in record)
    return record if good else None
