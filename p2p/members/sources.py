"""Where the addresses of possible members come from: a list, a name, a file.

A source is looked at again and again by one thread, `Lookout`, so that a slow name server or disk
delays news and nothing else. What was known last holds while a source fails.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from weightstream.errors import UsageError
from weightstream.p2p.members.addresses import Address, parse_address, resolve, unique

log = logging.getLogger(__name__)

_NAMES_S = 3.0
_FILE_S = 0.5
_AFTER_FAILURE_S = 1.0
_MOST_FILE_BYTES = 1 << 20
MOST_ADDRESSES = 10_000
_JOIN_S = 2.0


class SourceError(Exception):
    """A source cannot say now who is there."""


class Source(Protocol):
    """Says who might be a member."""

    every_s: float | None
    """Until the next look; None when it never says anything else."""

    def look(self) -> tuple[Address, ...]:
        """Return numeric addresses; may block. Raises `SourceError`."""
        ...

    def interrupt(self) -> None:
        """Make a look that blocks return soon; from another thread."""
        ...

    def close(self) -> None:
        """Let go of everything; the last call."""
        ...


class Names:
    """Resolves names again and again; the last answer holds when the name server has none."""

    def __init__(self) -> None:
        self._known: dict[Address, tuple[Address, ...]] = {}
        self._failing: set[Address] = set()

    def numbers(self, address: Address) -> tuple[Address, ...]:
        """Return what a name stands for, or stood for last, perhaps nothing."""
        try:
            self._known[address] = resolve(address)
            self._failing.discard(address)
        except (OSError, UnicodeError) as error:
            if address not in self._failing:
                log.warning("the name of peer %s cannot be resolved: %s", address, error)
            self._failing.add(address)
        return self._known.get(address, ())


class FixedSource:
    """A list of addresses; one number of each name is asked."""

    def __init__(self, addresses: tuple[Address, ...]) -> None:
        self._addresses = addresses
        self._names = Names()
        self.every_s = None if all(a.is_numeric for a in addresses) else _NAMES_S

    def look(self) -> tuple[Address, ...]:
        """Resolve what has a name."""
        # One number: a host with IPv4 and IPv6 is one peer, not two.
        return unique(n for a in self._addresses for n in self._names.numbers(a)[:1])

    def interrupt(self) -> None:
        """Do nothing: a look ends by itself."""

    def close(self) -> None:
        """Do nothing: nothing is held between looks."""


class NameSource:
    """All addresses of one name, such as a headless service's."""

    every_s: float | None = _NAMES_S

    def __init__(self, address: Address) -> None:
        self._address = address

    def look(self) -> tuple[Address, ...]:
        """Resolve the name."""
        try:
            return resolve(self._address)[:MOST_ADDRESSES]
        except (OSError, UnicodeError) as error:
            raise SourceError(f"{self._address.host} cannot be resolved: {error}") from error

    def interrupt(self) -> None:
        """Do nothing: a look ends by itself."""

    def close(self) -> None:
        """Do nothing: nothing is held between looks."""


class FileSource:
    """One `host:port` a line; read again when the file changes."""

    every_s: float | None = _FILE_S

    def __init__(self, path: Path, where: str) -> None:
        self._path = path
        self._where = where
        self._stamp: tuple[int, int, int] | None = None
        self._addresses: tuple[Address, ...] = ()
        self._names = Names()
        self._resolve_s = 0.0
        self._numbers: tuple[Address, ...] = ()

    def check(self) -> None:
        """Read it once; raises `UsageError` for a file that cannot be used."""
        try:
            self._read()
        except SourceError as error:
            raise UsageError(str(error)) from error

    def look(self) -> tuple[Address, ...]:
        """Read the file if it changed; resolve its names now and then."""
        changed = self._read()
        now_s = time.monotonic()
        if changed or now_s >= self._resolve_s:
            self._resolve_s = now_s + _NAMES_S
            self._numbers = unique(n for a in self._addresses for n in self._names.numbers(a)[:1])
        return self._numbers

    def interrupt(self) -> None:
        """Do nothing: a look ends by itself."""

    def close(self) -> None:
        """Do nothing: nothing is held between looks."""

    def _read(self) -> bool:
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
                if stamp == self._stamp:
                    return False
                text = file.read(_MOST_FILE_BYTES + 1).decode()
        except (OSError, UnicodeDecodeError) as error:
            self._stamp = None
            raise SourceError(f"{self._where}: cannot read {self._path}: {error}") from error
        if len(text) > _MOST_FILE_BYTES:
            raise SourceError(f"{self._where}: {self._path} has more than {_MOST_FILE_BYTES} bytes")
        self._addresses = self._parse(text)
        self._stamp = stamp
        return True

    def _parse(self, text: str) -> tuple[Address, ...]:
        found = []
        for number, line in enumerate(text.splitlines(), 1):
            if content := line.partition("#")[0].strip():
                try:
                    found.append(parse_address(content, f"{self._where}, {self._path}:{number}:"))
                except UsageError as error:
                    raise SourceError(str(error)) from error
        if len(found) > MOST_ADDRESSES:
            raise SourceError(f"{self._where}: {self._path} has more than {MOST_ADDRESSES} lines")
        return unique(found)


class Lookout:
    """Looks at a source on a thread of its own and tells what it found; close it."""

    def __init__(self, source: Source, tell: Callable[[tuple[Address, ...]], None]) -> None:
        self._source = source
        self._tell = tell
        self._closed = threading.Event()
        self._known: tuple[Address, ...] = ()
        self._is_failing = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="peers-lookout")
        self._thread.start()

    def close(self) -> None:
        """Stop looking; a name server that hangs is not waited for long."""
        self._closed.set()
        self._source.interrupt()
        self._thread.join(_JOIN_S)
        if not self._thread.is_alive():
            self._source.close()

    def _run(self) -> None:
        while not self._closed.is_set():
            pause_s = self._look()
            if pause_s is None:
                return
            self._closed.wait(pause_s)

    def _look(self) -> float | None:
        try:
            self._known = self._source.look()
        except SourceError as error:
            self._complain(error)
            self._tell(self._known)
            return _AFTER_FAILURE_S
        except Exception:
            log.exception("the setting peers: the members cannot be looked up")
            self._tell(self._known)
            return _AFTER_FAILURE_S
        if self._is_failing:
            log.info("the setting peers: the members can be looked up again")
        self._is_failing = False
        self._tell(self._known)
        return self._source.every_s

    def _complain(self, error: SourceError) -> None:
        if not self._is_failing and not self._closed.is_set():
            log.warning("%s; the members known before are kept", error)
        self._is_failing = True
