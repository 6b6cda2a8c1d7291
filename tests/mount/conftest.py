"""A bucket mounted for real: S3 server, fault proxy, `weightstream mount`, no way to stay stuck.

Everything that touches the mount runs in child processes or under the time limit of the test, and
the teardown kills what serves a mount before it takes it away: no test leaves a process waiting.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import SettingsFactory
from tests.kit.processes import Outcome, run_cli
from tests.kit.proxy import FaultProxy
from tests.kit.s3 import S3Server, client_env

from weightstream.settings import Settings

PATIENCE_S = 60.0
_prefixes = count()


def until(condition: Callable[[], object], patience_s: float = PATIENCE_S) -> bool:
    """Wait until something is so; False when it does not happen in a long time."""
    end = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def errno_of(call: Callable[[], object]) -> int:
    """Return the error number that a call fails with; 0 when it does not."""
    try:
        call()
    except OSError as error:
        return error.errno or 0
    return 0


@dataclass(slots=True)
class Bucket:
    """A prefix of the test's own on the S3 server, and the settings that mounts of it get."""

    s3: S3Server
    proxy: FaultProxy
    settings: Settings
    prefix: str
    root: Path
    options: dict[str, object] = field(default_factory=dict)
    mounts: "list[Mounted]" = field(default_factory=list)

    @property
    def uri(self) -> str:
        return f"s3://models/{self.prefix}"

    @property
    def env(self) -> dict[str, str]:
        """The environment of every command: credentials, settings, a run directory of its own."""
        values = self.settings.model_dump(mode="json") | self.options
        named = {f"WEIGHTSTREAM_{name.upper()}": str(value) for name, value in values.items()}
        return client_env(self.proxy.url) | named

    def put(self, name: str, data: bytes) -> bytes:
        self.s3.put(f"models/{self.prefix}/{name}", data)
        return data

    def put_files(self, files: Mapping[str, bytes]) -> None:
        for name, data in files.items():
            path = self.s3.root / "models" / self.prefix / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        self.s3.forget()

    def cli(self, *arguments: object, timeout_s: float = PATIENCE_S) -> Outcome:
        return run_cli(*arguments, env=self.env, timeout_s=timeout_s)

    def mount(self, *arguments: object, uri: str = "", directory: Path | None = None) -> "Mounted":
        """Mount the bucket; fails with what the command printed when it does not work."""
        path = directory or self.root / f"mnt{len(self.mounts)}"
        if directory is None:
            path.mkdir()
        outcome = self.cli("mount", uri or self.uri, path, *arguments)
        assert outcome.returncode == 0, outcome.stderr + outcome.stdout
        mounted = Mounted(self, path)
        self.mounts.append(mounted)
        return mounted

    def sent(self, name: str) -> int:
        """Return the body bytes that the origin sent of one object, or of several."""
        return sum(e.body_bytes for e in self.proxy.exchanges() if e.range and name in e.path)

    def lists(self) -> int:
        """Return how often the origin was asked for a listing."""
        return sum("list-type" in e.path for e in self.proxy.exchanges())


@dataclass(slots=True)
class Mounted:
    """One live mount."""

    bucket: Bucket
    path: Path

    def info(self) -> dict[str, Any]:
        """Return what `weightstream mounts` says of it."""
        outcome = self.bucket.cli("mounts", "--json")
        assert outcome.returncode == 0, outcome.stderr
        rows = json.loads(outcome.stdout)
        rows = rows["mounts"] if isinstance(rows, dict) else rows
        (row,) = [row for row in rows if row["directory"] == str(self.path)]
        assert isinstance(row, dict)
        return row

    @property
    def server_pid(self) -> int:
        return int(self.info()["server_pid"])

    @property
    def supervisor_pid(self) -> int:
        return int(self.info()["supervisor_pid"])

    def gauges(self) -> dict[str, int]:
        return dict(self.info()["gauges"])

    def state(self, name: str) -> str:
        return os.getxattr(self.path / name, "user.weightstream.state").decode()

    def complete(self, *names: str) -> bool:
        """Wait until files are complete in the store."""
        return until(lambda: all(self.state(name) == "complete" for name in names))

    def refresh(self) -> None:
        outcome = self.bucket.cli("refresh", self.path)
        assert outcome.returncode == 0, outcome.stderr

    def kill_server(self) -> int:
        """Kill -9 the server; return the process id it had."""
        pid = self.server_pid
        os.kill(pid, signal.SIGKILL)
        return pid

    def is_mounted(self) -> bool:
        return any(line.split()[1] == str(self.path) for line in _mount_table())

    def umount(self) -> Outcome:
        return self.bucket.cli("umount", self.path)

    def end(self) -> None:
        """Take everything away, whatever state it is in."""
        with suppress(AssertionError):
            if self.is_mounted() and self.umount().returncode == 0:
                return
        pids: list[int] = []
        with suppress(Exception):
            info = self.info()
            # No server is 0, which kill() takes for everybody in our own process group.
            pids = [pid for key in ("supervisor_pid", "server_pid") if (pid := int(info[key]))]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        subprocess.run(["umount", "--lazy", str(self.path)], capture_output=True, timeout=30)


def _mount_table() -> list[str]:
    return Path("/proc/self/mounts").read_text().splitlines()


def why_no_mount() -> str:
    """Return why nothing can be mounted here, or nothing."""
    if os.geteuid() != 0:
        return "mounting with the kernel driver needs root"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        return f"/dev/fuse: {error.strerror}"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give these tests more time than others: each starts several processes, some wait a minute."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(300))


@pytest.fixture
def bucket(
    s3: S3Server, proxy: FaultProxy, store_settings: SettingsFactory, tmp_path: Path
) -> Iterator[Bucket]:
    """An empty prefix; whatever is mounted from it is unmounted at the end."""
    if reason := why_no_mount():
        pytest.skip(reason)
    settings = store_settings(listing_ttl_s=600.0)
    made = Bucket(s3, proxy, settings, f"mount-{next(_prefixes)}", tmp_path)
    yield made
    for mounted in made.mounts:
        mounted.end()
