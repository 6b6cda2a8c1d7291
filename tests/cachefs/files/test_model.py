"""The tree against a plain model, while others put, replace and delete.

What a kernel remembers is what it was shown, less what it was told has changed. After a refresh
that must be true of the origin, and walking the tree must give exactly what is there.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tests.cachefs.files.origins import Clock
from tests.cachefs.origin.servers import Notes
from tests.kit.s3 import S3Server, storage_options

from weightstream.cachefs.files.tree import Change, Entry, File, Folder, Tree
from weightstream.cachefs.origin import Origin, open_origin
from weightstream.settings import Settings

NAMES = st.sampled_from(["a", "b", "c d", "ü", "+%41"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)
DATA = st.binary(max_size=3)


class TreeMachine(RuleBasedStateMachine):
    """A folder on disk, a model of it, a tree over it and what a kernel would remember."""

    def __init__(self, folder: Path, changed: Callable[[], None], origin: Origin) -> None:
        super().__init__()
        self.folder = folder
        self.changed = changed
        self.origin = origin
        self.model: dict[str, bytes] = {}
        self.clock = Clock()
        self.settings = Settings(store=folder.parent, listing_ttl_s=60.0)
        self.snapshot = folder.with_name(f"{folder.name}.snapshot")
        self.remembered: dict[str, Entry] = {}
        self.tree = self.opened()

    def opened(self) -> Tree:
        return Tree(
            self.origin.uri,
            self.origin,
            self.settings,
            self.snapshot,
            self.told,
            clock=self.clock,
        )

    def told(self, changes: Sequence[Change]) -> None:
        for change in changes:
            path = f"{change.folder}/{change.name}" if change.folder else change.name
            for known in [k for k in self.remembered if k == path or k.startswith(f"{path}/")]:
                del self.remembered[known]

    def teardown(self) -> None:
        self.tree.close()
        self.snapshot.unlink(missing_ok=True)
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        self.changed()

    @rule(path=PATHS, data=DATA)
    def put(self, path: str, data: bytes) -> None:
        parts = path.split("/")
        above = {"/".join(parts[:i]) for i in range(1, len(parts))}
        if above & set(self.model) or any(known.startswith(f"{path}/") for known in self.model):
            return  # a file where a folder is: no directory holds that
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = self.folder.with_name(f"{self.folder.name}.partial")
        partial.write_bytes(data)
        partial.replace(target)
        self.model[path] = data
        self.changed()

    @precondition(lambda self: self.model)
    @rule(choice=st.integers(0, 1 << 16))
    def delete(self, choice: int) -> None:
        path = sorted(self.model)[choice % len(self.model)]
        del self.model[path]
        (self.folder / path).unlink()
        for parent in Path(path).parents:
            if os.listdir(self.folder / parent) or parent == Path():
                break
            (self.folder / parent).rmdir()
        self.changed()

    @rule(path=PATHS)
    def look(self, path: str) -> None:
        """Remember what is shown, true or not: it is at most as old as the TTL."""
        entry = self.tree.entry(path)
        if entry is not None:
            self.remembered[path] = entry
        for child in self.tree.children(path.rpartition("/")[0]):
            self.remembered[child.path] = child

    @rule()
    def time_passes(self) -> None:
        self.clock.now_s += 60.0

    @rule()
    def restart(self) -> None:
        self.tree.close()
        self.tree = self.opened()

    @rule()
    def refresh(self) -> None:
        self.tree.refresh()
        shown = self.walk("")
        assert {path: entry for path, entry in shown.items() if isinstance(entry, File)}.keys() == (
            self.model.keys()
        )
        for path, data in self.model.items():
            entry = shown[path]
            assert isinstance(entry, File)
            into = bytearray(entry.blob.size)
            self.origin.read_into(entry.blob, 0, memoryview(into), Notes())
            assert into == data
        for path, entry in self.remembered.items():
            assert shown.get(path) == entry or _same_version(shown.get(path), entry)

    def walk(self, path: str) -> dict[str, Entry]:
        found: dict[str, Entry] = {}
        for entry in self.tree.children(path):
            found[entry.path] = entry
            if isinstance(entry, Folder):
                found |= self.walk(entry.path)
        return found

    @invariant()
    def what_is_shown_without_asking_is_whole(self) -> None:
        for path in ("", "a"):
            entries = self.tree.peek(path)
            names = [entry.name for entry in entries or ()]
            assert names == sorted(set(names))


def _same_version(now: Entry | None, then: Entry) -> bool:
    return isinstance(now, File) and isinstance(then, File) and now.blob == then.blob


def run(
    folder: Path, changed: Callable[[], None], origin: Origin, *, examples: int, steps: int
) -> None:
    class Machine(TreeMachine):
        def __init__(self) -> None:
            super().__init__(folder, changed, origin)

    run_state_machine_as_test(
        Machine,
        settings=hypothesis_settings(
            max_examples=examples, stateful_step_count=steps, deadline=None
        ),
    )


def test_against_a_directory(tmp_path: Path) -> None:
    folder = tmp_path / "root"
    folder.mkdir()
    origin = open_origin(folder, Settings(store=tmp_path))
    run(folder, lambda: None, origin, examples=60, steps=25)


def test_against_a_bucket(s3: S3Server, tmp_path: Path) -> None:
    folder = Path(tempfile.mkdtemp(dir=s3.root, prefix="model-"))
    s3.forget()
    origin = open_origin(f"s3://{folder.name}", Settings(store=tmp_path), storage_options(s3.url))
    run(folder, s3.forget, origin, examples=30, steps=25)
    origin.close()
