"""Files of this machine, and whatever else fsspec knows."""

import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import fsspec
import pytest
from tests.cachefs.origin.servers import Notes

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.origin import open_origin
from weightstream.cachefs.origin.generic import version_of
from weightstream.errors import (
    NotFoundError,
    ObjectChangedError,
    ProtocolError,
    UsageError,
)
from weightstream.settings import Settings

DATA = bytes(range(256)) * 10_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model dir"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.safetensors").write_bytes(DATA)
    (folder / "sub" / "b%20.bin").write_bytes(b"b")
    (folder / "empty").write_bytes(b"")
    (folder / "link.bin").symlink_to(folder / "sub" / "b%20.bin")
    return folder


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_listing_and_reading(folder: Path, settings: Settings, scheme: str) -> None:
    origin = open_origin(f"{scheme}{folder}/", settings)
    assert origin.uri == f"file://{folder}"
    blobs = {blob.uri.removeprefix(f"file://{folder}/"): blob for blob in origin.list(origin.uri)}
    assert list(blobs) == ["a.safetensors", "empty", "link.bin", "sub/b%20.bin"]
    blob, into, notes = blobs["a.safetensors"], bytearray(len(DATA) - 5), Notes()
    origin.read_into(blob, 5, memoryview(into), notes)
    assert into == DATA[5:]
    assert sum(notes.advanced) == len(into)
    assert len(notes.advanced) > 1
    assert origin.local_path(blob) == folder / "a.safetensors"
    assert origin.checksum(blob) is None


def test_links_that_go_in_circles(folder: Path, settings: Settings) -> None:
    (folder / "sub" / "up").symlink_to(folder)
    names = [blob.name for blob in open_origin(folder, settings).list(str(folder))]
    assert sorted(names) == ["a.safetensors", "b%20.bin", "empty", "link.bin"]


def test_pathlike_relative_and_single_file(
    folder: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    origin = open_origin(Path("a.safetensors"), settings)
    (blob,) = origin.list(origin.uri)
    assert blob.uri == f"file://{folder}/a.safetensors"


def test_a_replaced_file_is_found_out(folder: Path, settings: Settings) -> None:
    origin = open_origin(folder, settings)
    (blob,) = origin.list(f"{folder}/a.safetensors")
    (folder / "new").write_bytes(DATA)
    os.replace(folder / "new", folder / "a.safetensors")
    with pytest.raises(ObjectChangedError, match=r"a\.safetensors: bytes 0-9: file: "):
        origin.read_into(blob, 0, memoryview(bytearray(10)), Notes())


def test_a_file_that_changes_under_the_read(folder: Path, settings: Settings) -> None:
    origin = open_origin(folder, settings)
    (blob,) = origin.list(f"{folder}/a.safetensors")

    def truncate(count: int) -> None:
        os.truncate(folder / "a.safetensors", 1 << 20)

    with pytest.raises((ObjectChangedError, ProtocolError), match=r"ended after|changed"):
        origin.read_into(blob, 0, memoryview(bytearray(len(DATA))), Notes(on_advance=truncate))


def test_missing(folder: Path, settings: Settings) -> None:
    with pytest.raises(NotFoundError, match="no such file or directory"):
        open_origin(folder / "nope", settings).list(f"{folder}/nope")
    with pytest.raises(NotFoundError, match="bytes 0-0: file"):
        open_origin(folder, settings).read_into(
            Blob(f"file://{folder}/nope", 1, "v"), 0, memoryview(bytearray(1)), Notes()
        )
    (folder / "void").mkdir()
    with pytest.raises(NotFoundError, match="no file is there"):
        open_origin(folder / "void", settings).list(f"{folder}/void")


def test_no_permission() -> None:
    """In a process without root's powers, where the test itself has them."""
    code = """
import os, sys
from weightstream.cachefs.origin.local import LocalOrigin
from weightstream.errors import AccessDeniedError
from tests.cachefs.origin.servers import Notes
if os.geteuid() == 0: os.setuid(65534)
origin = LocalOrigin(sys.argv[1])
blob = origin.list(sys.argv[1])[0]
try: origin.read_into(blob, 0, memoryview(bytearray(1)), Notes())
except AccessDeniedError as error: print(error)
"""
    src = next(path for path in sys.path if path.endswith("src"))
    env = {"PYTHONPATH": os.pathsep.join([src, os.getcwd()])}
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"x")
        file.flush()
        os.chmod(file.name, 0)
        done = subprocess.run(
            [sys.executable, "-c", code, file.name],
            capture_output=True,
            text=True,
            env=env,
            timeout=60,
        )
        assert f"{file.name}: bytes 0-0: file: " in done.stdout, done.stderr


def test_anything_that_fsspec_knows(settings: Settings) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/origin-test/dir/a.bin", DATA)
    memory.pipe("/origin-test/b.bin", b"b")
    origin = open_origin("memory://origin-test", settings)
    blobs = origin.list(origin.uri)
    assert [blob.uri for blob in blobs] == [
        "memory:///origin-test/b.bin",
        "memory:///origin-test/dir/a.bin",
    ]
    into, notes = bytearray(1000), Notes()
    origin.read_into(blobs[1], 100, memoryview(into), notes)
    assert into == DATA[100:1100]
    memory.pipe("/origin-test/dir/a.bin", DATA)
    with pytest.raises(ObjectChangedError):
        origin.read_into(blobs[1], 100, memoryview(into), Notes())
    with pytest.raises(NotFoundError):
        origin.list("memory://origin-test/none")


def test_versions_of_details() -> None:
    assert version_of({"ETag": '"abc"', "mtime": 5}) == "abc"
    assert version_of({"mtime": 5.5}) == "5.5"
    assert version_of({"content_md5": b"\1\2"}) == "0102"
    assert version_of({"size": 5}) == ""


def test_a_missing_extra_says_what_to_install(settings: Settings) -> None:
    if find_spec("adlfs"):
        pytest.skip("adlfs is installed")
    with pytest.raises(UsageError, match=r"pip install 'weightstream\[azure\]'"):
        open_origin("az://container/x", settings).list("az://container/x")
