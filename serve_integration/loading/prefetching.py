"""`prefetch`: weights on their way while the process still imports what will use them.

Importing this costs nothing: torch, the loader and the origin's client are imported on the thread
that fetches, and the first bytes arrive before torch is there. `load_model` joins the fetch of its
URI; one that nobody joins keeps the model's memory until it is cancelled.
"""

import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING

from weightstream.errors import LoadCancelled
from weightstream.serve_integration.loading.wish import Wish, make_wish

if TYPE_CHECKING:
    import torch

    from weightstream.loader.session import Session
    from weightstream.serve_integration.loading.fetching import Fetched
    from weightstream.settings import Settings

_lock = threading.Lock()
_pending: "list[Prefetch]" = []


class Prefetch:
    """Weights on their way, or here. Thread-safe."""

    def __init__(self, wish: Wish) -> None:
        self.wish = wish
        self.called_at = time.time()
        self._lock = threading.Lock()
        self._session: Session | None = None
        self._cancelled = False
        self._fetched: Fetched | None = None
        self._ended: Future[None] = Future()
        threading.Thread(target=self._run, name="weightstream-prefetch", daemon=True).start()

    @property
    def uri(self) -> str:
        """Return what is fetched."""
        return self.wish.uri

    @property
    def done(self) -> bool:
        """Say whether it has ended, well or not."""
        return self._ended.done()

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when the weights are here; raises what went wrong, or TimeoutError."""
        self._ended.result(timeout_s)

    def cancel(self) -> None:
        """Give the fetch up, and the memory of what is here. Idempotent."""
        with _lock:
            if self in _pending:
                _pending.remove(self)
        with self._lock:
            self._cancelled = True
            self._fetched = None
            session = self._session
        if session is not None:
            session.cancel()

    def take(self) -> "Fetched":
        """Wait for the weights and hand them over; Ctrl-C and errors of the waiter end the fetch.

        Whoever keeps the handle keeps no memory: it holds the weights no longer. Once only.
        """
        try:
            self._ended.result()
        except BaseException:
            self.cancel()
            raise
        with self._lock:
            fetched, self._fetched = self._fetched, None
        if fetched is None:
            raise LoadCancelled(f"{self.uri}: its prefetch was cancelled")
        return fetched

    def _attach(self, session: "Session") -> None:
        """Let `cancel` end this session too."""
        with self._lock:
            self._session = session
            cancelled = self._cancelled
        if cancelled:
            session.cancel()

    def _run(self) -> None:
        try:
            from weightstream.serve_integration.loading.fetching import fetch

            fetched = fetch(self.wish, self._attach)
            with self._lock:
                self._session = None
                if not self._cancelled:
                    self._fetched = fetched
            del fetched
            self._ended.set_result(None)
        except BaseException as error:
            self._ended.set_exception(error)  # for whoever joins


def prefetch(
    uri: "str | os.PathLike[str]",
    device: "str | int | torch.device | None" = None,
    dtype: "torch.dtype | str | None" = None,
    *,
    settings: "Settings | None" = None,
    storage_options: Mapping[str, object] | None = None,
) -> Prefetch:
    """Begin to fetch a model's weights in the background, and return at once.

    Call it first in `__init__`, before anything heavy is imported; `load_model` with the same URI,
    settings and storage options joins it. A second call for the same returns the first's handle.
    What goes wrong is raised by `load_model`, not here.
    """
    wish = make_wish(uri, device, dtype, settings, storage_options)
    with _lock:
        for pending in _pending:
            if pending.wish.is_of(wish):
                return pending
        begun = Prefetch(wish)
        _pending.append(begun)
        return begun


def joined(wish: Wish) -> Prefetch:
    """Return the fetch that was begun for this, or begin it; nobody else joins it then."""
    with _lock:
        for pending in _pending:
            if pending.wish.is_of(wish):
                _pending.remove(pending)
                return pending
    return Prefetch(wish)
