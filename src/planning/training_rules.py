"""Rules about what a training step does besides its update (averages, penalties, norms), and of replica groups."""

from collections.abc import Callable

from src.distributed.precision.config import BYTES
from src.fault_tolerance.config import Asked
from src.run import Averages, ClipsLogits, MeasuresLayers, Merges, Penalises, Rehearses, Run, Validates, WatchesSpikes
from src.runs.cluster import Devices


def training_problems(run: Run) -> list[str]:
    """Options of the task that this run's model, layout or compiler cannot have."""
    found = [*run.parametrization.problems(run.model), *_average_problems(run)]
    if isinstance(run.task, MeasuresLayers) and run.task.layer_norms and run.compile.graph:
        found.append("task.layer_norms=true looks into steps, and compile.graph=true replays them; pass compile=blocks")
    if isinstance(run.task, Penalises) and run.task.router_z_loss > 0.0 and not run.model.routed:
        found.append(
            f"task.router_z_loss={run.task.router_z_loss:g} finds no router in this model; pass task.router_z_loss=0"
        )
    if run.compile.graph and run.optim.reads == "matrices":
        found.append(
            f"compile.graph=true replays updates that read no other number's gradient, and optim: "
            f"{type(run.optim).__name__} reads whole matrices; pass compile=blocks"
        )
    return found + _clip_problems(run) + _spike_problems(run)


def _clip_problems(run: Run) -> list[str]:
    if not isinstance(run.task, ClipsLogits) or run.task.qk_clip is None:
        return []
    found, key = [], f"task.qk_clip={run.task.qk_clip:g}"
    if not run.model.logit_rows():
        found.append(f"{key}: logits of {run.model.family} follow no weights; pass task.qk_clip=null")
    if run.compile.blocks or run.compile.graph:
        found.append(f"{key} looks at queries and keys in the middle of a block; pass compile=off")
    if run.parallel.context > 1:
        found.append(f"{key} needs whole sequences; at most parallel.context=1")
    if run.fault_tolerance.copies > 1:
        found.append(f"{key}: replica groups would scale their weights apart; pass task.qk_clip=null")
    return found


def _spike_problems(run: Run) -> list[str]:
    if not isinstance(run.task, WatchesSpikes) or run.task.spike_score is None:
        return []
    found = []
    if run.fault_tolerance.copies > 1:
        found.append("task.spike_score: replica groups do not agree on what a spike is; pass task.spike_score=null")
    if run.task.on_spike == "rewind" and run.checkpoint.every is None:
        found.append("task.on_spike=rewind goes back to a checkpoint, and checkpoint.every=null makes none")
    return found


def _average_problems(run: Run) -> list[str]:
    if not isinstance(run.task, Averages) or run.task.ema_decay is None:
        return []
    found = []
    if run.fault_tolerance.copies > 1:
        found.append("task.ema_decay: replica groups keep no average of their weights; pass task.ema_decay=null")
    if run.task.ema_offload and run.compile.graph:
        found.append(
            "task.ema_offload=true has the host work in each step, and compile.graph=true replays steps without it; "
            "pass task.ema_offload=false, or compile=blocks"
        )
    return found


def average_bytes(run: Run) -> int:
    """On the device, of each weight: of a moving average, or of a mean that is being made."""
    if isinstance(run.task, Merges):
        return run.task.average_bytes
    if not isinstance(run.task, Averages) or run.task.ema_decay is None or run.task.ema_offload:
        return 0
    return BYTES[run.task.ema_dtype]


def rehearsal_problems(run: Run) -> list[str]:
    """Why some ranks of the layout cannot be built on this CPU instead of training."""
    if not isinstance(run.task, Rehearses) or not run.task.rehearse:
        return []
    found = [] if run.dry_run else ["task.rehearse=true builds ranks and trains nothing; pass dry_run=true"]
    world = run.parallel.world
    if beyond := [rank for rank in run.task.rehearse_ranks or () if rank >= world]:
        found.append(f"task.rehearse_ranks={beyond} are beyond the {world} ranks of parallel; at most {world - 1}")
    return found


def group_problems(
    run: Run, devices: Devices | None, micro_batches: int, pipeline: Callable[[Run, int], list[str]]
) -> list[str]:
    """Of replica groups: batch, machine and layout must suit any number of live ones. `micro_batches`: of a step on one
    data rank. `pipeline`: what its stages say of so many of them.
    """
    options, world = run.fault_tolerance, run.parallel.world
    if not options.on:
        return []
    if not isinstance(run.task, Validates):  # so nothing else matters
        return ["fault_tolerance: this task trains no run that groups could share; pass fault_tolerance=none"]
    save_every = run.checkpoint.every if isinstance(run.checkpoint.every, int) else None
    found = options.problems(Asked(micro_batches, run.model.n_layers, run.task.steps, save_every))
    if devices is not None and devices.count is not None and options.copies * world > devices.count:
        room = devices.count // world
        found.append(
            f"fault_tolerance.groups={options.copies} of {world} ranks ask for {options.copies * world} GPUs, there "
            f"are {devices.count}; at most {room} group{'' if room == 1 else 's'} of this layout"
        )
    there = range(2, options.copies + 1)
    shares = {micro_batches // count for count in there} | {-(-micro_batches // count) for count in there}
    found += [line for share in sorted(shares - {0}) for line in pipeline(run, share)]
    return list(dict.fromkeys(found))
