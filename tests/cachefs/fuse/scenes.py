"""Trees and contents for a server to serve: fakes that do what a test tells them, over its socket.

They have the interfaces of `cachefs.files.tree.Tree` and `cachefs.files.content.Content` and
nothing of their insides: a dict of files, bytes made on the spot, completeness by command.
"""

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.files.entries import Change, Entry, File, Folder
from weightstream.cachefs.files.reads import Reply
from weightstream.errors import LoadCancelled, ObjectChangedError, UnavailableError

ROOT_URI = "s3://bucket/models"


def made_bytes(path: str, version: str, size: int) -> bytes:
    """Return bytes that differ from file to file, version to version and page to page."""
    seed = f"{path} {version} ".encode()
    pages = (seed + str(i).encode() for i in range(-(-size // 4096)))
    return b"".join(page.ljust(4096, b".") for page in pages)[:size]


class FakeTree:
    """Folders of a dict; each is listed when asked for and stays listed until it is expired."""

    def __init__(self) -> None:
        self.files: dict[str, File] = {}
        self.listed: dict[str, tuple[Entry, ...]] = {}
        self.listings: list[str] = []
        self.ttl = 600.0
        self.hung: dict[str, threading.Event] = {}
        self.failing: set[str] = set()
        self.on_change: Callable[[Sequence[Change]], None] = lambda changes: None

    def peek(self, path: str) -> tuple[Entry, ...] | None:
        return self.listed.get(path) if self.ttl else None

    def children(self, path: str) -> tuple[Entry, ...]:
        if (known := self.peek(path)) is not None:
            return known
        self.listings.append(path)
        if (hung := self.hung.get(path)) is not None:
            hung.wait()
        if path in self.failing:
            raise UnavailableError(f"{ROOT_URI}/{path}: refused")
        return self._list(path)

    def _list(self, path: str) -> tuple[Entry, ...]:
        prefix = f"{path}/" if path else ""
        found: dict[str, Entry] = {}
        for file in self.files.values():
            if file.path.startswith(prefix):
                name, slash, _ = file.path[len(prefix) :].partition("/")
                found[name] = Folder(prefix + name) if slash else file
        self.listed[path] = tuple(found[name] for name in sorted(found))
        return self.listed[path]

    def ttl_s(self, path: str) -> float:
        return self.ttl if path in self.listed else 0.0

    def change(self, path: str, file: File | None) -> None:
        """Show another file, or none, and say so, as after a refresh."""
        self.files.pop(path, None)
        if file is not None:
            self.files[path] = file
        folder, _, name = path.rpartition("/")
        if folder in self.listed:
            self._list(folder)
            self.on_change([Change(folder, name)])


@dataclass
class FakeTicket:
    """A read that waits."""

    file: File
    extent: Extent
    reply: Reply
    answered: bool = False


@dataclass(frozen=True)
class FakeState:
    state: str
    present_bytes: int


class FakeContent:
    """Bytes made on the spot, or when the test says so; complete files lie in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.on_complete: Callable[[Blob], None] = lambda blob: None
        self.lock = threading.Lock()
        self.complete: set[str] = set()
        self.in_memory: set[str] = set()
        self.held: set[str] = set()
        self.gone: set[str] = set()
        self.parked: list[FakeTicket] = []
        self.opens: dict[str, int] = {}
        self.reads: list[tuple[str, int, int]] = []
        self.latency_s = 0.0
        self.open_wait = threading.Event()
        self.waits_in_open: set[str] = set()

    def is_complete(self, blob: Blob) -> bool:
        return blob.id in self.complete

    def lies_in_memory(self, blob: Blob) -> bool:
        return blob.id in self.in_memory

    def backing(self, blob: Blob) -> int | None:
        if blob.id not in self.complete:
            return None
        try:
            return os.open(self.directory / blob.id, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # evicted a moment ago
            return None

    def opened(self, file: File) -> None:
        with self.lock:
            self.opens[file.path] = self.opens.get(file.path, 0) + 1
        if file.path in self.waits_in_open:
            self.open_wait.wait()

    def released(self, file: File) -> None:
        with self.lock:
            self.opens[file.path] -= 1

    def read(self, file: File, extent: Extent, reply: Reply) -> FakeTicket:
        ticket = FakeTicket(file, extent, reply)
        with self.lock:
            self.reads.append((file.path, extent.start, extent.stop))
            if file.path in self.held:
                self.parked.append(ticket)
                return ticket
        if self.latency_s:
            threading.Thread(
                target=self._later, args=(ticket,), name="weightstream-fake", daemon=True
            ).start()
        else:
            self.answer(ticket)
        return ticket

    def _later(self, ticket: FakeTicket) -> None:
        time.sleep(self.latency_s)
        self.answer(ticket)

    def answer(self, ticket: FakeTicket) -> None:
        file, extent = ticket.file, ticket.extent
        if not self._take(ticket):
            return
        if file.blob.id in self.gone:
            ticket.reply((), ObjectChangedError(f"{file.blob.uri}: replaced"))
            return
        data = memoryview(made_bytes(file.path, file.blob.version, extent.stop))[extent.start :]
        half = len(data) // 2
        ticket.reply([data[:half], data[half:]], None)

    def _take(self, ticket: FakeTicket) -> bool:
        with self.lock:
            mine, ticket.answered = not ticket.answered, True
            if ticket in self.parked:
                self.parked.remove(ticket)
        return mine

    def cancel(self, ticket: FakeTicket) -> None:
        if self._take(ticket):
            ticket.reply((), LoadCancelled("interrupted"))

    def state(self, blob: Blob) -> FakeState:
        whole = blob.id in self.complete
        return FakeState("complete" if whole else "absent", blob.size if whole else 0)

    def gauges(self) -> dict[str, int]:
        return {"parked_reads": len(self.parked)}


@dataclass
class Fakes:
    """A scene of both; its public methods are what a test can call in the server's process."""

    directory: Path
    tree: FakeTree = field(default_factory=FakeTree)
    content: FakeContent = field(init=False)

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.content = FakeContent(self.directory)

    def put(self, path: str, size: int, version: str = "1", complete: bool = False) -> None:
        """Add or replace a file."""
        blob = Blob(f"{ROOT_URI}/{path}", size, version)
        if complete:
            self._store(path, blob)
        self.tree.change(path, File(path, blob, 1_700_000_000_123_456_789))

    def _store(self, path: str, blob: Blob) -> None:
        data = self.directory / blob.id
        if not data.exists():
            data.write_bytes(made_bytes(path, blob.version, blob.size))
            data.chmod(0o444)
        self.content.complete.add(blob.id)

    def remove(self, path: str) -> None:
        self.tree.change(path, None)

    def complete(self, path: str) -> None:
        """Have all of a file in the store."""
        blob = self.tree.files[path].blob
        self._store(path, blob)
        self.content.on_complete(blob)

    def evict(self, path: str) -> None:
        blob = self.tree.files[path].blob
        self.content.complete.discard(blob.id)
        (self.directory / blob.id).unlink()

    def lose(self, path: str) -> None:
        """Have the origin refuse the rest of this version."""
        self.content.gone.add(self.tree.files[path].blob.id)

    def hold(self, path: str) -> None:
        """Answer no read of a file until `let_go`."""
        self.content.held.add(path)

    def let_go(self, path: str) -> None:
        self.content.held.discard(path)
        for ticket in list(self.content.parked):
            if ticket.file.path == path:
                self.content.answer(ticket)

    def delay(self, latency_s: float) -> None:
        self.content.latency_s = latency_s

    def wait_in_open(self, path: str) -> None:
        self.content.waits_in_open.add(path)

    def end_open_waits(self) -> None:
        self.content.open_wait.set()

    def hang(self, path: str) -> None:
        self.tree.hung[path] = threading.Event()

    def unhang(self, path: str) -> None:
        self.tree.hung.pop(path).set()

    def fail(self, path: str) -> None:
        self.tree.failing.add(path)

    def expire(self, path: str) -> None:
        self.tree.listed.pop(path, None)

    def set_ttl(self, seconds: float) -> None:
        self.tree.ttl = seconds

    def listings(self) -> list[str]:
        return list(self.tree.listings)

    def reads(self) -> list[tuple[str, int, int]]:
        return list(self.content.reads)

    def parked(self) -> int:
        return len(self.content.parked)

    def opens(self) -> dict[str, int]:
        return {path: count for path, count in self.content.opens.items() if count}

    def ino(self, path: str) -> list[int]:
        """Return the node ids of a file: while it fills, and when it is complete."""
        from weightstream.cachefs.fuse.kernel.nodes import file_id, file_ino

        ino = file_ino(path, self.tree.files[path].blob.id)
        return [file_id(ino, complete=False), file_id(ino, complete=True)]


def fakes(directory: str, files: dict[str, Any]) -> Fakes:
    """Make a scene of files: {path: size} or {path: [size, version, complete]}."""
    scene = Fakes(Path(directory))
    for path, given in files.items():
        scene.put(path, *given) if isinstance(given, list) else scene.put(path, given)
    return scene
