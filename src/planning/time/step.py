"""Seconds of one optimizer step on a layout, term by term, from shapes, a device and the links of a site.

Kernels run one after the other on one stream; FSDP's gathers and reductions run beside them on another, and slow matrix
products down while they do. Collectives of tensor, context and expert ranks stand in line with what needs them, but for
rows that go to experts beside the products of shared ones. The stages of a pipeline follow their schedule's order of
operations: bubbles.py.
"""

from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from statistics import NormalDist

from src.distributed.pipeline import stages
from src.distributed.precision.config import BYTES
from src.models.base import ModelConfig
from src.optim.base import Optimizer
from src.planning.memory import Load
from src.planning.recompute_choice import NONE
from src.planning.time.bubbles import Makespan, StagePass, makespan
from src.planning.time.collectives import Fabric, Reached, all_reduce_seconds, gather_seconds
from src.planning.time.devices import Gpu
from src.planning.time.traffic import Collective, FsdpGroups, block_collectives, fsdp_collectives, hop
from src.planning.time.work import BlockKind, ProductTime, Work, Worker, shape_of, together

# Seconds that Python needs for each kernel that it launches, guards, autograd and what calls a block included. Four
# steps of presets_h200.json and of its first version, where passes of four sequences left the GPU idle: 262 ms of 16
# passes of 8 blocks, 302 of 16 of 10, 1,760 of 64 of 14, 20.5 of one of 8. They are HOST_STEP and 1.9 ms a compiled
# block, whose kernels are 45; eager ones take 5 ms.
HOST_KERNEL = 43e-6
HOST_STEP = 4.4e-3  # once: the head and its loss, the norm, the update, and what the step before has to say
HOST_WRAPPED = 1.8e-3  # of a block that FSDP wraps, more: "half of the host's work"
SPREAD = 0.006  # standard deviation of the speed of a rank; two machines of a kind were 1.6 % apart


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the slowest rank; the parts add up to `seconds`."""

    products: float
    experts: float
    attention: float
    memory: float
    gaps: float  # between kernels
    loss: float
    recompute: float
    tensor: float
    context: float
    travel: float
    copies: float  # FSDP's, in and out of its buffers, and gradients that are added up
    contention: float  # what products lose beside collectives
    exposed: float  # gathers and reductions that nothing hides
    bubble: float  # a pipeline's ranks without work
    update: float
    host: float  # the GPU waits for Python
    stragglers: float  # ranks wait for the slowest
    hidden: float  # seconds of collectives beside other work: no part of the sum

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, float]:
        return {name: seconds for name, seconds in asdict(self).items() if name != "hidden"}

    @property
    def limit(self) -> str:
        """The largest part that is not the work itself."""
        waste = {name: self.parts[name] for name in WASTE}
        return max(waste, key=lambda name: waste[name])


WAITED_FOR = ("tensor", "context", "travel")  # collectives that stand in line
WASTE = (
    "recompute",
    "tensor",
    "context",
    "travel",
    "copies",
    "contention",
    "exposed",
    "bubble",
    "update",
    "gaps",
    "host",
    "stragglers",
)


@dataclass(frozen=True)
class Question:
    """A load on some machines."""

    load: Load
    gpu: Gpu
    fabric: Fabric
    flash: bool = True  # whether flash-attn-4 is there
    graph: bool = False  # whether a step is one CUDA graph
    # Of a dispatcher that sends a token once to each node and rank; None: a row for each expert, as ours does.
    reached: Reached | None = None


def step_time(question: Question) -> StepTime:
    """Whether the layout is legal or not; a pipeline must be."""
    return _Step(question).answer()


@dataclass(frozen=True)
class Terms:
    """What the parts of a step are sums of, on one rank; the mean of a pipeline's ranks."""

    products: tuple[ProductTime, ...]  # of one micro-batch
    collectives: tuple[Collective, ...]  # of a step


def terms(question: Question) -> Terms:
    """Each product by its shape, and each collective by algorithm, bytes, ranks and nodes."""
    return _Step(question).terms()


def least_seconds(question: Question) -> float:
    """About the least that `step_time` can be with any recomputation, and sooner known: nothing is computed again,
    and a pipeline only fills and empties once.
    """
    return without_order(replace(question, load=question.load.changed(recompute=NONE)))


def without_order(question: Question) -> float:
    """Seconds of a step whose pipeline only fills and empties once; without a pipeline, those of `step_time`."""
    return _Step(question, simulate=False).answer().seconds


@dataclass(frozen=True)
class _Stage:
    """One stage of the pipeline, of one micro-batch."""

    blocks: int
    forward: Work
    backward: Work
    dense: int  # elements at work on a rank, gathered
    routed: int
    largest: tuple[int, int]  # the same of its largest unit
    beside: float  # seconds of collectives beside its products, both directions


class _Step:
    def __init__(self, question: Question, *, simulate: bool = True) -> None:
        self.simulate = simulate
        self.load, self.gpu, self.fabric = question.load, question.gpu, question.fabric
        self.degrees, self.shape = self.load.degrees, shape_of(self.load.model)
        self.graph, self.reached = question.graph, question.reached
        self.worker = Worker(self.load, self.gpu, question.flash)
        self.kinds = [self._with_collectives(kind) for kind in self.shape.kinds]
        self.groups = FsdpGroups.of(self.degrees, self.fabric.per_node)

    def _with_collectives(self, kind: BlockKind) -> tuple[Work, Work, float]:
        """A block with what its ranks send each other, and what it computes again; and seconds of what is sent beside
        its products.
        """
        forward, backward = self.worker.block(kind)
        sent, back = dict.fromkeys(WAITED_FOR, 0.0), dict.fromkeys(WAITED_FOR, 0.0)
        beside = 0.0
        for each in block_collectives(self.load, self.worker, self.fabric, kind, self.reached):
            sent[each.what] += each.exposed * each.forward * each.seconds
            back[each.what] += each.exposed * each.backward * each.seconds
            beside += (1.0 - each.exposed) * each.times * each.seconds
        again = self.worker.recomputed(forward)
        if self.load.recompute.mode in ("full", "every"):
            again += sum(sent.values()) / (self.load.recompute.every or 1)
        return forward + Work(**sent), backward + Work(**back, recompute=again), beside

    @cached_property
    def stages(self) -> list[_Stage]:
        count = stages.stage_count(self.degrees, self.load.model.n_layers)
        layers = self.load.model.n_layers
        if count == 1:
            return [self._stage(list(range(len(self.shape.of_block))), first=True, last=True)]
        cut = stages.split(self.degrees, layers)
        found, alike = [], dict[tuple[int, ...], _Stage]()
        for number, names in enumerate(cut):
            blocks = [int(name.split(".")[1]) for name in names if "." in name]
            last = number == len(cut) - 1
            if last:
                blocks += range(layers, len(self.shape.of_block))
            kinds = (number == 0, last, *(self.shape.of_block[block] for block in blocks))
            if kinds not in alike:
                alike[kinds] = self._stage(blocks, first=number == 0, last=last)
            found.append(alike[kinds])
        return found

    def _stage(self, blocks: list[int], *, first: bool, last: bool) -> _Stage:
        forward, backward, beside = Work(), Work(), 0.0
        counts = {kind: sum(self.shape.of_block[block] == kind for block in blocks) for kind in range(len(self.kinds))}
        for kind, number in counts.items():
            if number:
                there, back, hidden = self.kinds[kind]
                forward, backward, beside = forward + there * number, backward + back * number, beside + hidden * number
        tensor, apart = self.degrees.tensor, self.degrees.expert * self.degrees.expert_tensor
        dense = sum(self.shape.dense[block] for block in blocks) // tensor
        routed = sum(self.shape.routed[block] for block in blocks) // apart
        units = [(self.shape.dense[block] // tensor, self.shape.routed[block] // apart) for block in blocks]
        ends = []
        if first:
            ends.append(self.shape.embedding // tensor)
        if last:
            heads = 1 + self.load.model.prediction_depths
            forward += Work(loss=heads * self.worker.head(self.shape.vocabulary))
            ends.append(self.shape.head // tensor)
        largest = max([*units, *((each, 0) for each in ends)], default=(0, 0), key=sum)
        return _Stage(len(blocks), forward, backward, dense + sum(ends), routed, largest, beside)

    def answer(self) -> StepTime:
        numbers = self.load.micro_batches
        each = self._fullest(self._ranks)
        traffic, copies = self._traffic(each)
        both = self._busiest * numbers
        span = self._makespan()
        room = max(0.0, both.computed - numbers * self._beside)  # one link cannot carry two collectives at a time
        beside = min(traffic, room)
        slowed = self.gpu.shares.contention * beside * min(1.0, both.matrices / max(room, 1e-12))
        ends = self._ends(each)
        exposed = max(0.0, traffic - room - slowed) + min(traffic, ends)
        bubble = max(0.0, span.seconds - both.total)
        update = self._update(each)
        worked = both.total + copies + slowed + exposed + update
        host = 0.0 if self.graph else max(0.0, self._host() - worked - bubble)
        ranks = self.degrees.world
        late = SPREAD * _slowest(ranks) * (worked + bubble)
        parts = {name: getattr(both, name) for name in Work.__dataclass_fields__}
        return StepTime(
            **parts,
            copies=copies,
            contention=slowed,
            exposed=exposed,
            bubble=bubble,
            update=update,
            host=host,
            stragglers=late,
            hidden=max(0.0, traffic - exposed),
        )

    @cached_property
    def _ranks(self) -> list[list[_Stage]]:
        """The stages of each rank of the pipeline."""
        count, ranks, schedule = len(self.stages), self.degrees.pipeline, self.degrees.pipeline_schedule
        if ranks == 1:
            return [self.stages]
        return [[self.stages[stage] for stage in stages.owned(rank, ranks, count, schedule)] for rank in range(ranks)]

    @cached_property
    def _busiest(self) -> Work:
        """Of one micro-batch, both directions, on the rank of the pipeline that has the most."""
        work = [sum((each.forward + each.backward for each in mine), Work()) for mine in self._ranks]
        return max(work, key=lambda each: each.total)

    @cached_property
    def _beside(self) -> float:
        """Seconds of collectives beside products, of one micro-batch, on the rank that has the most of them."""
        return max(sum(stage.beside for stage in mine) for mine in self._ranks)

    def _fullest(self, ranks: list[list[_Stage]]) -> _Stage:
        """The weights of the pipeline rank that has the most of them: of all of its stages."""
        fullest = max(ranks, key=lambda mine: sum(stage.dense + stage.routed for stage in mine))
        return _Stage(
            sum(stage.blocks for stage in fullest),
            fullest[0].forward,
            fullest[0].backward,
            sum(stage.dense for stage in fullest),
            sum(stage.routed for stage in fullest),
            max((stage.largest for stage in fullest), key=sum),
            sum(stage.beside for stage in fullest),
        )

    def _makespan(self) -> Makespan:
        if self.degrees.pipeline == 1:
            (only,) = self.stages
            total = self.load.micro_batches * (only.forward.total + only.backward.total)
            return Makespan(total, total)
        if not self.simulate:
            totals = [stage.forward.total + stage.backward.total for stage in self.stages]
            work = self.load.micro_batches * self._busiest.total
            return Makespan(work + (self.degrees.pipeline - 1) * min(totals), work)
        return makespan(
            self.degrees.pipeline_schedule,
            self.degrees.pipeline,
            [self._pass(stage) for stage in self.stages],
            self.load.micro_batches,
            hop(self.load, self.worker, self.fabric).seconds,
        )

    def _pass(self, stage: _Stage) -> StagePass:
        """Gradients of weights are a half of the backward of products; nothing else of it can wait."""
        back = stage.backward
        weights = 0.5 * (back.products + back.experts)
        return StagePass(stage.forward.total, back.total - weights, weights)

    def terms(self) -> Terms:
        products, found = list[ProductTime](), list[Collective]()
        for number, kind in enumerate(self.shape.kinds):
            blocks = self.shape.of_block.count(number) / self.degrees.pipeline
            products += (each.often(blocks) for each in self.worker.product_times(kind))
            here = block_collectives(self.load, self.worker, self.fabric, kind, self.reached)
            found += (each.often(blocks * self.load.micro_batches) for each in here)
        if self.degrees.pipeline > 1:
            stages_each = len(self.stages) / self.degrees.pipeline
            found.append(hop(self.load, self.worker, self.fabric).often(stages_each * self.load.micro_batches))
        if not self.degrees.on_one_device:
            found += self._fsdp(self._fullest(self._ranks))
        return Terms(together(products), together(found))

    def _gathers(self) -> float:
        """How often a step gathers each block's weights."""
        if self.degrees.reshards_after_forward:
            return 2.0 * self.load.micro_batches
        return 1.0 if self.degrees.pipeline > 1 else float(self.load.micro_batches)

    def _traffic(self, rank: _Stage) -> tuple[float, float]:
        """Seconds of FSDP's collectives in a step, and of the copies around them."""
        if self.degrees.on_one_device:
            more = max(0, self.load.micro_batches - 1) * (rank.dense + rank.routed)
            return 0.0, self.gpu.moved_seconds(10.0 * more)
        compute, reduce = BYTES[self.load.precision.compute], BYTES[self.load.precision.reduce]
        storage, micro = BYTES[self.load.precision.storage], self.load.micro_batches
        float8 = self.load.precision.float8
        sent = 1 if float8 is not None and float8.all_gather else compute
        gathers, reductions = self._gathers(), self._reductions
        seconds = sum(each.times * each.seconds for each in self._fsdp(rank))
        units = max(1, rank.blocks) - 1  # each unit is a collective of its own
        for elements, group in ((rank.dense, self.groups.dense), (rank.routed, self.groups.routed)):
            seconds += gathers * units * gather_seconds(1.0, group, self.fabric) * (elements > 0)
        whole = rank.dense + rank.routed
        here = rank.dense / self.groups.dense.ranks + rank.routed / self.groups.routed.ranks
        cast = gathers * here * (storage + compute + (2 * compute if whole > here else 0))
        cast += reductions * whole * (compute + reduce)
        plain = gathers * whole * 2 * sent
        if not self._reduces_each:
            plain += (micro - 1) * whole * (compute + 2 * reduce)  # added up whole on each rank
        rate = self.gpu.memory * self.gpu.shares.casts
        return seconds, cast / rate + self.gpu.moved_seconds(plain)

    def _fsdp(self, rank: _Stage) -> tuple[Collective, ...]:
        times = self._gathers(), float(self._reductions)
        return fsdp_collectives(self.load, self.fabric, self.groups, (rank.dense, rank.routed), times)

    @property
    def _reductions(self) -> int:
        return self.load.micro_batches if self._reduces_each else 1

    @property
    def _reduces_each(self) -> bool:
        return self.degrees.sync_each_micro_batch and self.degrees.pipeline == 1

    def _ends(self, rank: _Stage) -> float:
        """The first gather and the last reduction have nothing beside them; a pipeline reduces all at the end."""
        if self.degrees.on_one_device:
            return 0.0
        compute, reduce = BYTES[self.load.precision.compute], BYTES[self.load.precision.reduce]
        last = (rank.dense, rank.routed) if self.degrees.pipeline > 1 else rank.largest
        seconds = 0.0
        for first, whole, group in zip(rank.largest, last, (self.groups.dense, self.groups.routed), strict=True):
            seconds += gather_seconds(first * compute, group, self.fabric) * (first > 0)
            seconds += gather_seconds(whole * reduce, group, self.fabric) * (whole > 0)
            part = whole * reduce / group.ranks
            seconds += all_reduce_seconds(part, self.groups.replicas, self.fabric) * (whole > 0)
        return seconds

    def _update(self, rank: _Stage) -> float:
        """The optimizer reads and writes weights and state once, and reads gradients twice: for their norm as well."""
        here = rank.dense / self.groups.dense.ranks + rank.routed / self.groups.routed.ranks
        storage = BYTES[self.load.precision.storage]
        gradient = storage if not self.degrees.on_one_device else BYTES[self.load.precision.compute]
        copy = BYTES[self.load.precision.compute] if self.degrees.on_one_device else 0
        size = here * (2 * storage + 2 * gradient + copy + 2 * state_bytes(self.load.optim, self.load.model))
        return size / (self.gpu.memory * self.gpu.shares.update)

    def _host(self) -> float:
        """Seconds that Python needs for a step's launches: it goes on while its GPU waits for another stage."""
        kernels = [self.worker.kernels(kind) for kind in self.shape.kinds]
        wrapped = 0.0 if self.degrees.on_one_device else HOST_WRAPPED
        blocks = sum(HOST_KERNEL * kernels[kind] + wrapped for kind in self.shape.of_block)
        return HOST_STEP + self.load.micro_batches * blocks / self.degrees.pipeline


@lru_cache(maxsize=64)
def state_bytes(optim: Optimizer, model: ModelConfig) -> float:
    """Bytes of the optimizer's state for each element of the model's largest matrix."""
    matrix = max(model.weights(), key=lambda weight: weight.elements)
    return sum(kept.bytes for kept in optim.state(matrix.name, matrix.shape).values()) / matrix.elements


def _slowest(ranks: int) -> float:
    """Standard deviations by which the slowest of `ranks` is expected to be slower than the mean: Blom's quantile of a
    normal distribution (1958), within 2 % of the true mean.
    """
    if ranks == 1:
        return 0.0
    return NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))
