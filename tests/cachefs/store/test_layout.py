"""Which directories are a store, and who may make one."""

import json
import os
from pathlib import Path

import pytest
from tests.cachefs.store.blobs import make_blob, open_store, store_blob
from tests.kit.processes import start_python

from weightstream.errors import ForeignStoreError, StoreReadOnlyError

OPEN = """
import sys
from pathlib import Path
from tests.cachefs.store.blobs import open_store
from weightstream.errors import WeightstreamError
try:
    with open_store(Path(sys.argv[1])) as store:
        emit(store.writable)
except WeightstreamError as error:
    emit(type(error).__name__)
"""


def test_a_store_is_private_to_its_user(tmp_path: Path) -> None:
    data = store_blob(tmp_path, make_blob())
    with open_store(tmp_path) as store:
        store.save_listing("s3://b", (make_blob(),))
    root = tmp_path / "store"
    modes = {path: path.stat().st_mode & 0o777 for path in [root, *root.rglob("*")]}
    assert data in modes
    for path, mode in modes.items():
        assert mode == (0o700 if path.is_dir() else 0o600), path


def test_a_directory_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.tex").touch()
    with pytest.raises(ForeignStoreError, match=r"not empty and has no format\.json"):
        open_store(tmp_path)
    assert os.listdir(tmp_path / "store") == ["thesis.tex"]


def test_an_empty_directory_and_a_fresh_file_system_are_taken(tmp_path: Path) -> None:
    (tmp_path / "store" / "lost+found").mkdir(parents=True)
    with open_store(tmp_path) as store:
        assert store.writable


@pytest.mark.parametrize(
    "marker", ["", "{", "[]", "{}", '{"weightstream_store": 2}', '{"weightstream_store": "1"}']
)
def test_another_marker_is_another_store(tmp_path: Path, marker: str) -> None:
    with open_store(tmp_path):
        pass
    (tmp_path / "store" / "format.json").write_text(marker)
    with pytest.raises(ForeignStoreError):
        open_store(tmp_path)


def test_a_file_is_not_a_store(tmp_path: Path) -> None:
    (tmp_path / "store").touch()
    with pytest.raises(ForeignStoreError, match="is not a directory"):
        open_store(tmp_path)


def test_many_processes_open_a_new_store_at_once(tmp_path: Path) -> None:
    children = [start_python(OPEN, tmp_path) for _ in range(8)]
    assert [child.result().value for child in children] == [True] * 8
    for child in children:
        child.__exit__(None, None, None)
    marker = tmp_path / "store" / "format.json"
    assert json.loads(marker.read_text()) == {"weightstream_store": 1}
    assert sorted(os.listdir(marker.parent)) == ["format.json", "lock"]


def test_the_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with open_store(tmp_path, store=Path("~/store")) as store:
        assert store.path == tmp_path / "store"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_store_cannot_be_made_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StoreReadOnlyError):
        open_store(tmp_path)
