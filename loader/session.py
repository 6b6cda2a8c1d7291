"""What one load works with: settings, store, engine, flows, and an origin opened when needed.

A warm load must import neither s3fs nor botocore (they cost more than the load), so nothing here
touches the origin before somebody asks it for something.
"""

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeAlias

from weightstream.cachefs.agent.finding import find_agent
from weightstream.cachefs.blob import Blob
from weightstream.cachefs.fetch import Engine, Flow, Wanted, process_engine
from weightstream.cachefs.fetch.source import Source, Transfer
from weightstream.cachefs.origin.urls import shown
from weightstream.errors import LoadCancelled, UsageError
from weightstream.loader.stores import process_store
from weightstream.settings import Settings

if TYPE_CHECKING:
    from weightstream.cachefs.agent.client import AgentSource
    from weightstream.cachefs.origin import Checksum, Origin
    from weightstream.cachefs.store import Store

Uri: TypeAlias = str | os.PathLike[str]
StorageOptions: TypeAlias = Mapping[str, object]

_MOUNT_ATTRIBUTE = "user.weightstream.uri"


class LazyOrigin:
    """The origin of a load, opened at the first question. Satisfies `Source`; thread-safe."""

    name = "origin"

    def __init__(self, uri: str, settings: Settings, options: StorageOptions | None) -> None:
        self.uri = uri
        self._settings = settings
        self._options = options
        self._lock = threading.Lock()
        self._opened: Origin | None = None

    def list(self, uri: str) -> tuple[Blob, ...]:
        """Return the files under `uri`."""
        return self._open().list(uri)

    def read_into(self, blob: Blob, start: int, into: memoryview, transfer: Transfer) -> None:
        """Fill `into`; see `Source.read_into`."""
        self._open().read_into(blob, start, into, transfer)

    def checksum(self, blob: Blob) -> "Checksum | None":
        """Return the origin's own checksum of the file, if it keeps one."""
        return self._open().checksum(blob)

    def close(self) -> None:
        """Close what was opened."""
        with self._lock:
            opened, self._opened = self._opened, None
        if opened is not None:
            opened.close()

    def _open(self) -> "Origin":
        with self._lock:
            if self._opened is None:
                from weightstream.cachefs.origin import open_origin

                self._opened = open_origin(self.uri, self._settings, self._options)
            return self._opened


class Session:
    """One call of the loader; a context manager. `cancel` may come from any thread."""

    def __init__(self, uri: Uri, settings: Settings, options: StorageOptions | None) -> None:
        self.settings = settings
        self.uri = canonical_uri(uri)
        text = os.fspath(uri)
        # A signed URL's secrets are for the origin alone: everything else shows and stores `uri`.
        self.origin = LazyOrigin(text if _is_web(text) else self.uri, settings, options)
        self._agent: AgentSource | None = None
        self._flows: list[Flow] = []
        self._lock = threading.Lock()
        self._cancelled = False
        self._process = os.getpid()

    @property
    def is_inherited(self) -> bool:
        """Say that this is the copy in a forked child: its flows' threads do not exist here."""
        return os.getpid() != self._process

    @property
    def is_local(self) -> bool:
        """Say that the model's files lie on a file system of this machine."""
        return self.uri.startswith("file://")

    @property
    def _may_share(self) -> bool:
        """Say whether others could read the model: not with a signature that we alone have."""
        return not self.is_local and self.origin.uri.rstrip("/") == self.uri

    @property
    def store(self) -> "Store | None":
        """Return the store; None for local files, which need no second copy on the same machine."""
        return None if self.is_local else process_store(self.settings)

    @property
    def engine(self) -> Engine:
        """Return the engine of this process."""
        return process_engine(self.settings)

    @property
    def source(self) -> Source:
        """Return where bytes come from: the node's agent, where one runs, else the origin."""
        with self._lock:
            if self._agent is None and self._may_share and find_agent(self.settings):
                from weightstream.cachefs.agent.client import AgentSource

                self._agent = AgentSource(self.origin, self.uri, self.settings)
            return self._agent or self.origin

    def start(self, wanted: Sequence[Wanted]) -> Flow:
        """Begin to fetch; the session closes the flow if nobody else does."""
        self.check()
        flow = self.engine.start(wanted, self.source, self.store)
        with self._lock:
            self._flows = [one for one in self._flows if not one.stopping] + [flow]
        self.check()
        return flow

    def check(self) -> None:
        """Raise `LoadCancelled` when the session was cancelled."""
        if self._cancelled:
            self._close_flows()
            raise LoadCancelled(f"{self.uri}: the load was closed")

    def cancel(self) -> None:
        """End the load from outside: whoever waits in it gets `LoadCancelled`."""
        self._cancelled = True
        if not self.is_inherited:
            self._close_flows()

    def close(self) -> None:
        """End what is left; when it returns, no thread touches the load's memory."""
        if not self.is_inherited:
            self._close_flows()
            if self._agent is not None:
                self._agent.close()
            self.origin.close()

    def _close_flows(self) -> None:
        with self._lock:
            flows = list(self._flows)
        for flow in flows:
            flow.close()

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def canonical_uri(uri: Uri) -> str:
    """Return the URI without trailing slash; paths as `file://`, or what a mount says they are."""
    text = os.fspath(uri)
    if not text or "\0" in text:
        raise UsageError(f"a model is named by a URI or a path, not by {text!r}")
    if "://" in text and not text.startswith("file://"):
        return (shown(text) if _is_web(text) else text).rstrip("/")
    path = Path(text.removeprefix("file://")).expanduser().absolute()
    return _behind_mount(path) or f"file://{os.path.normpath(path)}"


def _is_web(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def _behind_mount(path: Path) -> str | None:
    """Return what a weightstream mount shows at `path`, so that it is read through the store."""
    try:
        return os.getxattr(path, _MOUNT_ATTRIBUTE).decode().rstrip("/")
    except (OSError, UnicodeDecodeError):
        return None
