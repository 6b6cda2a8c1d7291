"""The members that a tracker knows. Pure: the clock is an argument."""

from collections import OrderedDict
from dataclasses import dataclass, field

TTL_S = 15.0
"""How long a registration holds; nodes register three times in it."""

_MOST_ENTRIES = 10_000


@dataclass(frozen=True, slots=True)
class Entry:
    """What a node says of itself. Two nodes of one name are two entries: members see them both."""

    node: str
    host: str
    port: int
    zone: str


@dataclass(slots=True)
class Registry:
    """Entries, the longest silent first; bounded: the oldest goes when it is full."""

    epoch: int
    """Another number whenever the entries change."""
    most: int = _MOST_ENTRIES
    _until_s: "OrderedDict[Entry, float]" = field(default_factory=OrderedDict)

    def register(self, entry: Entry, now_s: float) -> bool:
        """Add or renew an entry; say whether the entries changed."""
        is_new = entry not in self._until_s
        self._until_s[entry] = now_s + TTL_S
        self._until_s.move_to_end(entry)
        while len(self._until_s) > self.most:
            self._until_s.popitem(last=False)
        self.epoch += is_new
        return is_new

    def expire(self, now_s: float) -> bool:
        """Forget who was silent for too long; say whether the entries changed."""
        before = len(self._until_s)
        while self._until_s and next(iter(self._until_s.values())) <= now_s:
            self._until_s.popitem(last=False)
        went = len(self._until_s) < before
        self.epoch += went
        return went

    def entries(self) -> tuple[Entry, ...]:
        """Return who is registered."""
        return tuple(self._until_s)
