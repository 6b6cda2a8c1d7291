"""The doctor's rows about mounts: what is said of a machine that can, and of those that cannot."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.conftest import Cli
from tests.conftest import SettingsFactory
from tests.kit.processes import run_python

from weightstream.cachefs.fuse import mount_table, probing
from weightstream.cachefs.fuse.probing import Probed
from weightstream.cli.doctor import mounts
from weightstream.cli.doctor.check import Check
from weightstream.settings import load_settings

NAMES = [
    "fuse", "capability", "driver", "passthrough", "readahead", "requests", "request timeout",
    "fusermount", "other users",
]  # fmt: skip
can_mount = pytest.mark.skipif(
    os.geteuid() != 0 or not os.access("/dev/fuse", os.W_OK), reason="needs root and /dev/fuse"
)


def states(rows: list[Check]) -> dict[str, str]:
    return {row.name: row.status for row in rows}


@pytest.mark.fuse
@can_mount
def test_machine_that_can_is_tried_for_real(cli: Cli) -> None:
    before = Path("/proc/self/mountinfo").read_text()
    report = cli.json("doctor")
    rows = {row["name"]: row for row in report["checks"] if row["group"] == "mount"}
    assert [name for name in rows if name != "trial mount"] == NAMES
    assert rows["driver"]["found"] == "kernel"
    assert "tried" in rows["passthrough"]["found"] or rows["passthrough"]["remedy"]
    assert Path("/proc/self/mountinfo").read_text().count("probe") == before.count("probe") == 0


@pytest.mark.fuse
@can_mount
def test_probe_says_no_where_the_store_cannot_back_a_mount() -> None:
    """procfs: no file can be made there, as on a read-only disk."""
    code = "from pathlib import Path\nfrom weightstream.cachefs.fuse.probing import probe\n"
    code += "found = probe(Path('/proc'))\nemit([found.mount, found.passthrough])"
    mount, passthrough = run_python(code).value
    assert mount == ""
    assert passthrough


def test_rows_without_privileges_name_what_lifts_them(
    monkeypatch: pytest.MonkeyPatch, store_settings: SettingsFactory
) -> None:
    monkeypatch.setattr(mount_table, "privileged", lambda: False)
    rows = mounts.checks(store_settings())
    found = {row.name: row for row in rows}
    assert list(found) == NAMES
    assert found["capability"].status == found["driver"].status == "warn"
    assert all(row.status == "ok" or (row.limits and row.remedy) for row in rows)
    assert "CAP_SYS_ADMIN" in found["driver"].found


def test_device_may_be_missing_or_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = mounts.device(tmp_path / "fuse")
    assert "does not exist" in missing.found
    assert "modprobe" in missing.remedy
    (tmp_path / "fuse").touch()
    assert mounts.device(tmp_path / "fuse").status == "ok"
    monkeypatch.setattr("os.access", lambda *_: False)
    assert mounts.device(tmp_path / "fuse").remedy.startswith("sudo chmod 666")


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (Probed(), {"passthrough": "ok", "readahead": "ok"}),
        (Probed("", "Operation not permitted", ""), {"passthrough": "warn", "readahead": "ok"}),
        (Probed("", "", "Read-only file system"), {"passthrough": "ok", "readahead": "warn"}),
        (Probed("Operation not permitted"), {"trial mount": "warn"}),
        (None, {"passthrough": "warn", "readahead": "warn"}),
    ],
)
def test_what_was_tried_is_told(found: Probed | None, expected: dict[str, str]) -> None:
    rows = mounts.probed(found)
    assert states(rows) == expected
    assert all(row.status == "ok" or (row.limits and row.remedy) for row in rows)


def test_probe_that_fails_or_hangs_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store_settings: SettingsFactory
) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho >&2 so it failed; exit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    assert mounts._probe(store_settings()).mount == "so it failed"
    program.write_text("#!/bin/sh\nexec sleep 100\n")
    monkeypatch.setattr(mounts, "_PROBE_S", 0.2)
    assert "no answer" in mounts._probe(store_settings()).mount


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EPERM, "no"), "no"),
        (OSError(errno.EACCES, "no", "/dev/fuse"), "no (/dev/fuse)"),
        (OSError("odd"), "odd"),
    ],
)
def test_probe_names_the_cause(error: OSError, said: str) -> None:
    assert probing._why(error) == said


@pytest.mark.parametrize(
    ("text", "status", "has_remedy"),
    [(None, "ok", True), ("256", "ok", True), ("4096", "ok", False), ("32", "warn", True)],
)
def test_requests(tmp_path: Path, text: str | None, status: str, has_remedy: bool) -> None:
    if text is not None:
        (tmp_path / "max_pages_limit").write_text(text)
    row = mounts.requests(tmp_path)
    assert row.status == status
    assert bool(row.remedy) is has_remedy


def test_request_timeout_counts_only_where_it_is_shorter_than_ours() -> None:
    settings = load_settings({"deadline_s": 60.0})
    assert mounts.request_timeout(settings, None).status == "ok"
    assert mounts.request_timeout(settings, 100).status == "ok"
    row = mounts.request_timeout(settings, 30)
    assert (row.status, "24 s" in row.limits) == ("warn", True)
    assert "max_request_timeout=0" in row.remedy


def test_driver_by_setting_and_none(monkeypatch: pytest.MonkeyPatch) -> None:
    driver: Callable[..., Check] = lambda name: mounts.driver(load_settings({"driver": name}))  # noqa: E731
    starting = "weightstream.cachefs.fuse.supervisor.starting."
    monkeypatch.setattr(starting + "why_not_kernel", lambda: "")
    monkeypatch.setattr(mounts, "why_not_kernel", lambda: "")
    monkeypatch.setattr(starting + "why_not_fuse_python", lambda: "")
    assert driver("auto").found == "kernel"
    assert driver("fuse-python").found == "fuse-python, by setting"
    monkeypatch.setattr(starting + "why_not_kernel", lambda: "it needs root")
    monkeypatch.setattr(mounts, "why_not_kernel", lambda: "it needs root")
    assert driver("auto").found == "fuse-python; the kernel driver: it needs root"
    monkeypatch.setattr(starting + "why_not_fuse_python", lambda: "it needs fusermount")
    assert driver("auto").found.startswith("none: ")


def test_fusermount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "fusermount3"
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert mounts.fusermount(privileged=False).status == "warn"
    assert mounts.fusermount(privileged=True).status == "ok"
    program.touch()
    monkeypatch.setattr("shutil.which", lambda _: str(program))
    assert "not set-uid" in mounts.fusermount(privileged=False).found
    if os.geteuid() == 0:
        program.chmod(0o755 | stat.S_ISUID)
        assert mounts.fusermount(privileged=False).status == "ok"


def test_other_users(tmp_path: Path) -> None:
    configuration = tmp_path / "fuse.conf"
    assert mounts.other_users(True, configuration).status == "ok"
    assert mounts.other_users(False, configuration).status == "warn"
    configuration.write_text("#user_allow_other\n")
    assert mounts.other_users(False, configuration).status == "warn"
    configuration.write_text("mount_max = 10\nuser_allow_other\n")
    assert mounts.other_users(False, configuration).status == "ok"
