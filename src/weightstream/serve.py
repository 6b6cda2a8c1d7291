"""`weightstream.serve`: the short name of `weightstream.serve_integration`."""

from typing import TYPE_CHECKING, Any

from weightstream import serve_integration

if TYPE_CHECKING:
    from weightstream.serve_integration import *  # noqa: F403

__all__ = serve_integration.__all__  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    return getattr(serve_integration, name)
