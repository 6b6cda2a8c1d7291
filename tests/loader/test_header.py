"""The header parser against a corpus of attacks, and against the safetensors library itself."""

import json
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from tests.loader.attacks.corpus import ATTACKS, Attack, entry, file

from weightstream.cachefs.blob import Blob
from weightstream.errors import FormatError
from weightstream.loader.dtypes import DTYPES
from weightstream.loader.header import Header
from weightstream.loader.headers import read_header


def parse(data: bytes) -> Header:
    blob = Blob("s3://b/m/model.safetensors", len(data), "v")
    return read_header(blob, lambda extent: data[extent.start : extent.stop])


def library_shapes(path: Path, data: bytes) -> dict[str, tuple[str, list[int]]] | None:
    """Return what the library reads from a file, or None when it refuses it."""
    path.write_bytes(data)
    try:
        with safe_open(path, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.offset_keys()}
            return {n: (s.get_dtype(), list(s.get_shape())) for n, s in slices.items()}
    except SafetensorError:
        return None


def our_shapes(data: bytes) -> dict[str, tuple[str, list[int]]] | None:
    try:
        return {t.name: (t.dtype.name, list(t.shape)) for t in parse(data).tensors}
    except FormatError:
        return None


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_attack_is_refused_in_one_line_that_names_file_and_cause(attack: Attack) -> None:
    with pytest.raises(FormatError) as caught:
        parse(attack.data)
    message = str(caught.value)
    assert message.startswith("s3://b/m/model.safetensors: ")
    assert attack.says in message
    assert "\n" not in message
    assert len(message) < 500


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_the_library_refuses_it_too_unless_documented(attack: Attack, tmp_path: Path) -> None:
    accepted = library_shapes(tmp_path / "attack", attack.data) is not None
    assert accepted == attack.library_accepts


ACCEPTED = {
    "no tensors": file({}),
    "only metadata": file({"__metadata__": {"a": "b"}}),
    "null metadata": file({"__metadata__": None}),
    "space behind the brace": file("{}  \n\t"),
    "unknown field": file({"a": {**entry(), "more": [-1, 1.5, {"x": None}]}}, b"\1\2\3\4"),
    "empty name": file({"": entry()}, b"\1\2\3\4"),
    "zero in a name": file({"a\0": entry()}, b"\1\2\3\4"),
    "name in any script": file({"重み🤗": entry()}, b"\1\2\3\4"),
    "scalar": file({"a": entry(shape=[])}, b"\1\2\3\4"),
    "hundred dimensions": file({"a": entry(shape=[1] * 100)}, b"\1\2\3\4"),
    "empty tensors at one place": file(
        {
            "a": entry(0, 2, "U8", [2]),
            "b": entry(2, 2, "U8", [0]),
            "c": entry(0, 0, "F64", [3, 0]),
        },
        b"ab",
    ),
    "huge dimension beside zero": file({"a": entry(0, 0, "U8", [0, 2**62])}),
    "overflow behind a zero": file({"a": entry(0, 0, "U8", [0, 2**62, 2**62])}),
    "odd offsets": file({"a": entry(0, 1, "U8"), "b": entry(1, 5)}, b"\0" * 5),
    "any order": file({"b": entry(4, 8), "a": entry(0, 4)}, b"\0" * 8),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_the_library_accepts_is_accepted(name: str, tmp_path: Path) -> None:
    theirs = library_shapes(tmp_path / "good", ACCEPTED[name])
    assert theirs is not None
    assert our_shapes(ACCEPTED[name]) == theirs


def test_every_dtype_of_the_library_is_known_with_its_width(tmp_path: Path) -> None:
    for dtype in DTYPES.values():
        data = file({"a": entry(0, dtype.bits, dtype.name, [2, 4])}, bytes(dtype.bits))
        assert library_shapes(tmp_path / "dtype", data) == {"a": (dtype.name, [2, 4])}
        assert our_shapes(data) == {"a": (dtype.name, [2, 4])}
    message = _refusal_of_unknown_dtype(tmp_path)
    assert all(f"`{name}`" in message for name in DTYPES)
    assert message.count("`") // 2 == len(DTYPES) + 1, "the library has dtypes that we lack"


def _refusal_of_unknown_dtype(tmp_path: Path) -> str:
    path = tmp_path / "unknown"
    path.write_bytes(file({"a": entry(dtype="NEW")}, b"\0" * 4))
    with pytest.raises(SafetensorError) as caught, safe_open(path, "pt"):
        pass
    return str(caught.value)


def test_metadata_and_offsets_are_read() -> None:
    data = file({"__metadata__": {"format": "pt"}, "b": entry(4, 8), "a": entry()}, b"\0" * 8)
    header = parse(data)
    assert header.metadata == {"format": "pt"}
    assert [t.name for t in header.tensors] == ["a", "b"]
    assert header.tensors[0].extent.start == header.data_start == len(data) - 8
    assert header.tensors[1].extent.stop == len(data)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_never_raise_anything_else(data: bytes) -> None:
    """Anything but a FormatError passes through `our_shapes`; no tensors, or None, is right."""
    assert not our_shapes(data)
    assert not our_shapes(struct.pack("<Q", len(data)) + data)


def numbers() -> st.SearchStrategy[object]:
    edges = st.sampled_from([0, 1, 2, 4, 8, 2**31, 2**61, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -1])
    return st.one_of(st.integers(0, 8), edges, st.sampled_from([1.0, True, None, "1"]))


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """Draw headers that are nearly right: most fail for one reason."""
    tensors: dict[str, object] = {}
    at = 0
    for name in draw(st.lists(st.text(max_size=3), max_size=4, unique=True)):
        dtype = draw(st.sampled_from([*DTYPES, "F128"]))
        shape = draw(st.lists(numbers() if draw(st.booleans()) else st.integers(0, 3), max_size=3))
        size = draw(st.integers(0, 16))
        if name != "__metadata__" and all(type(n) is int and 0 <= n < 9 for n in shape):
            bits = DTYPES[dtype].bits if dtype in DTYPES else 8
            for n in shape:
                assert isinstance(n, int)
                bits *= n
            size = bits // 8
        shift = draw(st.sampled_from([0] * 9 + [1]))
        tensors[name] = entry(at + shift, at + size, dtype, shape)
        at += size
    return file(tensors, bytes(at + draw(st.sampled_from([0] * 9 + [1]))))


@settings(deadline=None, max_examples=300)
@given(data=headers())
def test_we_accept_exactly_what_the_library_accepts(
    data: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "header-under-test"
    theirs, ours = library_shapes(path, data), our_shapes(data)
    if ours is None and theirs is not None:
        assert any(n >= 2**63 for _, shape in theirs.values() for n in shape)
    else:
        assert ours == theirs


def test_a_header_of_thirty_thousand_tensors_is_parsed() -> None:
    count = 30_000
    data = file({f"layer.{i}": entry(i, i + 1, "U8") for i in range(count)}, bytes(count))
    assert len(parse(data).tensors) == count


def test_corpus_names_are_unique() -> None:
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS)
    assert json.loads(json.dumps(entry())) == {
        "dtype": "F32",
        "shape": [1],
        "data_offsets": [0, 4],
    }
