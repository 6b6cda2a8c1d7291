"""The origins that an agent may read: those that it was configured with or asked for.

A blob is read only from an origin whose root it lies under, so a peer that names any other URI is
refused: a node does not become its neighbour's way to buckets that nobody here uses.
"""

import logging
import threading
from collections import ChainMap, OrderedDict
from collections.abc import Iterable, Mapping
from typing import Protocol, runtime_checkable

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.origin import Origin, open_origin
from weightstream.cachefs.store.info import is_under
from weightstream.errors import UsageError, WeightstreamError
from weightstream.settings import Settings

log = logging.getLogger(__name__)

_MOST_ASKED = 256
_MOST_NAMES = 1024
_WEB = ("http://", "https://")


@runtime_checkable
class Prepares(Protocol):
    """An origin whose first request costs more than the others."""

    def prepare(self, uri: str) -> None:
        """Do what comes before the first request; raises `OriginError` and its like."""
        ...


class Origins:
    """Opened origins by root. Thread-safe."""

    def __init__(self, settings: Settings, roots: Iterable[str] = ()) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        opened = [self._open(root) for root in roots]
        self._configured = {origin.uri: origin for origin in opened}
        self._asked: OrderedDict[str, Origin] = OrderedDict()
        self._names: dict[str, str] = {}
        """By root as it was asked for, `s3a://` among them: the root that it is read through."""

    def source_for(self, blob: Blob) -> Origin | None:
        """Return the origin with the longest root above the blob; None when there is none."""
        with self._lock:
            root = self._root_above(blob.uri)
            if root is None:
                return None
            if root in self._asked:
                self._asked.move_to_end(root)
            return self._known()[root]

    def admit(self, root: str) -> None:
        """Allow what a client on this node reads; raises `UsageError` for what is none.

        What lies under a root that is open already is read through that one: another client of a
        bucket costs 0.12 CPU s to make, and connections that are open are not opened again. Not
        on the web: what lies deeper may have a signature or a password of its own.
        """
        with self._lock:
            if self._names.get(root) in self._known():
                return
        origin = self._open(root)
        with self._lock:
            if len(self._names) >= _MOST_NAMES:
                self._names.clear()
            above = None if origin.uri.startswith(_WEB) else self._root_above(origin.uri)
            self._names[root] = above = above or origin.uri
            if above not in self._known():
                self._asked[above] = origin
            elif above in self._asked:
                self._asked.move_to_end(above)
            while len(self._asked) > _MOST_ASKED:
                _, oldest = self._asked.popitem(last=False)
                oldest.close()  # transfers that run are not touched

    def prepare(self) -> None:
        """Have configured origins ready for the first load; what goes wrong is for it to say."""
        for root, origin in self._configured.items():
            if isinstance(origin, Prepares):
                try:
                    origin.prepare(root)
                except WeightstreamError as error:
                    log.debug("%s is not prepared: %s", root, error)

    def roots(self) -> tuple[str, ...]:
        """Return every root, those of the configuration first."""
        with self._lock:
            return (*self._configured, *self._asked)

    def close(self) -> None:
        """Close all."""
        with self._lock:
            for origin in (*self._configured.values(), *self._asked.values()):
                origin.close()

    def _known(self) -> Mapping[str, Origin]:
        return ChainMap(self._configured, self._asked)

    def _root_above(self, uri: str) -> str | None:
        """Return the longest root that `uri` is or lies under."""
        return max((root for root in self._known() if is_under(uri, root)), key=len, default=None)

    def _open(self, root: str) -> Origin:
        origin = open_origin(root, self._settings)
        if "://" not in origin.uri or origin.uri.startswith("file://"):
            raise UsageError(f"{root} is on this machine already: it needs no agent")
        return origin
