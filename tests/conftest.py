"""Fixtures for every test, and three guards.

A test fails when it logs an unexpected WARNING (take `expect_log` to allow one), leaves threads of
ours running, or could be touched by the environment of whoever runs it.
"""

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.kit.proxy import FaultProxy
from tests.kit.s3 import S3Server, client_env

from weightstream.settings import Settings, load_settings

SettingsFactory = Callable[..., Settings]

# Threads that belong to the process and not to a test: pools of others' libraries, and the engine's
# own, which ends when the last flow is long gone.
LASTING_THREADS = re.compile(r"MainThread|asyncio_|fsspecIO|weightstream|pytest|Hypothesis|Dummy")

SLOW = ("mount", "e2e", "p2p/swarm")


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide credentials, endpoints, proxies and settings of whoever runs the tests."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "WEIGHTSTREAM_", "FSSPEC_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what starts Ray, and the folders whose tests mount, kill and wait."""
    here = Path(__file__).parent
    for item in items:
        if item.get_closest_marker("ray") or any(here / f in item.path.parents for f in SLOW):
            item.add_marker(pytest.mark.slow)


class LogWatch(logging.Handler):
    """Collects records of weightstream at WARNING and above."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []
        self.expected: list[str] = []
        self.allowed: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def __call__(self, pattern: str) -> None:
        """Expect records that match; the test fails when none comes."""
        self.expected.append(pattern)

    def allow(self, pattern: str) -> None:
        """Allow records that match, without asking for one."""
        self.allowed.append(pattern)

    def messages(self, pattern: str = "") -> list[str]:
        """Return the messages so far that match."""
        return [m for r in self.records if re.search(pattern, m := r.getMessage())]

    def verdict(self) -> str:
        """Return what is wrong, or nothing."""
        unmatched = [p for p in self.expected if not self.messages(p)]
        unexpected = [
            f"{r.name}: {r.getMessage()}"
            for r in self.records
            if not any(re.search(p, r.getMessage()) for p in self.expected + self.allowed)
        ]
        wrong = [f"expected in the log, but missing: {p}" for p in unmatched]
        return "\n".join(wrong + [f"unexpected in the log: {text}" for text in unexpected])


@pytest.fixture(autouse=True)
def expect_log() -> Iterator[LogWatch]:
    """Fail the test on unexpected warnings; `expect_log("pattern")` says that one is wanted."""
    watch = LogWatch()
    logger = logging.getLogger("weightstream")
    logger.addHandler(watch)
    yield watch
    logger.removeHandler(watch)
    if verdict := watch.verdict():
        pytest.fail(verdict, pytrace=False)


@pytest.fixture(autouse=True)
def _no_leaked_threads() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 5
    while leaked := [
        t for t in set(threading.enumerate()) - before if not LASTING_THREADS.search(t.name)
    ]:
        if time.monotonic() > deadline:
            pytest.fail(f"threads left running: {leaked}", pytrace=False)
        time.sleep(0.01)


@pytest.fixture
def store_settings(tmp_path: Path) -> SettingsFactory:
    """Make settings with a store of the test's own, and waits short enough for a test."""

    def make(**overrides: object) -> Settings:
        values: dict[str, object] = {
            "store": tmp_path / "store",
            "store_min_free_bytes": 0,
            "chunk_size": 1 << 20,
            "range_size": 1 << 20,
            "memory_budget": 64 << 20,
            "connect_timeout_s": 2.0,
            "stall_timeout_s": 2.0,
            "deadline_s": 8.0,
            "share_wait_s": 2.0,
        }
        return load_settings(values | overrides)

    return make


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One real S3 server for the session, with a bucket named `models`."""
    root = tmp_path_factory.mktemp("s3")
    (root / "models").mkdir()
    with S3Server(root) as server:
        yield server


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultProxy]:
    """A fault proxy of the test's own in front of the S3 server."""
    with FaultProxy(s3.address) as running:
        yield running


@pytest.fixture
def s3_env(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Point the usual AWS_* variables at the proxy; return them for child processes."""
    env = client_env(proxy.url)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    return env
