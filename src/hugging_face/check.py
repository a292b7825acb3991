"""Do these files hold this model? Names, shapes and dtypes, from headers alone: before anything starts."""

from collections.abc import Mapping
from math import ceil

from src.errors import CheckpointError, some
from src.hugging_face.archive import Archive, quantisation
from src.hugging_face.header import TensorEntry
from src.models.base import ModelConfig
from src.models.hugging_face import skipped, stored
from src.models.stored import Stored

SCALE = "_scale_inv"  # of X.weight: X.weight_scale_inv
WEIGHTS = ("float32", "bfloat16", "float16")
FLOAT8 = "float8_e4m3fn"
E8M0 = "float8_e8m0fnu"  # an exponent alone: 2^-127 to 2^127


def check(archive: Archive, config: ModelConfig) -> list[str]:
    """Lines for people about what is there and not read. CheckpointError with everything that does not fit."""
    table = stored(config)
    wanted = {key for each in table for key in (*each.keys, *each.copies)}
    needed = {key for each in table if not each.optional for key in each.keys}
    known = wanted | {f"{key}{SCALE}" for key in wanted}
    unused = {key: skipped(config, key, archive.config) for key in sorted(archive.entries.keys() - known)}
    problems = []
    if missing := needed - archive.entries.keys():
        problems.append(f"{archive.folder}: {len(missing)} of {len(needed)} keys missing: {some(missing)}")
    if unexpected := [key for key, reason in unused.items() if reason is None]:
        problems.append(
            f"{archive.folder}: {len(unexpected)} keys that model.family={config.family} of this shape has no place "
            f"for: {some(unexpected)}"
        )
    block = quantisation(archive.config)
    for each in table:
        there = (key for key in (*each.keys, *each.copies) if key in archive.entries)
        problems += [problem for key in there for problem in _misfits(archive.entries, each, key, block)]
    if problems:
        raise CheckpointError(_shortened(problems))
    reasons = [reason for reason in unused.values() if reason is not None]
    told = [f"{reasons.count(reason)} keys are not read: {reason}" for reason in dict.fromkeys(reasons)]
    return [*archive.remarks, *told]


def _misfits(entries: Mapping[str, TensorEntry], stored: Stored, key: str, block: tuple[int, int] | None) -> list[str]:
    entry = entries[key]
    where = f"{entry.file}: {key}"
    if entry.shape != stored.key_shape:
        return [f"{where}: shape {list(entry.shape)} found, {list(stored.key_shape)} expected"]
    if entry.dtype in WEIGHTS:
        return []
    if entry.dtype != FLOAT8 or len(entry.shape) != 2:
        return [f"{where}: dtype {entry.dtype} found, {' or '.join(WEIGHTS)} expected"]
    if block is None:
        return [f"{where}: dtype {FLOAT8} found, but config.json has no quantization_config"]
    scale = entries.get(f"{key}{SCALE}")
    shape = tuple(ceil(size / step) for size, step in zip(entry.shape, block, strict=True))
    if scale is None:
        return [f"{where}: dtype {FLOAT8} found without its {key}{SCALE}"]
    if scale.dtype not in (*WEIGHTS, E8M0) or scale.shape != shape:
        return [f"{scale.file}: {key}{SCALE}: {scale.words} found, float32 or {E8M0} {list(shape)} expected"]
    return []


def _shortened(problems: list[str], most: int = 12) -> list[str]:
    """A wrong model misfits in every tensor: the first tell enough."""
    return [*problems[:most], *([f"and {len(problems) - most} more such problems"] if len(problems) > most else [])]
