"""Headers of safetensors files: read by the safetensors package, made by hand, since it writes no shares of a tensor.

The format is eight bytes of length, a JSON header, then raw tensors; github.com/huggingface/safetensors.
"""

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from src.errors import CheckpointError

LENGTH = struct.Struct("<Q")
METADATA = "__metadata__"
POINTER = b"version "  # begins a file that git-lfs has not fetched

# Name in the format -> (torch's name, bytes). Others are no weights.
DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
NAMES = {name: code for code, (name, _) in DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """Name, dtype and shape of one tensor of a file."""

    file: Path
    dtype: str  # torch's name
    shape: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        return DTYPES[NAMES[self.dtype]][1]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.item_bytes

    @property
    def words(self) -> str:
        """Like "bfloat16 [128, 64]"."""
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class PlacedTensor(TensorEntry):
    """And where it lies in the file."""

    start: int  # of its first byte


def opened(path: Path, framework: str) -> Any:
    """safe_open: a mapped file whose header was checked against its size. CheckpointError when it is no such file.

    `framework`: what slices are made of, pt or numpy; the second needs no torch for shapes and dtypes.
    """
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework=framework)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    except SafetensorError as error:
        with path.open("rb") as file:
            pointer = file.read(len(POINTER)) == POINTER
        if pointer:
            raise CheckpointError(
                f"{path}: a pointer of git-lfs, not the file itself; run `git lfs pull` in its folder"
            ) from error
        raise CheckpointError(
            f"{path}: {path.stat().st_size:,} bytes found, no whole safetensors file ({error}); it is cut off, or of "
            "another kind; copy it again"
        ) from error


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a file by key. CheckpointError when it is cut off, is no such file, or has other dtypes."""
    with opened(path, "numpy") as file:
        return {key: _entry(path, key, file.get_slice(key)) for key in file.keys()}  # noqa: SIM118  (it is no mapping)


def _entry(path: Path, key: str, slices: Any) -> TensorEntry:
    code = slices.get_dtype()
    if code not in DTYPES:
        raise CheckpointError(f"{path}: {key}: dtype {code} found, expected one of {', '.join(DTYPES)}")
    return TensorEntry(path, DTYPES[code][0], tuple(slices.get_shape()))


def make_header(tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]) -> tuple[bytes, list[int]]:
    """Header of a file with these (torch's dtype name, shape) by key, and the first byte of each tensor."""
    entries: dict[str, Any] = {METADATA: metadata}
    starts, end = [], 0
    for key, (dtype, shape) in tensors.items():
        code = NAMES[dtype]
        size = prod(shape) * DTYPES[code][1]
        entries[key] = {"dtype": code, "shape": list(shape), "data_offsets": [end, end + size]}
        starts.append(end)
        end += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    first = LENGTH.size + len(text)
    return LENGTH.pack(len(text)) + text, [first + start for start in starts]
