"""The parts of a supervisor, one by one, without a mount."""

import os
import socket
import stat
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from weightstream.cachefs.fuse import mount_table
from weightstream.cachefs.fuse.lines import Channel, ChannelClosed
from weightstream.cachefs.fuse.mounts import MountSpec, Record, RunDirectory, name_of
from weightstream.cachefs.fuse.supervisor import mount_log, systemd
from weightstream.cachefs.fuse.supervisor.backoff import Backoff
from weightstream.cachefs.fuse.supervisor.children import Child
from weightstream.cachefs.fuse.supervisor.handover import Handover, Job, command, read
from weightstream.cachefs.fuse.supervisor.loop import Loop
from weightstream.cachefs.fuse.supervisor.mount_log import MountLog
from weightstream.cachefs.fuse.supervisor.starting import choose_driver
from weightstream.cachefs.fuse.supervisor.users import users_of
from weightstream.errors import UsageError

SPEC = MountSpec("s3://models", "/mnt/models", "kernel", {"deadline_s": 5.0, "hedge": "on"})


def record(directory: str = "/mnt/models") -> Record:
    return Record(directory, "s3://models", "kernel", "ready", "0.1.0", os.getpid())


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "run")
    directory.prepare()
    return directory


def test_backoff_begins_at_once_and_grows_to_ten_seconds() -> None:
    backoff, waits = Backoff(), []
    for _ in range(8):
        wait_s, backoff = backoff.after(1.0)
        waits.append(wait_s)
    assert waits == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0]


def test_backoff_forgets_when_a_server_lived_for_a_while() -> None:
    assert Backoff(7).after(3600.0) == (0.0, Backoff(1))


def test_names_of_mounts_are_readable_and_different() -> None:
    assert name_of("/mnt/models").startswith("mnt-models-")
    assert name_of("/mnt/models") != name_of("/mnt-models")
    assert len(name_of("/" + "x" * 4000)) < 100
    assert "/" not in name_of("/a\nb/\udcff")


def test_records_are_private_and_survive_other_versions(run: RunDirectory) -> None:
    run.write(record("/mnt/b"))
    run.write(record("/mnt/a"))
    assert [one.directory for one in run.records()] == ["/mnt/a", "/mnt/b"]
    [path] = run.path.glob("mnt-a-*.json")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text(path.read_text().replace('"state"', '"from_the_future": 1, "state"'))
    assert run.record("/mnt/a") == record("/mnt/a")
    path.write_text("{")
    assert run.record("/mnt/a") is None
    run.forget("/mnt/b")
    assert run.records() == []


def test_run_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    with pytest.raises(UsageError, match="written by others"):
        RunDirectory(open_to_all).prepare()
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(UsageError, match="written by others"):
        RunDirectory(tmp_path / "link").prepare()
    with pytest.raises(UsageError, match="cannot make"):
        RunDirectory(Path("/proc/nowhere")).prepare()


def test_lock_says_whether_a_supervisor_lives(run: RunDirectory) -> None:
    assert not run.is_supervised("/mnt/models")
    held = run.lock("/mnt/models")
    assert held is not None
    assert run.is_supervised("/mnt/models")
    assert run.lock("/mnt/models") is None
    run.unlock("/mnt/models", held)
    assert not run.is_supervised("/mnt/models")
    assert not list(run.path.iterdir())


def test_nobody_to_ask(run: RunDirectory) -> None:
    with pytest.raises(ConnectionError):
        run.ask("/mnt/models", {"command": "status"})


def test_control_socket_in_a_deep_directory(tmp_path: Path) -> None:
    """A socket's address holds 108 bytes; a path may be longer."""
    deep = RunDirectory(tmp_path / ("d" * 100) / ("e" * 100))
    deep.prepare()
    with deep.listen("/mnt/models") as listener:
        client = socket.socket(socket.AF_UNIX)
        client.close()
        assert listener.getsockname()
        with pytest.raises(TimeoutError):
            deep.ask("/mnt/models", {"command": "status"}, timeout_s=0.05)


def test_lines_arrive_whole() -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    with theirs:
        theirs.sendall(b'{"a": 1}\n{"b"')
        assert channel.receive() == [{"a": 1}]
        assert channel.receive() == []
        theirs.sendall(b": 2}\n")
        assert channel.receive() == [{"b": 2}]
        channel.send({"c": 3})
        assert theirs.recv(100) == b'{"c": 3}\n'
    with pytest.raises(ChannelClosed):
        channel.receive()
    with pytest.raises(ChannelClosed):
        channel.send({})
    channel.close()


@pytest.mark.parametrize("line", [b"nonsense\n", b"[1]\n", b"\xff\xfe\n", b"1\n"])
def test_what_is_not_a_message_ends_a_channel(line: bytes) -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    with theirs:
        theirs.sendall(line)
        with pytest.raises(ChannelClosed):
            channel.receive()
    channel.close()


def test_channel_keeps_what_cannot_be_sent_yet() -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    sent = {"text": "x" * (1 << 20)}
    channel.send(sent)
    assert channel.is_waiting
    reader = Channel(theirs)
    received: list[dict[str, object]] = []
    while not received:
        received = reader.receive()
        channel.flush()
    assert received == [sent]
    assert not channel.is_waiting
    channel.close()
    reader.close()


def test_loop_runs_descriptors_before_timers() -> None:
    loop, order = Loop(), []
    read, write = os.pipe()

    def arrived(_: int) -> None:
        order.append(os.read(read, 1))
        loop.forget(read)

    os.write(write, b"x")
    loop.watch(read, arrived)
    loop.after(0.0, lambda: order.append(b"timer"))
    cancelled = loop.after(0.0, lambda: order.append(b"cancelled"))
    cancelled.cancel()
    loop.after(0.01, lambda: loop.stop(3))
    assert loop.run() == 3
    assert order == [b"x", b"timer"]
    os.close(read)
    os.close(write)


def test_child_says_how_it_ended() -> None:
    for command_line, says in (
        (["/bin/false"], "exit status 1"),
        (["/bin/sleep", "60"], "SIGKILL"),
    ):
        child = Child.spawn(command_line)
        if says == "SIGKILL":
            child.kill()
        deadline_s = time.monotonic() + 30
        while not child.ended() and time.monotonic() < deadline_s:
            time.sleep(0.005)
        assert child.ending() == says
        child.kill()  # of what has ended: nothing
        child.close()


def test_children_do_not_hear_what_is_for_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/x")
    monkeypatch.setenv("LISTEN_FDS", "1")
    from weightstream.cachefs.fuse.supervisor.children import environment

    assert not {"NOTIFY_SOCKET", "LISTEN_FDS"} & set(environment())
    assert environment()["PATH"]


def test_table_of_mounts_is_read() -> None:
    line = r"36 35 0:45 / /mnt/a\040b\134 rw,noatime master:1 - fuse.weightstream s3://m\040x rw"
    found = mount_table._parse(line)
    assert found.directory == "/mnt/a b\\"
    assert found.source == "s3://m x"
    assert found.minor == 45
    assert found.is_ours
    assert mount_table.mounted_at("/proc") is not None
    assert mount_table.mount_of("/proc/self") is None


@pytest.mark.parametrize(
    ("path", "directory", "under"),
    [
        ("/mnt/models/a", "/mnt/models", True),
        ("/mnt/models", "/mnt/models", True),
        ("/mnt/models2", "/mnt/models", False),
        ("/a", "/", True),
    ],
)
def test_paths_under_a_directory(path: str, directory: str, under: bool) -> None:
    assert mount_table.is_under(path, directory) == under


def test_directory_to_mount_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "file").touch()
    assert mount_table.canonical(str(tmp_path / "link")) == str(tmp_path / "real")
    monkeypatch.chdir(tmp_path)
    assert mount_table.canonical("real/") == str(tmp_path / "real")
    with pytest.raises(UsageError, match="No such file"):
        mount_table.canonical(str(tmp_path / "missing"))
    with pytest.raises(UsageError, match="not a directory"):
        mount_table.canonical(str(tmp_path / "file"))


def test_job_and_handover_survive_the_way(tmp_path: Path) -> None:
    job = Job(SPEC, str(tmp_path), "s3://models", program=("a", "b"))
    handover = Handover(3, 4, 5, {"minor": 45}, 2, 1.5, received='{"x"')
    line, descriptor = command(job, handover)
    assert read(int(line[line.index("--job-fd") + 1])) == (job, handover)
    assert "s3://" not in " ".join(line)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(descriptor)
    assert read(command(job)[1]) == (job, None)


def test_spec_of_another_version() -> None:
    values = SPEC.to_json() | {"new": 1, "settings": {"deadline_s": 5.0, "gone_setting": 1}}
    spec = MountSpec.from_json(values)
    assert spec.load_settings().deadline_s == 5.0
    assert asdict(MountSpec.from_json(SPEC.to_json())) == asdict(SPEC)


def test_driver_that_cannot_be_had_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mount_table, "privileged", lambda: False)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("weightstream.cachefs.fuse.supervisor.starting.DEVICE", os.devnull)
    with pytest.raises(UsageError, match="kernel driver does not work here: it needs root"):
        choose_driver("kernel")
    with pytest.raises(UsageError, match=r"(pip|apt-get) install"):
        choose_driver("fuse-python")
    with pytest.raises(UsageError, match="it needs root"):
        choose_driver("auto")
    monkeypatch.setattr("weightstream.cachefs.fuse.supervisor.starting.DEVICE", "/no/such/device")
    with pytest.raises(UsageError, match="modprobe fuse"):
        choose_driver("auto")


def test_driver_kernel_is_the_better_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mount_table, "privileged", lambda: True)
    monkeypatch.setattr("weightstream.cachefs.fuse.supervisor.starting.DEVICE", os.devnull)
    assert choose_driver("auto") == "kernel"


def test_users_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "open").touch()
    with (tmp_path / "open").open():
        [user] = users_of(str(tmp_path))
    assert user.pid == os.getpid()
    assert str(tmp_path / "open") in str(user)
    assert users_of(str(tmp_path)) == []


def test_log_begins_anew_when_it_is_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mount_log, "_MOST_BYTES", 100)
    path = tmp_path / "log"
    with path.open("a") as writer:
        writer.write("a" * 60 + "b" * 90)
        writer.flush()
        MountLog(str(path)).trim()
        writer.write("c")
        writer.flush()
        MountLog(str(path)).trim()
    assert path.read_text() == "c"
    assert (tmp_path / "log.1").read_text() == "a" * 10 + "b" * 90


def test_log_on_a_full_disk_ends_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    code = (
        "from weightstream.cachefs.fuse.supervisor.mount_log import MountLog; MountLog('')('text')"
    )
    with open("/dev/full", "w") as full:
        subprocess.run([sys.executable, "-c", code], stderr=full, check=True, timeout=30)
    MountLog("/no/such/file")("odd \udcff", "ERROR")
    assert "ERROR supervisor: odd \\udcff" in capfd.readouterr().err


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> socket.socket:
    """Listen as systemd does."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener.bind(str(tmp_path / "notify"))
    listener.settimeout(10)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    return listener


def test_notifies_and_passes_the_descriptor(manager: socket.socket, tmp_path: Path) -> None:
    assert systemd.notify("READY=1", "STATUS=x")
    assert manager.recv(1000) == b"READY=1\nSTATUS=x"
    (tmp_path / "file").write_text("kept")
    with (tmp_path / "file").open() as file:
        assert systemd.keep_fuse(file.fileno())
    message, descriptors, _, _ = socket.recv_fds(manager, 1000, 4)
    assert message == b"FDSTORE=1\nFDNAME=fuse\nFDPOLL=0"
    [descriptor] = descriptors
    assert os.read(descriptor, 10) == b"kept"
    os.close(descriptor)
    manager.close()


def test_notifies_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not systemd.notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    assert not systemd.notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", "@abstract-and-gone")
    assert not systemd.notify("READY=1")


def test_descriptors_for_another_process_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_PID", str(os.getpid() + 1))
    monkeypatch.setenv("LISTEN_FDS", "1")
    monkeypatch.setenv("LISTEN_FDNAMES", "fuse")
    assert systemd.kept_fuse() == -1
    assert "LISTEN_FDS" not in os.environ


def test_watchdog_is_petted_twice_as_often_as_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    assert systemd.watchdog_s() == 15.0
    monkeypatch.delenv("WATCHDOG_USEC")
    assert systemd.watchdog_s() is None
