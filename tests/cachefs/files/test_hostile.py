"""Names in a bucket that no file may have: listed safely, or left out with one warning."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.cachefs.origin.servers import Handler, Notes, RawServer
from tests.conftest import LogWatch, SettingsFactory
from tests.kit.bucket import Bucket
from tests.kit.s3 import S3Server, storage_options

from weightstream.cachefs.files.entries import File, Folder
from weightstream.cachefs.files.tree import Tree
from weightstream.cachefs.origin import Origin, open_origin
from weightstream.settings import Settings

LEFT_OUT = "names that no file can have are left out"

# Names that `rclone serve s3` can hold, for its objects are files. It shows control characters as
# their Unicode pictures.
NAMES = (
    *("plain", "new\nline", "tab\there", "ctl\x01\x1f", "\x7f", "back\\slash", "per%2Fcent", "%00"),
    *("q?versionId=1", "q?x=1&y=2#z", "plus+plus sp", " lead", "trail ", "dot.", "-", "-rf", "..."),
    *(
        "~",
        "*",
        "$(id)",
        "'",
        '"',
        "a&b<c>",
        "]]>",
        "\u2028",
        "\u202egnp",
        "\ufffd",
        "\ufeff",
        "e\u0301",
    ),
    *("\U0001f600", "ü" * 127, "x" * 255, ".hidden", "con", "a:b", "name@rev", "{x}", "[x]"),
)


def walk(tree: Tree, path: str = "") -> Iterator[File | Folder]:
    for entry in tree.children(path):
        yield entry
        if isinstance(entry, Folder):
            yield from walk(tree, entry.path)


def content(origin: Origin, file: File) -> bytes:
    into = bytearray(file.blob.size)
    origin.read_into(file.blob, 0, memoryview(into), Notes())
    return bytes(into)


def test_odd_names_on_a_real_server(
    s3: S3Server, store_settings: SettingsFactory, expect_log: LogWatch
) -> None:
    expect_log(f"s3://models/hostile: {LEFT_OUT}: .*not UTF-8.* and 1 more")
    expect_log(f"s3://models/hostile/deep: {LEFT_OUT}: 'bad.udcff")
    root = s3.root / "models" / "hostile"
    for i, name in enumerate(NAMES):
        (root / "deep" / name).mkdir(parents=True)
        (root / name).write_bytes(b"%d" % i)
        (root / "deep" / name / name).write_bytes(b"%d" % (i + 1000))
    for bad in (b"bad\xff", b"bad\xfe", b"\xc3\x28", b"\xed\xa0\x80"):
        Path(os.fsdecode(os.fsencode(root) + b"/" + bad)).write_bytes(b"bad")
    Path(os.fsdecode(os.fsencode(root) + b"/deep/bad\xff")).write_bytes(b"bad")
    s3.forget()

    uri, given = "s3://models/hostile", store_settings()
    origin = open_origin(uri, given, storage_options(s3.url))
    tree = Tree(uri, origin, given, None, lambda _: None)
    pictures = str.maketrans({i: chr(0x2400 + i) for i in range(32)} | {0x7F: "\u2421"})
    shown = {name.translate(pictures): i for i, name in enumerate(NAMES)}
    found = {entry.path: entry for entry in walk(tree)}
    files = {path: entry for path, entry in found.items() if isinstance(entry, File)}
    assert set(files) == {*shown, *(f"deep/{name}/{name}" for name in shown)}
    for name, i in shown.items():
        assert content(origin, files[name]) == b"%d" % i
        assert content(origin, files[f"deep/{name}/{name}"]) == b"%d" % (i + 1000)
        assert tree.entry(f"deep/{name}") == Folder(f"deep/{name}")
    tree.refresh()
    assert len(expect_log.messages(LEFT_OUT)) == 2  # not said again
    tree.close()
    origin.close()


def test_odd_names_on_this_machine(tmp_path: Path, expect_log: LogWatch) -> None:
    expect_log(f"{LEFT_OUT}: 'bad.udcff")
    for name in NAMES:
        (tmp_path / "d" / name).mkdir(parents=True)
        (tmp_path / "d" / name / name).write_bytes(name.encode())
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/d/bad\xff")).write_bytes(b"bad")
    origin = open_origin(tmp_path, Settings(store=tmp_path))
    tree = Tree(origin.uri, origin, Settings(store=tmp_path), None, lambda _: None)
    files = [entry for entry in walk(tree) if isinstance(entry, File)]
    assert sorted(file.path for file in files) == sorted(f"d/{name}/{name}" for name in NAMES)
    assert all(content(origin, file) == file.name.encode() for file in files)
    tree.close()


Start = Callable[[Handler], RawServer]


@pytest.fixture
def raw_server() -> Iterator[Start]:
    started: list[RawServer] = []

    def start(handler: Handler) -> RawServer:
        started.append(RawServer(handler))
        return started[-1]

    yield start
    for server in started:
        server.close()


class Hostile:
    """A bucket of any keys, and trees over it."""

    def __init__(self, start: Start, given: Settings) -> None:
        self.bucket = Bucket()
        self.settings = given
        self.origin = open_origin("s3://models", given, storage_options(start(self.bucket).url))

    def tree(self, uri: str = "s3://models") -> Tree:
        return Tree(uri, self.origin, self.settings, None, lambda _: None)

    def paths(self, *keys: bytes) -> list[str]:
        self.bucket.objects = dict.fromkeys(keys, b"x")
        tree = self.tree()
        paths = [entry.path for entry in walk(tree)]
        tree.close()
        return paths


@pytest.fixture
def hostile(raw_server: Start, store_settings: SettingsFactory) -> Iterator[Hostile]:
    made = Hostile(raw_server, store_settings())
    yield made
    made.origin.close()


@pytest.mark.parametrize(
    ("keys", "paths", "said"),
    [
        ([b"../../etc/passwd", b"ok"], ["ok"], r"'\.\.' \(it leads up\)"),
        ([b"a/../../x", b"a/ok"], ["a", "a/ok"], r"models/a: .*'\.\.' \(it leads up\)"),
        ([b"..", b".", b"ok"], ["ok"], r"'\.' .*'\.\.'"),
        ([b"./x", b"ok"], ["ok"], r"'\.' \(it means the folder itself\)"),
        ([b"/etc/passwd", b"ok"], ["ok"], r"'' \(it is empty\)"),
        ([b"//", b"ok"], ["ok"], r"'' \(it is empty\)"),
        ([b"a//b", b"a/ok"], ["a", "a/ok"], r"models/a: .*'' \(it is empty\)"),
        ([b"nul\0", b"ok"], ["ok"], r"'nul.x00' \(it holds a NUL\)"),
        ([b"n\0/x", b"ok"], ["ok"], r"'n.x00' \(it holds a NUL\)"),
        ([b"x" * 256, b"y" * 255], ["y" * 255], r"\(it is longer than 255 bytes\)"),
        ([b"z" * 1000 + b"/a", b"ok"], ["ok"], r"\(it is longer than 255 bytes\)"),
        ([b"\xff\xfe", b"\x80", b"ok"], ["ok"], r"'.udcff.udcfe' \(it is not UTF-8\)"),
        ([b"same", b"same/x"], ["same", "same/x"], r"'same' \(a folder has the same name\)"),
        ([b"same", b"same/"], ["same"], r"'same' \(a folder has the same name\)"),
    ],
)
def test_keys_that_are_no_files(
    hostile: Hostile, expect_log: LogWatch, keys: list[bytes], paths: list[str], said: str
) -> None:
    expect_log(said)
    expect_log.allow(LEFT_OUT)
    assert hostile.paths(*keys) == paths
    assert len(expect_log.messages(LEFT_OUT)) == 1
    assert expect_log.messages(LEFT_OUT)[0].isprintable()


def test_keys_that_are_files_of_odd_names(hostile: Hostile) -> None:
    keys = [b"new\nline", b"\x01", b"\r\n", b"a\tb", b"%2e%2e", b"\xef\xbf\xbd", b"a b+c%20d"]
    assert sorted(hostile.paths(*keys)) == sorted(key.decode() for key in keys)


def test_markers_are_folders(hostile: Hostile) -> None:
    keys = [b"empty/", b"full/", b"full/x", b"deep/empty/"]
    assert hostile.paths(*keys) == ["deep", "deep/empty", "empty", "full", "full/x"]


def test_an_empty_bucket_is_an_empty_mount(hostile: Hostile) -> None:
    tree = hostile.tree()
    tree.require_root()
    assert tree.children("") == ()
    tree.close()


def test_a_marker_is_a_root(hostile: Hostile) -> None:
    hostile.bucket.objects = {b"models/empty/": b""}
    tree = hostile.tree("s3://models/models/empty/")
    tree.require_root()
    assert tree.children("") == ()
    tree.close()


def test_a_folder_of_many_pages(hostile: Hostile) -> None:
    hostile.bucket.objects = {b"d/%05d" % i: b"" for i in range(3456)}
    hostile.bucket.objects |= {b"d/f%05d/x" % i: b"" for i in range(1234)}
    tree = hostile.tree()
    assert len(tree.children("d")) == 3456 + 1234
    assert tree.entry("d/03455") is not None
    assert tree.entry("d/f01233") == Folder("d/f01233")
    assert len(hostile.bucket.requests) == 5
    tree.close()


def test_warnings_have_an_end(hostile: Hostile, expect_log: LogWatch) -> None:
    expect_log(LEFT_OUT)
    hostile.paths(*(b"%03d/../x" % i for i in range(120)))
    assert len(expect_log.messages(LEFT_OUT)) == 100


PARTS = st.sampled_from([b"a", b"b", b"", b".", b"..", b"\0", b"\xff", b"\n", b"x" * 256, b"%2F"])
KEYS = st.lists(PARTS, min_size=1, max_size=4).map(b"/".join).filter(bool)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(keys=st.sets(KEYS, max_size=12))
def test_any_keys(hostile: Hostile, expect_log: LogWatch, keys: set[bytes]) -> None:
    """What is shown is exactly what a plain reading of the keys as paths gives."""
    expect_log.allow(LEFT_OUT)
    expected: set[str] = set()
    for key in keys:
        parts = key.split(b"/")
        good = 0
        while good < len(parts) and parts[good] in (b"a", b"b", b"\n", b"%2F"):
            good += 1
            expected.add(b"/".join(parts[:good]).decode())
    assert sorted(expected) == sorted(hostile.paths(*keys))
