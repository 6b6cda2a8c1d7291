"""A few named threads for work that may wait: for the origin, for the disk.

Not concurrent.futures: its threads are joined when the interpreter ends, and a server must end
whatever its origin does.
"""

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

from weightstream.cachefs.files.entries import Entry
from weightstream.errors import WeightstreamError

log = logging.getLogger(__name__)

Children = tuple[Entry, ...]


class Workers:
    """At most so many daemon threads, started when they are needed."""

    def __init__(self, name: str, most: int) -> None:
        self._name = name
        self._most = most
        self._work: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._lock = threading.Lock()
        self._started = 0
        self._idle = 0

    def submit(self, work: Callable[[], None]) -> None:
        """Have it done; returns at once."""
        with self._lock:
            if self._idle:
                self._idle -= 1
            elif self._started < self._most:
                self._start()
            self._work.put(work)

    def _start(self) -> None:
        name = f"weightstream-{self._name}-{self._started}"
        threading.Thread(target=self._run, daemon=True, name=name).start()
        self._started += 1

    def _run(self) -> None:
        while True:
            work = self._work.get()
            try:
                work()
            except Exception:  # a bug: one request hangs until its deadline, not the pool
                log.exception("unexpected, in %s", threading.current_thread().name)
            with self._lock:
                if self._work.empty():
                    self._idle += 1


class Listings:
    """Folders that are being listed: one worker for each, however many wait for it."""

    def __init__(self, children: Callable[[str], Children], workers: Workers) -> None:
        self._children = children
        self._workers = workers
        self._lock = threading.Lock()
        self._asked: dict[str, list[Callable[[Children, WeightstreamError | None], None]]] = {}

    def __len__(self) -> int:
        return len(self._asked)

    def ask(self, path: str, then: Callable[[Children, WeightstreamError | None], None]) -> None:
        """Call `then` with the children of a folder, or with why there are none, on a worker."""
        with self._lock:
            waiters = self._asked.get(path)
            if waiters is not None:
                waiters.append(then)
                return
            self._asked[path] = [then]
        self._workers.submit(lambda: self._list(path))

    def _list(self, path: str) -> None:
        children: Children = ()
        failure: WeightstreamError | None = None
        try:
            children = self._children(path)
        except WeightstreamError as error:
            failure = error
        except Exception as error:  # a bug: those who wait must hear of it
            log.exception("unexpected, listing %r", path)
            failure = WeightstreamError(f"{path!r} cannot be listed: {error!r}")
        with self._lock:
            waiters = self._asked.pop(path)
        for then in waiters:
            then(children, failure)
