"""Write what was published, through fsspec: each file whole or not at all, where that can be had.

An object store shows an object when all of it is there, and on this machine a file is renamed when
it is complete. What other kinds of file systems show of a write that broke off is no manifest: the
root hash in it does not match.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from weightstream.cachefs.origin.base import StorageOptions
from weightstream.cachefs.origin.failures import translated
from weightstream.cachefs.origin.fs import FileSystem
from weightstream.cachefs.origin.responses import Asked
from weightstream.cachefs.origin.urls import shown
from weightstream.errors import UsageError

_WRITE_TIMEOUT_S = 300.0
_LOCAL = ("file", "local")


def write_files(
    folder: str, files: Iterable[tuple[str, bytes]], options: StorageOptions | None
) -> None:
    """Write files, in this order, into a folder: a directory or any fsspec URL."""
    protocol = folder.partition("://")[0].lower() if "://" in folder else "file"
    for name, body in files:
        if protocol in _LOCAL:
            _write_local(Path(folder.partition("://")[2] or folder).expanduser() / name, body)
        else:
            _write_remote(protocol, f"{folder.rstrip('/')}/{name}", body, options or {})


def check_writable(folder: str) -> None:
    """Refuse, before a model is read for nothing, what can never be written to."""
    if folder.startswith(("http://", "https://")):
        raise UsageError(f"{shown(folder)} cannot be written to; say with --to where to write")


def _write_local(path: Path, body: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    with translated(Asked(str(path), "file")):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                file.write(body)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _write_remote(protocol: str, uri: str, body: bytes, options: StorageOptions) -> None:
    asked = Asked(uri, protocol)
    fs = FileSystem(protocol, options).get(asked)
    with translated(asked):
        path = fs._strip_protocol(uri)
        if getattr(fs, "async_impl", False):
            from fsspec.asyn import sync

            sync(fs.loop, fs._pipe_file, path, body, timeout=_WRITE_TIMEOUT_S)
            return
        fs.makedirs(fs._parent(path), exist_ok=True)
        fs.pipe_file(path, body)
