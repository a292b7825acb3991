"""The plan of a run: every derived number, and every reason why the config cannot work, before anything starts.

Pure arithmetic on frozen objects: no process group, no model, no GPU, no clock. What this machine has comes in as an
argument.
"""

import json
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol, Self

from src.distributed.parallel_dims import ParallelDims
from src.distributed.pipeline import stages
from src.distributed.precision.config import BYTES
from src.distributed.recompute import Recompute
from src.errors import PlanError
from src.planning import batch, machines
from src.planning.advice import problem as fit_problem
from src.planning.advice import told
from src.planning.memory import GIB, Load, Memory, estimate
from src.planning.precision_choice import UNDECIDED, AutoPrecision
from src.planning.recompute_choice import NONE, cheapest
from src.planning.time.interruptions import NOTHING_MEASURED, Interruptions
from src.planning.time.prediction import Prediction, predict
from src.planning.time.site import SiteFacts
from src.planning.training_rules import average_bytes, group_problems, rehearsal_problems, training_problems
from src.run import Compares, Infers, MeasuresLayers, Rehearses, Remembers, Run, Validates, WithoutModel
from src.runs.cluster import Devices
from src.runs.records import PLAN_FILE


class TrainingData(Protocol):
    """What the plan needs to know of prepared data. Whether they suffice is checked by `src.data.corpus.check`."""

    def windows(self, split: str, seq_len: int) -> int: ...


@dataclass(frozen=True)
class Plan:
    """Answers; config.yaml keeps the question. Computed by the launcher alone: ranks read it from the run folder."""

    world: int  # of one replica group, as everything here
    groups: int  # replica groups; 1: the run is no more than its ranks
    nodes: int
    ranks_per_node: int
    axes: dict[str, int]  # degrees above 1, outermost first
    expert_axes: dict[str, int]  # how routed experts lie on the same ranks of a stage; empty: as all weights do
    data_ranks: int
    micro_batch: int  # sequences
    micro_batches: int  # forwards of one rank per optimizer step
    sequences_per_step: int
    tokens_per_step: int
    steps: int
    tokens: int
    epochs: float | None  # of the training split; None before the data are prepared
    parameters: int
    active_parameters: int
    parameters_per_gpu: int  # on the fullest
    stages: tuple[int, ...]  # parameters of each stage of the pipeline; none without
    flops_per_token: int  # attention counted in full
    flops_per_token_causal: int
    schedule_end: int  # the step at which the decay ends
    last_lr: float  # of the last step
    recompute: Recompute  # never `auto`
    memory: Memory  # bytes on the fullest GPU, estimated
    memory_limit: int | None  # bytes
    fits: bool | None  # None: no limit is known
    time: Prediction | None  # None: of a device that is not known, and of what takes no training steps
    warnings: tuple[str, ...]
    training_stages: tuple["Plan", ...] = ()  # of a run in stages, each until its last step of the run

    @property
    def predicted_rate(self) -> float | None:
        """Tokens per second of one GPU; None where `time` is."""
        return None if self.time is None else self.time.tokens_per_second

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `memory` with its sums."""
        memory = asdict(self.memory) | {"allocated": self.memory.allocated, "peak": self.memory.peak}
        inner = [each.to_dict() for each in self.training_stages]
        own = {key: value for key, value in asdict(self).items() if key != "training_stages"}
        return (own | {"training_stages": inner} if inner else own) | {
            "memory": memory,
            "recompute": self.recompute.model_dump(),
            "time": None if self.time is None else self.time.to_dict(),
            "warnings": list(self.warnings),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read plan.json, which the launcher wrote into the run folder."""
        return cls.from_dict(json.loads((folder / PLAN_FILE).read_text()))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        parts = {each.name: values["memory"][each.name] for each in fields(Memory)}  # without its sums
        timed = values.get("time")  # of a folder of version 0.1: nothing
        typed = {
            "memory": Memory(**parts),
            "recompute": Recompute(**values["recompute"]),
            "time": None if timed is None else Prediction.from_dict(timed),
            "training_stages": tuple(map(cls.from_dict, values.get("training_stages", ()))),
        }
        return cls(**values | typed | {key: tuple(values[key]) for key in ("stages", "warnings")})

    def with_data(self, run: Run, corpus: TrainingData) -> Self:
        """Once the training data are prepared: how often they are read, and the warning that belongs to it."""
        epochs = None if _infers(run) else _epochs(run, corpus)
        return replace(self, epochs=epochs, warnings=tuple(_warnings(run, self.micro_batches, epochs)))


def plan(
    run: Run,
    corpus: TrainingData | None = None,
    devices: Devices | None = None,
    problems: Iterable[str] = (),
    interruptions: Interruptions = NOTHING_MEASURED,
) -> Plan:
    """Raises PlanError with every problem at once, those of other rooms (`problems`) first.

    `devices`: of the machine that shall run it, `run.cluster.devices()`; None: count and memory are not judged.
    `interruptions`: what the run has measured of its saves and restarts.
    """
    load = load_of(run)
    limit = None if isinstance(run.task, WithoutModel) else _memory_limit(run, devices)
    load = batch.fitted(run, load, limit)
    if run.recompute.mode == "auto":
        load = load.changed(recompute=cheapest(load, limit))
    found = [
        *problems,
        *_layout_problems(run, devices),
        *_pipeline_problems(run, load.micro_batches),
        *batch.length_problems(run),
        *([] if _rehearses(run) or _infers(run) else batch.problems(run)),
        *([] if _infers(run) else batch.float8_problems(run, load.micro_batch)),
        *_section_problems(run),
        *group_problems(run, devices, load.micro_batches, _pipeline_problems),
        *rehearsal_problems(run),
        *machines.float8_problems(run, devices),
        *machines.kernel_problems(run, devices),
        *machines.graph_problems(run, devices),
        *machines.host_problems(run, load, devices),
    ]
    if limit is not None and (unfit := fit_problem(load, limit)) is not None:
        found.append(unfit)
    if (room := limit or machines.host_bytes(run, devices)) is not None:
        found += one_device_problems(run, room)
    if found:
        raise PlanError(found)
    answers = replace(_answers(run, load, limit), time=predict(run, load, devices, interruptions))
    return answers if corpus is None else answers.with_data(run, corpus)


def load_of(run: Run) -> Load:
    """The inputs of the memory estimate, whether the layout is legal or not."""
    texts, columns = 0, 0
    if isinstance(run.task, Remembers):
        texts, columns = run.task.remembered(run)
    if isinstance(run.task, Infers):
        run = run.task.computed(run)
    micro_batch = batch.micro_batch(run)
    micro_batches = batch.passes(run, micro_batch)
    if _infers(run):  # a forward pass follows no schedule: as many as any schedule likes
        micro_batches = stages.stage_count(run.parallel, run.model.n_layers)
    return Load(
        model=run.model,
        degrees=run.parallel,
        precision=run.precision,
        optim=run.optim,
        recompute=NONE if run.recompute.mode == "auto" else run.recompute,
        compiled_blocks=run.compile.blocks,
        compiled_loss=run.compile.loss,
        seq_len=run.task.seq_len,
        micro_batch=micro_batch,
        micro_batches=micro_batches,
        forward_only=_infers(run),
        texts=texts,
        columns=columns,
        ema_bytes=average_bytes(run),
        layer_norms=isinstance(run.task, MeasuresLayers) and run.task.layer_norms,
        outer_bytes=run.fault_tolerance.outer_bytes(BYTES[run.precision.storage]),
    )


def _answers(run: Run, load: Load, limit: int | None) -> Plan:
    """Before the data are prepared."""
    task, degrees = run.task, run.parallel
    counts = run.model.counts(task.seq_len)
    memory = estimate(load)
    tokens_per_step = task.global_batch * task.seq_len
    per_node = _ranks_per_node(run)
    local = [
        _local_elements(run, share.modules) for share in stages.shares(degrees, run.model.n_layers, load.micro_batches)
    ]
    cut = stages.split(degrees, run.model.n_layers)
    return Plan(
        world=degrees.world,
        groups=run.fault_tolerance.copies,
        nodes=degrees.world // per_node,
        ranks_per_node=per_node,
        axes={axis: degree for axis, degree in degrees.axes.items() if degree > 1},
        expert_axes=degrees.expert_axes if run.model.routed else {},
        data_ranks=degrees.data_ranks,
        micro_batch=load.micro_batch,
        micro_batches=load.micro_batches,
        sequences_per_step=task.global_batch,
        tokens_per_step=tokens_per_step,
        steps=task.steps,
        tokens=task.steps * tokens_per_step,
        epochs=None,
        parameters=counts.parameters,
        active_parameters=counts.active,
        parameters_per_gpu=max(local),
        stages=tuple(_parameters(run, frozenset(modules)) for modules in cut) if len(cut) > 1 else (),
        flops_per_token=counts.flops_per_token,
        flops_per_token_causal=counts.flops_per_token_causal,
        schedule_end=run.schedule.total_steps or task.steps,
        last_lr=run.optim.lr * run.schedule.multiplier(task.steps - 1, task.steps),
        recompute=load.recompute,
        memory=memory,
        memory_limit=limit,
        fits=None if limit is None else True,
        time=None,
        warnings=tuple(_warnings(run, load.micro_batches, None)),
    )


def _local_elements(run: Run, modules: frozenset[str]) -> int:
    """On one rank that holds these modules."""
    mine = (weight for weight in run.model.weights() if stages.module_of(weight.name) in modules)
    return sum(weight.local_elements(run.parallel) for weight in mine)


def _parameters(run: Run, modules: frozenset[str]) -> int:
    return sum(weight.elements for weight in run.model.weights() if stages.module_of(weight.name) in modules)


def _ranks_per_node(run: Run) -> int:
    """All of them on one machine, unless the cluster has several."""
    world = run.parallel.world
    return min(world, run.cluster.gpus_per_node or world)


def _memory_limit(run: Run, devices: Devices | None) -> int | None:
    if run.cluster.gpu_memory_gib is not None:
        return int(run.cluster.gpu_memory_gib * GIB)
    here = None if devices is None else devices.memory_gib
    return machines.gpu_bytes(run, devices, None if here is None else int(here * GIB))


def _layout_problems(run: Run, devices: Devices | None) -> list[str]:
    degrees: ParallelDims = run.parallel
    found = run.model.problems(degrees)
    found += degrees.problems(
        flex=run.model.attention == "flex", compiled_blocks=run.compile.blocks, gpu=machines.has_gpu(run, devices)
    )
    if devices is not None and devices.count is not None and degrees.world > devices.count:
        found.append(
            f"parallel asks for {degrees.world} ranks ({degrees.product}) and there are {devices.count} GPUs; "
            f"choose a layout of at most {devices.count} ranks"
        )
    if (size := run.cluster.gpus_per_node) is not None and degrees.world > size and degrees.world % size:
        lower = degrees.world // size * size
        found.append(
            f"parallel asks for {degrees.world} ranks ({degrees.product}), which do not fill nodes of "
            f"cluster.gpus_per_node={size} ({lower} or {lower + size} do)"
        )
    return found


def _pipeline_problems(run: Run, micro_batches: int) -> list[str]:
    """What the stages ask of the model, the batch and the compiler."""
    degrees, name = run.parallel, run.parallel.pipeline_schedule
    found = stages.problems(degrees, run.model.n_layers, micro_batches)
    if degrees.splits_backward and run.compile.blocks:
        found.append(
            f"parallel.pipeline_schedule={name} asks for the gradients of inputs and of weights apart, and a compiled "
            "block gives them at once; pass compile.blocks=false or parallel.pipeline_schedule=Interleaved1F1B"
        )
    # torch takes the gradient of each weight by itself: a block of nine weights ran ten times for one backward. What
    # selective recompute kept is there for the first of them alone.
    if degrees.splits_backward and run.recompute.mode not in ("none", "auto"):
        found.append(
            f"recompute.mode={run.recompute.mode} with parallel.pipeline_schedule={name} would compute a block again "
            "for each of its weights, whose gradients are taken apart; pass recompute=none or "
            "parallel.pipeline_schedule=Interleaved1F1B"
        )
    if degrees.splits_backward and degrees.reshards_after_forward:  # the weights of the graph would be gone
        found.append(
            f"parallel.reshard={degrees.reshard} lets go of weights whose gradients parallel.pipeline_schedule={name} "
            "asks for later; pass parallel.reshard=default or parallel.pipeline_schedule=Interleaved1F1B"
        )
    return found


def one_device_problems(run: Run, limit_bytes: int) -> list[str]:
    """Whether a task that needs the whole model on one device has the memory; only fewer layers make room there."""
    if not isinstance(run.task, Compares):
        return []
    load = load_of(run.on_one_device())
    if (peak := estimate(load).peak) <= limit_bytes:
        return []

    def beyond(layers: int) -> bool:
        return estimate(load.changed(model=run.model.model_copy(update={"n_layers": layers}))).peak > limit_bytes

    fit = bisect_left(range(1, run.model.n_layers), x=True, key=beyond)  # each layer adds to the peak
    way_out = f"pass model.n_layers={fit}, or a smaller model" if fit else "pass a smaller model"
    return [
        f"this task also trains the whole model on one device: {told(peak)}, there are {told(limit_bytes)}; {way_out}"
    ]


def _infers(run: Run) -> bool:
    return isinstance(run.task, Infers) and run.task.forward_only


def _follows_the_schedule(run: Run) -> bool:
    """A benchmark and a verification keep the learning rate; only a run over data follows the schedule."""
    return run.task.needs_corpus and not _infers(run)


def _rehearses(run: Run) -> bool:
    """Then ranks are built and counted, and a batch that does not fit the layout is a warning: nobody trains on it."""
    return isinstance(run.task, Rehearses) and run.task.rehearse


def _section_problems(run: Run) -> list[str]:
    """Options that contradict each other over the border of two sections."""
    degrees = run.parallel
    found = []
    if not _infers(run):  # else there is no gradient, and no optimizer to make
        found += run.optim.problems(storage=run.precision.storage, row_shards=degrees.fsdp, tensor=degrees.tensor)
    found += training_problems(run)
    if run.checkpoint.every == "auto":
        found.append("checkpoint.every=auto is decided by launch.py alone; pass steps, such as checkpoint.every=500")
    if run.compile.graph and _infers(run):
        found.append("compile.graph=true replays training steps, and this task takes none; pass compile=blocks")
    if run.recompute.mode == "budget" and not run.compile.blocks:
        found.append("recompute.mode=budget is kept by the compiler; pass compile=blocks, or recompute=selective")
    if run.recompute.every is not None and run.recompute.every > run.model.n_layers:
        found.append(
            f"recompute.every={run.recompute.every} repeats none of model.n_layers={run.model.n_layers}; at most "
            f"recompute.every={run.model.n_layers}, or recompute=none"
        )
    if _follows_the_schedule(run) and run.schedule.rests(run.task.steps):
        found.append(
            f"schedule.total_steps={run.schedule.total_steps} leaves a learning rate of 0 for the rest of "
            f"task.steps={run.task.steps}; pass schedule.total_steps=null, at least {run.task.steps}, or a "
            "schedule.min_factor above 0"
        )
    if run.checkpoint.keep_best is not None and isinstance(run.task, Validates) and not run.task.validate_every:
        found.append(
            f"checkpoint.keep_best={run.checkpoint.keep_best} goes by the validation loss, and task.validate_every=0; "
            "pass task.validate_every, or checkpoint.keep_best=null"
        )
    found += machines.expert_problems(run)
    found += [UNDECIDED] if isinstance(run.precision, AutoPrecision) else []
    if run.model.within_documents and not run.data.document_masks:
        found.append("model.mask=block_causal needs to know the documents; pass data.document_masks=true")
    if run.data.document_masks and not run.model.within_documents:
        found.append(
            "data.document_masks=true does nothing to this model's attention; pass model.attention=flex "
            "model.mask=block_causal, or data.document_masks=false"
        )
    if isinstance(run.task, Validates) and run.task.validate_every > 0 and run.data.validation_fraction == 0:
        found.append(
            f"task.validate_every={run.task.validate_every} has nothing to read: data.validation_fraction=0; "
            "pass task.validate_every=0 or a fraction such as 0.01"
        )
    return found


def _epochs(run: Run, corpus: TrainingData) -> float:
    return run.task.steps * run.task.global_batch / corpus.windows("train", run.task.seq_len)


def _warnings(run: Run, micro_batches: int, epochs: float | None) -> list[str]:
    found = list(run.schedule.warnings(run.task.steps)) if _follows_the_schedule(run) else []
    found += stages.warnings(run.parallel, run.model.n_layers, micro_batches)
    found += run.model.warnings()
    found += batch.problems(run) if _rehearses(run) else []
    if epochs is not None and epochs > 1:
        found.append(f"task.steps={run.task.steps} reads the training data {epochs:.1f} times")
    if (float8 := run.precision.float8) is not None:
        found += float8.left_out(run.model.weights(), run.parallel.tensor)
    if run.parallel.tensor > _ranks_per_node(run):
        found.append(f"parallel.tensor={run.parallel.tensor} crosses nodes of {_ranks_per_node(run)} GPUs: slow")
    if isinstance(run.cluster, SiteFacts):
        found += run.cluster.guesses(run.cluster.gpus_per_node, run.parallel.world)
    return found
