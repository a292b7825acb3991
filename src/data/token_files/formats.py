"""Files of token ids that other projects have written: which form a file has, and where its ids lie.

Megatron-LM's .bin with its .idx (megatron/core/datasets/indexed_dataset.py), llm.c's .bin (dev/data/data_common.py),
arrays of numpy.save, and ids without a header: OLMo-core's .npy (dolma writes them by numpy.memmap) and nanoGPT's .bin.
All of them are little-endian.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from src.data.files import readable
from src.errors import DataError

Width = Literal["uint16", "uint32"]

SUFFIXES = (".bin", ".npy")  # of the files that a folder stands for
MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}  # 6 and 7 are floats
MEGATRON_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype, sequences, documents + 1
LLM_C_FORMS: dict[int, tuple[int, Width]] = {20240520: (1, "uint16"), 20240801: (7, "uint32")}  # magic: version, ids
LLM_C_EVALUATION = 20240522
LLM_C_HEADER_BYTES = 1024
NUMPY_MAGIC = b"\x93NUMPY"
LOOKED_AT = 4096  # ids at the beginning of a file without a header


@dataclass(frozen=True)
class TokenFile:
    """Where the ids of a file lie."""

    path: Path
    form: str  # in words
    dtype: str  # numpy's name
    offset: int  # bytes before the first id
    tokens: int
    documents: int | None = None  # as the format itself counts them; None: it does not

    def ids(self) -> NDArray[np.integer]:
        """All ids, memory-mapped."""
        if self.tokens == 0:  # an empty file cannot be mapped
            return np.zeros(0, self.dtype)
        return np.memmap(self.path, np.dtype(self.dtype).newbyteorder("<"), "r", self.offset, (self.tokens,))


def token_file(path: Path, dtype: Width | None, headless: Width) -> TokenFile:
    """What the file is. DataError where it is cut off, or no form that is known.

    `dtype`: what was asked for, which a file with a header must agree to; `headless`: of files without one, where
    nothing was asked for.
    """
    with readable(path), path.open("rb") as file:
        start = file.read(12)
        size = path.stat().st_size
        index = path.with_suffix(".idx")
        if path.suffix == ".bin" and index.is_file():
            found = _megatron(path, index, size)
        elif start.startswith(NUMPY_MAGIC):
            found = _numpy(path, file, size)
        elif int.from_bytes(start[:4], "little") in (*LLM_C_FORMS, LLM_C_EVALUATION):
            found = _llm_c(path, start, size)
        else:
            return _headless(path, dtype, headless, size)
    if dtype is not None and found.dtype != dtype:
        raise DataError(f"data.dtype={dtype}: {path} is {found.form}, whose header says {found.dtype}; pass null")
    return found


def _megatron(path: Path, index: Path, size: int) -> TokenFile:
    with readable(index):
        content = index.read_bytes()
    if len(content) < MEGATRON_HEADER.size or not content.startswith(MEGATRON_MAGIC):
        raise DataError(f"data.files: {index}: no index of Megatron's (it does not begin with MMIDIDX); {_apart(path)}")
    _, version, code, sequences, borders = MEGATRON_HEADER.unpack_from(content)
    if version != 1:
        raise DataError(f"data.files: {index}: version {version} of Megatron's index is not known, only 1")
    if code not in MEGATRON_DTYPES:
        raise DataError(f"data.files: {index}: dtype code {code} is none of token ids ({', '.join(_codes())})")
    at = MEGATRON_HEADER.size
    whole = at + sequences * (4 + 8) + borders * 8
    if len(content) not in (whole, whole + sequences):  # with a mode for each sequence, where there are several
        raise DataError(f"data.files: {index}: {len(content):,} bytes for what should be {whole:,}; it was cut off")
    if any(content[whole:]):
        raise DataError(f"data.files: {index}: its sequences have modes other than text, which are not read")
    lengths = np.frombuffer(content, "<i4", sequences, at)
    pointers = np.frombuffer(content, "<i8", sequences, at + 4 * sequences)
    tokens, width = int(lengths.sum(dtype=np.int64)), np.dtype(MEGATRON_DTYPES[code]).itemsize
    if size != tokens * width:
        raise DataError(
            f"data.files: {path}: {size:,} bytes, and its index speaks of {tokens:,} ids of {width}: {tokens * width:,}"
        )
    if not np.array_equal(pointers, (np.cumsum(lengths, dtype=np.int64) - lengths) * width):
        raise DataError(f"data.files: {index}: its sequences do not follow each other in {path.name}; merge it anew")
    return TokenFile(path, "Megatron's .bin and .idx", MEGATRON_DTYPES[code], 0, tokens, max(borders - 1, 0))


def _codes() -> list[str]:
    return [f"{code}: {name}" for code, name in MEGATRON_DTYPES.items()]


def _apart(path: Path) -> str:
    return f"move it away if it does not belong to {path.name}"


def _llm_c(path: Path, start: bytes, size: int) -> TokenFile:
    magic, version, tokens = (int(each) for each in np.frombuffer(start, "<i4"))
    if magic == LLM_C_EVALUATION:
        raise DataError(f"data.files: {path}: a multiple-choice file of llm.c, not a text; leave it out")
    known, dtype = LLM_C_FORMS[magic]
    if version != known:
        raise DataError(f"data.files: {path}: version {version} of llm.c's {magic} is not known, only {known}")
    whole = LLM_C_HEADER_BYTES + tokens * np.dtype(dtype).itemsize
    if size != whole:
        raise DataError(f"data.files: {path}: {size:,} bytes, and its header speaks of {tokens:,} ids: {whole:,}")
    return TokenFile(path, "llm.c's .bin", dtype, LLM_C_HEADER_BYTES, tokens)


def _numpy(path: Path, file: BinaryIO, size: int) -> TokenFile:
    from numpy.lib import format as npy

    file.seek(0)
    try:
        version = npy.read_magic(file)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read(file)
    except ValueError as error:
        raise DataError(f"data.files: {path}: no array of numpy's that can be read: {error}") from error
    if len(shape) != 1 or dtype.kind not in "ui" or dtype.byteorder == ">":
        raise DataError(f"data.files: {path}: an array of {dtype} and shape {shape}; ids are one row of integers")
    offset, tokens = file.tell(), int(shape[0])
    if size != offset + tokens * dtype.itemsize:
        raise DataError(f"data.files: {path}: {size:,} bytes, and its header speaks of {tokens:,} {dtype}; it was cut")
    return TokenFile(path, "an array of numpy.save", dtype.name, offset, tokens)


def _headless(path: Path, dtype: Width | None, headless: Width, size: int) -> TokenFile:
    chosen: Width = dtype or headless
    width = np.dtype(chosen).itemsize
    if size % width:
        raise DataError(f"data.files: {path}: {size:,} bytes are no whole number of {chosen}; it was cut, or is no ids")
    if dtype is None and chosen == "uint16" and size % 4 == 0:
        with path.open("rb") as file:
            first = np.frombuffer(file.read(2 * LOOKED_AT), "<u2")
        if len(first) >= 4 and not first[1::2].any() and first[::2].any():
            raise DataError(
                f"data.files: {path}: every other uint16 is 0, as in uint32; pass data.dtype=uint32 (or 16)"
            )
    return TokenFile(path, "ids without a header", chosen, 0, size // width)
