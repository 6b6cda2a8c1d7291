"""The store of this process, opened once per directory; a load goes on without one.

It stays open: the write-back of a load ends after the load has returned.
"""

import logging
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from weightstream.errors import ForeignStoreError, StoreError
from weightstream.settings import Settings

if TYPE_CHECKING:
    from weightstream.cachefs.store import Store

log = logging.getLogger(__name__)

_stores: "dict[Path, Store]" = {}
_warned: set[Path] = set()
_lock = threading.Lock()


def process_store(settings: Settings) -> "Store | None":
    """Return the store of these settings, or None (said once) when it cannot be used.

    A directory that is something else's raises: it is a mistake in the settings, and nothing of
    it may be touched.
    """
    with _lock:
        found = _stores.get(settings.store)
        if found is None:
            found = _open(settings)
            if found is not None:
                _stores[settings.store] = found
        return found


def _open(settings: Settings) -> "Store | None":
    from weightstream.cachefs.store import Store

    try:
        return Store.open(settings)
    except ForeignStoreError:
        raise
    except StoreError as error:
        if settings.store not in _warned:
            _warned.add(settings.store)
            log.warning("loading without the store: %s", error)
        return None


def _forget() -> None:
    """In a forked child: the lock may be held by a thread that does not exist here."""
    global _lock
    _lock = threading.Lock()
    _stores.clear()


os.register_at_fork(after_in_child=_forget)
