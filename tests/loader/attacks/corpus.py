"""Hostile safetensors files, built in code: what each one tries, and the word that must name it."""

import json
import struct
from dataclasses import dataclass

MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class Attack:
    """One file that must be refused."""

    name: str
    data: bytes
    says: str
    """A part of the message."""
    library_accepts: bool = False
    """The safetensors library lets it pass: documented in `loader/header.py`."""

    def __str__(self) -> str:
        return self.name


def file(header: object, data: bytes = b"") -> bytes:
    """Return a file with this header: JSON text, raw bytes, or an object to encode."""
    if isinstance(header, str):
        header = header.encode()
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(body)) + body + data


def entry(
    begin: int = 0, end: int = 4, dtype: str = "F32", shape: object = (1,)
) -> dict[str, object]:
    """Return a tensor's entry; a valid one by default."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


FOUR = b"\1\2\3\4"
VALID = json.dumps(entry())

ATTACKS = (
    # lengths
    Attack("empty file", b"", "too few"),
    Attack("seven bytes", b"\2\0\0\0\0\0\0", "too few"),
    Attack("length of zero", struct.pack("<Q", 0), "does not start"),
    Attack("length beyond the file", struct.pack("<Q", 100) + b"{}", "exceeds the file"),
    Attack("length of 2^64-1", struct.pack("<Q", 2**64 - 1) + b"{}", "exceeds the limit"),
    Attack("length over 100 MB", struct.pack("<Q", MAX_HEADER_BYTES + 1), "exceeds the limit"),
    Attack("length one too long", struct.pack("<Q", 3) + b"{}", "exceeds the file"),
    Attack("cut off in the header", file({"a": entry()}, FOUR)[:20], "exceeds the file"),
    Attack("cut off in the data", file({"a": entry()}, FOUR[:3]), "do not lie"),
    Attack("not safetensors at all", b"<html><body>403 Forbidden</body></html>", "exceeds"),
    Attack("a pickle", b"\x80\x04\x95" + bytes(61), "exceeds"),
    # JSON
    Attack("no JSON", file(b"{" + b"\0" * 7), "not valid JSON"),
    Attack("an array", file("[]"), "does not start"),
    Attack("a string", file('"{}"'), "does not start"),
    Attack("space before the brace", file(" {}"), "does not start", library_accepts=True),
    Attack("byte order mark", file(b"\xef\xbb\xbf{}"), "does not start"),
    Attack("rubbish behind", file("{}x"), "not valid JSON"),
    Attack("zero bytes behind", file(b"{}\0\0"), "not valid JSON"),
    Attack("a second object", file("{}{}"), "not valid JSON"),
    Attack("not UTF-8", file(b'{"\xff":1}'), "not UTF-8"),
    Attack("UTF-16", file("{}".encode("utf-16-le")), "not valid JSON"),
    Attack("lone surrogate", file(f'{{"\\ud800":{VALID}}}', FOUR), "not valid JSON"),
    Attack("control character", file(f'{{"a\1":{VALID}}}', FOUR), "not valid JSON"),
    Attack("NaN", file('{"__metadata__":{"a":NaN}}'), "not valid JSON"),
    Attack("100,000 brackets", file('{"a":' + "[" * 100_000), "not valid JSON"),
    Attack("leading zero", file('{"a":{"dtype":"U8","shape":[01]}}', FOUR), "not valid JSON"),
    # names
    Attack(
        "duplicate tensor",
        file(f'{{"a":{VALID},"a":{json.dumps(entry(4, 8))}}}', FOUR * 2),
        "duplicate name 'a'",
    ),
    Attack(
        "duplicate, equal",
        file(f'{{"a":{VALID},"a":{VALID}}}', FOUR),
        "duplicate name",
        library_accepts=True,
    ),
    Attack(
        "duplicate by escape",
        file(f'{{"a":{VALID},"\\u0061":{json.dumps(entry(4, 8))}}}', FOUR * 2),
        "duplicate name",
    ),
    Attack(
        "duplicate field",
        file('{"a":{"dtype":"U8","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', FOUR),
        "duplicate name",
    ),
    Attack("duplicate metadata", file('{"__metadata__":{},"__metadata__":{}}'), "duplicate name"),
    Attack(
        "duplicate in metadata",
        file('{"__metadata__":{"a":"1","a":"2"}}'),
        "duplicate name",
        library_accepts=True,
    ),
    Attack("metadata of numbers", file({"__metadata__": {"a": 1}}), "__metadata__"),
    Attack("metadata a list", file({"__metadata__": []}), "__metadata__", library_accepts=False),
    # entries
    Attack("entry a number", file({"a": 1}, FOUR), "not an object"),
    Attack(
        "entry an array",
        file({"a": ["F32", [1], [0, 4]]}, FOUR),
        "not an object",
        library_accepts=True,
    ),
    Attack("no dtype", file({"a": {"shape": [1], "data_offsets": [0, 4]}}, FOUR), "no dtype"),
    Attack("no shape", file({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, FOUR), "no shape"),
    Attack("no offsets", file({"a": {"dtype": "F32", "shape": [1]}}, FOUR), "no data_offsets"),
    Attack("unknown dtype", file({"a": entry(dtype="F128")}, FOUR), "dtype 'F128'"),
    Attack("dtype in small letters", file({"a": entry(dtype="f32")}, FOUR), "dtype 'f32'"),
    Attack("dtype a number", file({"a": {**entry(), "dtype": 5}}, FOUR), "dtype '5'"),
    # shapes
    Attack("negative dimension", file({"a": entry(shape=[-1])}, FOUR), "shape"),
    Attack("two negatives", file({"a": entry(shape=[-1, -1])}, FOUR), "shape"),
    Attack("minus zero", file('{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'), "shape"),
    Attack("fraction", file({"a": entry(shape=[1.0])}, FOUR), "shape"),
    Attack("exponent", file(VALID.join(['{"a":', "}"]).replace("[1]", "[1e0]"), FOUR), "shape"),
    Attack("true", file({"a": entry(shape=[True])}, FOUR), "shape"),
    Attack("null shape", file({"a": entry(shape=None)}, FOUR), "shape"),
    Attack("string shape", file({"a": entry(shape="1")}, FOUR), "shape"),
    Attack("product over 2^64", file({"a": entry(0, 0, "U8", [2**32, 2**32])}), "whole number"),
    Attack("product wraps to zero", file({"a": entry(0, 0, "U8", [2**63 - 1, 4, 0])}), "whole"),
    Attack("bits over 2^64", file({"a": entry(0, 0, "F64", [2**61])}), "whole number"),
    Attack(
        "dimension over 2^63",
        file({"a": entry(0, 0, "U8", [2**63, 0])}),
        "below 2^63",
        library_accepts=True,
    ),
    Attack("dimension over 2^64", file({"a": entry(0, 0, "U8", [2**64, 0])}), "below 2^63"),
    Attack("5,000 digits", file('{"a":{"dtype":"U8","shape":[' + "9" * 5000 + "]}}"), ""),
    Attack("too large for its bytes", file({"a": entry(shape=[2])}, FOUR), "takes 8 bytes"),
    Attack("too small for its bytes", file({"a": entry(dtype="U8")}, FOUR), "takes 1 bytes"),
    Attack("half a byte", file({"a": entry(0, 2, "F4", [3])}, b"ab"), "whole number of bytes"),
    # offsets
    Attack("offsets reversed", file({"a": entry(4, 0)}, FOUR), "do not lie in order"),
    Attack("offsets beyond the file", file({"a": entry(0, 8, shape=[2])}, FOUR), "do not lie"),
    Attack("offset negative", file({"a": entry(-4, 0)}, FOUR), "two offsets"),
    Attack("offset of 2^64", file({"a": entry(0, 2**64)}, FOUR), "two offsets"),
    Attack("three offsets", file({"a": {**entry(), "data_offsets": [0, 4, 4]}}, FOUR), "two off"),
    Attack("one offset", file({"a": {**entry(), "data_offsets": [0]}}, FOUR), "two offsets"),
    Attack("offsets fractions", file({"a": {**entry(), "data_offsets": [0, 4.0]}}, FOUR), "two"),
    Attack("overlap", file({"a": entry(), "b": entry()}, FOUR), "overlaps"),
    Attack("overlap by one", file({"a": entry(), "b": entry(3, 7)}, FOUR * 2), "overlaps"),
    Attack("hole", file({"a": entry(), "b": entry(8, 12)}, FOUR * 3), "leaves a hole"),
    Attack("hole before the first", file({"a": entry(4, 8)}, FOUR * 2), "leaves a hole"),
    Attack("bytes behind the last", file({"a": entry()}, FOUR * 2), "belong to none"),
    Attack("bytes of nobody", file({}, FOUR), "belong to none"),
    Attack(
        "empty tensor inside another",
        file({"a": entry(0, 4), "b": entry(2, 2, shape=[0])}, FOUR),
        "overlaps",
    ),
)
