"""The header of a safetensors file, parsed strictly: a file is refused before a byte is believed.

Layout: u64 little-endian length, that many bytes of JSON, then the tensors' bytes. What the
safetensors library refuses is refused here, so that no file means one thing to it and another to
us. Refused here though the library lets it pass (each could hide something, no writer makes it):
white space before the brace (the format's text forbids it), any duplicate name (forbidden too),
tensors written as JSON arrays instead of objects, and dimensions that torch cannot hold (>= 2^63).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Never

from weightstream.cachefs.blob import Blob, Extent
from weightstream.errors import FormatError
from weightstream.loader.dtypes import DTYPES, DType

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
_U64 = 1 << 64
_MAX_DIMENSION = (1 << 63) - 1
_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of one file; `extent` counts from the file's first byte."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    extent: Extent


@dataclass(frozen=True, slots=True)
class Header:
    """What one file says of itself; tensors by offset."""

    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str] | None
    data_start: int


def header_extent(blob: Blob, prefix: bytes) -> Extent:
    """Return where the JSON lies, from the first eight bytes of the file."""
    if blob.size < LENGTH_BYTES or len(prefix) < LENGTH_BYTES:
        raise FormatError(f"{blob.uri}: {blob.size} bytes are too few for a safetensors file")
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise FormatError(
            f"{blob.uri}: header length {length} exceeds the limit of {MAX_HEADER_BYTES} bytes"
        )
    if LENGTH_BYTES + length > blob.size:
        raise FormatError(
            f"{blob.uri}: header length {length} exceeds the file of {blob.size} bytes"
        )
    return Extent(LENGTH_BYTES, LENGTH_BYTES + length)


def parse_header(blob: Blob, body: bytes) -> Header:
    """Return the header of `blob`, given the JSON that `header_extent` points to."""
    entries = _decode(blob, body)
    metadata = _metadata(blob, entries.pop(_METADATA, None))
    data_start = LENGTH_BYTES + len(body)
    tensors = [_tensor(blob, name, entry, data_start) for name, entry in entries.items()]
    tensors.sort(key=lambda info: (info.extent, info.name))
    _check_cover(blob, tensors, data_start)
    return Header(tuple(tensors), metadata, data_start)


def _decode(blob: Blob, body: bytes) -> dict[str, object]:
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{blob.uri}: header is not UTF-8: {error}") from error
    if not text.startswith("{"):
        raise FormatError(f"{blob.uri}: header does not start with '{{'")
    try:
        return decode_object(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{blob.uri}: header is not valid JSON: {error}") from error


def decode_object(text: str) -> dict[str, object]:
    """Return a JSON object; ValueError for anything else, for duplicates and lone surrogates."""
    found = json.loads(
        text, object_pairs_hook=_unique, parse_int=_integer, parse_constant=_refuse_constant
    )
    if not isinstance(found, dict):
        raise ValueError("it is not an object")
    return found


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"duplicate name {shown(twice)}")
    for name, value in pairs:
        for text in (name, value):
            if isinstance(text, str) and not text.isascii():
                text.encode("utf-8")  # a lone surrogate has no bytes: UnicodeEncodeError
    return found


def _integer(text: str) -> int | float:
    """Read as the safetensors library does: what no u64 or i64 holds, and -0, is a float."""
    if len(text) > 20:
        return float(text)
    value = int(text)
    return value if value < _U64 and text != "-0" else float(text)


def _refuse_constant(text: str) -> Never:
    raise ValueError(f"{text} is not JSON")


def shown(name: str) -> str:
    """Return a name fit for a one-line message."""
    return repr(name if len(name) <= 120 else f"{name[:100]}...")


def _metadata(blob: Blob, found: object) -> Mapping[str, str] | None:
    if found is None:
        return None
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise FormatError(f"{blob.uri}: {_METADATA} is not an object of strings")
    return found


def _tensor(blob: Blob, name: str, entry: object, data_start: int) -> TensorInfo:
    def wrong(cause: str) -> FormatError:
        return FormatError(f"{blob.uri}: tensor {shown(name)}: {cause}")

    if not isinstance(entry, dict):
        raise wrong("its entry is not an object")
    missing = [key for key in ("dtype", "shape", "data_offsets") if key not in entry]
    if missing:
        raise wrong(f"no {missing[0]}")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise wrong(f"unknown dtype {shown(str(entry['dtype']))}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape):
        raise wrong("its shape is not a list of sizes below 2^63")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise wrong("data_offsets are not two offsets")
    begin, end = offsets
    if begin > end or data_start + end > blob.size:
        raise wrong(
            f"data_offsets {begin}, {end} do not lie in order within "
            f"the {blob.size - data_start} bytes of data"
        )
    expected = _size_bytes(dtype, shape)
    if expected is None:
        raise wrong(f"shape {_shown_shape(shape)} of {dtype.name} is no whole number of bytes")
    if expected != end - begin:
        raise wrong(
            f"shape {_shown_shape(shape)} of {dtype.name} takes {expected} bytes, "
            f"data_offsets give it {end - begin}"
        )
    return TensorInfo(name, dtype, tuple(shape), Extent(data_start + begin, data_start + end))


def _are_sizes(found: object) -> bool:
    return isinstance(found, list) and all(
        type(n) is int and 0 <= n <= _MAX_DIMENSION for n in found
    )


def _size_bytes(dtype: DType, shape: list[int]) -> int | None:
    """Return the tensor's bytes; None when a step overflows 64 bits or a byte stays half full."""
    count = 1
    for dimension in shape:
        count *= dimension
        if count >= _U64:
            return None
    bits = count * dtype.bits
    return None if bits >= _U64 or bits % 8 else bits // 8


def _shown_shape(shape: list[int]) -> str:
    return str(shape) if len(shape) <= 16 else f"of {len(shape)} dimensions"


def _check_cover(blob: Blob, tensors: list[TensorInfo], data_start: int) -> None:
    """Demand that the tensors cover the data without a hole, an overlap or trailing bytes."""
    reached = data_start
    for info in tensors:
        if info.extent.start != reached:
            kind = "overlaps the one before" if info.extent.start < reached else "leaves a hole"
            raise FormatError(
                f"{blob.uri}: tensor {shown(info.name)}: {info.extent} {kind}, "
                f"expected to start at {reached}"
            )
        reached = info.extent.stop
    if reached != blob.size:
        raise FormatError(
            f"{blob.uri}: {blob.size - reached} bytes after the last tensor belong to none"
        )
