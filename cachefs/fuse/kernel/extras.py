"""Extended attributes, and the numbers of the file system.

`user.weightstream.uri` is how weightstream's own loader recognises a path in a mount and takes the
bytes from the store instead. For a folder it is the prefix's URI.
"""

import errno
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from weightstream.cachefs.files.entries import Entry, Folder, join
from weightstream.cachefs.fuse.kernel import wire
from weightstream.cachefs.fuse.kernel.connection import Refusal
from weightstream.cachefs.fuse.kernel.names import ChildrenOf, Names
from weightstream.cachefs.fuse.kernel.wire import Parts, Request

if TYPE_CHECKING:
    from weightstream.cachefs.files.content import Content

log = logging.getLogger(__name__)

USER = "user."
PREFIX = USER + "weightstream."
URI, ETAG, CACHED, STATE = (PREFIX + name for name in ("uri", "etag", "cached", "state"))
_OF_FILES = (URI, ETAG, CACHED, STATE)
_OF_FOLDERS = (URI,)


_NAME_AT = wire.HEADER.size + 8
_ENCODED_USER = wire.encode(USER)


def is_foreign(message: memoryview) -> bool:
    """Say whether a GETXATTR is about a class of attributes that is not here (SELinux, ACL).

    The answer is EOPNOTSUPP: `ls -l` then asks no other file of the device, where ENODATA had it
    ask for two attributes of each. ENOSYS would have the kernel never ask again, for ours neither.
    """
    return message[_NAME_AT : _NAME_AT + len(USER)] != _ENCODED_USER


class Extras:
    """Handlers for what few ask. Thread-safe."""

    def __init__(self, uri: str, names: Names, content: "Content", store: Path | None) -> None:
        self._uri = uri
        self._names = names
        self._content = content
        self._store = store

    def getxattr(self, request: Request, _: ChildrenOf) -> Parts:
        """Return the value of an attribute, or its size."""
        entry = self._names.node(request.nodeid).entry
        room, name = wire.xattr_of(request)
        return _sized(self._value(entry, name), room)

    def listxattr(self, request: Request, _: ChildrenOf) -> Parts:
        """Return the names of the attributes, or their size."""
        entry = self._names.node(request.nodeid).entry
        names = _OF_FOLDERS if isinstance(entry, Folder) else _OF_FILES
        listed = "".join(f"{name}\0" for name in names)
        return _sized(listed, wire.first_u32_of(request))

    def statfs(self, request: Request, _: ChildrenOf) -> Parts:
        """Return the numbers of the store's disk."""
        try:
            found = os.statvfs(self._store) if self._store is not None else None
        except OSError as error:
            log.debug("no numbers of %s: %s", self._store, error)
            found = None
        return [wire.statfs_out(found)]

    def _value(self, entry: Entry, name: str) -> str:
        if isinstance(entry, Folder):
            if name == URI:
                return join(self._uri.rstrip("/"), entry.path) if entry.path else self._uri
            raise Refusal(errno.ENODATA)
        if name == URI:
            return entry.blob.uri
        if name == ETAG:
            return entry.blob.version
        if name == CACHED:
            return str(self._content.state(entry.blob).present_bytes)
        if name == STATE:
            return self._content.state(entry.blob).state
        raise Refusal(errno.ENODATA)


def _sized(value: str, room: int) -> Parts:
    raw = wire.encode(value)
    if not room:
        return [wire.xattr_size_out(len(raw))]
    if len(raw) > room:
        raise Refusal(errno.ERANGE)
    return [raw]
