"""precision=auto: the options of conf/precision that a run may take one of, and which of them its time speaks for.

Precision changes numbers, so nothing chooses it unasked, and the first option of the list stays unless another one is
predicted to be MARGIN faster: less than that is nearer to nothing than the prediction to the truth.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from pydantic import field_validator

from src.config.base import Names
from src.config.groups import options
from src.config.wording import unknown
from src.distributed.precision.config import BYTES, Precision
from src.planning import batch, machines
from src.planning.memory import Load
from src.run import Run
from src.runs.cluster import Devices

AUTO = "auto"
MARGIN = 0.05
UNDECIDED = "precision=auto is decided by launch.py alone, for a training; pass a precision, such as precision=bf16"


class AutoPrecision(Precision):
    """A precision that is still to be chosen; storage, compute and reduce that differ from those of conf/precision/auto
    are those of whatever is chosen.
    """

    float8: None
    """What is decided; null: nothing else may stand here."""
    among: Names
    """Options of conf/precision to choose from; the first stays unless another is 5 % faster."""

    @field_validator("float8", mode="before")
    @classmethod
    def _is_decided(cls, float8: object) -> object:
        if float8 is not None:
            raise ValueError(f"{float8!r} is decided here; pass null, or precision=fp8 for its keys")
        return float8

    @field_validator("among")
    @classmethod
    def _options_by_name(cls, among: tuple[str, ...]) -> tuple[str, ...]:
        known = [each for each in options("precision") if each != AUTO]
        if not among:
            raise ValueError(f"names no option; there are {', '.join(known)}")
        if wrong := [each for each in among if each not in known]:
            raise ValueError(unknown(wrong[0], known, "option of precision"))
        if len(set(among)) < len(among):
            raise ValueError("names an option twice; each once")
        return among


def weight(place: int) -> float:
    """What the seconds of the option in this place of the list count, from 0."""
    return 1.0 if place == 0 else 1.0 + MARGIN


def narrowest(found: Mapping[str, Precision]) -> list[Precision]:
    """Those of which no other is at least as narrow in everything: none of the rest can be faster, or smaller."""
    kept = list(dict.fromkeys(found.values()))
    for each in tuple(kept):
        if any(other is not each and _within(other, each) for other in kept):
            kept.remove(each)
    return kept


def _within(narrow: Precision, wide: Precision) -> bool:
    """Whether `narrow` takes no more bytes than `wide` anywhere, and multiplies no slower."""
    pairs = ((narrow.storage, wide.storage), (narrow.compute, wide.compute), (narrow.reduce, wide.reduce))
    if any(BYTES[one] > BYTES[other] for one, other in pairs):
        return False
    if wide.float8 is None:
        return narrow.float8 is None or not narrow.float8.emulate
    if narrow.float8 is None or narrow.float8.recipe != wide.float8.recipe or narrow.float8.emulate:
        return False
    return narrow.float8.exclude == wide.float8.exclude and narrow.float8.all_gather >= wide.float8.all_gather


def checks(run: Run, devices: Devices | None) -> Callable[[Load], list[str]]:
    """Of a load on this run's device: why its precision cannot be had, problems in the words of the plan."""
    known: dict[tuple[object, ...], list[str]] = {}  # a search asks thousands of times, and all weights are looked at

    def problems(load: Load) -> list[str]:
        degrees = load.degrees
        here = replace(run, parallel=degrees, precision=load.precision)
        asked = (load.precision, degrees.tensor, degrees.shard, degrees.context, degrees.splits_backward)
        if asked not in known:
            known[asked] = _problems(here, devices)
        return known[asked] + batch.float8_problems(here, load.micro_batch)

    return problems


def _problems(run: Run, devices: Devices | None) -> list[str]:
    degrees = run.parallel
    found = run.optim.problems(storage=run.precision.storage, row_shards=degrees.fsdp, tensor=degrees.tensor)
    return found + machines.float8_problems(run, devices) + machines.expert_problems(run)
