"""The GPUs of this machine, as NVIDIA's driver tells them to any process: without torch, whose import takes 2 s, and
without a CUDA context, which would take some 500 MB of the first GPU from its rank.
"""

import ctypes
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

# Attributes of a device by their numbers in cuda.h.
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76
NAME_BYTES = 256


@dataclass(frozen=True)
class Gpus:
    """Those that CUDA_VISIBLE_DEVICES lets a process see, and the first of them; None: not told."""

    count: int
    name: str = "GPU"
    memory_gib: float | None = None  # what processes can have of it: less than the board has
    capability: tuple[int, int] | None = None


@cache
def visible_gpus() -> Gpus:
    """Of AMD's, whose devices have another driver, torch counts them and tells nothing more."""
    driver = _driver()
    if driver is not None:
        return told_by(driver)
    if sys.platform == "linux" and not Path("/dev/kfd").exists():
        return Gpus(0)
    import torch

    return Gpus(torch.cuda.device_count())


def told_by(driver: Any) -> Gpus:
    """`driver`: the library, or what answers like it. A driver that does not work here has no GPUs, as for torch."""
    count, device = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return Gpus(0)
    if driver.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return Gpus(count.value)
    name, size = ctypes.create_string_buffer(NAME_BYTES), ctypes.c_size_t()
    named = driver.cuDeviceGetName(name, NAME_BYTES, device) == 0
    measured = driver.cuDeviceTotalMem_v2(ctypes.byref(size), device) == 0
    versions = [ctypes.c_int(), ctypes.c_int()]
    numbered = [
        driver.cuDeviceGetAttribute(ctypes.byref(version), attribute, device) == 0
        for version, attribute in zip(versions, (CAPABILITY_MAJOR, CAPABILITY_MINOR), strict=True)
    ]
    return Gpus(
        count.value,
        name.value.decode(errors="replace") if named else "GPU",
        size.value / 2**30 if measured else None,
        (versions[0].value, versions[1].value) if all(numbered) else None,
    )


def _driver() -> "ctypes.CDLL | None":
    """NVIDIA's; None without it, and on systems where it has another name."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
