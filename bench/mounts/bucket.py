"""What the mounted bucket holds: a model in shards and in one file, a wide tree, many files.

Made once in a folder of its own, beside the bucket of the load scenarios: ten thousand objects
would be listed by every client of those.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from weightstream.demo.checkpoint import Checkpoint, write_checkpoint

SHARDS = 4
TREE_FOLDERS, TREE_FILES = 100, 100
MANY = 500


@dataclass(frozen=True, slots=True)
class Bucket:
    """The parts, as paths relative to the bucket."""

    folder: Path  # of the bucket itself
    natives: Path  # where a copy of `whole` lies that no server holds in memory
    shards: tuple[str, ...]
    whole: str  # one file of about the same size
    tree: str  # a folder of 100 x 100 objects
    many: tuple[str, ...]

    def names(self, what: str) -> tuple[str, ...]:
        """Return the files of a part; none of the tree, which is listed and not read."""
        parts = {"whole": (self.whole,), "shards": self.shards, "many": self.many}
        return parts.get(what, ())

    def paths(self, names: tuple[str, ...], root: Path | None = None) -> tuple[Path, ...]:
        """Return files below a mount's directory, or the native ones."""
        return tuple((root or self.folder) / name for name in names)

    def size_bytes(self, *names: str) -> int:
        """Return the bytes of some files."""
        return sum((self.folder / name).stat().st_size for name in names)


def make_bucket(folder: Path, size_bytes: int) -> Bucket:
    """Write what is not there yet."""
    size = f"{size_bytes >> 20}mib"
    shards = write_checkpoint(folder / f"llama-{size}", size_bytes, SHARDS)
    whole = write_checkpoint(folder / f"whole-{size}", size_bytes, 1)
    return Bucket(
        folder,
        _copied(folder, whole),
        _names(folder, shards),
        _names(folder, whole)[0],
        _tree(folder / "tree"),
        _many(folder / f"many-{size}", size_bytes // MANY),
    )


def _names(folder: Path, model: Checkpoint) -> tuple[str, ...]:
    return tuple(path.relative_to(folder).as_posix() for path in model.files)


def _copied(folder: Path, model: Checkpoint) -> Path:
    """Copy the model beside the bucket."""
    natives = folder.with_name(f"{folder.name}-native")
    for path in model.files:
        copy = natives / path.relative_to(folder)
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, part := copy.with_suffix(".part"))
            part.replace(copy)
    return natives


def _tree(folder: Path) -> str:
    """Write small files in folders; the last one says that all are there."""
    last = folder / f"d{TREE_FOLDERS - 1:03}" / f"f{TREE_FILES - 1:03}"
    if not last.exists():
        for d in range(TREE_FOLDERS):
            (folder / f"d{d:03}").mkdir(parents=True, exist_ok=True)
            for f in range(TREE_FILES):
                (folder / f"d{d:03}" / f"f{f:03}").write_bytes(b"%d" % (d * TREE_FILES + f))
    return folder.name


def _many(folder: Path, size_bytes: int) -> tuple[str, ...]:
    """Write files of random bytes: each its own, so that none can stand in for another."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for i in range(MANY):
        path = folder / f"part-{i:03}.bin"
        if not path.exists() or path.stat().st_size != size_bytes:
            part = path.with_suffix(".part")
            part.write_bytes(os.urandom(size_bytes))
            part.replace(path)
        names.append(f"{folder.name}/{path.name}")
    return tuple(names)
