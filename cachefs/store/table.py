"""The chunk table: which chunks of a blob are there, with their hashes, in memory shared by all.

    0     fixed    magic, format, sizes, lengths of the two texts; BLAKE3 of those and the texts
    128   mutable  last use, pinned, count of drops, boot id, seal
    256   uri and version, as asked by whoever made the table
    H     one entry of 64 bytes per chunk (H: the next multiple of 4096)

The file is mapped by every process that has the blob open, so a state that one process sets is seen
by all others without a system call. An entry is 64 bytes and aligned: it never straddles a cache
line, a sector or a page, so a power loss tears at most what is inside it, and its own check finds
that. The hash goes in before the state byte. Who trusts the table trusts no byte of it unchecked:
fixed fields have a hash, entries and seal a CRC, and a state byte only says where to look.

Scanning 100,000 chunks takes a strided slice (0.2 ms), never a loop.
"""

import mmap
import os
import struct
import sys
import time
import zlib
from dataclasses import dataclass
from typing import Any

from blake3 import blake3

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.store.files import OpenFile
from weightstream.cachefs.store.state import ChunkState
from weightstream.errors import StoreError

PAGE = 4096
_MAGIC = b"WSTREAM\0"
_VERSION = 1
_FIXED = struct.Struct("<8sIIQQQII")
_FIXED_HASH_AT = 48
_LAST_USED_AT = 128
_PINNED_AT = 136
_DROPS_AT = 144
_BOOT_AT = 160
_SEAL_AT = 192
_TEXT_AT = 256
_U64 = struct.Struct("<Q")
_SEAL = struct.Struct("<QQQI")
_ENTRY_BYTES = 64
_ENTRY = struct.Struct("<Q32sI")
_ENTRY_AT = 8
_TEXT_MAX_BYTES = 1 << 20

# From 3.13 a mapping need not keep a duplicate of its descriptor: one less per blob.
MAP_OPTIONS: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}


class DamagedTable(StoreError):
    """A table that must not be believed; it is rebuilt, so this stays inside the store."""


@dataclass(frozen=True, slots=True)
class Header:
    """The fields of a table that never change."""

    blob: Blob
    chunk_size: int

    @property
    def n_chunks(self) -> int:
        """Return how many chunks the blob has."""
        return -(-self.blob.size // self.chunk_size)

    @property
    def header_bytes(self) -> int:
        """Return where the entries begin."""
        text_bytes = len(self.blob.uri.encode()) + len(self.blob.version.encode())
        return -(-(_TEXT_AT + text_bytes) // PAGE) * PAGE

    @property
    def table_bytes(self) -> int:
        """Return the size of the table's file."""
        return self.header_bytes + self.n_chunks * _ENTRY_BYTES

    def encode(self) -> bytes:
        """Return the header as it stands at the start of a new table."""
        uri, version = self.blob.uri.encode(), self.blob.version.encode()
        fixed = _FIXED.pack(
            _MAGIC,
            _VERSION,
            self.header_bytes,
            self.blob.size,
            self.chunk_size,
            self.n_chunks,
            len(uri),
            len(version),
        )
        digest = blake3(fixed + uri + version).digest()
        return (fixed + digest).ljust(_TEXT_AT, b"\0") + uri + version


@dataclass(frozen=True, slots=True)
class Stamp:
    """What changes when somebody writes to a data file."""

    mtime_ns: int
    size: int
    inode: int

    @classmethod
    def of(cls, file: OpenFile) -> "Stamp":
        """Return the stamp of an open file as it is now."""
        status = os.fstat(file.fileno())
        return cls(status.st_mtime_ns, status.st_size, status.st_ino)


@dataclass(frozen=True, slots=True)
class Entry:
    """What the table says of the bytes of one chunk."""

    digest: bytes
    crc64: int


def parse_header(content: bytes | memoryview, file_bytes: int, where: object) -> Header:
    """Read a header that may be anything; raises `DamagedTable` that says what is wrong with it."""
    if len(content) < _TEXT_AT:
        raise DamagedTable(f"{where}: too short for a table")
    magic, form, _, size, chunk_size, _, n_uri, n_version = _FIXED.unpack_from(content)
    if magic != _MAGIC or form != _VERSION:
        raise DamagedTable(f"{where}: not a chunk table of format {_VERSION}")
    n_text = n_uri + n_version
    if n_text > min(_TEXT_MAX_BYTES, len(content) - _TEXT_AT) or not chunk_size:
        raise DamagedTable(f"{where}: impossible sizes in the header")
    text = bytes(content[_TEXT_AT : _TEXT_AT + n_text])
    fixed = bytes(content[: _FIXED.size])
    digest = blake3(fixed + text).digest()
    if digest != bytes(content[_FIXED_HASH_AT : _FIXED_HASH_AT + len(digest)]):
        raise DamagedTable(f"{where}: the header does not match its hash")
    header = Header(Blob(text[:n_uri].decode(), size, text[n_uri:].decode()), chunk_size)
    if file_bytes != header.table_bytes:
        raise DamagedTable(f"{where}: {file_bytes} bytes long instead of {header.table_bytes}")
    return header


class Table:
    """A mapped table. Single fields are atomic; who changes what under which lock: see the note."""

    def __init__(self, file: OpenFile, shared: bool) -> None:
        """Map the table: `shared`, or as a private copy whose changes nobody sees."""
        size = os.fstat(file.fileno()).st_size
        if size < PAGE:
            raise DamagedTable(f"{file.path}: too short for a table")
        access = mmap.ACCESS_WRITE if shared else mmap.ACCESS_COPY
        self._view = memoryview(mmap.mmap(file.fileno(), size, access=access, **MAP_OPTIONS))
        self.header = parse_header(self._view, size, file.path)
        self._base = self.header.header_bytes
        self._n_chunks = self.header.n_chunks

    def _at(self, i: int) -> int:
        if not 0 <= i < self._n_chunks:
            raise IndexError(f"{self.header.blob.uri} has {self._n_chunks} chunks, no chunk {i}")
        return self._base + i * _ENTRY_BYTES

    def state(self, i: int) -> ChunkState:
        """Return the state of one chunk."""
        value = self._view[self._at(i)]
        return ChunkState(value) if value <= ChunkState.SUSPECT else ChunkState.SUSPECT

    def set_state(self, i: int, state: ChunkState) -> None:
        """Set the state of one chunk."""
        self._view[self._at(i)] = state

    def states(self) -> bytes:
        """Return a snapshot of all states, one byte per chunk."""
        return bytes(self._view[self._base :: _ENTRY_BYTES])

    def replace_states(self, states: bytes) -> None:
        """Set all states at once. Only for recovery: states set meanwhile by others are lost."""
        self._view[self._base :: _ENTRY_BYTES] = states

    def put(self, i: int, entry: Entry) -> None:
        """Store the hashes of one chunk; its state is set afterwards."""
        check = _entry_check(i, entry.crc64, entry.digest)
        _ENTRY.pack_into(self._view, self._at(i) + _ENTRY_AT, entry.crc64, entry.digest, check)

    def entry(self, i: int) -> Entry | None:
        """Return the hashes of one chunk, or None when they were never stored whole."""
        crc64, digest, check = _ENTRY.unpack_from(self._view, self._at(i) + _ENTRY_AT)
        if check != _entry_check(i, crc64, digest):
            return None
        return Entry(digest, crc64)

    @property
    def last_used_ns(self) -> int:
        """Return the wall clock of the last use."""
        return int(_U64.unpack_from(self._view, _LAST_USED_AT)[0])

    def touch(self) -> None:
        """Make now the time of the last use."""
        _U64.pack_into(self._view, _LAST_USED_AT, time.time_ns())

    @property
    def pinned(self) -> bool:
        """Say whether eviction must leave the blob alone."""
        return self._view[_PINNED_AT] != 0

    @pinned.setter
    def pinned(self, value: bool) -> None:
        self._view[_PINNED_AT] = value

    @property
    def drops(self) -> int:
        """Return how many chunks were ever dropped."""
        return int(_U64.unpack_from(self._view, _DROPS_AT)[0])

    def count_drop(self) -> None:
        """Add one to `drops`; under the blob's change lock."""
        _U64.pack_into(self._view, _DROPS_AT, self.drops + 1)

    @property
    def boot_id(self) -> bytes:
        """Return the boot on which FILLED chunks were written."""
        return bytes(self._view[_BOOT_AT : _BOOT_AT + 16])

    @boot_id.setter
    def boot_id(self, value: bytes) -> None:
        self._view[_BOOT_AT : _BOOT_AT + 16] = value

    @property
    def seal(self) -> Stamp | None:
        """Return the data file's stamp when the blob was sealed, or None when it is not."""
        mtime_ns, size, inode, check = _SEAL.unpack_from(self._view, _SEAL_AT)
        if check != _seal_check(mtime_ns, size, inode):
            return None
        return Stamp(mtime_ns, size, inode)

    @seal.setter
    def seal(self, stamp: Stamp | None) -> None:
        if stamp is None:
            self._view[_SEAL_AT : _SEAL_AT + _SEAL.size] = bytes(_SEAL.size)
            return
        fields = (stamp.mtime_ns, stamp.size, stamp.inode)
        _SEAL.pack_into(self._view, _SEAL_AT, *fields, _seal_check(*fields))


# Both checks begin with a word so that an area of zeros is never valid.
def _entry_check(i: int, crc64: int, digest: bytes) -> int:
    return zlib.crc32(struct.pack("<5sQQ32s", b"entry", i, crc64, digest))


def _seal_check(mtime_ns: int, size: int, inode: int) -> int:
    return zlib.crc32(struct.pack("<4sQQQ", b"seal", mtime_ns, size, inode))
