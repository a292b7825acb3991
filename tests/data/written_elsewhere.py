"""Files of token ids, written by the rules of the projects whose they are, byte by byte."""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

MEGATRON_CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}


def megatron(prefix: Path, documents: Sequence[Sequence[int]], dtype: str = "int32") -> Path:
    """tools/preprocess_data.py: a sequence a document; give an end of document with each, as --append-eod does."""
    lengths = [len(each) for each in documents]
    width = np.dtype(dtype).itemsize
    starts = [sum(lengths[:number]) * width for number in range(len(lengths))]
    head = b"MMIDIDX\0\0" + struct.pack("<Q", 1) + struct.pack("<B", MEGATRON_CODES[dtype])
    head += struct.pack("<Q", len(lengths)) + struct.pack("<Q", len(lengths) + 1)
    head += struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(lengths)}q", *starts)
    head += struct.pack(f"<{len(lengths) + 1}q", *range(len(lengths) + 1))
    prefix.with_suffix(".idx").write_bytes(head)
    path = prefix.with_suffix(".bin")
    path.write_bytes(b"".join(np.array(each, np.dtype(dtype).newbyteorder("<")).tobytes() for each in documents))
    return path


def llm_c(path: Path, ids: Sequence[int], magic: int = 20240520, version: int = 1, count: int | None = None) -> Path:
    """dev/data/data_common.py: 256 int32 of header, then uint16 (GPT-2) or, of Llama 3, uint32."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + np.array(ids, "<u2" if magic == 20240520 else "<u4").tobytes())
    return path


def olmo(path: Path, ids: Sequence[int], dtype: str = "uint16") -> Path:
    """docs/source/guides/data_loading.rst: a memory map that is called .npy, without numpy's header."""
    mapped = np.memmap(path, dtype, "w+", shape=(len(ids),))
    mapped[:] = ids
    mapped.flush()
    return path


def nano_gpt(path: Path, ids: Sequence[int]) -> Path:
    """data/openwebtext/prepare.py: uint16 and nothing else."""
    np.array(ids, np.uint16).tofile(path)
    return path


def saved(path: Path, ids: Sequence[int], dtype: str = "uint16") -> Path:
    """numpy.save, as many shards of fineweb-edu for nanoGPT are."""
    np.save(path, np.array(ids, dtype))
    return path
