"""The structures of the FUSE protocol that a read-only file system needs: bytes in, values out.

Pure: no descriptor, no state. Layouts and numbers are those of include/uapi/linux/fuse.h, protocol
7.45 (Linux 6.18); the kernel pads all structures, so the standard sizes in its own byte order fit.
What is parsed comes from the kernel and is checked all the same: a short or lying message must end
in `WireError`, never in bytes of the request before it.
"""

import errno
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from weightstream.cachefs.fuse.kernel.protocol import Init, Op
from weightstream.errors import WeightstreamError

Parts: TypeAlias = Sequence[bytes | memoryview]
"""What a reply is made of, without its header."""

MAJOR = 7
MINOR = 45
OLDEST_MINOR = 31  # Linux 5.4; INIT's answer had another size before 7.23
ROOT_ID = 1
RESENT = 1 << 63
"""Set in the unique number of a request that an earlier server read and did not answer."""

HEADER = struct.Struct("=IIQQIIIHH")
"""length, opcode, unique, nodeid, uid, gid, pid, length of extensions, padding."""

READ_REQUEST = struct.Struct("=IIQQIIIHHQQIIQII")
"""A header and fuse_read_in: fh, offset, size, read_flags, lock_owner, flags, padding."""

OUT = struct.Struct("=IiQ")
"""length, -errno, unique; for a notification: length, its code, 0."""

_U64 = struct.Struct("=Q")
_TWO_U32 = struct.Struct("=II")
_FORGET_ONE = struct.Struct("=QQ")
_GETATTR_IN = struct.Struct("=IIQ")
_READ_IN = struct.Struct("=QQIIQII")
_INIT_IN = struct.Struct("=IIII")
_ATTR = struct.Struct("=QQQQQQIIIIIIIIII")
_ENTRY = struct.Struct("=QQQQII")
_ATTR_OUT = struct.Struct("=QII")
_STATX_OUT = struct.Struct("=QIIQQ")
_STATX = struct.Struct("=IIQIIIHHQQQQ qIi qIi qIi qIi IIII 112x")
_OPEN_OUT = struct.Struct("=QIi")
_STATFS_OUT = struct.Struct("=QQQQQIIII24x")
_INIT_OUT = struct.Struct("=IIIIHHIIHHIIH22x")
_DIRENT = struct.Struct("=QQII")
_INVAL_INODE = struct.Struct("=Qqq")
_INVAL_ENTRY = struct.Struct("=QII")
BACKING_MAP = struct.Struct("=iIQ")


class WireError(WeightstreamError):
    """A message that is not what the protocol says."""

    errno = errno.EINVAL


@dataclass(frozen=True, slots=True)
class Request:
    """One question of the kernel's; `body` is what follows the header."""

    opcode: int
    unique: int
    nodeid: int
    uid: int
    gid: int
    pid: int
    body: bytes

    @property
    def op(self) -> str:
        """Return the operation's name, for logs and metrics."""
        return op_name(self.opcode)


def decode(name: bytes) -> str:
    """Return a name as the tree has it: UTF-8, whatever the locale."""
    return name.decode("utf-8", "surrogateescape")


def encode(name: str) -> bytes:
    """Return a name as the kernel has it."""
    return name.encode("utf-8", "surrogateescape")


def op_name(opcode: int) -> str:
    """Return an operation's name in lower case; its number if it is unknown."""
    try:
        return Op(opcode).name.lower()
    except ValueError:
        return str(opcode)


def parse_request(message: bytes | bytearray | memoryview) -> Request:
    """Take a message apart; the body is a copy."""
    if len(message) < HEADER.size:
        raise WireError(f"a FUSE message of {len(message)} bytes")
    length, opcode, unique, nodeid, uid, gid, pid, extensions, _ = HEADER.unpack_from(message)
    stop = length - 8 * extensions
    if length != len(message) or stop < HEADER.size:
        raise WireError(f"a FUSE message of {len(message)} bytes says {length}")
    return Request(opcode, unique, nodeid, uid, gid, pid, bytes(message[HEADER.size : stop]))


# ---- what requests carry


def _fields(layout: struct.Struct, request: Request, offset: int = 0) -> tuple[int, ...]:
    try:
        return layout.unpack_from(request.body, offset)
    except struct.error as error:
        raise WireError(f"{request.op} with only {len(request.body)} bytes") from error


def name_of(request: Request, offset: int = 0) -> str:
    """Return the name that a request carries, without its NUL."""
    name, nul, _ = request.body[offset:].partition(b"\0")
    if not name or not nul or b"/" in name:
        raise WireError(f"{request.op} without a proper name")
    return decode(name)


def forgets_of(request: Request) -> list[tuple[int, int]]:
    """Return (node id, count) of FORGET and BATCH_FORGET."""
    if request.opcode == Op.FORGET:
        return [(request.nodeid, _fields(_U64, request)[0])]
    count, _ = _fields(_TWO_U32, request)
    ones = request.body[_TWO_U32.size :]
    if count * _FORGET_ONE.size != len(ones):
        raise WireError(f"batch_forget of {count} with {len(ones)} bytes")
    return list(_FORGET_ONE.iter_unpack(ones))


def open_flags_of(request: Request) -> int:
    """Return the flags that the application gave to open(2)."""
    return _fields(_TWO_U32, request)[0]


def handle_of(request: Request) -> int:
    """Return the handle that RELEASE and RELEASEDIR end."""
    return _fields(_U64, request)[0]


def read_of(request: Request) -> tuple[int, int, int]:
    """Return (handle, offset, size) of READ, READDIR and READDIRPLUS."""
    handle, offset, size, *_ = _fields(_READ_IN, request)
    return handle, offset, size


def xattr_of(request: Request) -> tuple[int, str]:
    """Return (room, name) of GETXATTR."""
    room, _ = _fields(_TWO_U32, request)
    name, nul, _rest = request.body[_TWO_U32.size :].partition(b"\0")
    if not name or not nul:
        raise WireError("getxattr without a name")
    return room, decode(name)


def first_u32_of(request: Request) -> int:
    """Return the room of LISTXATTR, the mask of ACCESS."""
    return _fields(_TWO_U32, request)[0]


def interrupted_of(request: Request) -> int:
    """Return the unique number of the request that INTERRUPT is about."""
    return _fields(_U64, request)[0]


@dataclass(frozen=True, slots=True)
class Offer:
    """What the kernel can do."""

    major: int
    minor: int
    max_readahead: int
    flags: Init


def offer_of(request: Request) -> Offer:
    """Return what INIT says."""
    major, minor, max_readahead, flags = _fields(_INIT_IN, request)
    if flags & Init.INIT_EXT and len(request.body) >= _INIT_IN.size + 4:
        flags |= int.from_bytes(request.body[_INIT_IN.size : _INIT_IN.size + 4], "little") << 32
    return Offer(major, minor, max_readahead, Init(flags))


# ---- what replies carry


@dataclass(frozen=True, slots=True)
class Attributes:
    """What `stat` shows."""

    ino: int
    mode: int
    size: int
    nlink: int
    modified_ns: int
    uid: int
    gid: int

    @property
    def blocks(self) -> int:
        """Return the size in units of 512 bytes."""
        return -(-self.size // 512)


def seconds(duration_s: float) -> tuple[int, int]:
    """Split a time into seconds and nanoseconds; never negative, at most a hundred years."""
    total_ns = int(min(max(duration_s, 0.0), 3.2e9) * 1e9)
    return divmod(total_ns, 1_000_000_000)


def _instant(at_ns: int) -> tuple[int, int]:
    """Split a wall-clock time; the protocol's seconds are unsigned."""
    return divmod(min(max(at_ns, 0), (1 << 63) - 1), 1_000_000_000)


def attr(attributes: Attributes) -> bytes:
    """Pack fuse_attr."""
    a = attributes
    s, ns = _instant(a.modified_ns)
    return _ATTR.pack(
        a.ino, a.size, a.blocks, s, s, s, ns, ns, ns, a.mode, a.nlink, a.uid, a.gid, 0, 0, 0
    )


def entry_out(nodeid: int, entry_s: float, attr_s: float, attributes: Attributes) -> bytes:
    """Pack fuse_entry_out: a name leads to a node, for so long."""
    es, ens = seconds(entry_s)
    as_, ans = seconds(attr_s)
    return _ENTRY.pack(nodeid, 0, es, as_, ens, ans) + attr(attributes)


def no_entry_out(entry_s: float) -> bytes:
    """Pack fuse_entry_out that says: there is nothing of this name, for so long."""
    es, ens = seconds(entry_s)
    return _ENTRY.pack(0, 0, es, 0, ens, 0) + bytes(_ATTR.size)


def attr_out(attr_s: float, attributes: Attributes) -> bytes:
    """Pack fuse_attr_out."""
    s, ns = seconds(attr_s)
    return _ATTR_OUT.pack(s, ns, 0) + attr(attributes)


_STATX_BASIC, _STATX_BTIME = 0x7FF, 0x800


def statx_out(attr_s: float, attributes: Attributes) -> bytes:
    """Pack fuse_statx_out; the time of birth is that of the version."""
    a = attributes
    s, ns = seconds(attr_s)
    at, at_ns = _instant(a.modified_ns)
    time = (at, at_ns, 0)
    return _STATX_OUT.pack(s, ns, 0, 0, 0) + _STATX.pack(
        _STATX_BASIC | _STATX_BTIME, 4096, 0, a.nlink, a.uid, a.gid, a.mode, 0, a.ino, a.size,
        a.blocks, 0, *time, *time, *time, *time, 0, 0, 0, 0,
    )  # fmt: skip


def open_out(handle: int, flags: int, backing_id: int = 0) -> bytes:
    """Pack fuse_open_out."""
    return _OPEN_OUT.pack(handle, flags, backing_id)


def xattr_size_out(size: int) -> bytes:
    """Pack fuse_getxattr_out."""
    return _TWO_U32.pack(size, 0)


def statfs_out(found: os.statvfs_result | None) -> bytes:
    """Pack fuse_statfs_out: a file system's numbers, or none."""
    if found is None:
        return _STATFS_OUT.pack(0, 0, 0, 0, 0, 4096, 255, 4096, 0)
    return _STATFS_OUT.pack(
        found.f_blocks, found.f_bfree, found.f_bavail, found.f_files, found.f_ffree,
        found.f_bsize, 255, found.f_frsize, 0,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Answer:
    """What the server takes of the kernel's offer."""

    minor: int
    flags: Init
    max_readahead: int
    max_background: int
    congestion: int
    max_write: int
    max_pages: int
    max_stack_depth: int


def init_out(answer: Answer) -> bytes:
    """Pack fuse_init_out, 64 bytes."""
    low, high = answer.flags & 0xFFFFFFFF, answer.flags >> 32
    return _INIT_OUT.pack(
        MAJOR, answer.minor, answer.max_readahead, low, answer.max_background, answer.congestion,
        answer.max_write, 1, answer.max_pages, 0, high, answer.max_stack_depth, 0,
    )  # fmt: skip


DT_DIR, DT_REG = 4, 8


def dirent_bytes(name: bytes, plus: bool = False) -> int:
    """Return the room that one entry of a directory takes."""
    size = _DIRENT.size + len(name)
    return (size + 7 & ~7) + (_ENTRY.size + _ATTR.size if plus else 0)


def dirent(ino: int, following: int, kind: int, name: bytes) -> bytes:
    """Pack fuse_dirent; `following` is the offset of the entry after it."""
    return _DIRENT.pack(ino, following, len(name), kind) + name + bytes(-len(name) % 8)


NO_ENTRY = bytes(_ENTRY.size + _ATTR.size)
"""Before a dirent of READDIRPLUS: nothing is said about what it leads to."""


# ---- notifications


def inval_inode(nodeid: int, start: int = 0, length: int = 0) -> bytes:
    """Pack: forget what is cached of a node; a negative start means its attributes alone."""
    return _INVAL_INODE.pack(nodeid, start, length)


def inval_entry(parent: int, name: str) -> bytes:
    """Pack: forget what a name leads to."""
    raw = encode(name)
    return _INVAL_ENTRY.pack(parent, len(raw), 0) + raw + b"\0"
