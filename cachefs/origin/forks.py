"""Objects that start afresh in a forked child."""

import os
import weakref
from typing import Protocol


class Forgetful(Protocol):
    """Something with state that belongs to one process: sockets, event loops, held locks."""

    def forget(self) -> None:
        """Drop the parent's state without touching what the parent still uses."""
        ...


_watched: "weakref.WeakSet[Forgetful]" = weakref.WeakSet()


def forget_in_child(thing: Forgetful) -> None:
    """Have `thing.forget()` called in every child, as long as `thing` lives."""
    _watched.add(thing)


def _forget_all() -> None:
    for thing in list(_watched):
        thing.forget()


os.register_at_fork(after_in_child=_forget_all)
