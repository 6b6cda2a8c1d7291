"""An origin in memory, whose listings can be counted, held up and refused."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.origin import Checksum, FolderListing, Listed, Listing
from weightstream.cachefs.origin.base import folder_listing
from weightstream.errors import NotFoundError, UnavailableError

if TYPE_CHECKING:
    from weightstream.cachefs.fetch.source import Transfer

ROOT = "mem://root"
WAIT_S = 60.0


class Clock:
    """Time that stands still until it is moved."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Gate:
    """Where listings wait, when they were made and before they are told."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.come = threading.Semaphore(0)

    def wait_for_one(self) -> None:
        """Wait until one more has come."""
        assert self.come.acquire(timeout=WAIT_S)


class Origin:
    """Files by path under `mem://root`; the value is the version."""

    name = "origin"
    uri = ROOT
    host = "memory"

    def __init__(self, files: dict[str, str]) -> None:
        self.files = files
        self.asked: list[str] = []
        self.failure: Callable[[str], BaseException | None] = lambda path: None
        self.single: Listing = ()
        self._gates: dict[str, Gate] = {}

    def list_folder(self, uri: str) -> FolderListing:
        path = uri.removeprefix(ROOT).removeprefix("/")
        self.asked.append(path)
        gate = self._gates.get(path)
        listing = self._listing(path)
        if gate is not None:
            gate.come.release()
            assert gate.open.wait(WAIT_S)
        failure = self.failure(path)
        if failure is not None:
            raise failure
        if not listing.folders and not listing.files:
            raise NotFoundError(f"{uri}: nothing is there")
        return listing

    def _listing(self, path: str) -> FolderListing:
        prefix = f"{path}/" if path else ""
        rest = {
            name.removeprefix(prefix): version
            for name, version in self.files.items()
            if name.startswith(prefix)
        }
        folders = {name.partition("/")[0] for name in rest if "/" in name}
        files = [
            Listed(Blob(f"{ROOT}/{prefix}{name}", len(version), version), 5)
            for name, version in rest.items()
            if "/" not in name
        ]
        return folder_listing(folders, files)

    @contextmanager
    def held(self, path: str) -> Iterator["Gate"]:
        """Hold the answers for one folder back."""
        gate = self._gates[path] = Gate()
        try:
            yield gate
        finally:
            self.pass_on(path)
            gate.open.set()

    def pass_on(self, path: str) -> None:
        """Hold no new ones back; those that are held stay held."""
        self._gates.pop(path, None)

    def silence(self) -> None:
        """Answer nothing any more."""
        self.failure = lambda path: UnavailableError(f"{ROOT}/{path}: memory: no route")

    def answer(self) -> None:
        """Answer again."""
        self.failure = lambda path: None

    def list(self, uri: str) -> Listing:
        if not self.single:
            raise NotFoundError(f"{uri}: nothing is there")
        return self.single

    def read_into(self, blob: Blob, start: int, into: memoryview, transfer: "Transfer") -> None:
        raise AssertionError("a tree reads nothing")

    def checksum(self, blob: Blob) -> Checksum | None:
        return None

    def local_path(self, blob: Blob) -> Path | None:
        return None

    def close(self) -> None:
        pass
