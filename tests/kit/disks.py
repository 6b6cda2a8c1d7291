"""Small disks of a test's own: tmpfs and ext4, filled and made read-only at will. Root only."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True, slots=True)
class Disk:
    """A mounted file system."""

    path: Path

    def fill(self) -> None:
        """Write a file named `ballast` that leaves less than 64 KiB."""
        block = bytes(64 << 10)
        with (self.path / "ballast").open("ab") as file:
            while (status := os.statvfs(self.path)).f_bavail * status.f_frsize >= len(block):
                file.write(block)
                file.flush()

    def set_read_only(self, read_only: bool) -> None:
        """Remount."""
        _run("mount", "-o", f"remount,{'ro' if read_only else 'rw'}", str(self.path))


@contextmanager
def small_disk(path: Path, size: int, kind: str = "tmpfs") -> Iterator[Disk]:
    """Mount a file system of `size` bytes at `path`; skip the test where that is not permitted."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    path.mkdir(parents=True, exist_ok=True)
    try:
        if kind == "tmpfs":
            _run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path))
        else:
            image = path.with_suffix(".img")
            with image.open("wb") as file:
                file.truncate(size)
            _run("mkfs.ext4", "-q", "-m", "0", str(image))
            _run("mount", "-o", "loop", str(image), str(path))
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        pytest.skip(f"mounting {kind} is not possible here: {error}")
    try:
        yield Disk(path)
    finally:
        _run("umount", "--lazy", str(path))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=30)
