"""What a supervisor does for a mount, with a server that does as it is told."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from tests.cachefs.fuse.fake_server import content
from tests.cachefs.fuse.supervised import (
    DIGEST,
    SOURCE,
    Reader,
    Sandbox,
    eventually,
    is_running,
    needs_mount,
    sandbox,
)

from weightstream.cachefs.fuse import mount_table
from weightstream.cachefs.fuse.mount_table import MNT_DETACH, MNT_FORCE
from weightstream.cachefs.fuse.supervisor.attachment import fusermount
from weightstream.cachefs.fuse.supervisor.server_process import Limits
from weightstream.errors import MountError

__all__ = ["sandbox"]

pytestmark = [pytest.mark.fuse, needs_mount]

DATA = content()
QUICK = Limits(silence_s=1.0, ready_s=10.0)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def test_mounts_and_tells(sandbox: Sandbox) -> None:
    report = sandbox.start()
    assert report["state"] == "ready"
    assert sandbox.data.read_bytes() == DATA
    [record] = sandbox.run.records()
    assert record.uri == SOURCE
    assert record.supervisor_pid == report["supervisor_pid"]
    status = sandbox.ask("status")
    assert status["gauges"] == {"reads": 0}
    assert status["restarts"] == 0
    found = mount_table.mounted_at(sandbox.directory)
    assert found is not None
    assert found.source == SOURCE


def test_is_small(sandbox: Sandbox) -> None:
    pid = sandbox.start()["supervisor_pid"]
    status = Path(f"/proc/{pid}/status").read_text()
    resident = int(status.split("VmRSS:")[1].split()[0]) << 10
    assert resident < 25 << 20


def test_inherits_nothing_of_the_shell(sandbox: Sandbox) -> None:
    read, write = os.pipe()
    os.set_inheritable(write, True)
    report = sandbox.start()
    os.close(write)
    assert os.read(read, 1) == b""  # whoever waits for the end of that pipe gets it
    os.close(read)
    assert os.readlink(f"/proc/{report['supervisor_pid']}/cwd") == "/"


def test_dead_server_is_not_noticed_by_a_reader(sandbox: Sandbox) -> None:
    report = sandbox.start(delay_s=0.15)
    with Reader(sandbox.data) as reader:
        time.sleep(0.05)
        assert not reader.reads()
        kill(report["server_pid"])
        assert reader.outcome() == DIGEST
    record = sandbox.wait_ready(1)
    assert record.server_pid != report["server_pid"]
    assert record.supervisor_pid == report["supervisor_pid"]


def test_leaves_no_zombie_and_no_descriptor(sandbox: Sandbox) -> None:
    report = sandbox.start()
    process = Path(f"/proc/{report['supervisor_pid']}")
    for restarts in range(1, 4):
        kill(sandbox.record().server_pid)
        sandbox.wait_ready(restarts)
        sandbox.ask("status")
    sandbox.ask("upgrade")
    # Standard streams; lock, listener, server's channel and pidfd,
    # /dev/fuse, the two ends of the signals' pipe
    eventually(lambda: len(os.listdir(process / "fd")) == 3 + 7, "descriptors closed")
    children = process / "task" / process.name / "children"
    assert children.read_text().split() == [str(sandbox.record().server_pid)]


@pytest.mark.parametrize(
    ("settings", "says", "code"),
    [
        ({"failed": "no such bucket", "exit_code": 3}, "no such bucket", 3),
        ({"failed": "the store is foreign", "exit_code": 6}, "the store is foreign", 6),
        ({"crash": True}, "exit status 42", 7),
        ({"silent": True}, "was not prepared for 1 s", 7),
    ],
)
def test_mount_that_fails_leaves_nothing(
    sandbox: Sandbox, settings: dict[str, object], says: str, code: int
) -> None:
    with pytest.raises(MountError, match=says) as caught:
        sandbox.start(Limits(prepare_s=1.0), **settings)
    assert caught.value.exit_code == code
    sandbox.wait_gone()
    assert not list(sandbox.run.path.iterdir())


@pytest.mark.parametrize("how", ["stopped", "mute"])
def test_silent_server_is_replaced(sandbox: Sandbox, how: str) -> None:
    report = sandbox.start(QUICK, mute=how == "mute")
    if how == "stopped":
        os.kill(report["server_pid"], signal.SIGSTOP)
    assert sandbox.data.read_bytes() == DATA
    sandbox.wait_ready(1)
    assert "SIGKILL, because it did not answer for 1 s" in sandbox.log
    assert not is_running(report["server_pid"])


def test_upgrade_under_load_fails_no_read(sandbox: Sandbox) -> None:
    report = sandbox.start()
    servers = set()
    with Reader(sandbox.data, "again and again") as reader:
        for _ in range(5):
            upgraded = sandbox.ask("upgrade", python=sys.executable)
            servers.add(upgraded["server_pid"])
            assert upgraded["supervisor_pid"] == report["supervisor_pid"]
            before = len(reader.reads())
            reader.wait_for(lambda before=before: len(reader.reads()) > before + 1)  # type: ignore[misc]
        assert set(reader.reads()) == {DIGEST}
    assert len(servers) == 5
    assert sandbox.ask("status")["restarts"] == 0


def test_upgrade_that_does_not_run_changes_nothing(sandbox: Sandbox) -> None:
    report = sandbox.start()
    for python in ("/bin/false", "/no/such/python"):
        with pytest.raises(MountError, match="run"):
            sandbox.ask("upgrade", python=python)
    assert sandbox.ask("status")["server_pid"] == report["server_pid"]
    assert sandbox.data.read_bytes() == DATA


def test_upgrade_whose_server_fails_keeps_the_old_one(sandbox: Sandbox) -> None:
    report = sandbox.start(crash_restarted=True)
    with pytest.raises(MountError, match="exit status 42"):
        sandbox.ask("upgrade")
    status = sandbox.ask("status")
    assert status["server_pid"] == report["server_pid"]
    assert status["state"] == "ready"
    assert sandbox.data.read_bytes() == DATA


def test_readers_are_let_go_when_no_server_comes(sandbox: Sandbox) -> None:
    report = sandbox.start(Limits(patience_s=1.0), crash_restarted=True)
    kill(report["server_pid"])
    with Reader(sandbox.data) as reader:
        assert "onnect" in reader.outcome()
    assert "reads fail from now on" in sandbox.log
    os.kill(report["supervisor_pid"], signal.SIGTERM)
    sandbox.wait_gone()


def test_terminates_though_a_reader_waits_for_ever(sandbox: Sandbox) -> None:
    report = sandbox.start(deaf=True)
    with Reader(Path(sandbox.directory) / "stuck") as reader:
        time.sleep(0.2)
        began_s = time.monotonic()
        os.kill(report["supervisor_pid"], signal.SIGTERM)
        sandbox.wait_gone(15)
        print(f"SIGTERM to the end: {time.monotonic() - began_s:.2f} s")
        assert "onnect" in reader.outcome()


def test_terminates_though_the_server_hangs(sandbox: Sandbox) -> None:
    report = sandbox.start()
    os.kill(report["server_pid"], signal.SIGSTOP)
    os.kill(report["supervisor_pid"], signal.SIGTERM)
    sandbox.wait_gone(15)


def test_terminates_while_it_waits_to_restart(sandbox: Sandbox) -> None:
    report = sandbox.start(crash_restarted=True)
    kill(report["server_pid"])
    eventually(lambda: sandbox.record().restarts > 2, "restarts")
    os.kill(report["supervisor_pid"], signal.SIGTERM)
    sandbox.wait_gone(15)


def test_ends_when_somebody_unmounts(sandbox: Sandbox) -> None:
    sandbox.start()
    mount_table.unmount(sandbox.directory)
    sandbox.wait_gone()
    assert "was unmounted" in sandbox.log


def test_unmounts_on_request(sandbox: Sandbox) -> None:
    sandbox.start()
    assert sandbox.ask("umount") == {"unmounted": True}
    sandbox.wait_gone()
    assert not list(sandbox.run.path.iterdir())


def test_unmount_of_a_busy_mount(sandbox: Sandbox) -> None:
    sandbox.start()
    with sandbox.data.open("rb") as file:
        with pytest.raises(MountError, match="in use"):
            sandbox.ask("umount")
        assert sandbox.is_mounted()
        sandbox.ask("umount", lazy=True)
        assert not sandbox.is_mounted()
        assert file.read() == DATA  # served on for those who have it open
    sandbox.wait_gone()


def test_forced_unmount_ends_readers(sandbox: Sandbox) -> None:
    sandbox.start()
    with Reader(Path(sandbox.directory) / "stuck") as reader:
        time.sleep(0.2)
        sandbox.ask("umount", force=True)
        sandbox.wait_gone(15)
        assert "onnect" in reader.outcome()


def test_aborted_connection_is_mounted_again(sandbox: Sandbox) -> None:
    sandbox.start()
    held = os.open(sandbox.data, os.O_RDONLY)  # so that `umount -f` aborts but does not unmount
    with pytest.raises(OSError, match="busy"):
        mount_table.unmount(sandbox.directory, MNT_FORCE)
    sandbox.wait_ready(1)
    with suppress(OSError):
        os.close(held)
    assert sandbox.data.read_bytes() == DATA
    assert "mounting again" in sandbox.log


def test_second_mount_of_a_directory_is_refused(sandbox: Sandbox) -> None:
    sandbox.start()
    with pytest.raises(MountError, match="mounted already with fake://models"):
        sandbox.start()
    assert sandbox.data.read_bytes() == DATA


def test_whoever_asked_goes_away_before_it_is_mounted(sandbox: Sandbox) -> None:
    code = """
import sys
from tests.cachefs.fuse.supervised import Sandbox
from pathlib import Path
Sandbox(Path(sys.argv[1])).start(silent=True)
"""
    root = Path(__file__).parents[3]
    child = subprocess.Popen([sys.executable, "-c", code, str(sandbox.base)], cwd=root)
    eventually(lambda: "started" in sandbox.log, "a server")
    sandbox.look()
    child.kill()
    child.wait()
    sandbox.wait_gone()
    assert "went away" in sandbox.log or not sandbox.is_mounted()


def test_killed_supervisor_leaves_a_mount_that_works(sandbox: Sandbox) -> None:
    report = sandbox.start()
    kill(report["supervisor_pid"])
    eventually(lambda: not sandbox.run.is_supervised(sandbox.directory), "the lock is free")
    assert sandbox.data.read_bytes() == DATA
    with pytest.raises(ConnectionError):
        sandbox.ask("status")
    mount_table.unmount(sandbox.directory)
    eventually(lambda: not is_running(report["server_pid"]), "the server ended")


def test_killed_supervisor_is_taken_over_from(sandbox: Sandbox) -> None:
    report = sandbox.start(delay_s=0.1)
    kill(report["supervisor_pid"])
    eventually(lambda: not sandbox.run.is_supervised(sandbox.directory), "the lock is free")
    with Reader(sandbox.data) as reader:
        time.sleep(0.05)
        again = sandbox.start(delay_s=0.1)
        assert reader.outcome() == DIGEST
    assert again["supervisor_pid"] != report["supervisor_pid"]
    assert again["restarts"] == 1
    assert not is_running(report["server_pid"])
    kill(again["server_pid"])
    assert sandbox.data.read_bytes() == DATA


def test_take_over_that_fails_leaves_the_server_alone(sandbox: Sandbox) -> None:
    report = sandbox.start()
    kill(report["supervisor_pid"])
    eventually(lambda: not sandbox.run.is_supervised(sandbox.directory), "the lock is free")
    with pytest.raises(MountError, match="exit status 42"):
        sandbox.start(crash=True)
    assert sandbox.data.read_bytes() == DATA
    assert sandbox.start()["restarts"] == 1


def test_both_killed_is_cleaned_by_the_next_mount(sandbox: Sandbox) -> None:
    report = sandbox.start()
    for who in ("supervisor_pid", "server_pid"):
        kill(report[who])
    eventually(lambda: not any(map(is_running, sandbox.seen)), "dead")
    with pytest.raises(OSError, match=r"not connected|abort") as caught:
        sandbox.data.read_bytes()
    assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    sandbox.start()
    assert sandbox.data.read_bytes() == DATA
    mount_table.unmount(sandbox.directory, MNT_DETACH)
    sandbox.wait_gone()


def test_unmounts_as_an_ordinary_user_does(sandbox: Sandbox) -> None:
    if shutil.which("fusermount3") is None and shutil.which("fusermount") is None:
        pytest.skip("there is no fusermount")
    sandbox.start()
    with sandbox.data.open("rb") as file:
        with pytest.raises(OSError, match="busy") as caught:
            fusermount(sandbox.directory, lazy=False)
        assert caught.value.errno == errno.EBUSY
        fusermount(sandbox.directory, lazy=True)
        assert not sandbox.is_mounted()
        assert file.read() == DATA
    sandbox.wait_gone()


def test_kernel_ends_a_connection_whose_server_cannot_be_killed(sandbox: Sandbox) -> None:
    report = sandbox.start()
    found = mount_table.mounted_at(sandbox.directory)
    assert found is not None
    os.kill(report["supervisor_pid"], signal.SIGSTOP)
    with Reader(Path(sandbox.directory) / "stuck") as reader:
        time.sleep(0.2)
        mount_table.unmount(sandbox.directory, MNT_DETACH)
        code = "import sys; from weightstream.cachefs.fuse.mount_table import abort; "
        line = [sys.executable, "-c", f"{code}abort(int(sys.argv[1]))", str(found.minor)]
        # In a mount namespace of its own, for the control file system may have to be mounted.
        subprocess.run(["unshare", "--mount", *line], check=True, timeout=30)
        assert "onnect" in reader.outcome()
    os.kill(report["supervisor_pid"], signal.SIGCONT)
    sandbox.wait_gone()
