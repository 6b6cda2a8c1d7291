"""Trees over an origin in memory, with a clock that stands still."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from tests.cachefs.files.origins import ROOT, Clock, Origin

from weightstream.cachefs.files.tree import Change, Tree
from weightstream.settings import Settings

FILES = {
    "config.json": "v1",
    "llama/a.safetensors": "v1",
    "llama/b.safetensors": "v1",
    "llama/deep/c.bin": "v1",
    "qwen/a.safetensors": "v1",
}


class Planted:
    """A tree, its origin, its clock, and what it said of changes."""

    def __init__(self, folder: Path) -> None:
        self.origin = Origin(dict(FILES))
        self.clock = Clock()
        self.changes: list[Change] = []
        self.snapshot_path = folder / "run" / "tree.snapshot"
        self.settings = Settings(store=folder, listing_ttl_s=60.0, deadline_s=20.0)
        self._opened: list[Tree] = []
        self.tree = self.restarted()

    def restarted(self) -> Tree:
        """Return the tree of another server over the same origin and snapshot."""
        if self._opened:
            self._opened[-1].close()
        self.tree = Tree(
            ROOT, self.origin, self.settings, self.snapshot_path, self._told, clock=self.clock
        )
        self._opened.append(self.tree)
        return self.tree

    def _told(self, changes: Sequence[Change]) -> None:
        self.changes += changes

    def names(self, path: str = "") -> list[str]:
        """Return the names in a folder."""
        return [entry.name for entry in self.tree.children(path)]

    def look(self, *paths: str) -> None:
        """Have these folders known."""
        for path in paths:
            self.tree.children(path)

    def asked(self) -> list[str]:
        """Return the folders that were asked for since this was called last."""
        asked, self.origin.asked = self.origin.asked, []
        return asked

    def told(self) -> list[tuple[str, str]]:
        """Return the changes that were told since this was called last."""
        told, self.changes = self.changes, []
        return [(change.folder, change.name) for change in told]

    def close(self) -> None:
        self._opened[-1].close()


@pytest.fixture
def planted(tmp_path: Path) -> Iterator[Planted]:
    made = Planted(tmp_path)
    yield made
    made.close()


@pytest.fixture
def until() -> Callable[[Callable[[], bool]], None]:
    """Wait for a condition, long."""

    def wait(condition: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline_s
            time.sleep(0.002)

    return wait
