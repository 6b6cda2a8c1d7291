"""Tensors over memory: every dtype, any offset, and who owns which page."""

import gc
import mmap
from pathlib import Path

import pytest
import torch
from tests.loader.attacks.corpus import entry, file

from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.fetch.memory import PAGE_BYTES, allocate
from weightstream.errors import FormatError, UsageError
from weightstream.loader.dtypes import DTYPES, DType
from weightstream.loader.header import TensorInfo
from weightstream.loader.headers import mapped_header
from weightstream.loader.mapped import map_file
from weightstream.loader.plan import Place
from weightstream.loader.views import check_types, tensor_over

BLOB = Blob("s3://b/m/x.safetensors", 1 << 30, "v")
HELD = [d for d in DTYPES.values() if not d.name.startswith("F6")]


def info(dtype: str, shape: tuple[int, ...], size: int) -> TensorInfo:
    return TensorInfo("t", DTYPES[dtype], shape, Extent(0, size))


@pytest.mark.parametrize("dtype", HELD, ids=lambda d: d.name)
@pytest.mark.parametrize("offset", [0, 1, 2, 4, 8, 4095])
def test_every_dtype_at_any_offset_holds_the_right_bits(dtype: DType, offset: int) -> None:
    size = 2 * 4 * dtype.bits // 8
    memory = allocate(8192)
    data = bytes(range(1, size + 1))
    memory[offset : offset + size] = data
    tensor = tensor_over(memory, offset, BLOB, info(dtype.name, (2, 4), size))
    assert bytes(tensor.view(torch.uint8).flatten().tolist()) == data
    assert tensor.is_contiguous()
    assert tensor.data_ptr() % tensor.element_size() == 0
    assert tensor.shape == ((2, 2) if dtype.name == "F4" else (2, 4))


@pytest.mark.parametrize("dtype", HELD, ids=lambda d: d.name)
def test_empty_and_scalar_tensors(dtype: DType) -> None:
    name = dtype.name
    memory = allocate(64)
    empty = tensor_over(memory, 3, BLOB, info(name, (0, 4), 0))
    assert empty.shape == ((0, 2) if name == "F4" else (0, 4))
    if name != "F4":
        scalar = tensor_over(memory, 0, BLOB, info(name, (), DTYPES[name].bits // 8))
        assert scalar.shape == ()


@pytest.mark.parametrize("name", ["F6_E2M3", "F6_E3M2"])
def test_a_dtype_that_torch_lacks_is_named_with_the_tensor(name: str) -> None:
    with pytest.raises(UsageError, match=rf"x.safetensors: tensor 't' has dtype {name}, for which"):
        tensor_over(allocate(64), 0, BLOB, info(name, (4,), 3))


def test_a_packed_dtype_whose_last_dimension_is_odd_is_refused() -> None:
    with pytest.raises(FormatError, match=r"torch packs 2 F4 .*\[2, 1\]"):
        tensor_over(allocate(64), 0, BLOB, info("F4", (2, 1), 1))


def test_types_are_checked_before_bytes() -> None:
    check_types([Place(BLOB, info("F32", (1,), 4))])
    with pytest.raises(UsageError, match="F6_E2M3"):
        check_types([Place(BLOB, info("F6_E2M3", (4,), 3))])
    with pytest.raises(FormatError, match="packs"):
        check_types([Place(BLOB, info("F4", (2,), 1)), Place(BLOB, info("F4", (2, 1), 1))])


def resident(memory: mmap.mmap, start: int, stop: int) -> bool:
    """Say whether these bytes are still what was written: given-back pages read as zeros."""
    return memory[start:stop] == b"\xab" * (stop - start)


def test_a_dead_tensor_gives_back_its_pages_and_no_neighbours_byte() -> None:
    sizes = [100, 3 * PAGE_BYTES + 5, 2 * PAGE_BYTES, 7]
    memory = allocate(16 * PAGE_BYTES)
    memory[:] = b"\xab" * len(memory)
    tensors, at, places = [], 8, []
    for size in sizes:
        tensors.append(tensor_over(memory, at, BLOB, info("U8", (size,), size)))
        places.append((at, at + size))
        at += size
    view = tensors[1][10:]
    del tensors[1]
    gc.collect()
    start, stop = places[1]
    assert resident(memory, start, stop), "a view keeps the tensor's memory"
    del view
    gc.collect()
    first_page = -(-start // PAGE_BYTES) * PAGE_BYTES
    last_page = stop // PAGE_BYTES * PAGE_BYTES
    assert memory[first_page:last_page] == bytes(last_page - first_page), "pages were given back"
    assert resident(memory, 0, first_page)
    assert resident(memory, last_page, len(memory))


def test_a_mapped_file_is_never_written_to(tmp_path: Path) -> None:
    data = file({"a": entry(0, 8, "U8", [8])}, b"abcdefgh")
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    blob = Blob(f"file://{path}", len(data), "v")
    memory = map_file(path, blob)
    place = mapped_header(blob, memory).tensors[0]
    tensor = tensor_over(memory, place.extent.start, blob, place)
    tensor += 1
    assert bytes(tensor.tolist()) == b"bcdefghi"
    assert path.read_bytes() == data
