"""Stages of a pipeline: their modules, the stages of each rank, the rules of each schedule. Arithmetic only."""

from dataclasses import dataclass
from math import ceil

from src.distributed.parallel_dims import ParallelDims, ScheduleName

EMBEDDING = "tok_embeddings"
HEAD = ("norm", "output")
PREDICTION = "mtp"  # modules of multi-token prediction, which are where the head is


@dataclass(frozen=True)
class Demands:
    """Rules of one of torch's pipeline schedules."""

    several: bool  # each rank has more than one stage
    folded: bool = False  # rank p has stages p and last - p, exactly two
    in_rounds: bool = False  # micro-batches come in equal rounds of about as many as there are ranks
    full: bool = False  # at least as many micro-batches as stages


SCHEDULES: dict[ScheduleName, Demands] = {
    "GPipe": Demands(several=False),
    "1F1B": Demands(several=False, full=True),
    "Interleaved1F1B": Demands(several=True, in_rounds=True),
    "LoopedBFS": Demands(several=True),
    "InterleavedZeroBubble": Demands(several=True, in_rounds=True),
    "ZBVZeroBubble": Demands(several=True, folded=True),
    "DualPipeV": Demands(several=True, folded=True, full=True),
}


def modules(n_layers: int) -> tuple[str, ...]:
    """All modules of a decoder that a stage may hold, in the order in which data meet them."""
    return (EMBEDDING, *(f"layers.{layer}" for layer in range(n_layers)), *HEAD)


def module_of(weight: str) -> str:
    """The module of `modules` that owns the parameter of this name: multi-token prediction is the head's."""
    words = weight.split(".")
    if words[0] == "layers":
        return ".".join(words[:2])
    return HEAD[-1] if words[0] == PREDICTION else words[0]


def stage_count(degrees: ParallelDims, n_layers: int) -> int:
    """Stages of the whole pipeline."""
    if degrees.stages is not None:
        return len(degrees.stages)
    if degrees.pipeline == 1:
        return 1
    if degrees.layers_per_stage is not None:
        return ceil(_units(degrees, n_layers) / degrees.layers_per_stage)
    return degrees.pipeline * (2 if SCHEDULES[degrees.pipeline_schedule].several else 1)


def split(degrees: ParallelDims, n_layers: int) -> tuple[tuple[str, ...], ...]:
    """The modules of each stage: `parallel.stages`, or even shares where embedding and head count as some layers.

    ValueError when there is no such split.
    """
    if degrees.stages is not None:
        return tuple(tuple(stage) for stage in degrees.stages)
    return even(stage_count(degrees, n_layers), n_layers, degrees.first_stage_less, degrees.last_stage_less)


def even(count: int, n_layers: int, first_less: int = 1, last_less: int = 1) -> tuple[tuple[str, ...], ...]:
    """The modules of each of `count` parts; the first and the last have so many layers less than their share.

    Of `units = layers + first_less + last_less`, early parts take what does not divide evenly. ValueError when there
    is no such split.
    """
    if count == 1:
        return (modules(n_layers),)
    share, rest = divmod(n_layers + first_less + last_less, count)
    if share == 0:
        raise ValueError(
            f"{count} stages for {n_layers + first_less + last_less} units (layers, and what the first and last stage "
            "hold less)"
        )
    if max(first_less, last_less) > share:
        raise ValueError(f"each of the {count} stages has only {share} units to give away")
    layers = [share + (stage < rest) for stage in range(count)]
    layers[0] -= first_less
    layers[-1] -= last_less
    blocks = iter(f"layers.{layer}" for layer in range(n_layers))
    found = [tuple(next(blocks) for _ in range(number)) for number in layers]
    return ((EMBEDDING, *found[0]), *found[1:-1], (*found[-1], *HEAD))


def owned(rank: int, ranks: int, count: int, schedule: ScheduleName) -> tuple[int, ...]:
    """The stages of one pipeline rank, first to last: rank, rank + ranks, ..., or the two arms of a V."""
    if SCHEDULES[schedule].folded:
        return (rank, count - 1 - rank)
    return tuple(range(rank, count, ranks))


@dataclass(frozen=True)
class StageShare:
    """Modules and live micro-batches of one rank of a pipeline; without a pipeline, of the whole model."""

    modules: frozenset[str]
    layers: tuple[int, ...]
    stages: int
    in_flight: float  # micro-batches of which a block's activations wait for their backward at most
    heads_in_flight: int  # the same of the head; 0 where it is not
    borders: int  # stages that receive from another rank, and stages that send

    @property
    def has_head(self) -> bool:
        return HEAD[-1] in self.modules


def shares(degrees: ParallelDims, n_layers: int, micro_batches: int) -> list[StageShare]:
    """The share of each pipeline rank; the whole model where there is no pipeline, or an illegal one."""
    ranks, schedule = degrees.pipeline, degrees.pipeline_schedule
    if ranks == 1 or problems(degrees, n_layers, micro_batches):
        return [StageShare(frozenset(modules(n_layers)), tuple(range(n_layers)), 1, 1, 1, 0)]
    cut = split(degrees, n_layers)
    found = []
    for rank in range(ranks):
        mine = owned(rank, ranks, len(cut), schedule)
        names = [name for stage in mine for name in cut[stage]]
        last = len(cut) - 1 in mine
        found.append(
            StageShare(
                modules=frozenset(names),
                layers=tuple(int(name.split(".")[1]) for name in names if "." in name),
                stages=len(mine),
                in_flight=in_flight(rank, ranks, len(cut), schedule, micro_batches),
                heads_in_flight=heads_in_flight(ranks, schedule, micro_batches) if last else 0,
                borders=2 * len(mine) - (0 in mine) - last,
            )
        )
    return found


def in_flight(rank: int, ranks: int, count: int, schedule: ScheduleName, micro_batches: int) -> float:
    """Forwards of one stage, averaged over the rank's stages, whose activations wait for their backward at most."""
    each = count // ranks
    most = micro_batches * each
    match schedule:
        case "GPipe" | "LoopedBFS":
            kept = most
        case "1F1B":
            kept = ranks - rank
        case "Interleaved1F1B":
            kept = (each - 1) * _round_size(micro_batches, ranks) + 2 * (ranks - 1 - rank) + 1
        case "InterleavedZeroBubble":
            kept = (each - 1) * _round_size(micro_batches, ranks) + ranks
        case "ZBVZeroBubble":
            kept = 2 * ranks
        case "DualPipeV":
            kept = 2 * ranks + 1
    return min(kept, most) / each


def heads_in_flight(ranks: int, schedule: ScheduleName, micro_batches: int) -> int:
    """The same of the last stage alone, whose backward mostly follows at once."""
    match schedule:
        case "GPipe" | "LoopedBFS":
            return micro_batches
        case "InterleavedZeroBubble":
            return min(ranks, micro_batches)
        case _:
            return 1


def problems(degrees: ParallelDims, n_layers: int, micro_batches: int) -> list[str]:
    """Why this pipeline cannot run: key, value, rule, nearest legal value."""
    if degrees.pipeline == 1:
        return _idle_keys(degrees)
    found = _count_problems(degrees, n_layers)
    if not found:
        found = _split_problems(degrees, n_layers) + _micro_batch_problems(degrees, n_layers, micro_batches)
    if degrees.sync_each_micro_batch:
        found.append(
            f"parallel.sync_each_micro_batch=true: parallel.pipeline={degrees.pipeline} reduces gradients once, after "
            "the last micro-batch; pass false"
        )
    return found


def warnings(degrees: ParallelDims, n_layers: int, micro_batches: int) -> list[str]:
    """Legal choices that waste time or memory."""
    count = stage_count(degrees, n_layers)
    if degrees.pipeline == 1 or micro_batches >= count:
        return []
    return [
        f"{micro_batches} micro-batches for {count} stages leave most ranks idle most of the time; at least {count}, "
        "through a larger task.global_batch or a smaller task.micro_batch"
    ]


def _units(degrees: ParallelDims, n_layers: int) -> int:
    return n_layers + degrees.first_stage_less + degrees.last_stage_less


def _idle_keys(degrees: ParallelDims) -> list[str]:
    given = {"layers_per_stage": degrees.layers_per_stage, "stages": degrees.stages}
    return [
        f"parallel.{key} cuts a pipeline, and there is none: parallel.pipeline=1; pass parallel.{key}=null"
        for key, value in given.items()
        if value is not None
    ]


def _count_problems(degrees: ParallelDims, n_layers: int) -> list[str]:
    """Stages per rank, against what the schedule asks."""
    name, ranks = degrees.pipeline_schedule, degrees.pipeline
    demands, count, key = SCHEDULES[name], stage_count(degrees, n_layers), _count_key(degrees)
    if degrees.stages is not None and degrees.layers_per_stage is not None:
        return ["parallel.stages and parallel.layers_per_stage both say where to cut; pass one of them as null"]
    if count % ranks:
        lower = count // ranks * ranks
        return [
            f"{key} makes {count} stages, no multiple of parallel.pipeline={ranks} "
            f"({f'{lower} or {lower + ranks}' if lower else ranks} stages would do)"
        ]
    each = count // ranks
    if not demands.several and each > 1:
        return [
            f"parallel.pipeline_schedule={name} takes one stage a rank, and {key} makes {each}; "
            f"{ranks} stages in all, or parallel.pipeline_schedule=Interleaved1F1B"
        ]
    if demands.several and each == 1:
        return [
            f"parallel.pipeline_schedule={name} takes several stages a rank, and {key} makes one; "
            f"{2 * ranks} stages in all, or parallel.pipeline_schedule=1F1B"
        ]
    if demands.folded and each != 2:
        return [
            f"parallel.pipeline_schedule={name} takes exactly two stages a rank, and {key} makes {each}; "
            f"{2 * ranks} stages in all"
        ]
    return []


def _count_key(degrees: ParallelDims) -> str:
    if degrees.stages is not None:
        return "parallel.stages"
    if degrees.layers_per_stage is not None:
        return f"parallel.layers_per_stage={degrees.layers_per_stage}"
    return f"parallel.pipeline={degrees.pipeline}"


def _split_problems(degrees: ParallelDims, n_layers: int) -> list[str]:
    if degrees.stages is None:
        try:
            split(degrees, n_layers)
        except ValueError as error:
            keys = f"parallel.first_stage_less={degrees.first_stage_less} and last_stage_less={degrees.last_stage_less}"
            return [f"{_count_key(degrees)} with {keys} cannot cut model.n_layers={n_layers}: {error}"]
        return []
    found = []
    flat = [name for stage in degrees.stages for name in stage]
    if flat != list(modules(n_layers)):
        missing = [name for name in modules(n_layers) if name not in flat]
        unknown = [name for name in flat if name not in modules(n_layers)]
        what = f"missing {missing}" if missing else f"unknown {unknown}" if unknown else "another order, or one twice"
        found.append(
            f"parallel.stages must name {EMBEDDING}, layers.0 to layers.{n_layers - 1}, {' and '.join(HEAD)} "
            f"once each, in this order; here: {what}"
        )
    if not all(degrees.stages):
        found.append("parallel.stages has an empty stage; each holds at least one module")
    elif not set(HEAD) <= set(degrees.stages[-1]):
        found.append(f"parallel.stages parts {' from '.join(HEAD)}; both belong to the last stage")
    return found


def _micro_batch_problems(degrees: ParallelDims, n_layers: int, micro_batches: int) -> list[str]:
    name, ranks = degrees.pipeline_schedule, degrees.pipeline
    demands, count = SCHEDULES[name], stage_count(degrees, n_layers)
    if demands.full and micro_batches < count:
        return [
            f"parallel.pipeline_schedule={name} needs at least as many micro-batches as its {count} stages, and "
            f"task.global_batch over data ranks and task.micro_batch makes {micro_batches}; {count} would do, or "
            f"parallel.pipeline_schedule={'ZBVZeroBubble' if demands.folded else 'GPipe'}"
        ]
    if demands.in_rounds and not _in_rounds(micro_batches, ranks):
        legal = [number for number in range(1, 2 * micro_batches) if _in_rounds(number, ranks)]
        below, above = (max(n for n in legal if n < micro_batches), min(n for n in legal if n > micro_batches))
        return [
            f"parallel.pipeline_schedule={name} takes micro-batches in equal rounds of about "
            f"parallel.pipeline={ranks}, and task.global_batch over task.micro_batch makes {micro_batches} "
            f"({below} or {above} would do)"
        ]
    return []


def _round_size(micro_batches: int, ranks: int) -> int:
    return micro_batches // max(1, micro_batches // ranks)


def _in_rounds(micro_batches: int, ranks: int) -> bool:
    return micro_batches % max(1, micro_batches // ranks) == 0
