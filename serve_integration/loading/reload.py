"""`Reloadable`: another version of a model in place, while the old one goes on answering."""

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Generic

from weightstream.errors import UsageError
from weightstream.serve_integration.loading.building import ModuleT
from weightstream.serve_integration.loading.model import afinish, finish
from weightstream.serve_integration.loading.reporting import (
    belongs_to_start,
    let_go,
    report_failed_reload,
)
from weightstream.serve_integration.loading.wish import Wish, make_wish

if TYPE_CHECKING:
    import os

    import torch

    from weightstream.settings import Settings

_THREAD = "weightstream-reload"


class Reloadable(Generic[ModuleT]):
    """A module that is called like one, and whose weights `reload` exchanges. Thread-safe.

    Made for `reconfigure`, which Serve calls at the start and for each new `user_config`:

        async def reconfigure(self, user_config):
            await self.model.follow(user_config["uri"])

    Both versions are in memory until the new one is ready. The old one's memory is given back when
    the last request that uses it has ended. A reload that fails changes nothing.

    Why not `reload` there: until `reconfigure` returns, Serve sends the replica no requests, and
    what it raises makes Serve stop the replica, whose successors fail in the same way. `follow`
    raises and waits only where nothing is loaded yet. So Serve says RUNNING before the new version
    answers; `uri` and `weightstream serve timeline` say when it does.
    """

    def __init__(
        self,
        build: Callable[[], ModuleT],
        uri: "str | os.PathLike[str] | None" = None,
        device: "str | int | torch.device | None" = None,
        dtype: "torch.dtype | str | None" = None,
        *,
        strict: bool = True,
        settings: "Settings | None" = None,
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        """Load `uri` now, or nothing before the first reload; the rest as for `load_model`."""
        self._build = build
        self._device, self._dtype, self._strict = device, dtype, strict
        self._settings, self._storage_options = settings, storage_options
        self._lock = threading.Lock()
        self._asked = 0
        self._shown = 0
        self._uri: str | None = None
        self._module: ModuleT | None = None
        self._failure: str | None = None
        if uri is not None:
            self.reload(uri)

    @property
    def uri(self) -> str | None:
        """Return the URI of what answers now."""
        return self._uri

    @property
    def failure(self) -> str | None:
        """Return why the last reload failed; None when what was asked for last answers."""
        return self._failure

    @property
    def module(self) -> ModuleT:
        """Return what answers now. A request that needs it twice keeps it in a variable."""
        module = self._module
        if module is None:
            raise UsageError("nothing is loaded yet: call reload(uri) first")
        return module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call what answers now."""
        return self.module(*args, **kwargs)

    def reload(self, uri: "str | os.PathLike[str]") -> None:
        """Load another version and let it answer; nothing when it does already."""
        wish, ticket = self._ask(uri)
        if ticket is not None:
            self._reload(wish, ticket)

    async def areload(self, uri: "str | os.PathLike[str]") -> None:
        """Do what `reload` does; the event loop goes on answering with the old version."""
        wish, ticket = self._ask(uri)
        if ticket is not None:
            await self._areload(wish, ticket)

    async def follow(self, uri: "str | os.PathLike[str]") -> None:
        """Reload in the background when a version answers already; else load, and raise what fails.

        A failure in the background is logged as an error, counted, and told by `failure`.
        """
        wish, ticket = self._ask(uri)
        if ticket is None:
            return
        if self._uri is None:
            await self._areload(wish, ticket)
        else:
            work = threading.Thread(
                target=self._reload_behind, args=(wish, ticket), name=_THREAD, daemon=True
            )
            work.start()

    def _reload_behind(self, wish: Wish, ticket: int) -> None:
        try:
            self._reload(wish, ticket)
        except Exception:  # it is noted already, and nobody waits for this thread
            return

    def _reload(self, wish: Wish, ticket: int) -> None:
        try:
            is_start = belongs_to_start()
            module = finish(self._build, wish, strict=self._strict, is_start=is_start)
        except Exception as error:
            self._note_failure(wish, error, ticket)
            raise
        self._show(wish, module, ticket)

    async def _areload(self, wish: Wish, ticket: int) -> None:
        try:
            is_start = belongs_to_start()
            module = await afinish(self._build, wish, strict=self._strict, is_start=is_start)
        except Exception as error:
            self._note_failure(wish, error, ticket)
            raise
        self._show(wish, module, ticket)

    def _note_failure(self, wish: Wish, error: Exception, ticket: int) -> None:
        with self._lock:
            if ticket >= self._shown:
                self._failure = f"{wish.uri}: {error}"
        if self._uri is not None:
            report_failed_reload(wish.uri, self._uri, error)

    def _ask(self, uri: "str | os.PathLike[str]") -> tuple[Wish, int | None]:
        """Return the wish and a number for its turn; none when it is fulfilled."""
        wish = make_wish(uri, self._device, self._dtype, self._settings, self._storage_options)
        with self._lock:
            self._asked += 1
            if wish.uri != self._uri:
                return wish, self._asked
            self._shown = self._asked  # a slower reload that was asked for earlier is out of date
            self._failure = None
            return wish, None

    def _show(self, wish: Wish, module: ModuleT, ticket: int) -> None:
        """Exchange the module, unless one that was asked for later is there already."""
        with self._lock:
            old: ModuleT | None = module
            if ticket >= self._shown:
                old, self._module = self._module, module
                self._uri, self._shown, self._failure = wish.uri, ticket, None
        if old is not None:
            let_go(old)
        del old
        if any(parameter.is_cuda for parameter in module.parameters()):
            import torch

            torch.cuda.empty_cache()  # to whoever shares the device
