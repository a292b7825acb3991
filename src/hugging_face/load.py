"""Weights in Hugging Face layout as a run's beginning: the launcher looks at them and notes where, ranks read them."""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.hugging_face.archive import Archive, quantisation, read_json, unread_quantisation
from src.hugging_face.check import check
from src.hugging_face.hub import Fetched
from src.models.base import ModelConfig
from src.models.hugging_face import section, stored
from src.storage.atomic_write import atomic_write

if TYPE_CHECKING:
    from torch import Tensor

FILE = "initial.json"
# Keys of a model that a run may choose anew, and those that another form of the same numbers would change.
OURS = frozenset(
    {
        *("max_seq_len", "attention", "mask", "fixed_block", "depth_init", "mtp", "moe.load_balance_coeff"),
        *("multiple_of", "ffn_dim_multiplier", "head_dim"),
    }
)


def examine(folder: Path, config: ModelConfig) -> list[str]:
    """Lines for people, from headers alone. CheckpointError when the folder does not hold this model."""
    archive = Archive.open(folder)
    lines = check(archive, config)
    there, _ = section(archive.config, str(folder / "config.json"))
    return [*lines, *_differences(config, there)]


def _differences(config: ModelConfig, there: Mapping[str, Any]) -> list[str]:
    """Where a model that was chosen by hand is not the one of config.json, though every shape fits."""
    here = dict(_flat(config.model_dump(mode="json")))
    said = dict(_flat(there))
    silent = OURS | ({"moe.group_score"} if said.get("moe.num_expert_groups") == 1 else set())
    return [
        f"model.{key}={here[key]}, and config.json says {value}"
        for key, value in said.items()
        if key not in silent and key in here and here[key] != value
    ]


def _flat(keys: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """With the keys of inner groups by their dotted names; a group that is null stays one key."""
    for key, value in keys.items():
        if key == "moe" and value is not None:
            yield from ((f"{key}.{inner}", each) for inner, each in value.items())
        else:
            yield key, value


def note(folder: Path, fetched: Fetched) -> None:
    """Record in the run folder where its weights come from: source, revision, and their place on this machine."""
    atomic_write(folder / FILE, json.dumps(fetched.to_dict(), indent=2) + "\n")


def begun_from(folder: Path) -> Fetched | None:
    """What `note` recorded in this run folder; None: nothing."""
    return Fetched(**read_json(folder / FILE)) if (folder / FILE).is_file() else None


def noted(folder: Path) -> Path | None:
    """The place that `note` recorded in this run folder; None: it has none."""
    fetched = begun_from(folder)
    return None if fetched is None else Path(fetched.folder)


def pinned(folder: Path, source: str) -> str:
    """`source` at the revision of this run folder's first start, if it has had one."""
    earlier = begun_from(folder)
    if earlier is None or earlier.source != source or earlier.revision is None:
        return source
    return f"{source.partition('@')[0]}@{earlier.revision}"


def load(folder: Path, tensors: "Mapping[str, Tensor]", config: ModelConfig) -> str:
    """Fill this rank's part of every tensor; no other byte is read. Returns a line for people."""
    from src.hugging_face.read import Reader

    began = time.perf_counter()
    archive = Archive.open(folder)
    check(archive, config)
    reader = Reader(archive)
    reader.fill(tensors, stored(config))
    seconds = time.perf_counter() - began
    return f"{reader.bytes_read / 1e6:,.1f} of {archive.bytes / 1e6:,.1f} MB read in {seconds:.1f} s by this rank"


def model_section(folder: Path) -> tuple[dict[str, object], list[str]]:
    """The section `model` that config.json describes, and the keys of it that have no meaning here."""
    values = read_json(folder / "config.json")
    quantisation(values)
    keys, unread = section(values, str(folder / "config.json"))
    return keys, sorted([*unread, *unread_quantisation(values)])
