"""A node's name: made once, kept in its store."""

import contextlib
import logging
import os
import re
import secrets
import socket
from pathlib import Path

from weightstream.cachefs.store.layout import open_layout
from weightstream.errors import UsageError

log = logging.getLogger(__name__)

FILE = "node"
_MOST_HOST_CHARACTERS = 63
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_READ_BYTES = 4096


def is_node_name(text: object) -> bool:
    """Say whether this may be a node's name, in a file or in a message."""
    return isinstance(text, str) and _NAME.fullmatch(text) is not None


def node_name(store: Path) -> str:
    """Return the name in the store's file `node`; make both when they are not there.

    It is the store's name rather than the process's: peers know by it who holds what. A store that
    cannot be written gives a name for this process only. Raises `UsageError` for a file that holds
    something else, `StoreError` for a directory that is no store.
    """
    _, writable = open_layout(store)  # the marker comes first: a store is refused beside strangers
    path = store / FILE
    found = _read(path)
    if found is None and not writable:
        name = _invented()
        log.info("the store %s cannot be written: this node is %s until it ends", store, name)
        return name
    if found is None:
        _create(path, _invented())
        found = _read(path)
    if found is None:
        raise UsageError(f"{path} was removed while it was made")
    return found


def _read(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            text = file.read(_READ_BYTES).decode("ascii", "replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"cannot read the node's name in {path}: {error.strerror}") from error
    if not is_node_name(text):
        raise UsageError(f"{path} holds no node's name: remove it, a new one is made")
    return text


def _create(path: Path, name: str) -> None:
    """Make the file with its content at once; of several processes the first one wins."""
    temporary = path.with_name(f"{FILE}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(f"{name}\n".encode())
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):  # another process was first: its name it is
            os.link(temporary, path)
    except OSError as error:
        raise UsageError(f"cannot write the node's name to {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _invented() -> str:
    host = re.sub(r"[^A-Za-z0-9.-]+", "-", socket.gethostname()).strip(".-")
    return f"{host[:_MOST_HOST_CHARACTERS] or 'node'}-{secrets.token_hex(4)}"
