"""The parts of the fuse-python driver that need no mount."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import pytest
from tests.conftest import LogWatch
from tests.kit.processes import run_python

from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.files.entries import File
from weightstream.cachefs.fuse import pythonaside
from weightstream.cachefs.fuse.libfuse import LibfuseDriver, _captured_stderr, _escaped, _last_line
from weightstream.cachefs.fuse.pythonaside import Aside
from weightstream.cachefs.fuse.pythonreads import loaded_libfuse, read_unless
from weightstream.errors import LoadCancelled, MountError, UnavailableError

FILE = File("a", Blob("s3://b/a", 10, "v"), 0)


class Late:
    """A content that answers on another thread, after a while or when it is cancelled."""

    def __init__(self, answer: Exception | bytes | None) -> None:
        self.answer = answer
        self.reply: Any = None
        self.cancelled = threading.Event()

    def read(self, file: File, extent: Extent, reply: Any) -> str:
        self.reply = reply
        if self.answer is not None:
            threading.Timer(0.01, self._answer).start()
        return "ticket"

    def cancel(self, ticket: str) -> None:
        assert ticket == "ticket"
        self.cancelled.set()
        self.reply((), LoadCancelled("interrupted"))

    def _answer(self) -> None:
        if isinstance(self.answer, bytes):
            self.reply([memoryview(self.answer)[:4], memoryview(self.answer)[4:]], None)
        else:
            self.reply((), self.answer)


def read(content: Late, interrupted: bool = False) -> bytes:
    return read_unless(lambda: interrupted, cast(Any, content), FILE, Extent(0, 10))


def test_read_waits_for_its_bytes() -> None:
    assert read(Late(b"0123456789")) == b"0123456789"


def test_read_raises_what_went_wrong() -> None:
    with pytest.raises(UnavailableError, match="away"):
        read(Late(UnavailableError("away")))


def test_read_of_a_process_that_got_a_signal_ends() -> None:
    content = Late(None)
    with pytest.raises(LoadCancelled):
        read(content, interrupted=True)
    assert content.cancelled.is_set()


_MAPS = """\
7f00-7f01 r--p 00000000 fe:00 1 /usr/lib/libc.so.6
7f02-7f03 rw-p 00000000 00:00 0
7f04-7f05 r-xp 00000000 fe:00 2                          /home/a b/libs/libfuse-4a7c.so.2.9.7
"""


def test_libfuse_is_found_among_the_mappings(tmp_path: Path) -> None:
    (tmp_path / "maps").write_text(_MAPS)
    assert loaded_libfuse(tmp_path / "maps") == "/home/a b/libs/libfuse-4a7c.so.2.9.7"
    (tmp_path / "maps").write_text(_MAPS.replace("libfuse", "libother"))
    assert loaded_libfuse(tmp_path / "maps") == ""


@pytest.mark.skipif(find_spec("fuse") is None, reason="needs fuse-python")
def test_libfuse_of_fuse_python_can_be_asked() -> None:
    code = "import ctypes, fuse\nfrom weightstream.cachefs.fuse.pythonreads import loaded_libfuse\n"
    code += "emit(hasattr(ctypes.CDLL(loaded_libfuse()), 'fuse_interrupted'))"
    assert run_python(code).value is True


def test_stderr_of_anybody_is_collected_and_passed_on(capfd: pytest.CaptureFixture[str]) -> None:
    with _captured_stderr() as said:
        os.write(2, b"from here\n")
        subprocess.run(["sh", "-c", "echo from a child >&2"], check=True)
    assert said == ["from here", "from a child"]
    assert capfd.readouterr().err == "from here\nfrom a child\n"


def test_stderr_is_itself_again_after_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MountError), _captured_stderr():
        raise MountError("no")
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"


@pytest.mark.parametrize(
    ("said", "last"), [([], ""), (["a", "b", "", "  "], "b"), (["  fuse: no  "], "fuse: no")]
)
def test_last_line(said: list[str], last: str) -> None:
    assert _last_line(said) == last


def test_option_values_may_hold_commas_and_backslashes() -> None:
    assert _escaped("s3://b/a,b\\c") == "s3://b/a\\,b\\\\c"


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("fuse") is not None:
        monkeypatch.setitem(sys.modules, "fuse", None)
        monkeypatch.delitem(sys.modules, "weightstream.cachefs.fuse.pythonfuse", raising=False)
    spec: Any = None
    with pytest.raises(MountError, match=r"pip install 'weightstream\[fuse\]'"):
        LibfuseDriver(spec, spec)


@pytest.fixture
def aside(tmp_path: Path) -> Iterator[Aside]:
    made = Aside(str(tmp_path))
    yield made
    made.close()


def _ended(aside: Aside) -> bool:
    """Let it do all it has, and wait for its thread's end."""
    aside.close()
    assert aside._thread is not None
    aside._thread.join(30)
    return not aside._thread.is_alive()


def test_names_below_a_mount_that_is_gone_are_never_unlinked(aside: Aside, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("the user's own")
    aside.put("a")
    assert _ended(aside)
    assert (tmp_path / "a").read_text() == "the user's own"


def test_names_are_unlinked_in_a_mount_of_ours(
    aside: Aside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pythonaside, "_is_ours", lambda *_: True)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "a").touch()
    aside.put("m/a")
    aside.put("m/none")  # it has vanished meanwhile
    assert _ended(aside)
    assert list((tmp_path / "m").iterdir()) == []


def test_what_cannot_be_unlinked_is_logged(
    aside: Aside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expect_log: LogWatch
) -> None:
    expect_log("folder was replaced, but stays what it was: ")
    monkeypatch.setattr(pythonaside, "_is_ours", lambda *_: True)
    (tmp_path / "folder").mkdir()
    aside.put("folder")
    assert _ended(aside)


def test_only_the_thread_itself_asks_to_unlink(
    aside: Aside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not aside.is_asking({"pid": threading.get_native_id()})
    asked: list[bool] = []

    def unlink(path: str) -> None:
        asked.append(aside.is_asking({"pid": threading.get_native_id()}))
        asked.append(aside.is_asking({"pid": os.getpid()}))

    monkeypatch.setattr(aside, "_unlink", unlink)
    aside.put("a")
    assert _ended(aside)
    assert asked == [True, False]


def test_path_waits_once_however_often_it_is_put(
    aside: Aside, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, unlinked = threading.Event(), []

    def unlink(path: str) -> None:
        gate.wait(30)
        unlinked.append(path)

    monkeypatch.setattr(aside, "_unlink", unlink)
    aside.put("first")
    deadline = time.monotonic() + 30
    while aside._waiting and time.monotonic() < deadline:  # it is at the first by now
        time.sleep(0.001)
    for _ in range(3):
        aside.put("second")
    gate.set()
    assert _ended(aside)
    assert unlinked == ["first", "second"]
