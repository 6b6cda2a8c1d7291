"""The order in which a load touched a model's files, kept for the next one.

One small JSON file per folder, under the store. It is advice: whatever is wrong with it costs only
a fill in file order.
"""

import json
import logging
import threading
from collections.abc import Sequence
from pathlib import Path

from blake3 import blake3

from weightstream.cachefs.store.files import DIRECTORY_MODE, replace_file
from weightstream.errors import StoreError

log = logging.getLogger(__name__)

_MOST_TOUCHES = 65_536
_FORMAT = 1


class AccessOrder:
    """The touches of one folder: as recorded by an earlier load, and as this one makes them."""

    def __init__(self, home: Path | None, folder_uri: str) -> None:
        self._path = _path(home, folder_uri) if home is not None else None
        self._uri = folder_uri
        self._lock = threading.Lock()
        self._touched: dict[tuple[str, int], None] = {}
        self._saved = 0
        self._earlier = _read(self._path, folder_uri)

    def touch(self, name: str, chunk: int) -> None:
        """Hear that a reader asked for a chunk of a file."""
        with self._lock:
            if len(self._touched) < _MOST_TOUCHES:
                self._touched.setdefault((name, chunk))

    def names(self) -> Sequence[str]:
        """Return the files in the order of their first touch, as recorded earlier."""
        return list(dict.fromkeys(name for name, _ in self._earlier))

    def chunks(self, name: str) -> Sequence[int]:
        """Return the chunks of a file in the order of their first touch, as recorded earlier."""
        return [chunk for other, chunk in self._earlier if other == name]

    def save(self) -> None:
        """Keep what this load touched, if it touched anything new; never raises for a bad disk.

        A look at one file must not replace the record of a load: half as much as before is wanted.
        """
        with self._lock:
            touched = list(self._touched)
            enough = len(touched) > self._saved and 2 * len(touched) >= len(self._earlier)
            if self._path is None or not enough:
                return
            self._saved = len(touched)
        content = {"format": _FORMAT, "uri": self._uri, "touched": touched}
        try:
            self._path.parent.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
            replace_file(self._path, json.dumps(content).encode())
        except (OSError, StoreError) as error:
            log.debug("the access order of %s is not kept: %s", self._uri, error)


def _path(home: Path, folder_uri: str) -> Path:
    return home / "orders" / f"{blake3(folder_uri.encode()).hexdigest(length=16)}.json"


def _read(path: Path | None, uri: str) -> list[tuple[str, int]]:
    if path is None:
        return []
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != _FORMAT or content["uri"] != uri:
            return []
        return [(str(name), int(chunk)) for name, chunk in content["touched"][:_MOST_TOUCHES]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        log.debug("ignoring the access order %s: %r", path, error)
        return []
