"""What a server serves, put together of a mount's spec: origin, store, engine, tree, content."""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from weightstream.cachefs.agent.client import AgentSource
from weightstream.cachefs.fetch import Engine, process_engine
from weightstream.cachefs.files.content import Content
from weightstream.cachefs.files.tree import Change, File, Tree
from weightstream.cachefs.fuse.kernel.device import request_timeout_s
from weightstream.cachefs.fuse.mounts import MountSpec
from weightstream.cachefs.origin import Origin, open_origin
from weightstream.cachefs.store import Store
from weightstream.errors import WeightstreamError
from weightstream.settings import Settings

log = logging.getLogger(__name__)

_CLOSE_S = 2.0

# The kernel looks every 15 s which requests are too old, and then ends the connection: an answer
# has to be there well before.
_OF_KERNEL_LIMIT = 0.8


@dataclass(frozen=True, slots=True)
class Assembly:
    """The parts behind a mount; `close` once nobody is answered any more."""

    settings: Settings
    origin: Origin
    source: AgentSource
    store: Store
    engine: Engine
    tree: Tree
    content: Content

    def close(self) -> None:
        """End all fetching; returns in about two seconds, whatever the origin does."""
        self.tree.close()
        self.content.close(_CLOSE_S)
        self.source.close()
        self.origin.close()


def assemble(spec: MountSpec, on_change: Callable[[Sequence[Change]], None]) -> Assembly:
    """Open everything. Asks the origin for its root, unless the mount is there already."""
    settings = within_kernel_limit(spec.load_settings(), request_timeout_s())
    store = Store.open(settings)
    origin = open_origin(spec.uri, settings)
    engine = process_engine(settings)
    tree = Tree(spec.uri, origin, settings, _snapshot_path(store, spec.uri), on_change)
    if not spec.restart:
        tree.require_root()

    def siblings(file: File) -> list[File]:
        return [entry for entry in tree.children(file.folder) if isinstance(entry, File)]

    source = AgentSource(origin, origin.uri, settings)
    content = Content(source, store, engine, settings, siblings)
    content.on_changed = lambda file: _refresh_soon(tree, file.folder)
    return Assembly(settings, origin, source, store, engine, tree, content)


def within_kernel_limit(settings: Settings, limit_s: float | None) -> Settings:
    """Return settings whose deadlines end before the kernel's."""
    if limit_s is None or settings.deadline_s <= limit_s * _OF_KERNEL_LIMIT:
        return settings
    deadline_s = limit_s * _OF_KERNEL_LIMIT
    log.info("the kernel limits requests to %d s: reads get %g s", limit_s, deadline_s)
    return settings.model_copy(update={"deadline_s": deadline_s})


def _snapshot_path(store: Store, uri: str) -> Path | None:
    """Return where folders are remembered: mounts of the same URI share what they know."""
    if not store.writable:
        return None
    return store.path / "folders" / f"{blake3(uri.encode()).hexdigest(length=16)}.jsonl"


def _refresh_soon(tree: Tree, folder: str) -> None:
    def refresh() -> None:
        try:
            tree.refresh(folder)
        except WeightstreamError as error:
            log.debug("not listed again: %s", error)

    threading.Thread(target=refresh, daemon=True, name="weightstream-refresh").start()
