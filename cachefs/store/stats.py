"""What happened in a store since this process opened it."""

import threading
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Counts of the events that tell an operator about the disk and its limits."""

    dropped_chunks: int = 0
    """Chunks that did not match their hash or could not be read."""
    rebuilt_tables: int = 0
    """Blobs started over because their table was damaged or their data file missing."""
    rebooted_blobs: int = 0
    """Blobs with chunks that were not durable when the machine restarted."""
    touched_blobs: int = 0
    """Blobs whose data file was changed by somebody else."""
    evicted_blobs: int = 0
    evicted_bytes: int = 0


class Counters:
    """Counts events from any thread."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._stats = StoreStats()

    def add(self, **events: int) -> None:
        """Add to the named fields of `StoreStats`."""
        with self._mutex:
            grown = {name: getattr(self._stats, name) + count for name, count in events.items()}
            self._stats = replace(self._stats, **grown)

    def snapshot(self) -> StoreStats:
        """Return the counts so far."""
        return self._stats

    def after_fork_in_child(self) -> None:
        """Start anew in the child."""
        self._mutex = threading.Lock()
        self._stats = StoreStats()
