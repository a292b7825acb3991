"""A folder in Hugging Face layout: config.json, and weights in one safetensors file or in several with an index."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.errors import CheckpointError, some
from src.hugging_face.header import TensorEntry, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
CONVERSION = (
    "weights from elsewhere are read as safetensors only, since pickle can run any code. Convert them on a machine "
    "that may: python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('<in>', dtype='auto')"
    ".save_pretrained('<out>')\""
)


@dataclass(frozen=True)
class Archive:
    """A folder of safetensors files, as their headers describe it."""

    folder: Path
    config: Mapping[str, Any]  # config.json
    entries: Mapping[str, TensorEntry]  # by key
    remarks: tuple[str, ...] = ()  # for people: where index and shards differ without harm

    @classmethod
    def open(cls, folder: Path) -> "Archive":
        """Reads headers only. CheckpointError when a file is missing, cut off, outside the folder, or pickle."""
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder")
        config = read_json(folder / "config.json")
        if (folder / INDEX).is_file():
            return cls(folder, config, *_sharded(folder))
        if (folder / SINGLE).is_file():
            return cls(folder, config, read_header(folder / SINGLE))
        pickles = [path.name for pattern in PICKLES for path in sorted(folder.glob(pattern))]
        if pickles:
            raise CheckpointError(f"{folder}: holds {some(pickles)}; {CONVERSION}")
        there = some(path.name for path in folder.iterdir()) or "nothing"
        raise CheckpointError(f"{folder}: neither {SINGLE} nor {INDEX}; it holds {there}")

    @property
    def quantised(self) -> bool:
        """Whether linear weights are float8 with a scale for each block."""
        return quantisation(self.config) is not None

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.bytes for entry in self.entries.values())


# Of a quantization_config; the second line says how activations are quantised, and what was left as it was.
_QUANTISATION = frozenset(
    {
        *("quant_method", "weight_block_size", "fmt", "scale_fmt"),
        *("activation_scheme", "modules_to_not_convert", "ignored_layers", "dequantize"),
    }
)


def quantisation(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a block that shares a scale; None: not quantised. CheckpointError for another method."""
    facts = config.get("quantization_config")
    if facts is None:
        return None
    if not isinstance(facts, Mapping):
        raise CheckpointError(f"config.json: quantization_config={json.dumps(facts)} is not an object")
    method, block = facts.get("quant_method"), facts.get("weight_block_size")
    sizes = [size for size in block if type(size) is int and size > 0] if isinstance(block, list) else []
    if method != "fp8" or len(sizes) != 2 or sizes != block or facts.get("fmt", "e4m3") not in ("e4m3", None):
        raise CheckpointError(
            f"config.json: quantization_config has quant_method={json.dumps(method)}, "
            f"weight_block_size={json.dumps(block)}, fmt={json.dumps(facts.get('fmt'))}; only fp8 (e4m3) with blocks "
            "such as [128, 128] is read; take the release in bfloat16"
        )
    return sizes[0], sizes[1]


def unread_quantisation(config: Mapping[str, Any]) -> list[str]:
    """Keys of quantization_config that say nothing here, by their path; `quantisation` came before."""
    facts = config.get("quantization_config") or {}
    return [f"quantization_config.{key}" for key in sorted(facts.keys() - _QUANTISATION)]


def read_json(path: Path) -> dict[str, Any]:
    """CheckpointError when it is missing or no JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds {type(values).__name__}, expected an object")
    return values


def shard_names(folder: Path) -> list[str]:
    """The files that the index of a folder tells of. CheckpointError for a name that leads out of it."""
    return sorted(set(_weight_map(folder).values()))


def _sharded(folder: Path) -> tuple[dict[str, TensorEntry], tuple[str, ...]]:
    """Entries of all shards, each of the shard that the index names; and what else the shards hold."""
    where, names = _weight_map(folder), shard_names(folder)
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(f"{folder}: {len(absent)} of {len(names)} shards missing: {some(absent)}")
    held = {name: read_header(folder / name) for name in names}
    lost = [f"{key} ({name})" for key, name in where.items() if key not in held[name]]
    if lost:
        raise CheckpointError(f"{folder / INDEX}: {len(lost)} keys are not in the shard it names: {some(lost)}")
    counts = Counter(key for entries in held.values() for key in entries)
    beside, double = counts.keys() - where.keys(), {key for key in where if counts[key] > 1}
    remarks = (
        [f"{len(beside)} keys are in a shard and not in {INDEX}, and are not read: {some(beside)}"] if beside else []
    )
    if double:
        remarks.append(f"{len(double)} keys are in two shards, and read of the one that {INDEX} names: {some(double)}")
    return {key: held[name][key] for key, name in where.items()}, tuple(remarks)


def _weight_map(folder: Path) -> dict[str, str]:
    """Key -> name of a file in this very folder: no path, so none that leads out of it."""
    where = read_json(folder / INDEX).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise CheckpointError(f"{folder / INDEX}: no weight_map in it")
    wrong = {str(name) for name in where.values() if not isinstance(name, str) or Path(name).name != name}
    if wrong:
        raise CheckpointError(f"{folder / INDEX}: {some(wrong)}: no name of a file in this folder, so it is refused")
    wrong = {name for name in where.values() if not name.endswith(".safetensors")}
    if wrong:
        raise CheckpointError(f"{folder / INDEX}: {some(wrong)}: {CONVERSION}")
    return where
