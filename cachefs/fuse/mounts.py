"""What there is to know about a mount, and where: its spec, its record on disk, its control socket.

Imported by the supervisor, which holds the mount for months in a few MiB: standard library only.

Each mount has files in the run directory, named after its directory (`mnt-models-1f3870be`):

    NAME.json   the record: who serves it, since when, where its log is
    NAME.sock   the control socket: one JSON line asks, one answers
    NAME.lock   locked (flock) by the supervisor as long as it lives; a process id may be
                somebody else's by now, a lock may not
    NAME.nodes, NAME.opens   what a server notes for the next one (`journal.py`)

Everything there is for the user alone (0700, 0600), so who may connect may command.
"""

import binascii
import errno
import fcntl
import json
import os
import socket
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from weightstream.errors import MountBusyError, MountError, UsageError

if TYPE_CHECKING:
    from weightstream.settings import Settings

Driver = Literal["kernel", "fuse-python"]
Value = str | int | float | bool

ASK_TIMEOUT_S = 10.0
_READABLE = 80  # characters of a directory's name in the names of its files


@dataclass(frozen=True, slots=True)
class MountSpec:
    """What is mounted where, and how: the first line that a server gets."""

    uri: str
    directory: str
    driver: Driver
    settings: Mapping[str, Value]
    allow_other: bool = False
    # The mount is there already: the server says `prepared` without having asked the origin, which
    # may be away just now. Everything else must hold (settings, store).
    restart: bool = False

    def load_settings(self) -> "Settings":
        """Return the settings of the mount; leave out what this version does not know any more."""
        from weightstream.settings import Settings, load_settings

        known = {k: v for k, v in self.settings.items() if k in Settings.model_fields}
        return load_settings(known, given_by="mount")

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` takes."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "MountSpec":
        """Make a spec; leave out what this version does not know."""
        return cls(**known_fields(cls, values))


@dataclass(frozen=True, slots=True)
class Record:
    """One mount, as its supervisor wrote it down last."""

    directory: str
    uri: str  # without credentials
    driver: Driver
    state: str
    version: str
    supervisor_pid: int
    server_pid: int = 0
    server_started: int = 0  # of /proc/PID/stat: with the id it names one process for ever
    log: str = ""
    mounted_at_s: float = 0.0  # wall clock
    restarts: int = 0
    # What the server negotiated with the kernel, for the one that resumes after both have died and
    # systemd kept the descriptor.
    init: Mapping[str, Any] = field(default_factory=dict)


def known_fields(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values for which a dataclass has a field: another version may have others."""
    names = {one.name for one in fields(cls)}
    return {name: value for name, value in values.items() if name in names}


def name_of(directory: str) -> str:
    """Return the name of a mount's files: readable, and unique by its checksum."""
    readable = directory.strip("/").replace("/", "-").replace("\n", "-")[-_READABLE:] or "root"
    return f"{readable}-{binascii.crc32(os.fsencode(directory)):08x}"


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """The directory where this user's mounts are noted."""

    path: Path

    def prepare(self) -> None:
        """Make it; refuse one that others could have put there (the fallback lies in /tmp)."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.path.lstat()
        except OSError as error:
            raise UsageError(f"cannot make the run directory {self.path}: {error}") from error
        private = found.st_uid == os.geteuid() and not found.st_mode & 0o022
        if not stat.S_ISDIR(found.st_mode) or not private:
            raise UsageError(f"the run directory {self.path} can be written by others")

    def records(self) -> list[Record]:
        """Return the records of all mounts, sorted by directory."""
        found = (_read(path) for path in self.path.glob("*.json"))
        return sorted((one for one in found if one is not None), key=lambda one: one.directory)

    def record(self, directory: str) -> Record | None:
        """Return the record of one mount."""
        return _read(self._file(directory, "json"))

    def write(self, record: Record) -> None:
        """Replace a mount's record."""
        path = self._file(record.directory, "json")
        partial = path.with_suffix(".partial")
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(asdict(record), file)
        partial.replace(path)

    def forget(self, directory: str) -> None:
        """Remove a mount's record and socket, and what its servers noted for each other."""
        name = name_of(directory)
        for file in os.listdir(self.path) if self.path.is_dir() else []:
            if file.startswith(name) and file != f"{name}.lock":
                (self.path / file).unlink(missing_ok=True)

    def lock(self, directory: str) -> int | None:
        """Return a descriptor that holds the mount's lock; None when its supervisor lives."""
        path = self._file(directory, "lock")
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return None
            if _is_at(descriptor, path):
                return descriptor
            os.close(descriptor)  # the holder removed it between our open and our lock

    def unlock(self, directory: str, descriptor: int) -> None:
        """Give the lock back, and remove its file while it is still ours."""
        self._file(directory, "lock").unlink(missing_ok=True)
        os.close(descriptor)

    def is_supervised(self, directory: str) -> bool:
        """Return whether the mount's supervisor lives."""
        try:
            descriptor = os.open(self._file(directory, "lock"), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def listen(self, directory: str) -> socket.socket:
        """Return the mount's control socket, listening."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with self._socket_path(directory) as path:
            with suppress(FileNotFoundError):
                os.unlink(path)
            listener.bind(path)
            os.chmod(path, 0o600)
        listener.listen(16)
        return listener

    def ask(
        self, directory: str, question: Mapping[str, Any], timeout_s: float = ASK_TIMEOUT_S
    ) -> dict[str, Any]:
        """Return the supervisor's answer; raise what it says went wrong.

        Raises `ConnectionError` or `TimeoutError` when there is no supervisor, or it does not
        answer.
        """
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout_s)
            with self._socket_path(directory) as path:
                try:
                    connection.connect(path)
                except FileNotFoundError as error:
                    raise ConnectionRefusedError(errno.ECONNREFUSED, "no supervisor") from error
            connection.sendall(json.dumps(question).encode() + b"\n")
            with connection.makefile("rb") as lines:
                line = lines.readline()
        if not line.endswith(b"\n"):
            raise ConnectionResetError(errno.ECONNRESET, "the supervisor went away")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            kind = MountBusyError if answer.get("busy") else MountError
            raise kind(str(answer["error"]), int(answer.get("exit_code", kind.exit_code)))
        return answer

    def _file(self, directory: str, kind: str) -> Path:
        return self.path / f"{name_of(directory)}.{kind}"

    @contextmanager
    def _socket_path(self, directory: str) -> Iterator[str]:
        """Yield a path of the socket that fits into the 108 bytes of a socket's address."""
        folder = os.open(self.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield f"/proc/self/fd/{folder}/{name_of(directory)}.sock"
        finally:
            os.close(folder)


def started(pid: int) -> int:
    """Return when a process started, in clock ticks since boot; 0 when there is none."""
    try:
        stat_line = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    state, *rest = stat_line.rpartition(b") ")[2].split()
    return 0 if state in (b"Z", b"X") else int(rest[18])


def _read(path: Path) -> Record | None:
    try:
        values = json.loads(path.read_text())
        return Record(**known_fields(Record, values))
    except (OSError, ValueError, TypeError):  # gone meanwhile, or not one of ours
        return None


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
