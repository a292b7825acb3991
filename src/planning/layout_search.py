"""The fastest layouts of a number of GPUs: every legal product of degrees, schedule and micro-batch that is left open,
with the least recomputation that fits, in the order of predicted time.

What cannot fit goes first, by the bytes of weights and state alone. What is left is ordered by a time that hardly any
exact one beats; the first of it gets the recomputation that fits and its time without its pipeline's order, and only
where it is still the first, the exact time, until the best are known.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush
from itertools import product
from typing import Any

from src.distributed.parallel_dims import ParallelDims, ScheduleName
from src.distributed.pipeline import stages
from src.distributed.precision.config import BYTES, Precision
from src.distributed.recompute import Recompute
from src.planning.batch import GPU_TOKENS
from src.planning.memory import RUNTIME_BYTES, Load, estimate
from src.planning.precision_choice import narrowest, weight
from src.planning.recompute_choice import LADDER
from src.planning.time.step import Question, StepTime, least_seconds, state_bytes, step_time, without_order
from src.planning.time.work import shape_of

DEGREES = ("replicate", "shard", "context", "tensor", "expert", "pipeline")
MICRO_BATCHES = (1, 2, 4)  # sequences; of short ones more: `_sizes`
LONG_SEQUENCE = 32_768  # tokens from which on a sequence is cut though there is batch enough
INTERLEAVED = (2, 4)  # stages of a rank
OPEN = -1  # in the place of a precision


@dataclass(frozen=True)
class Space:
    """What the search may choose. What is given of the layout stays; so do recomputation and micro-batch."""

    gpus: int
    degrees: Mapping[str, Any]  # fields of ParallelDims
    micro_batch: int | None
    recompute: Recompute | None
    global_batch: int
    precisions: Mapping[str, Precision] = field(default_factory=dict)  # by option; none: that of the load


@dataclass(frozen=True)
class Found:
    """A layout that fits, with its time."""

    load: Load
    step: StepTime
    peak: int  # bytes of the fullest GPU
    precision: str | None = None  # option of conf/precision, where it was open

    @property
    def text(self) -> str:
        open_too = "" if self.precision is None else f" precision={self.precision}"
        return self.load.degrees.told(self.load.micro_batch, self.load.recompute) + open_too


def any_layout(_degrees: ParallelDims) -> bool:
    return True


def nothing_wrong(_load: Load) -> Sequence[str]:
    return ()


def best(
    question: Question,
    space: Space,
    limit_bytes: int | None,
    count: int = 5,
    among: Callable[[ParallelDims], bool] = any_layout,
    problems: Callable[[Load], Sequence[str]] = nothing_wrong,
) -> list[Found]:
    """The `count` fastest layouts, fastest first; none where nothing fits. `question`: of the run on any layout;
    `problems`: why a layout and its precision do not go together.
    """
    room = limit_bytes if limit_bytes is not None else 2**62
    options: list[tuple[str | None, Precision]] = [*space.precisions.items()] or [(None, question.load.precision)]
    # Seconds, number of the layout, place of the precision; the last: None at first, then the peak of what fits, then
    # all of it.
    heap: list[tuple[float, int, int, Question, int | Found | None]] = []
    for number, load in enumerate(legal(question.load, space, among)):
        if (least := _least(question, load, space, room)) is not None:
            heap.append((least, number, OPEN, replace(question, load=load), None))
    heapify(heap)
    found: list[Found] = []
    while heap and len(found) < count:
        _, number, place, asked, known = heappop(heap)
        if isinstance(known, Found):
            found.append(known)
        elif known is None:
            for each, (_, precision) in enumerate(options):
                load = asked.load.changed(precision=precision)
                if problems(load) or (fits := fitting(replace(asked, load=load), space, room)) is None:
                    continue
                fitted, peak = fits
                heappush(heap, (weight(each) * without_order(fitted), number, each, fitted, peak))
        else:
            exact = Found(asked.load, step_time(asked), known, options[place][0])
            heappush(heap, (weight(place) * exact.step.seconds, number, place, asked, exact))
    return found


def _least(question: Question, load: Load, space: Space, room: int) -> float | None:
    """Seconds that hardly any precision of those that are open beats on this layout; None: it cannot fit."""
    if not space.precisions:
        return least_seconds(replace(question, load=load)) if _least_bytes(load) <= room else None
    loads = (load.changed(precision=each) for each in narrowest(space.precisions))
    fit = (replace(question, load=each) for each in loads if _least_bytes(each) <= room)
    return min(map(least_seconds, fit), default=None)


def fitting(question: Question, space: Space, room: int) -> tuple[Question, int] | None:
    """With the least recomputation that fits, and the bytes of the fullest GPU; None: nothing fits."""
    load = question.load
    ladder: Sequence[Recompute] = LADDER if space.recompute is None else (space.recompute,)
    if load.degrees.splits_backward:
        ladder = ladder[:1]
    if estimate(load.changed(recompute=ladder[-1])).peak > room:
        return None
    for option in ladder:
        changed = load.changed(recompute=option)
        peak = estimate(changed).peak
        if peak <= room:
            return replace(question, load=changed), peak
    return None


def _least_bytes(load: Load) -> int:
    """That no rank of the layout can do without: its share of weights, gradients and state, and gathered weights."""
    shape, degrees = shape_of(load.model), load.degrees
    dense = (sum(shape.dense) + shape.embedding + shape.head) / degrees.tensor / degrees.pipeline
    routed = sum(shape.routed) / (degrees.expert * degrees.expert_tensor) / degrees.pipeline
    here = dense / degrees.fsdp + routed / degrees.expert_shard
    storage, compute = BYTES[load.precision.storage], BYTES[load.precision.compute]
    resting = here * (2 * storage + state_bytes(load.optim, load.model))
    gathered = 0.0 if degrees.reshards_after_forward else (dense + routed) * compute
    if degrees.pipeline > 1 or (load.micro_batches > 1 and not degrees.sync_each_micro_batch):
        gathered += (dense + routed) * BYTES[load.precision.reduce]
    return int(resting + gathered) + RUNTIME_BYTES


def legal(load: Load, space: Space, among: Callable[[ParallelDims], bool] = any_layout) -> Iterator[Load]:
    """Loads that models, batches and schedules allow, whether they fit or not."""
    for degrees in _layouts(load, space):
        if not among(degrees) or load.model.problems_of_shape(degrees):
            continue
        for size in (space.micro_batch,) if space.micro_batch else _sizes(load.seq_len // degrees.context):
            together = size * degrees.data_ranks
            if space.global_batch % together or load.seq_len % degrees.sequence_parts:
                continue
            numbers = space.global_batch // together
            for each in _as_given(_schedules(load, degrees, numbers), space):
                if not stages.problems(each, load.model.n_layers, numbers):
                    yield load.changed(degrees=each, micro_batch=size, micro_batches=numbers)


def _sizes(tokens: int) -> tuple[int, ...]:
    """Micro-batches of sequences of which a rank has so many tokens. Of 4,096 tokens no others: a third more layouts
    would be looked at, for what MICRO_BATCHES fill as well.
    """
    most = GPU_TOKENS // 2 // max(tokens, 1)
    return (*MICRO_BATCHES, *(size for size in _powers(most) if size > MICRO_BATCHES[-1]))


def _layouts(load: Load, space: Space) -> Iterator[ParallelDims]:
    """Products of powers of two, and of what the number of GPUs leaves for data ranks."""
    base, routed = load.degrees, load.model.routed

    def choices(name: str, legal: Sequence[int]) -> Sequence[int]:
        return (space.degrees[name],) if name in space.degrees else legal

    for tensor, pipeline in product(choices("tensor", _powers(8)), choices("pipeline", _powers(64))):
        scarce = space.gpus // (tensor * pipeline) > space.global_batch
        cuts = _powers(64) if scarce or load.seq_len >= LONG_SEQUENCE else (1,)
        for context in choices("context", cuts):
            data, rest = divmod(space.gpus, tensor * pipeline * context)
            if rest or not data:
                continue
            for shard in choices("shard", _shards(data)):
                replicate, rest = divmod(data, shard)
                if rest or space.degrees.get("replicate", replicate) != replicate:
                    continue
                experts = _powers(min(256, shard * context * tensor)) if routed else (1,)
                for expert in choices("expert", experts):
                    yield base.model_copy(
                        update={
                            "tensor": tensor,
                            "pipeline": pipeline,
                            "context": context,
                            "shard": shard,
                            "replicate": replicate,
                            "expert": expert,
                            "expert_tensor": tensor if routed and expert == 1 else 1,
                        }
                    )


def _powers(most: int) -> tuple[int, ...]:
    return tuple(2**power for power in range(most.bit_length()) if 2**power <= most)


def _shards(data: int) -> tuple[int, ...]:
    """Of data ranks: all of them, and parts of 8 and 64, whose gathers stay near."""
    return tuple(dict.fromkeys(each for each in (data, 64, 8, 1) if data % each == 0))


def _as_given(found: Iterator[ParallelDims], space: Space) -> Iterator[ParallelDims]:
    """With what is given beside the degrees, each layout once."""
    given = {name: value for name, value in space.degrees.items() if name not in DEGREES}
    if not given:
        yield from found
        return
    yield from dict.fromkeys(each.model_copy(update=given) for each in found)


def _schedules(load: Load, degrees: ParallelDims, micro_batches: int) -> Iterator[ParallelDims]:
    if degrees.pipeline == 1:
        plain = {"pipeline_schedule": "1F1B", "layers_per_stage": None}
        cut = degrees.fsdp > 1
        for reshard in ("default", "never") if cut else ("default",):
            for sync in (True, False) if cut and micro_batches > 1 else (False,):
                yield degrees.model_copy(update={**plain, "reshard": reshard, "sync_each_micro_batch": sync})
        return
    yield _with(degrees, "1F1B", None)
    units = load.model.n_layers + degrees.first_stage_less + degrees.last_stage_less
    for each in INTERLEAVED:
        yield _with(degrees, "Interleaved1F1B", -(-units // (each * degrees.pipeline)))
    if not load.compiled_blocks:
        yield _with(degrees, "ZBVZeroBubble", None)


def _with(degrees: ParallelDims, schedule: ScheduleName, layers: int | None) -> ParallelDims:
    changes = {"pipeline_schedule": schedule, "layers_per_stage": layers, "reshard": "default"}
    return degrees.model_copy(update={**changes, "sync_each_micro_batch": False})
