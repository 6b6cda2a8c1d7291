"""`weightstream mount`, `umount`, `mounts`, `refresh`, `status PATH`, and the helper for fstab."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.cachefs.fuse.supervised import Reader, eventually, is_running
from tests.cli.conftest import Cli, check, wait_for_connection
from tests.kit.faults import Stall, When
from tests.kit.models import random_bytes
from tests.kit.processes import Child, Outcome
from tests.kit.proxy import FaultProxy
from tests.kit.s3 import SECRET_KEY, S3Server

from weightstream.cachefs.fuse import mount_table
from weightstream.cachefs.fuse.mount_table import MNT_DETACH, MNT_FORCE, mounted_at
from weightstream.cachefs.fuse.supervisor.starting import why_not_fuse_python, why_not_kernel
from weightstream.cli import fstab
from weightstream.errors import UsageError

needs_mount = pytest.mark.skipif(bool(why_not_kernel()), reason=why_not_kernel() or "it works")

DATA = random_bytes(6 << 20, "mounting")
DIGEST = hashlib.sha256(DATA).hexdigest()
URI = "s3://models/mounting"


@dataclass(slots=True)
class Mounting:
    """The command line, a directory to mount at and a proxy before the origin."""

    cli: Cli
    directory: Path
    proxy: FaultProxy

    @property
    def data(self) -> Path:
        return self.directory / "model.bin"

    def mount(self, *arguments: object) -> dict[str, Any]:
        report: dict[str, Any] = self.cli.json("mount", URI, self.directory, *arguments)
        return report

    def row(self) -> dict[str, Any]:
        """Return what `mounts` says of the directory."""
        rows = self.cli.json("mounts")
        [row] = [row for row in rows if row["directory"] == str(self.directory)]
        assert isinstance(row, dict)
        return row

    def start(self, *arguments: object) -> Child:
        """Start a command that goes on."""
        command = [sys.executable, "-m", "weightstream.cli", *map(str, arguments)]
        return Child(command, self.cli.env)

    def is_mounted(self) -> bool:
        found = mounted_at(str(self.directory))
        return found is not None and found.is_ours

    def processes(self) -> list[int]:
        """Return the processes of mounts of this test: they have its run directory."""
        mark = f"WEIGHTSTREAM_RUN_DIRECTORY={self.cli.env['WEIGHTSTREAM_RUN_DIRECTORY']}".encode()
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                environment = Path(f"/proc/{name}/environ").read_bytes()
            except OSError:
                continue
            if mark in environment.split(b"\0") and is_running(int(name)):
                found.append(int(name))
        return found

    def assert_nothing_left(self) -> None:
        eventually(lambda: not self.processes(), "no process")
        assert not self.is_mounted()
        assert not list(Path(self.cli.env["WEIGHTSTREAM_RUN_DIRECTORY"]).glob("*.json"))

    def end(self) -> None:
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        while self.is_mounted():
            mount_table.unmount(str(self.directory), MNT_DETACH | MNT_FORCE)
        eventually(lambda: not self.processes(), "no process")


@pytest.fixture
def mounting(cli: Cli, s3: S3Server, proxy: FaultProxy, tmp_path: Path) -> Iterator[Mounting]:
    """Return a place to mount at, with an object in the bucket."""
    s3.put("models/mounting/model.bin", DATA)
    cli.env |= s3.env | {
        "AWS_ENDPOINT_URL": proxy.url,
        "WEIGHTSTREAM_RUN_DIRECTORY": str(tmp_path / "run"),
        "XDG_STATE_HOME": str(tmp_path / "state"),
    }
    directory = tmp_path / "mnt"
    directory.mkdir()
    running = Mounting(cli, directory, proxy)
    try:
        yield running
    finally:
        running.end()


@pytest.mark.fuse
@needs_mount
def test_life_of_a_mount(mounting: Mounting, s3: S3Server) -> None:
    report = mounting.mount("--allow-other")
    assert report["driver"] == "kernel"
    assert report["uri"] == URI
    assert mounting.data.read_bytes() == DATA

    row = mounting.row()
    assert row["state"] == "ready"
    assert row["restarts"] == 0
    assert Path(row["log"]).is_file()
    for pid in mounting.processes():
        line = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
        assert SECRET_KEY not in line
        assert "s3://" not in line
    assert URI in mounting.cli("mounts").stdout

    [status] = mounting.cli.json("status", mounting.data)["files"]
    assert status["uri"] == f"{URI}/model.bin"
    assert status["size_bytes"] == len(DATA)
    assert status["state"] in ("partial", "filling", "complete")
    assert "model.bin" in mounting.cli("status", mounting.directory).stdout
    assert "No such file" in mounting.cli.error("status", mounting.directory / "nope", code=7)

    s3.put("models/mounting/later/new.bin", b"new")
    assert not (mounting.directory / "later").exists()
    assert mounting.cli.json("refresh", mounting.directory)["folders"] >= 1
    assert (mounting.directory / "later" / "new.bin").read_bytes() == b"new"
    assert mounting.cli.json("refresh", mounting.directory / "later")["path"] == "later"
    s3.delete("models/mounting/later/new.bin")

    again = mounting.cli.error("mount", URI, mounting.directory, code=7)
    assert f"mounted already with {URI}" in again
    assert str(mounting.directory) in mounting.cli("umount", mounting.directory).stdout
    mounting.assert_nothing_left()
    assert mounting.cli("mounts", "--json").stdout


@pytest.mark.fuse
@needs_mount
@pytest.mark.parametrize(
    ("uri", "env", "code", "says"),
    [
        ("s3://no-such-bucket", {}, 3, "NoSuchBucket"),
        ("s3://models/nothing-here", {}, 3, "no object is there"),
        (URI, {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, 3, URI),
        (URI, {"AWS_SECRET_ACCESS_KEY": "another-secret-of-mine"}, 3, URI),
        (URI, {"WEIGHTSTREAM_STORE": "/proc/nowhere"}, 6, "/proc/nowhere"),
        ("gopher://models", {}, 2, "gopher"),
        ("/no/such/origin", {}, 3, "/no/such/origin"),
    ],
)
def test_what_cannot_be_mounted_leaves_nothing(
    mounting: Mounting, uri: str, env: dict[str, str], code: int, says: str
) -> None:
    mounting.cli.env |= env | {"WEIGHTSTREAM_DEADLINE_S": "1"}
    line = mounting.cli.error("mount", uri, mounting.directory, code=code)
    assert says in line
    assert "another-secret" not in line
    mounting.assert_nothing_left()


def test_where_nothing_can_be_mounted(mounting: Mounting, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for arguments, code, says in (
        ((URI, tmp_path / "missing"), 2, "No such file or directory"),
        ((URI, tmp_path / "file"), 2, "not a directory"),
        ((URI,), 2, "Missing argument 'DIRECTORY'"),
        ((URI, mounting.directory, "--driver", "best"), 2, "best"),
        ((URI, mounting.directory, "-o", "read_aheed=1"), 2, "did you mean 'read_ahead'"),
        (("--upgrade", mounting.directory), 7, "is not mounted by weightstream"),
    ):
        assert says in mounting.cli.error("mount", *arguments, code=code)
    assert "nothing is at" in mounting.cli.error("umount", mounting.directory, code=7)
    assert "not in a mount" in mounting.cli.error("refresh", mounting.directory, code=7)
    assert "another program" in mounting.cli.error("umount", "/proc", code=7)
    assert all(row["state"] == "foreign" for row in mounting.cli.json("mounts"))


@pytest.mark.fuse
@needs_mount
def test_busy_mount_says_who_uses_it(mounting: Mounting) -> None:
    mounting.mount()
    code = "import os, sys; os.chdir(sys.argv[1]); emit('there'); sys.stdin.read()"
    holder = _holding(code, mounting.directory)
    try:
        line = mounting.cli.error("umount", mounting.directory, code=7)
        assert f"(pid {holder.pid}) uses {mounting.directory}" in line
        assert mounting.is_mounted()
        mounting.cli("umount", mounting.directory, "--lazy")
        assert not mounting.is_mounted()
    finally:
        holder.communicate(timeout=30)
    mounting.assert_nothing_left()


def _holding(code: str, *arguments: object) -> subprocess.Popen[bytes]:
    """Start a process that says a line and then waits for its stdin to be closed."""
    prelude = "emit = lambda text: print(text, flush=True)\n"
    command = [sys.executable, "-c", prelude + code, *map(str, arguments)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


@pytest.mark.fuse
@needs_mount
def test_dead_server_is_not_noticed_by_a_reader_of_cold_bytes(mounting: Mounting) -> None:
    mounting.proxy.add(When(key="model.bin", ranged=True, times=None), Stall(0.3))
    before = mounting.mount()
    with Reader(mounting.data) as reader:
        time.sleep(0.1)
        os.kill(before["server_pid"], signal.SIGKILL)
        assert reader.outcome() == DIGEST
    row = mounting.row()
    assert row["restarts"] == 1
    assert row["server_pid"] != before["server_pid"]


@pytest.mark.fuse
@needs_mount
def test_upgrades_under_load_fail_no_read(mounting: Mounting) -> None:
    before = mounting.mount()
    with Reader(mounting.data, "again and again") as reader:
        for _ in range(2):
            report = mounting.cli.json("mount", "--upgrade", mounting.directory)
            assert report["supervisor_pid"] == before["supervisor_pid"]
            assert report["server_pid"] != before["server_pid"]
            seen = len(reader.reads())
            reader.wait_for(lambda seen=seen: len(reader.reads()) > seen + 1)  # type: ignore[misc]
        assert set(reader.reads()) == {DIGEST}
    assert mounting.row()["restarts"] == 0


@pytest.mark.fuse
@needs_mount
def test_killed_supervisor_then_killed_everybody(mounting: Mounting) -> None:
    report = mounting.mount()
    os.kill(report["supervisor_pid"], signal.SIGKILL)
    eventually(lambda: not is_running(report["supervisor_pid"]), "killed")
    assert mounting.data.read_bytes() == DATA
    assert mounting.row()["state"] == "unsupervised"
    refused = mounting.cli.error("mount", "--upgrade", mounting.directory, code=7)
    assert f"weightstream mount {URI} {mounting.directory}" in refused

    report = mounting.mount()
    assert mounting.row()["state"] == "ready"
    os.kill(report["supervisor_pid"], signal.SIGKILL)
    eventually(lambda: not is_running(report["supervisor_pid"]), "killed")
    os.kill(report["server_pid"], signal.SIGKILL)
    eventually(lambda: not mounting.processes(), "killed")
    with pytest.raises(OSError, match="onnect"):
        mounting.data.read_bytes()
    assert mounting.row()["state"] == "dead"

    mounting.mount()
    assert mounting.data.read_bytes() == DATA
    mounting.cli("umount", mounting.directory)
    mounting.assert_nothing_left()


@pytest.mark.fuse
@needs_mount
def test_unmounts_without_a_supervisor(mounting: Mounting) -> None:
    report = mounting.mount()
    os.kill(report["supervisor_pid"], signal.SIGKILL)
    eventually(lambda: not is_running(report["supervisor_pid"]), "killed")
    mounting.cli("umount", mounting.directory)
    mounting.assert_nothing_left()


@pytest.mark.slow
@pytest.mark.fuse
@needs_mount
def test_forced_unmount_though_everybody_hangs(mounting: Mounting) -> None:
    report = mounting.mount()
    for who in ("supervisor_pid", "server_pid"):
        os.kill(report[who], signal.SIGSTOP)
    assert mounting.row()["state"] == "silent"
    began_s = time.monotonic()
    mounting.cli("umount", mounting.directory, "--force")
    assert time.monotonic() - began_s < 60
    assert not mounting.is_mounted()
    os.kill(report["supervisor_pid"], signal.SIGCONT)
    mounting.assert_nothing_left()


@pytest.mark.fuse
@needs_mount
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_foreground_ends_by_a_signal_though_the_origin_hangs(
    mounting: Mounting, number: signal.Signals
) -> None:
    with mounting.start("mount", URI, mounting.directory, "--foreground") as service:
        service.wait_for(mounting.is_mounted)
        eventually(lambda: mounting.row()["state"] == "ready", "ready")
        assert mounting.row()["supervisor_pid"] == service.pid
        mounting.proxy.add(When(key="model.bin", times=None), Stall(60))
        with Reader(mounting.data) as reader:
            time.sleep(0.2)
            began_s = time.monotonic()
            os.kill(service.pid, number)
            outcome = service.result(30)
            print(f"{number.name} to the end: {time.monotonic() - began_s:.2f} s")
            assert time.monotonic() - began_s < 15
            assert os.strerror(errno.ENOENT) not in reader.outcome()
    assert outcome.returncode == 0
    assert "serves" in outcome.stderr
    mounting.assert_nothing_left()


@pytest.mark.fuse
@needs_mount
def test_foreground_says_why_not(mounting: Mounting) -> None:
    outcome = mounting.cli("mount", "s3://no-such-bucket", mounting.directory, "-f", code=3)
    [line] = [one for one in outcome.stderr.splitlines() if one.startswith("weightstream: ")]
    assert "NoSuchBucket" in line
    mounting.assert_nothing_left()


@pytest.mark.fuse
@needs_mount
def test_ctrl_c_while_the_origin_is_silent(mounting: Mounting, hanging_endpoint: str) -> None:
    mounting.cli.env |= {"AWS_ENDPOINT_URL": hanging_endpoint}
    mounting.cli.env["WEIGHTSTREAM_STALL_TIMEOUT_S"] = "60"
    with mounting.start("mount", URI, mounting.directory) as child:
        # A process that was just forked is none yet.
        eventually(lambda: any(map(_is_server, mounting.processes())), "a server")
        [server] = [pid for pid in mounting.processes() if _is_server(pid)]
        wait_for_connection(server)
        os.kill(child.pid, signal.SIGINT)
        outcome = child.result(30)
    check(outcome)
    assert outcome.returncode == 130
    assert outcome.stderr.strip() == "weightstream: cancelled"
    mounting.assert_nothing_left()


def _is_server(pid: int) -> bool:
    return b"fuse.serve" in Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.fuse
@needs_mount
def test_directory_of_this_machine(mounting: Mounting, tmp_path: Path) -> None:
    (tmp_path / "origin").mkdir()
    (tmp_path / "origin" / "a.bin").write_bytes(b"local")
    origin = os.path.relpath(tmp_path / "origin")
    mounting.cli("mount", origin, mounting.directory)
    assert (mounting.directory / "a.bin").read_bytes() == b"local"
    assert mounting.row()["uri"] == str(tmp_path / "origin")


@pytest.mark.fuse
@needs_mount
@pytest.mark.skipif(bool(why_not_fuse_python()), reason=why_not_fuse_python() or "it works")
def test_fuse_python_driver_is_kept_running(mounting: Mounting) -> None:
    before = mounting.mount("--driver", "fuse-python")
    assert before["driver"] == "fuse-python"
    assert _digest(mounting.data) == DIGEST
    os.kill(before["server_pid"], signal.SIGKILL)
    eventually(lambda: _digest(mounting.data) == DIGEST, "mounted again")
    assert mounting.row()["restarts"] == 1
    report = mounting.cli.json("mount", "--upgrade", mounting.directory)
    assert report["supervisor_pid"] == before["supervisor_pid"]
    assert _digest(mounting.data) == DIGEST
    os.kill(before["supervisor_pid"], signal.SIGKILL)
    os.kill(report["server_pid"], signal.SIGKILL)
    eventually(lambda: not mounting.processes(), "killed")
    mounting.mount("--driver", "fuse-python")
    assert _digest(mounting.data) == DIGEST
    mounting.cli("umount", mounting.directory)
    mounting.assert_nothing_left()


def _digest(path: Path) -> str:
    """Return what a process of its own reads: a fork of one with open files may hang."""
    with Reader(path) as reader:
        return reader.outcome()


@pytest.mark.fuse
@needs_mount
def test_fstab_helper_mounts(mounting: Mounting, tmp_path: Path) -> None:
    secret = mounting.cli.env.pop("AWS_SECRET_ACCESS_KEY")
    env_file = tmp_path / "models.env"
    env_file.write_text(f'# of the bucket\nAWS_SECRET_ACCESS_KEY="{secret}"\n')
    options = f"rw,_netdev,nofail,x-systemd.automount,deadline_s=7,env_file={env_file}"
    outcome = _helper(mounting, URI, mounting.directory, "-o", options)
    assert (outcome.returncode, outcome.stdout, outcome.stderr) == (0, "", "")
    assert mounting.data.read_bytes() == DATA
    again = _helper(mounting, URI, mounting.directory, "-o", options)
    assert again.returncode == fstab.FAILURE
    assert "mounted already" in again.stderr


def _helper(mounting: Mounting, *arguments: object) -> Outcome:
    """Run `mount.weightstream` as mount(8) does."""
    code = "from weightstream.cli.fstab import main; raise SystemExit(main())"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with Child(command, mounting.cli.env) as child:
        outcome = child.result()
    check(outcome)
    return outcome


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("", []),
        ("defaults", []),
        ("rw,_netdev,nofail,ro,user,noauto,x-systemd.requires=network.target,comment=x", []),
        ("allow_other,deadline_s=5", ["--allow-other", "-o", "deadline_s=5"]),
        ("driver=fuse-python,store=/nvme/ws", ["-o", "driver=fuse-python", "-o", "store=/nvme/ws"]),
        (" ro , hedge=off ", ["-o", "hedge=off"]),
    ],
)
def test_fstab_options(text: str, arguments: list[str]) -> None:
    assert fstab.parse(text).arguments == arguments


def test_fstab_refuses_what_it_does_not_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="'bigfiles'"):
        fstab.parse("ro,bigfiles")
    assert fstab.parse("ro,bigfiles", sloppy=True).arguments == []
    assert fstab.main(["s3://b", "/mnt", "-o", "bigfiles"]) == fstab.USAGE
    assert fstab.main(["s3://b", "/mnt", "-o", "env_file=/no/such/file"]) == fstab.USAGE
    assert fstab.main(["s3://b"]) == fstab.USAGE
    assert fstab.main(["s3://b", "/mnt", "-f", "-n", "-s", "-v", "-o", "bigfiles"]) == 0
    assert fstab.main(["s3://b", str(tmp_path / "missing"), "-o", "ro"]) == fstab.USAGE
    assert "No such file" in capsys.readouterr().err


def test_env_file(tmp_path: Path) -> None:
    path = tmp_path / "env"
    path.write_text("A=1\n\n; no\n# no\nexport B = 'two words'\nC=a=b\n")
    assert fstab.read_environment(str(path)) == {"A": "1", "B": "two words", "C": "a=b"}
    path.write_text("A=1\nnonsense\n")
    with pytest.raises(UsageError, match="line 2"):
        fstab.read_environment(str(path))
