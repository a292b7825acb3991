"""The safetensors format: eight bytes of length, a JSON header, then raw tensors. Only headers are read here.

A file is judged by its header and its size alone, in microseconds for any size; github.com/huggingface/safetensors.
"""

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from src.errors import CheckpointError

LENGTH = struct.Struct("<Q")
MOST_HEADER_BYTES = 100_000_000  # the format's own limit
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
    """Name, dtype, shape and byte range of one tensor of a file."""

    file: Path
    dtype: str  # torch's name
    shape: tuple[int, ...]
    start: int  # of its first byte in the file
    item_bytes: int

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.item_bytes

    @property
    def words(self) -> str:
        """Like "bfloat16 [128, 64]"."""
        return f"{self.dtype} {list(self.shape)}"


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a file by key. CheckpointError when it is cut off or is no such file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = _length(path, size, file.read(LENGTH.size))
            header = json.loads(file.read(length))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing") from error
    except ValueError as error:
        raise CheckpointError(
            f"{path}: its header is no JSON ({error}); it is no safetensors file, or cut off"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its header is no JSON object; it is no safetensors file")
    header.pop(METADATA, None)
    first = LENGTH.size + length
    entries = {key: _entry(path, key, facts, first) for key, facts in header.items()}
    end = max((entry.start + entry.bytes for entry in entries.values()), default=first)
    if end != size:
        raise CheckpointError(f"{path}: {size:,} bytes found, {end:,} expected of its header; copy it again")
    return entries


def _length(path: Path, size: int, start: bytes) -> int:
    """Of the header."""
    if len(start) < LENGTH.size:
        raise CheckpointError(f"{path}: {size} bytes found, at least {LENGTH.size} expected; it is cut off")
    if start == POINTER:
        raise CheckpointError(f"{path}: a pointer of git-lfs, not the file itself; run `git lfs pull` in its folder")
    length = int(LENGTH.unpack(start)[0])
    if length > MOST_HEADER_BYTES:
        raise CheckpointError(f"{path}: no safetensors file: its header would have {length:,} bytes")
    if LENGTH.size + length > size:
        raise CheckpointError(f"{path}: {size:,} bytes found, its header alone has {length:,}; it is cut off")
    return length


def _entry(path: Path, key: str, facts: Any, first: int) -> TensorEntry:
    try:
        dtype, shape, (start, end) = facts["dtype"], tuple(facts["shape"]), facts["data_offsets"]
        name, item_bytes = DTYPES.get(dtype, (str(dtype), 0))
        entry = TensorEntry(path, name, shape, first + start, item_bytes)
        sound = item_bytes == 0 or end - start == entry.bytes
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {key}: its entry in the header is broken ({error})") from error
    if item_bytes == 0:
        raise CheckpointError(f"{path}: {key}: dtype {name} found, expected one of {', '.join(DTYPES)}")
    if not sound:
        raise CheckpointError(f"{path}: {key}: {end - start:,} bytes found, {entry.bytes:,} expected of {entry.words}")
    return entry


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
