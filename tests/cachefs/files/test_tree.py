"""The tree: what it shows, when it asks, whom it tells."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.cachefs.files.conftest import FILES, Planted
from tests.cachefs.files.origins import ROOT, WAIT_S, Origin
from tests.conftest import LogWatch

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.files.entries import File, Folder
from weightstream.cachefs.files.listings import Listing, Listings
from weightstream.cachefs.files.tree import Change, Tree
from weightstream.cachefs.origin import FolderListing, Listed
from weightstream.errors import (
    AccessDeniedError,
    LoadCancelled,
    NotFoundError,
    OriginError,
    UnavailableError,
)
from weightstream.settings import Settings


def test_files_and_folders(planted: Planted) -> None:
    tree = planted.tree
    config = File("config.json", Blob(f"{ROOT}/config.json", 2, "v1"), 5)
    assert tree.children("") == (config, Folder("llama"), Folder("qwen"))
    assert [entry.path for entry in tree.children("llama")] == [
        "llama/a.safetensors",
        "llama/b.safetensors",
        "llama/deep",
    ]
    assert tree.entry("") == Folder("")
    assert tree.entry("config.json") == config
    assert tree.entry("llama/deep") == Folder("llama/deep")
    assert (tree.entry("llama/deep") or config).folder == "llama"
    assert tree.entry("llama/nope") is None
    assert tree.entry("nope/at/all") is None


def test_each_folder_is_asked_for_once_within_the_ttl(planted: Planted) -> None:
    assert planted.tree.peek("") is None
    assert planted.tree.ttl_s("") == 0.0
    for _ in range(3):
        assert planted.names() == ["config.json", "llama", "qwen"]
        assert planted.tree.entry("llama/a.safetensors") is not None
    assert planted.asked() == ["", "llama"]
    assert planted.tree.ttl_s("") == 60.0
    planted.clock.now_s += 59.0
    assert planted.tree.peek("") is planted.tree.children("")
    assert planted.tree.ttl_s("") == 1.0
    assert planted.asked() == []
    planted.clock.now_s += 1.0
    assert planted.tree.peek("") is None
    assert planted.tree.ttl_s("") == 0.0
    before = planted.tree.children("llama")
    assert planted.asked() == ["llama"]
    assert planted.tree.peek("llama") is before


def test_a_ttl_of_nothing_asks_always(tmp_path: Path) -> None:
    origin = Origin(dict(FILES))
    tree = Tree(ROOT, origin, Settings(store=tmp_path, listing_ttl_s=0.0), None, lambda _: None)
    tree.children("")
    origin.files["new"] = "v1"
    assert tree.entry("new") is not None
    assert origin.asked == ["", ""]
    tree.close()


def test_what_a_fresh_folder_does_not_hold_is_not_asked_for(planted: Planted) -> None:
    planted.names()
    planted.asked()
    assert planted.names("nope") == []
    assert planted.tree.entry("nope/x") is None
    assert planted.names("config.json") == []  # a file
    assert planted.asked() == []


@pytest.mark.parametrize("path", ["..", "a/../..", ".", "a//b", "/", "a/", "nul\0", "x" * 300])
def test_no_path_leads_out(planted: Planted, path: str) -> None:
    assert planted.tree.children(path) == ()
    assert planted.tree.entry(f"{path}/x") is None
    assert planted.asked() == []


def test_a_folder_that_is_not_there(planted: Planted) -> None:
    assert planted.tree.children("nope") == ()
    assert planted.tree.children("nope") == ()
    assert planted.asked() == ["nope"]
    planted.origin.files["nope/x"] = "v1"
    planted.clock.now_s += 60.0
    assert planted.names("nope") == ["x"]


def test_changes_are_told(planted: Planted) -> None:
    planted.look("", "llama", "llama/deep")
    assert planted.told() == []  # what was never shown did not change
    files = planted.origin.files
    files["llama/a.safetensors"] = "v2"
    del files["llama/b.safetensors"]
    files["llama/new.bin"] = "v1"
    del files["llama/deep/c.bin"]
    planted.clock.now_s += 60.0
    before = planted.tree.entry("qwen")
    assert planted.names("llama") == ["a.safetensors", "new.bin"]
    assert planted.tree.refresh() == 2  # the root and llama: deep went with its name
    assert planted.told() == [
        ("llama", "a.safetensors"),
        ("llama", "b.safetensors"),
        ("llama", "deep"),
        ("llama", "new.bin"),
    ]
    assert planted.tree.entry("qwen") is before
    assert planted.tree.peek("llama/deep") is None


def test_a_folder_that_vanished(planted: Planted) -> None:
    planted.look("", "llama")
    for name in [name for name in planted.origin.files if name.startswith("llama/")]:
        del planted.origin.files[name]
    assert planted.tree.refresh("llama") == 1
    assert planted.told() == [
        ("llama", name) for name in ("a.safetensors", "b.safetensors", "deep")
    ]
    assert planted.names("llama") == []
    assert planted.names() == ["config.json", "qwen"]  # asked again: it named llama
    assert planted.tree.refresh() == 1
    assert planted.told() == [("", "llama")]


def test_a_file_becomes_a_folder(planted: Planted) -> None:
    planted.names()
    del planted.origin.files["config.json"]
    planted.origin.files["config.json/x"] = "v1"
    planted.tree.refresh()
    assert planted.told() == [("", "config.json")]
    assert planted.tree.entry("config.json") == Folder("config.json")
    assert planted.names("config.json") == ["x"]


def test_another_date_is_no_change(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    before = planted.tree.entry("config.json")
    assert isinstance(before, File)
    listing = FolderListing(("llama", "qwen"), (Listed(before.blob, 99),))
    monkeypatch.setattr(planted.origin, "list_folder", lambda uri: listing)
    planted.tree.refresh()
    after = planted.tree.entry("config.json")
    assert isinstance(after, File)
    assert (after.blob, after.modified_ns) == (before.blob, 99)
    assert planted.told() == []


# Refreshing.


def test_refresh_asks_for_what_was_known(planted: Planted) -> None:
    for path in ("", "llama", "llama/deep", "qwen"):
        planted.names(path)
    planted.asked()
    assert planted.tree.refresh("llama") == 2
    assert sorted(planted.asked()) == ["llama", "llama/deep"]
    assert planted.tree.refresh() == 4
    assert sorted(planted.asked()) == ["", "llama", "llama/deep", "qwen"]
    assert planted.tree.refresh("llama/a.safetensors") == 1  # a file: its folder
    assert planted.asked() == ["llama"]
    planted.origin.files["llama/new/x"] = "v1"
    assert planted.tree.refresh("llama/new") == 1  # not known: where it would be
    assert planted.names("llama/new") == ["x"]


def test_refresh_of_a_tree_that_knows_nothing(planted: Planted) -> None:
    assert planted.tree.refresh() == 0
    assert planted.tree.refresh("llama/deep") == 0
    assert planted.asked() == []


def test_refresh_of_many_folders(planted: Planted) -> None:
    planted.origin.files = {f"f{i}/x": "v1" for i in range(40)}
    planted.names()
    for i in range(40):
        planted.names(f"f{i}")
    planted.origin.files = {f"f{i}/x": f"v{i}" for i in range(20)}
    assert planted.tree.refresh() == 21
    told = planted.told()
    assert sorted(told) == sorted(
        [("", f"f{i}") for i in range(20, 40)] + [(f"f{i}", "x") for i in range(20) if i != 1]
    )


def test_an_answer_from_before_a_refresh_does_not_count(planted: Planted) -> None:
    planted.names()
    planted.clock.now_s += 60.0
    with ThreadPoolExecutor(1, "weightstream-test") as pool:
        with planted.origin.held("") as gate:
            early = pool.submit(planted.names)
            gate.wait_for_one()  # the listing is made, and held back
            planted.origin.pass_on("")
            planted.origin.files["new"] = "v1"
            assert planted.tree.refresh() == 1
            assert "new" in planted.names()
        assert "new" not in early.result(WAIT_S)  # as it was when it was asked for
    assert "new" in planted.names()
    assert planted.told() == [("", "new")]


def test_a_first_listing_from_before_a_refresh_does_not_count(planted: Planted) -> None:
    planted.names()
    with ThreadPoolExecutor(1, "weightstream-test") as pool:
        with planted.origin.held("llama") as gate:
            early = pool.submit(planted.names, "llama")
            gate.wait_for_one()
            planted.origin.files["llama/new"] = "v1"
            planted.tree.refresh()
        assert "new" not in early.result(WAIT_S)
    assert "new" in planted.names("llama")


def test_a_refresh_waits_until_earlier_differences_are_told(tmp_path: Path) -> None:
    origin, come, go = Origin(dict(FILES)), threading.Event(), threading.Event()
    told: list[str] = []

    def tell(changes: Sequence[Change]) -> None:
        come.set()
        assert go.wait(WAIT_S)
        told.extend(change.name for change in changes)

    tree = Tree(ROOT, origin, Settings(store=tmp_path, listing_ttl_s=0.0), None, tell)
    tree.children("")
    origin.files["new"] = "v1"
    assert tree.entry("new") is not None  # answered before it is told
    assert come.wait(WAIT_S)
    with ThreadPoolExecutor(1, "weightstream-test") as pool:
        refreshed = pool.submit(tree.refresh)
        while len(origin.asked) < 3 or tree._flights:
            threading.Event().wait(0.002)
        assert not refreshed.done()
        go.set()
        assert refreshed.result(WAIT_S) == 1
    assert told == ["new"]
    tree.close()


# Threads.


def test_many_readers_ask_once(planted: Planted) -> None:
    together = threading.Barrier(16, timeout=WAIT_S)

    def ask() -> list[str]:
        together.wait()
        return planted.names("llama")

    with ThreadPoolExecutor(16, "weightstream-test") as pool, planted.origin.held("llama") as gate:
        found = [pool.submit(ask) for _ in range(16)]
        gate.wait_for_one()
        assert planted.names() == ["config.json", "llama", "qwen"]  # nobody else waits
        assert planted.tree.peek("llama") is None
        assert planted.tree.ttl_s("llama") == 0.0
        assert not any(future.done() for future in found)
        gate.open.set()
        answers = [future.result(WAIT_S) for future in found]
    assert all(answer == ["a.safetensors", "b.safetensors", "deep"] for answer in answers)
    assert planted.asked().count("llama") == 1


def test_who_waits_too_long_gets_an_error_and_the_next_one_the_answer(tmp_path: Path) -> None:
    origin = Origin(dict(FILES))
    settings = Settings(store=tmp_path, deadline_s=0.05)
    tree = Tree(ROOT, origin, settings, None, lambda _: None)
    with origin.held("llama"), pytest.raises(UnavailableError, match=f"{ROOT}/llama: no listing"):
        tree.children("llama")
    while tree.peek("llama") is None:
        threading.Event().wait(0.002)
    assert len(tree.children("llama")) == 3
    assert origin.asked == ["llama"]
    tree.close()


def test_what_was_listed_before_is_shown_while_a_listing_takes_long(
    planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightstream.cachefs.files.tree.STALE_PATIENCE_S", 0.02)
    before = planted.tree.children("llama")
    planted.clock.now_s += 60.0
    planted.origin.files["llama/new"] = "v1"
    with planted.origin.held("llama") as gate:
        assert planted.tree.children("llama") is before
        assert planted.tree.children("llama") is before
        gate.wait_for_one()
        assert planted.asked() == ["llama", "llama"]  # the first, and one that takes long
    while planted.tree.peek("llama") is None:
        threading.Event().wait(0.002)
    assert "new" in planted.names("llama")


def test_closing_wakes_who_waits(planted: Planted) -> None:
    with ThreadPoolExecutor(2, "weightstream-test") as pool, planted.origin.held("llama") as gate:
        waiting = [pool.submit(planted.tree.children, "llama") for _ in range(2)]
        gate.wait_for_one()
        planted.tree.close()
        for future in waiting:
            with pytest.raises(LoadCancelled):
                future.result(WAIT_S)
    with pytest.raises(LoadCancelled):
        planted.tree.children("")
    with pytest.raises(LoadCancelled):
        planted.tree.refresh()
    assert planted.tree.peek("llama") is None


def test_a_storm_of_readers_and_changes(planted: Planted) -> None:
    """Every answer is one that was true at some time, and the last one is true now."""
    stop = threading.Event()

    def read() -> int:
        count = 0
        while not stop.is_set():
            names = planted.names("llama")
            assert names == sorted(names)
            assert {"a.safetensors", "b.safetensors", "deep"} <= set(names)
            count += 1
        return count

    with ThreadPoolExecutor(4, "weightstream-test") as pool:
        readers = [pool.submit(read) for _ in range(4)]
        for i in range(60):
            planted.origin.files = {**FILES, f"llama/new{i}": "v1"}
            if i % 3:
                planted.clock.now_s += 61.0
            else:
                planted.tree.refresh()
        stop.set()
        assert all(reader.result(WAIT_S) for reader in readers)
    planted.tree.refresh()
    assert "new59" in planted.names("llama")


# An origin that says no.


def test_no_access(planted: Planted) -> None:
    planted.look("", "llama", "llama/deep")
    planted.clock.now_s += 60.0
    planted.origin.failure = lambda path: (
        AccessDeniedError(f"{path}: no") if path == "llama" else None
    )
    with pytest.raises(AccessDeniedError, match="llama: no"):
        planted.tree.children("llama")
    assert planted.tree.peek("llama") is None
    assert planted.tree.peek("llama/deep") is None
    assert planted.names() == ["config.json", "llama", "qwen"]
    assert planted.tree.refresh() == 1
    assert [name for folder, name in planted.told() if folder == "llama"] == [
        "a.safetensors",
        "b.safetensors",
        "deep",
    ]
    planted.origin.answer()
    assert planted.names("llama") == ["a.safetensors", "b.safetensors", "deep"]


def test_an_error_that_says_nothing_of_the_folder(planted: Planted) -> None:
    before = planted.tree.children("")
    planted.clock.now_s += 60.0
    planted.origin.failure = lambda path: OriginError("what?")
    with pytest.raises(OriginError, match=r"what\?"):
        planted.tree.children("")
    with pytest.raises(OriginError, match=r"what\?"):
        planted.tree.refresh()
    planted.origin.answer()
    assert planted.tree.children("") is before


def test_a_bug_is_told_to_who_asked(planted: Planted, expect_log: LogWatch) -> None:
    expect_log(f"{ROOT}: listing 'llama' failed")
    planted.origin.failure = lambda path: ZeroDivisionError("oh")
    with pytest.raises(ZeroDivisionError):
        planted.tree.children("llama")
    planted.origin.answer()
    assert planted.names("llama")


# Roots.


def test_a_root_that_is_one_file(tmp_path: Path) -> None:
    origin = Origin({})
    origin.single = (Blob(f"{ROOT}/m.bin", 7, "v"),)
    tree = Tree(f"{ROOT}/m.bin", origin, Settings(store=tmp_path), None, lambda _: None)
    assert tree.children("") == (File("m.bin", origin.single[0], 0),)
    assert tree.entry("m.bin") == File("m.bin", origin.single[0], 0)
    assert tree.entry("other") is None
    tree.require_root()
    tree.close()


def test_a_root_that_is_not_there(tmp_path: Path) -> None:
    origin = Origin({})
    tree = Tree(ROOT, origin, Settings(store=tmp_path), None, lambda _: None)
    with pytest.raises(NotFoundError, match=ROOT):
        tree.require_root()
    assert tree.children("") == ()
    origin.single = (Blob(f"{ROOT}/deeper/m.bin", 7, "v"),)  # not the root itself
    with pytest.raises(NotFoundError, match="not a folder"):
        tree.require_root()
    tree.close()


def test_the_root_is_asked_for(planted: Planted) -> None:
    planted.tree.require_root()
    assert planted.asked() == [""]
    assert planted.names() == ["config.json", "llama", "qwen"]
    assert planted.asked() == []


# Memory.


def test_folders_listed_longest_ago_are_forgotten_first() -> None:
    known = Listings(max_entries=10)

    def put(path: str, count: int) -> None:
        known.put(path, Listing(tuple(Folder(f"{path}/{i}") for i in range(count)), 0.0))

    for path in ("a", "b", "c"):
        put(path, 2)
    assert len(known) == 9
    put("a", 2)
    put("d", 2)
    assert [path for path, _ in known.items()] == ["c", "a", "d"]
    put("huge", 100)
    assert [path for path, _ in known.items()] == ["huge"]  # one folder is shown whole
    known.drop("huge")
    assert len(known) == 0
    for i in range(100):
        put(f"empty{i}", 0)
    assert len(known) == 10


def test_paths_below() -> None:
    known = Listings()
    for path in ("a/b", "ab", "", "a/b/c", "a", "a b"):
        known.put(path, Listing((), 0.0))
    assert known.below("a") == ["a", "a/b", "a/b/c"]
    assert known.below("") == ["", "a", "a b", "ab", "a/b", "a/b/c"]
    assert known.below("a/b/c/d") == []
    known.drop_below({"a/b"})
    assert known.below("") == ["", "a", "a b", "ab"]
