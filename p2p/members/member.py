"""What others see of the members."""

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Member:
    """A node that answers, and where."""

    node: str
    host: str
    port: int
    zone: str = ""


class Membership(Protocol):
    """Knows who answers now. Thread-safe; close it.

    Two nodes may see different members at the same moment, and each sees changes late: what is
    built on it may only ever lose time by that.
    """

    @property
    def on_change(self) -> Callable[[], None]:
        """Called after a change, one call at a time, on a thread that may be kept waiting."""
        ...

    @on_change.setter
    def on_change(self, call: Callable[[], None]) -> None: ...

    @property
    def is_settled(self) -> bool:
        """Every address was asked once: who is missing did not answer. It stays so."""
        ...

    def members(self) -> tuple[Member, ...]:
        """Return who answers now, sorted by node; this node is left out. Costs nothing."""
        ...

    def suspect(self, node: str, why: str) -> None:
        """Hear that a request to a node failed: it is out until it answers a hello again."""
        ...

    def close(self) -> None:
        """End its threads and connections."""
        ...


class StaticMembers:
    """A `Membership` that is told who is there, by Ray or by a test; nobody is asked."""

    def __init__(self, members: Iterable[Member] = ()) -> None:
        self.on_change: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._told = _by_node(members)
        self._suspected: set[str] = set()

    @property
    def is_settled(self) -> bool:
        """Say that there is nobody to ask."""
        return True

    def members(self) -> tuple[Member, ...]:
        """Return who was told, without the suspects."""
        with self._lock:
            return tuple(m for m in self._told if m.node not in self._suspected)

    def tell(self, members: Iterable[Member]) -> None:
        """Replace the members; suspects among them get another chance."""
        with self._lock:
            self._told = _by_node(members)
            self._suspected.clear()
        self.on_change()

    def suspect(self, node: str, why: str) -> None:
        """Leave a node out until the next `tell`."""
        with self._lock:
            if node in self._suspected:
                return
            self._suspected.add(node)
        self.on_change()

    def close(self) -> None:
        """Do nothing: there are no threads."""


def _by_node(members: Iterable[Member]) -> tuple[Member, ...]:
    return tuple(sorted(members, key=lambda member: member.node))
