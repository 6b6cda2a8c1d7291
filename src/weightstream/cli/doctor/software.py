"""The software: Python, torch and CUDA, the optional extras."""

import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from weightstream.cli.doctor.check import Check
from weightstream.settings import format_bytes

GROUP = "software"

# extra -> a module that it brings
EXTRAS = {
    "torch": "torch",
    "fuse": "fuse",
    "p2p": "libtorrent",
    "serve": "ray",
    "hub": "huggingface_hub",
    "gcs": "gcsfs",
    "azure": "adlfs",
}


def checks() -> list[Check]:
    """Return the rows about installed software."""
    return [Check(GROUP, "python", "ok", platform.python_version()), *_torch(), _extras()]


def _torch() -> list[Check]:
    try:
        found = version("torch")
    except PackageNotFoundError:
        remedy = "pip install 'weightstream[torch]'"
        limits = "load, stream and open need it; prefetch does not"
        return [Check(GROUP, "torch", "warn", "not installed", limits, remedy)]
    return [Check(GROUP, "torch", "ok", found), _cuda(found)]


def _cuda(torch_version: str) -> Check:
    without = "this torch is built without CUDA; models load to CPU memory"
    if torch_version.endswith("+cpu"):  # known without the two seconds that importing it takes
        return Check(GROUP, "cuda", "ok", without)
    import torch

    if torch.version.cuda is None:
        return Check(GROUP, "cuda", "ok", without)
    if not torch.cuda.is_available():
        return Check(GROUP, "cuda", "ok", "no device; models load to CPU memory")
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    names = ", ".join(f"{d.name} ({format_bytes(d.total_memory)})" for d in devices)
    return Check(GROUP, "cuda", "ok", f"CUDA {torch.version.cuda}: {names}")


def _extras() -> Check:
    present = [name for name, module in EXTRAS.items() if find_spec(module)]
    absent = [name for name in EXTRAS if name not in present]
    found = f"installed: {', '.join(present) or 'none'}"
    remedy = f"pip install 'weightstream[{','.join(absent)}]'" if absent else ""
    limits = f"not installed: {', '.join(absent)}" if absent else ""
    return Check(GROUP, "extras", "ok", found, limits, remedy)
