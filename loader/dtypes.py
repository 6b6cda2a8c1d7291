"""The dtypes that safetensors has: their width in bits, and torch's name for each.

Sub-byte dtypes are packed. torch has one of them, F4, as pairs of two elements per byte, so its
last dimension is half of the header's; it has no F6 at all.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightstream.errors import UsageError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class DType:
    """One dtype of the format."""

    name: str
    bits: int
    torch_name: str
    per_element: int = 1
    """How many of these one element of torch holds."""


_TABLE = (
    DType("BOOL", 8, "bool"),
    DType("F4", 4, "float4_e2m1fn_x2", per_element=2),
    DType("F6_E2M3", 6, ""),
    DType("F6_E3M2", 6, ""),
    DType("U8", 8, "uint8"),
    DType("I8", 8, "int8"),
    DType("F8_E5M2", 8, "float8_e5m2"),
    DType("F8_E4M3", 8, "float8_e4m3fn"),
    DType("F8_E8M0", 8, "float8_e8m0fnu"),
    DType("F8_E4M3FNUZ", 8, "float8_e4m3fnuz"),
    DType("F8_E5M2FNUZ", 8, "float8_e5m2fnuz"),
    DType("I16", 16, "int16"),
    DType("U16", 16, "uint16"),
    DType("F16", 16, "float16"),
    DType("BF16", 16, "bfloat16"),
    DType("I32", 32, "int32"),
    DType("U32", 32, "uint32"),
    DType("F32", 32, "float32"),
    DType("C64", 64, "complex64"),
    DType("F64", 64, "float64"),
    DType("I64", 64, "int64"),
    DType("U64", 64, "uint64"),
)

DTYPES = {dtype.name: dtype for dtype in _TABLE}


def torch_dtype(dtype: DType) -> "torch.dtype | None":
    """Return torch's dtype, or None where the installed torch has none."""
    import torch

    found: torch.dtype | None = getattr(torch, dtype.torch_name or "no_such_dtype", None)
    return found


def require_torch() -> None:
    """Refuse with the cure when torch is not installed; every public call asks this first."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "tensors need torch, which is not installed: pip install 'weightstream[torch]'"
        ) from error
