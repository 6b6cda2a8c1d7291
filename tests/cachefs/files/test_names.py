"""Which names a mount shows, and how two listings differ."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.files.entries import (
    Change,
    Entry,
    File,
    Folder,
    find,
    lost_folders,
    reconcile,
)
from weightstream.cachefs.files.names import Sifted, flaw, is_path, name_in_uri, sift, some, uri_of
from weightstream.cachefs.origin import FolderListing, Listed
from weightstream.cachefs.origin.base import folder_listing


def listing(folders: Sequence[str], *names: str) -> FolderListing:
    files = [Listed(Blob(f"s3://b/x/{name}", 1, "v"), None) for name in names]
    return folder_listing(folders, files)


def sifted(folders: Sequence[str], *names: str) -> Sifted:
    return sift("x", listing(folders, *names), web=False)


def file(path: str, version: str = "v", modified_ns: int = 0) -> File:
    return File(path, Blob(f"s3://b/{path}", 1, version), modified_ns)


@pytest.mark.parametrize(
    "name",
    [
        *("a", "...", "..a", " ", "new\nline", "tab\t", "\x01\x7f", "q?x=1", "per%2Fcent", "-rf"),
        *("back\\slash", "'\"$(x)`", "~", "ü", "\U0001f600", "\ufffd", "x" * 255, "ü" * 127),
    ],
)
def test_names_that_are_shown(name: str) -> None:
    assert flaw(name) == ""
    found = sifted([name], "other")
    assert Folder(f"x/{name}") in found.entries
    assert not found.hidden


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "empty"),
        (".", "folder itself"),
        ("..", "leads up"),
        ("a/b", "slash"),
        ("/", "slash"),
        ("nul\0", "NUL"),
        ("\udcff", "not UTF-8"),
        ("x" * 256, "longer than 255"),
        ("ü" * 128, "longer than 255"),
    ],
)
def test_names_that_are_left_out(name: str, why: str) -> None:
    assert why in flaw(name)
    found = sifted([name], "other")
    assert [entry.path for entry in found.entries] == ["x/other"]
    assert [(hidden.name, hidden.why) for hidden in found.hidden] == [(name, flaw(name))]
    assert not is_path(f"a/{name}/b") or "/" in name.strip("/")
    if "/" not in name:  # the origin's lists have no name with a slash for a file
        assert [entry.path for entry in sifted([], name, "other").entries] == ["x/other"]


def test_a_folder_wins_over_a_file() -> None:
    found = sifted(["a", "b"], "b", "c")
    assert found.entries == (Folder("x/a"), Folder("x/b"), file("x/c"))
    assert [str(hidden) for hidden in found.hidden] == ["'b' (a folder has the same name)"]


def test_two_files_of_one_name() -> None:
    files = [Listed(Blob(f"http://h/x/{name}", 1, "v"), 7) for name in ("a%20b", "a b", "c%2Fd")]
    found = sift("", folder_listing((), files), web=True)
    assert found.entries == (File("a b", files[1].blob, 7),)
    assert [hidden.why for hidden in found.hidden] == [
        "another file has the same name",
        "it holds a slash",
    ]


@pytest.mark.parametrize("size", [-1, 1 << 63, 10**40])
def test_sizes_that_no_file_has(size: int) -> None:
    found = sift("", FolderListing((), (Listed(Blob("s3://b/x", size, "v"), None),)), web=False)
    assert found.entries == ()
    assert "bytes" in found.hidden[0].why


def test_what_is_hidden_in_words() -> None:
    hidden = sifted(["", ".."], "new\nline\0", "\udcff", "y" * 300).hidden
    text = some(hidden)
    assert text.startswith(
        "'' (it is empty), '..' (it leads up), 'new\\nline\\x00' (it holds a NUL)"
    )
    assert text.endswith(" and 2 more")
    assert len(some(hidden[-1:])) < 130
    text.encode("ascii")


@given(st.lists(st.text(max_size=4)), st.lists(st.text(max_size=4)))
def test_nothing_leads_out_of_the_folder(folders: list[str], names: list[str]) -> None:
    found = sift("x", listing(folders, *names), web=False)
    shown = [entry.name for entry in found.entries]
    assert shown == sorted(set(shown))
    for entry in found.entries:
        assert entry.path == f"x/{entry.name}"
        assert entry.folder == "x"
        assert not {entry.name} & {"", ".", ".."}
        assert "/" not in entry.name
        assert "\0" not in entry.name
        assert find(found.entries, entry.name) is entry
    count = len(set(folders)) + len(names)
    assert len(found.entries) + len(found.hidden) == count
    assert find(found.entries, "no such name") is None


@pytest.mark.parametrize(
    ("root", "path", "web", "uri"),
    [
        ("s3://b/x", "", False, "s3://b/x"),
        ("s3://b", "a b/c%", False, "s3://b/a b/c%"),
        ("file:///", "etc", False, "file:///etc"),
        ("http://h/x", "part two/ü", True, "http://h/x/part%20two/%C3%BC"),
    ],
)
def test_uris(root: str, path: str, web: bool, uri: str) -> None:
    assert uri_of(root, path, web=web) == uri
    assert name_in_uri(uri, web=web) == (path or "x").rpartition("/")[2]


def test_names_in_urls() -> None:
    assert name_in_uri("https://h/a/b%20c.bin?download=true", web=True) == "b c.bin"
    assert name_in_uri("https://h/a/%FF", web=True) == "\udcff"
    assert name_in_uri("s3://b/a?x=1#y", web=False) == "a?x=1#y"


def test_no_difference() -> None:
    old = (Folder("x/a"), file("x/b"))
    assert reconcile("x", old, (Folder("x/a"), file("x/b"))) == (old, ())
    assert reconcile("x", old, (Folder("x/a"), file("x/b")))[0] is old
    entries, changes = reconcile("x", old, (Folder("x/a"), file("x/b", modified_ns=9)))
    assert entries == (Folder("x/a"), file("x/b", modified_ns=9))
    assert entries[0] is old[0]
    assert changes == ()  # the same version under another date


def test_differences() -> None:
    old = (Folder("x/a"), file("x/b"), file("x/c"), Folder("x/d"), file("x/e"))
    new = (Folder("x/a"), file("x/b", "w"), Folder("x/c"), file("x/d"), file("x/f"))
    entries, changes = reconcile("x", old, new)
    assert entries == new
    assert entries[0] is old[0]
    assert changes == tuple(Change("x", name) for name in "bcdef")
    assert lost_folders(old, new) == {"x/d"}


@st.composite
def folders(draw: st.DrawFn) -> tuple[Entry, ...]:
    names = draw(st.sets(st.sampled_from("abcdef")))
    kinds = st.sampled_from(["folder", "v", "w"])
    return tuple(
        Folder(name) if (kind := draw(kinds)) == "folder" else file(name, kind)
        for name in sorted(names)
    )


@given(folders(), folders())
def test_differences_are_those_of_dictionaries(
    old: tuple[Entry, ...], new: tuple[Entry, ...]
) -> None:
    entries, changes = reconcile("", old, new)
    before, after = ({entry.name: entry for entry in some} for some in (old, new))
    assert entries == new
    assert {change.name for change in changes} == {
        name for name in before | after if before.get(name) != after.get(name)
    }
