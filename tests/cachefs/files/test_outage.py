"""An origin that says nothing: what was listed before is shown."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from tests.cachefs.files.conftest import FILES, Planted
from tests.cachefs.files.origins import WAIT_S
from tests.conftest import LogWatch, SettingsFactory
from tests.kit import faults as f
from tests.kit.proxy import FaultProxy
from tests.kit.s3 import S3Server
from tests.kit.wire import Request

from weightstream.cachefs.files.outage import LONGEST_RETRY_S, Outage, is_silence
from weightstream.cachefs.files.tree import Tree
from weightstream.cachefs.origin import open_origin
from weightstream.errors import (
    AccessDeniedError,
    CredentialsError,
    NotFoundError,
    OriginError,
    ProtocolError,
    ThrottledError,
    UnavailableError,
)

Until = Callable[[Callable[[], bool]], None]
SILENT = "the origin is silent, folders are shown as listed before"


@pytest.mark.parametrize(
    "kind", [UnavailableError, ThrottledError, ProtocolError, CredentialsError]
)
def test_silence_is_covered(
    planted: Planted, expect_log: LogWatch, kind: type[OriginError]
) -> None:
    expect_log(f"{SILENT}: no word")
    before = planted.tree.children("llama")
    planted.clock.now_s += 60.0
    planted.origin.failure = lambda path: kind("no word")
    assert is_silence(kind("no word"))
    assert planted.tree.children("llama") is before
    assert planted.tree.peek("llama") is before
    assert planted.tree.entry("llama/deep") is not None
    assert planted.tree.ttl_s("llama") == 2.0
    assert planted.told() == []
    assert planted.asked() == ["llama", "llama"]


@pytest.mark.parametrize("kind", [NotFoundError, AccessDeniedError, OriginError, ValueError])
def test_what_is_no_silence(kind: type[Exception]) -> None:
    assert not is_silence(kind("no"))


def test_one_warning_for_each_outage(planted: Planted, expect_log: LogWatch, until: Until) -> None:
    expect_log(SILENT)
    for path in ("", "llama", "qwen"):
        planted.names(path)
    for outage in (1, 2, 3):
        planted.clock.now_s += 60.0
        planted.origin.silence()
        for _ in range(4):
            for path in ("", "llama", "qwen"):
                assert planted.names(path)
            planted.clock.now_s += 100.0
        until(lambda: not planted.tree._flights)
        assert len(expect_log.messages(SILENT)) == outage
        planted.origin.answer()
        planted.origin.files[f"new{outage}"] = "v1"
        planted.clock.now_s += 100.0
        planted.names()  # asks, and does not wait for it
        until(partial(_has, planted, f"new{outage}"))


def _has(planted: Planted, name: str) -> bool:
    return name in planted.names()


def test_in_an_outage_nobody_waits_and_one_asks(planted: Planted, expect_log: LogWatch) -> None:
    expect_log(SILENT)
    before = {path: planted.tree.children(path) for path in ("", "llama", "qwen")}
    planted.clock.now_s += 60.0
    planted.origin.silence()
    planted.names()
    planted.asked()
    for path, entries in before.items():
        assert planted.tree.children(path) is entries
        assert planted.tree.ttl_s(path) == 2.0
    assert planted.asked() == []  # just asked
    planted.clock.now_s += 30.0
    with planted.origin.held("llama") as gate:
        for path in ("llama", "", "qwen", "llama"):
            assert planted.tree.children(path) is before[path]
        gate.wait_for_one()
        assert planted.asked() == ["llama"]  # one listing at a time looks whether it is back


@pytest.fixture
def silence_expected(expect_log: LogWatch) -> None:
    expect_log(SILENT)


@pytest.mark.usefixtures("silence_expected")
def test_a_folder_that_nobody_knows_fails(planted: Planted) -> None:
    planted.origin.silence()
    with pytest.raises(UnavailableError, match="no route"):
        planted.tree.children("llama")
    with pytest.raises(UnavailableError, match="no route"):
        planted.tree.require_root()
    assert planted.tree.peek("llama") is None
    planted.origin.answer()
    assert planted.names("llama")


@pytest.mark.usefixtures("silence_expected")
def test_a_refresh_of_a_silent_origin_fails_and_keeps_everything(planted: Planted) -> None:
    before = {path: planted.tree.children(path) for path in ("", "llama", "qwen")}
    planted.origin.silence()
    with pytest.raises(UnavailableError, match="no route"):
        planted.tree.refresh()
    for path, entries in before.items():
        assert planted.tree.children(path) is entries
    planted.origin.answer()
    assert planted.tree.refresh() == 3
    assert planted.told() == []
    assert planted.tree.ttl_s("") == 60.0


@pytest.mark.usefixtures("silence_expected")
def test_an_origin_that_says_no_ends_an_outage(planted: Planted, until: Until) -> None:
    planted.look("", "llama")
    planted.clock.now_s += 60.0
    planted.origin.silence()
    planted.names()
    planted.origin.answer()
    planted.origin.files.clear()
    planted.clock.now_s += 60.0
    planted.names("llama")
    until(lambda: planted.names("llama") == [])
    until(lambda: len(planted.changes) == 3)


def test_times_between_questions() -> None:
    outage = Outage()
    now_s, waits = 100.0, []
    assert outage.failed(now_s)
    for _ in range(8):
        waits.append(outage.retry_at_s - now_s)
        now_s = outage.retry_at_s
        assert not outage.failed(now_s)
        assert not outage.failed(now_s)  # another folder, at the same time
    assert waits == [2.0, 4.0, 8.0, 16.0, *[LONGEST_RETRY_S] * 4]
    assert outage.answered()
    assert not outage.answered()
    assert outage.failed(now_s)
    assert outage.retry_at_s == now_s + 2.0


# A mount that starts without its origin.


@pytest.mark.usefixtures("silence_expected")
def test_a_restarted_tree_knows_what_the_one_before_knew(planted: Planted) -> None:
    before = {path: planted.tree.children(path) for path in ("", "llama", "llama/deep")}
    planted.origin.silence()
    planted.restarted()
    assert planted.tree.peek("") is None  # known, but not to be taken for granted
    assert {entry.path for entry in planted.tree.known()} == {
        entry.path for entries in before.values() for entry in entries
    }
    planted.tree.require_root()
    for path, entries in before.items():
        assert planted.tree.children(path) == entries
    with pytest.raises(UnavailableError):
        planted.tree.children("qwen")


def test_a_restarted_tree_tells_what_changed_meanwhile(planted: Planted) -> None:
    planted.look("", "llama")
    planted.restarted()
    planted.origin.files["llama/a.safetensors"] = "v2"
    planted.asked()
    assert planted.names("llama") == ["a.safetensors", "b.safetensors", "deep"]
    assert planted.asked() == ["llama"]
    planted.tree.refresh("llama")
    assert planted.told() == [("llama", "a.safetensors")]


# A real server behind a proxy.


@pytest.fixture
def bucket(s3: S3Server) -> S3Server:
    s3.put_files("models/outage", dict.fromkeys(FILES, b"x"))
    return s3


@pytest.mark.usefixtures("s3_env", "silence_expected")
@pytest.mark.parametrize("fault", [f.SLOW_DOWN, f.Drop(reset=True), f.EXPIRED_TOKEN])
def test_outages_of_s3(
    bucket: S3Server,
    proxy: FaultProxy,
    store_settings: SettingsFactory,
    tmp_path: Path,
    until: Until,
    fault: f.Fault,
) -> None:
    settings = store_settings(listing_ttl_s=0.0)
    uri = "s3://models/outage"
    tree = Tree(uri, open_origin(uri, settings), settings, tmp_path / "snapshot", lambda _: None)
    before = tree.children("llama")
    assert [entry.name for entry in before] == ["a.safetensors", "b.safetensors", "deep"]
    proxy.add(f.ALWAYS, fault)
    assert tree.children("llama") == before
    with pytest.raises((UnavailableError, ProtocolError, CredentialsError)):
        tree.children("qwen")
    proxy.clear()
    until(lambda: tree._outage.retry_at_s <= tree._clock())
    until(lambda: _names(tree, "qwen") == ["a.safetensors"])
    assert tree.children("llama") == before
    tree.close()


def _names(tree: Tree, path: str) -> list[str]:
    try:
        return [entry.name for entry in tree.children(path)]
    except OriginError:
        return []


@pytest.mark.usefixtures("s3_env")
def test_a_listing_that_hangs_holds_nobody_else_up(
    bucket: S3Server, proxy: FaultProxy, store_settings: SettingsFactory
) -> None:
    settings = store_settings(stall_timeout_s=60.0, deadline_s=60.0)
    uri = "s3://models/outage"
    tree = Tree(uri, open_origin(uri, settings), settings, None, lambda _: None)
    tree.children("")
    come, release = threading.Event(), threading.Event()

    def hang(_: Request) -> None:
        come.set()
        release.wait(WAIT_S)

    hung = f.When(where=lambda request: "llama" in request.target, times=None)
    proxy.add(hung, f.Hook(hang))
    with ThreadPoolExecutor(1, "weightstream-test") as pool:
        waiting = pool.submit(tree.children, "llama")
        assert come.wait(WAIT_S)
        assert [entry.name for entry in tree.children("qwen")] == ["a.safetensors"]
        assert tree.peek("") is not None
        assert tree.peek("llama") is None
        assert not waiting.done()
        release.set()
        assert len(waiting.result(WAIT_S)) == 3
    tree.close()
