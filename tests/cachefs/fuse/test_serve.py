"""The server process with its real parts, told what to do as its supervisor tells it."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import pytest
from tests.cachefs.fuse.harness import until, why_not
from tests.conftest import SettingsFactory
from tests.kit.disks import small_disk
from tests.kit.processes import clean_env

from weightstream.cachefs.fuse import mount_table
from weightstream.cachefs.fuse.assembly import within_kernel_limit
from weightstream.cachefs.fuse.kernel import device
from weightstream.cachefs.fuse.mounts import MountSpec

pytestmark = pytest.mark.fuse

PATIENCE_S = 60.0
MIB = 1 << 20


class Server:
    """A server process, and the supervisor's end of its control socket."""

    def __init__(self, fuse_fd: int, spec: MountSpec) -> None:
        self.end, theirs = socket.socketpair()
        self._log = TemporaryFile()  # noqa: SIM115 (closed by `close`)
        numbers = ["--fuse-fd", str(fuse_fd), "--control-fd", str(theirs.fileno())]
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "weightstream.cachefs.fuse.serve", *numbers],
                pass_fds=[fuse_fd, theirs.fileno()],
                env=clean_env(),
                stderr=self._log,
            )
        self._received = b""
        self.beats = 0
        self.say(spec.to_json())

    def say(self, message: Mapping[str, Any]) -> None:
        self.end.sendall(json.dumps(message).encode() + b"\n")

    def hear(self, *, beats: bool = False) -> dict[str, Any]:
        """Return the next line; beats are counted, and left out."""
        while True:
            line = self._line()
            if line.get("event") != "beat" or beats:
                return line
            self.beats += 1

    def ask(self, command: str, **fields: object) -> dict[str, Any]:
        self.say({"command": command, "id": 7, **fields})
        answer = self.hear()
        assert answer.pop("id") == 7
        return answer

    def _line(self) -> dict[str, Any]:
        deadline_s = time.monotonic() + PATIENCE_S
        while b"\n" not in self._received:
            ready = select.select([self.end], [], [], max(0.0, deadline_s - time.monotonic()))[0]
            assert ready, f"it says nothing\n{self.log()}"
            data = self.end.recv(1 << 16)
            assert data, f"it ended\n{self.log()}"
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        message = json.loads(line)
        assert isinstance(message, dict)
        return message

    def log(self) -> str:
        return os.pread(self._log.fileno(), 1 << 20, 0).decode(errors="replace")

    def wait(self) -> int:
        return self.process.wait(PATIENCE_S)

    def close(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_S)
        self.end.close()
        self._log.close()


class Place:
    """A directory of an origin, one to mount at, and the servers that a test starts."""

    def __init__(self, root: Path, settings: SettingsFactory) -> None:
        self.origin = root / "origin"
        self.directory = root / "mnt"
        run = root / "run"
        for path in (self.origin, self.directory, run):
            path.mkdir()
        self._settings = settings(run_directory=run, listing_ttl_s=600.0)
        self.fuse_fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        self.servers: list[Server] = []

    def spec(self, uri: str = "", restart: bool = False, **settings: Any) -> MountSpec:
        values = self._settings.model_dump(mode="json") | settings
        return MountSpec(
            uri or str(self.origin), str(self.directory), "kernel", values, True, restart
        )

    def start(self, spec: MountSpec | None = None) -> Server:
        server = Server(self.fuse_fd, spec or self.spec())
        self.servers.append(server)
        return server

    def mount(self, spec: MountSpec | None = None) -> Server:
        """Start a server and mount."""
        server = self.start(spec)
        assert server.hear() == {"event": "prepared"}
        mount_table.mount(self.fuse_fd, str(self.directory), "test", allow_other=True)
        server.say({"command": "serve", "resume": None})
        ready = server.hear()
        assert ready["event"] == "ready"
        self.init = ready["init"]
        return server

    def go_on(self, spec: MountSpec) -> Server:
        """Start a server that goes on where an earlier one ended."""
        server = self.start(spec)
        assert server.hear() == {"event": "prepared"}
        server.say({"command": "serve", "resume": self.init})
        assert server.hear() == {"event": "ready", "init": self.init}
        return server

    def close(self) -> None:
        with suppress(OSError):
            flags = mount_table.MNT_FORCE | mount_table.MNT_DETACH
            mount_table.unmount(str(self.directory), flags)
        for server in self.servers:
            server.close()
        os.close(self.fuse_fd)


@contextmanager
def made_place(root: Path, settings: SettingsFactory) -> Iterator[Place]:
    if reason := why_not():
        pytest.skip(reason)
    root.mkdir(exist_ok=True)
    place = Place(root, settings)
    try:
        yield place
    finally:
        place.close()


@pytest.fixture
def place(tmp_path: Path, store_settings: SettingsFactory) -> Iterator[Place]:
    with made_place(tmp_path / "place", store_settings) as made:
        yield made


def state(path: Path) -> str:
    return os.getxattr(path, "user.weightstream.state").decode()


def test_from_the_spec_to_the_end(place: Place) -> None:
    data = os.urandom(5 * MIB + 17)
    (place.origin / "llama").mkdir()
    (place.origin / "llama" / "a.bin").write_bytes(data)
    server = place.mount()
    path = place.directory / "llama" / "a.bin"
    assert path.read_bytes() == data
    assert os.getxattr(path, "user.weightstream.uri").decode().endswith("/origin/llama/a.bin")
    assert os.getxattr(place.directory, "user.weightstream.uri").decode().endswith("/origin")
    assert until(lambda: state(path) == "complete", PATIENCE_S)
    assert path.read_bytes() == data
    assert server.hear(beats=True) == {"event": "beat"}
    metrics = server.ask("metrics")["metrics"]
    assert metrics['weightstream_fuse_requests_total{op="open"}'] >= 2
    assert metrics['weightstream_fuse_opens_total{way="passthrough"}'] >= 1
    assert metrics['weightstream_fuse_read_bytes_total{way="cached"}'] >= len(data)
    assert set(server.ask("status")["gauges"]) >= {"parked_reads", "open_files", "fills"}
    mount_table.unmount(str(place.directory))
    assert server.hear() == {"event": "unmounted"}
    assert server.wait() == 0
    assert "Traceback" not in server.log()


def test_refresh_shows_what_is_there_now(place: Place) -> None:
    (place.origin / "f").mkdir()
    path = place.origin / "f" / "a"
    path.write_bytes(b"old")
    server = place.mount()
    shown = place.directory / "f"
    assert (shown / "a").read_bytes() == b"old"
    assert not (shown / "b").exists()
    path.write_bytes(b"newer")
    (place.origin / "f" / "b").write_bytes(b"b")
    assert (shown / "a").stat().st_size == 3
    assert server.ask("refresh", path="f") == {"folders": 1}
    assert (shown / "a").read_bytes() == b"newer"
    assert (shown / "b").read_bytes() == b"b"
    assert os.listdir(shown) == ["a", "b"]
    assert server.ask("refresh", path="") == {"folders": 2}


def test_commands_that_nobody_knows(place: Place) -> None:
    (place.origin / "a").write_bytes(b"a")
    server = place.mount()
    answer = server.ask("dance")
    assert "dance" in answer["error"]
    assert answer["exit_code"] == 1
    assert "gauges" in server.ask("status")


@pytest.mark.parametrize(
    ("uri", "settings", "exit_code", "said"),
    [
        ("/nowhere/at/all", {}, 3, "nowhere"),
        ("", {"store": "/proc/self/status"}, 6, "/proc/self/status"),
        ("", {"store": "/usr"}, 6, "/usr"),
        ("", {"chunk_size": "many"}, 2, "chunk_size"),
    ],
)
def test_what_cannot_be_is_said(
    place: Place, uri: str, settings: dict[str, Any], exit_code: int, said: str
) -> None:
    (place.origin / "a").write_bytes(b"a")
    server = place.start(place.spec(uri, **settings))
    answer = server.hear()
    assert (answer["event"], answer["exit_code"]) == ("failed", exit_code)
    assert said in answer["error"]
    assert "\n" not in answer["error"]
    assert server.wait() == exit_code


def test_a_restart_asks_no_origin_before_it_serves(place: Place) -> None:
    server = place.start(place.spec("/nowhere/at/all", restart=True))
    assert server.hear() == {"event": "prepared"}
    server.say({"command": "stop"})
    assert server.wait() == 0


def test_a_server_without_a_supervisor(place: Place) -> None:
    """Before it has mounted it ends; afterwards it goes on until it is unmounted."""
    (place.origin / "a").write_bytes(b"a")
    early = place.start()
    assert early.hear() == {"event": "prepared"}
    early.end.close()
    assert early.wait() == 0
    server = place.mount()
    server.end.close()
    assert (place.directory / "a").read_bytes() == b"a"
    mount_table.unmount(str(place.directory))
    assert server.wait() == 0


@pytest.mark.parametrize("how", ["stop", "SIGTERM", "SIGKILL"])
def test_readers_wait_for_the_next_server(place: Place, how: str) -> None:
    data = os.urandom(3 * MIB)
    (place.origin / "a.bin").write_bytes(data)
    server = place.mount(place.spec())
    path = place.directory / "a.bin"
    assert path.stat().st_size == len(data)
    server.process.send_signal(signal.SIGSTOP)  # from here on, nothing is answered
    with ThreadPoolExecutor(2, thread_name_prefix="weightstream-test") as pool:
        read = pool.submit(path.read_bytes)
        listed = pool.submit(os.listdir, place.directory)
        if how == "stop":
            server.say({"command": "stop"})
        else:
            server.process.send_signal(getattr(signal, how))
        server.process.send_signal(signal.SIGCONT)
        assert server.wait() == (0 if how != "SIGKILL" else -signal.SIGKILL)
        place.go_on(place.spec(restart=True))
        assert read.result(PATIENCE_S) == data
        assert listed.result(PATIENCE_S) == ["a.bin"]


def test_a_new_server_is_prepared_while_the_old_one_serves(place: Place) -> None:
    """An upgrade: the journal is read when the old server has written its last word."""
    for name in ("a", "b"):
        (place.origin / name).write_bytes(name.encode() * 10)
    old = place.mount()
    new = place.start(place.spec(restart=True))
    assert new.hear() == {"event": "prepared"}
    held = [(place.directory / name).open("rb") for name in ("a", "b")]
    old.say({"command": "stop"})
    assert old.wait() == 0
    new.say({"command": "serve", "resume": place.init})
    assert new.hear() == {"event": "ready", "init": place.init}
    assert [file.read() for file in held] == [b"a" * 10, b"b" * 10]
    for file in held:
        file.close()


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_the_store_on_other_disks(
    tmp_path: Path, store_settings: SettingsFactory, kind: str
) -> None:
    with (
        small_disk(tmp_path / "disk", 64 * MIB, kind) as disk,
        made_place(tmp_path / "place", store_settings) as place,
    ):
        passes_through(place, disk.path / "store")


def test_the_store_on_an_overlay(tmp_path: Path, store_settings: SettingsFactory) -> None:
    """As in a container: passthrough needs a stack depth of 2 there."""
    with small_disk(tmp_path / "disk", 64 * MIB) as disk:
        for name in ("lower", "upper", "work", "merged"):
            (disk.path / name).mkdir()
        merged = disk.path / "merged"
        layers = ",".join(
            f"{key}={disk.path / name}"
            for key, name in (("lowerdir", "lower"), ("upperdir", "upper"), ("workdir", "work"))
        )
        command = ["mount", "-t", "overlay", "overlay", "-o", layers, str(merged)]
        if subprocess.run(command, capture_output=True, timeout=30).returncode:
            pytest.skip("no overlayfs here")
        try:
            assert device.stack_depth(merged) == 2
            assert device.stack_depth(disk.path) == 1
            with made_place(tmp_path / "place", store_settings) as place:
                passes_through(place, merged / "store")
        finally:
            subprocess.run(["umount", "--lazy", str(merged)], capture_output=True, timeout=30)


def passes_through(place: Place, store: Path) -> None:
    """Check that a file that is complete is passed through from a store there."""
    data = os.urandom(2 * MIB + 5)
    (place.origin / "a.bin").write_bytes(data)
    server = place.mount(place.spec(store=str(store)))
    assert place.init["passthrough"]
    path = place.directory / "a.bin"
    assert path.read_bytes() == data
    assert until(lambda: state(path) == "complete", PATIENCE_S)
    with path.open("rb") as file:
        assert file.read() == data
        assert server.ask("status")["gauges"]["passthrough_files"] == 1


def test_r23_deadlines_end_before_the_kernels(
    tmp_path: Path, store_settings: SettingsFactory
) -> None:
    settings = store_settings(deadline_s=60.0)
    assert within_kernel_limit(settings, None) is settings
    assert within_kernel_limit(settings, 600) is settings
    assert within_kernel_limit(settings, 30).deadline_s == 24.0
    limits = tmp_path / "fuse"
    limits.mkdir()
    assert device.request_timeout_s(limits) is None
    (limits / "default_request_timeout").write_text("0\n")
    (limits / "max_request_timeout").write_text("0\n")
    assert device.request_timeout_s(limits) is None
    (limits / "max_request_timeout").write_text("45\n")
    assert device.request_timeout_s(limits) == 45
    (limits / "default_request_timeout").write_text("20\n")
    assert device.request_timeout_s(limits) == 20
