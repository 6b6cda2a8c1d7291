"""The FUSE protocol's structures: packed as the kernel has them, parsed with suspicion."""

import struct
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightstream.cachefs.fuse.kernel import wire
from weightstream.cachefs.fuse.kernel.protocol import Init, Op
from weightstream.cachefs.fuse.kernel.wire import Attributes, Request, WireError


def message(opcode: int, body: bytes, **given: int) -> bytes:
    """Return a message as the kernel sends it."""
    fields = {"unique": 2, "nodeid": 1, "uid": 0, "gid": 0, "pid": 7, "extensions": 0} | given
    return (
        wire.HEADER.pack(
            fields.get("length", wire.HEADER.size + len(body)), opcode, fields["unique"],
            fields["nodeid"], fields["uid"], fields["gid"], fields["pid"], fields["extensions"], 0,
        )
        + body
    )  # fmt: skip


def request(opcode: int, body: bytes) -> Request:
    return wire.parse_request(message(opcode, body))


def test_a_message_is_taken_apart() -> None:
    parsed = wire.parse_request(message(Op.LOOKUP, b"name\0", unique=18, nodeid=5, uid=3, gid=4))
    assert parsed == Request(Op.LOOKUP, 18, 5, 3, 4, 7, b"name\0")
    assert parsed.op == "lookup"
    assert request(99, b"").op == "99"


def test_extensions_are_left_out() -> None:
    parsed = wire.parse_request(message(Op.MKDIR, b"name\0" + bytes(11), extensions=1))
    assert parsed.body == b"name\0" + bytes(3)


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        bytes(39),
        message(Op.LOOKUP, b"x\0")[:-1],
        message(Op.LOOKUP, b"x\0") + b"y",
        message(Op.LOOKUP, b"x\0", length=10),
        message(Op.LOOKUP, b"x\0", extensions=1),
        message(Op.LOOKUP, b"x\0", extensions=65535),
    ],
)
def test_messages_that_lie_about_their_length(bad: bytes) -> None:
    with pytest.raises(WireError):
        wire.parse_request(bad)


PARSERS: dict[Op, Callable[[Request], object]] = {
    Op.LOOKUP: wire.name_of,
    Op.FORGET: wire.forgets_of,
    Op.BATCH_FORGET: wire.forgets_of,
    Op.OPEN: wire.open_flags_of,
    Op.RELEASE: wire.handle_of,
    Op.READ: wire.read_of,
    Op.READDIR: wire.read_of,
    Op.GETXATTR: wire.xattr_of,
    Op.LISTXATTR: wire.first_u32_of,
    Op.INTERRUPT: wire.interrupted_of,
    Op.INIT: wire.offer_of,
}


@pytest.mark.parametrize("op", PARSERS)
def test_a_short_body_is_refused(op: Op) -> None:
    for length in range(4):
        with pytest.raises(WireError):
            PARSERS[op](request(op, b"\xff" * length))


@given(op=st.sampled_from(list(PARSERS)), body=st.binary(max_size=200))
def test_any_body_is_parsed_or_refused(op: Op, body: bytes) -> None:
    with suppress(WireError):
        PARSERS[op](request(op, body))


@given(st.binary(max_size=300))
def test_any_message_is_parsed_or_refused(data: bytes) -> None:
    with suppress(WireError):
        wire.parse_request(data)


@pytest.mark.parametrize("body", [b"", b"\0", b"no-nul", b"a/b\0", b"/\0"])
def test_names_that_no_kernel_sends(body: bytes) -> None:
    with pytest.raises(WireError):
        wire.name_of(request(Op.LOOKUP, body))


@given(st.binary(min_size=1, max_size=255).filter(lambda name: not {0, 47} & set(name)))
def test_names_survive_whatever_their_encoding(name: bytes) -> None:
    parsed = wire.name_of(request(Op.LOOKUP, name + b"\0"))
    assert wire.encode(parsed) == name


def test_forgets() -> None:
    assert wire.forgets_of(wire.parse_request(message(Op.FORGET, struct.pack("=Q", 3)))) == [(1, 3)]
    batch = struct.pack("=IIQQQQ", 2, 0, 10, 1, 20, 2)
    assert wire.forgets_of(request(Op.BATCH_FORGET, batch)) == [(10, 1), (20, 2)]
    for count in (0, 1, 3, 1 << 31):
        lying = struct.pack("=II", count, 0) + batch[8:]
        with pytest.raises(WireError):
            wire.forgets_of(request(Op.BATCH_FORGET, lying))


def test_init_of_old_and_new_kernels() -> None:
    old = struct.pack("=IIII", 7, 31, 131072, 1 | 1 << 22)
    assert wire.offer_of(request(Op.INIT, old)) == wire.Offer(
        7, 31, 131072, Init.ASYNC_READ | Init.MAX_PAGES
    )
    flags = 1 | Init.INIT_EXT
    new = struct.pack("=IIIII", 7, 45, 131072, flags, Init.PASSTHROUGH >> 32) + bytes(44)
    assert wire.offer_of(request(Op.INIT, new)).flags & Init.PASSTHROUGH
    unmarked = struct.pack("=IIIII", 7, 45, 131072, 1, 0xFFFFFFFF) + bytes(44)
    assert not wire.offer_of(request(Op.INIT, unmarked)).flags & Init.PASSTHROUGH


ATTRIBUTES = Attributes(77, 0o100444, 1000, 1, 1_700_000_000_000_000_005, 10, 20)


def test_sizes_are_the_kernels() -> None:
    assert len(wire.attr(ATTRIBUTES)) == 88
    assert len(wire.entry_out(1, 1, 1, ATTRIBUTES)) == len(wire.no_entry_out(1)) == 128
    assert len(wire.NO_ENTRY) == 128
    assert len(wire.attr_out(1, ATTRIBUTES)) == 104
    assert len(wire.statx_out(1, ATTRIBUTES)) == 288
    assert len(wire.open_out(1, 0)) == 16
    assert len(wire.statfs_out(None)) == 80
    assert len(wire.init_out(wire.Answer(45, Init(0), 0, 0, 0, 0, 0, 0))) == 64
    assert wire.OUT.size == 16
    assert wire.HEADER.size == 40
    assert wire.READ_REQUEST.size == 80
    assert len(wire.inval_inode(1)) == 24
    assert len(wire.inval_entry(1, "abc")) == 20


def test_attributes() -> None:
    packed = struct.unpack("=6Q10I", wire.attr(ATTRIBUTES))
    seconds = 1_700_000_000
    assert packed == (
        77, 1000, 2, seconds, seconds, seconds, 5, 5, 5, 0o100444, 1, 10, 20, 0, 0, 0,
    )  # fmt: skip


@pytest.mark.parametrize("modified_ns", [-1, 0, 1 << 62, 1 << 80])
def test_times_that_do_not_fit(modified_ns: int) -> None:
    attributes = Attributes(1, 0, 0, 1, modified_ns, 0, 0)
    assert len(wire.attr(attributes)) == 88
    assert len(wire.statx_out(1, attributes)) == 288


@pytest.mark.parametrize(
    ("duration_s", "split"),
    [(1.5, (1, 500_000_000)), (0, (0, 0)), (-3, (0, 0)), (float("inf"), (3_200_000_000, 0))],
)
def test_durations(duration_s: float, split: tuple[int, int]) -> None:
    assert wire.seconds(duration_s) == split


def test_entries() -> None:
    packed = wire.entry_out(9, 1.5, 2.5, ATTRIBUTES)
    assert struct.unpack_from("=QQQQII", packed) == (9, 0, 1, 2, 500_000_000, 500_000_000)
    assert packed[40:] == wire.attr(ATTRIBUTES)
    assert struct.unpack_from("=QQQQII", wire.no_entry_out(2.0)) == (0, 0, 2, 0, 0, 0)


@given(st.binary(min_size=1, max_size=255), st.booleans())
def test_entries_of_directories_are_aligned(name: bytes, plus: bool) -> None:
    packed = wire.dirent(5, 6, wire.DT_REG, name)
    assert len(packed) % 8 == 0
    assert struct.unpack_from("=QQII", packed) == (5, 6, len(name), 8)
    assert packed[24 : 24 + len(name)] == name
    assert wire.dirent_bytes(name, plus) == len(packed) + (128 if plus else 0)


def test_init_answer() -> None:
    flags = Init.ASYNC_READ | Init.INIT_EXT | Init.PASSTHROUGH
    packed = wire.init_out(wire.Answer(45, flags, 11, 12, 13, 14, 15, 2))
    fields = struct.unpack("=IIIIHHIIHHIIH22x", packed)
    assert fields == (7, 45, 11, 1 | 1 << 30, 12, 13, 14, 1, 15, 0, 0x20, 2, 0)


def test_notifications() -> None:
    assert wire.inval_entry(3, "\u00fc") == struct.pack("=QII", 3, 2, 0) + b"\xc3\xbc\0"
    assert wire.inval_inode(3) == struct.pack("=Qqq", 3, 0, 0)


def test_numbers_of_a_file_system_that_is_not_there() -> None:
    assert struct.unpack("=5Q4I24x", wire.statfs_out(None)) == (0, 0, 0, 0, 0, 4096, 255, 4096, 0)
