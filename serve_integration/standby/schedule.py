"""How many steps of capacity wait when: `1, mon-fri 08:00-20:00=3, sat 10:00-14:00=2`.

An entry without a time always holds. Of those that hold, the last one counts, so the usual comes
first and the exceptions after it. A window may run past midnight; it belongs to the day on which
it begins. Times are those of whoever asks.
"""

import re
from dataclasses import dataclass
from datetime import datetime

from weightstream.errors import UsageError

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_DAY_MIN = 24 * 60
_ENTRY = re.compile(
    r"(?:(?:(?P<first>[a-z]{3})(?:-(?P<last>[a-z]{3}))?\s+)?"
    r"(?P<begin>\d\d:\d\d)-(?P<end>\d\d:\d\d)\s*=\s*)?(?P<steps>\d+)"
)


@dataclass(frozen=True, slots=True)
class Window:
    """Some hours on some days of the week, and how many steps wait then."""

    days: frozenset[int]
    """0 is Monday; the day on which it begins."""
    begin_min: int
    length_min: int
    steps: int

    def holds(self, when: datetime) -> bool:
        """Say whether that time is in the window."""
        since_min = when.hour * 60 + when.minute - self.begin_min
        today = 0 <= since_min < self.length_min and when.weekday() in self.days
        late = since_min + _DAY_MIN < self.length_min and (when.weekday() - 1) % 7 in self.days
        return today or late


def steps_at(windows: tuple[Window, ...], when: datetime) -> int:
    """Return how many steps wait at that time; none where no window holds."""
    return next((window.steps for window in reversed(windows) if window.holds(when)), 0)


def parse(text: str) -> tuple[Window, ...]:
    """Return a schedule; raises UsageError for anything that is none."""
    return tuple(_window(entry.strip().lower()) for entry in text.split(","))


def _window(entry: str) -> Window:
    found = _ENTRY.fullmatch(entry)
    if found is None:
        raise UsageError(
            f"{entry!r} is no entry of a schedule: `2`, `08:00-20:00=2` or `mon-fri 08:00-20:00=2`"
        )
    steps = int(found["steps"])
    if found["begin"] is None:
        return Window(frozenset(range(7)), 0, _DAY_MIN, steps)
    begin_min, end_min = _minute(found["begin"]), _minute(found["end"])
    length_min = (end_min - begin_min) % _DAY_MIN or _DAY_MIN
    return Window(_days(found["first"], found["last"]), begin_min % _DAY_MIN, length_min, steps)


def _minute(text: str) -> int:
    hour, minute = map(int, text.split(":"))
    if minute > 59 or hour * 60 + minute > _DAY_MIN:
        raise UsageError(f"{text!r} is no time of day, 00:00 to 24:00")
    return hour * 60 + minute


def _days(first: str | None, last: str | None) -> frozenset[int]:
    if first is None:
        return frozenset(range(7))
    begin, end = _day(first), _day(last or first)
    return frozenset((begin + offset) % 7 for offset in range((end - begin) % 7 + 1))


def _day(name: str) -> int:
    if name not in _DAYS:
        raise UsageError(f"{name!r} is no day of the week: {', '.join(_DAYS)}")
    return _DAYS.index(name)
