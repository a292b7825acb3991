"""checkpoint.every=auto on the launcher: a run's config gets the interval that loses the least time to failures."""

from dataclasses import replace
from math import isqrt, log
from pathlib import Path
from typing import TYPE_CHECKING

from src.config.tree import Tree, identity
from src.errors import PlanError
from src.runs.folder import place
from src.storage.streams import to_stderr

if TYPE_CHECKING:
    from src.planning.time.interruptions import Interruptions
    from src.run import Run

AUTO = "auto"
OTHERWISE = "or steps, such as checkpoint.every=500"


def saved_in_time(tree: Tree) -> Tree:
    """`tree`, with steps in the place of checkpoint.every=auto; what they were chosen for is said on stderr.

    PlanError where it is not known how often the run will fail, or how long its steps take.
    """
    section = tree.get("checkpoint")
    if not isinstance(section, dict) or section.get("every") != AUTO:
        return tree
    from src.config.build import build
    from src.run import Run

    run = Run.from_sections(build(tree))
    every = _interval(run, interruptions(tree, run))
    return tree | {"checkpoint": section | {"every": every}}


def interruptions(tree: Tree, run: "Run") -> "Interruptions":
    """What the run in this tree's folder has measured of its saves and restarts; nothing where failures are not
    asked about.
    """
    from src.planning.time.interruptions import NOTHING_MEASURED, measured_interruptions
    from src.planning.time.site import SiteFacts

    if not isinstance(run.cluster, SiteFacts) or run.cluster.mtbf_hours_per_gpu is None:
        return NOTHING_MEASURED
    folder: Path = place(run.root, run.name, identity(tree), run.folder)
    return measured_interruptions(folder)


def _interval(run: "Run", known: "Interruptions") -> int:
    """Steps between two checkpoints."""
    from src.planning.staged.plans import plan_run
    from src.planning.time.devices import GPUS
    from src.planning.time.site import SiteFacts
    from src.run import Infers

    if isinstance(run.task, Infers) and run.task.forward_only:
        raise PlanError("checkpoint.every=auto: this task takes no steps to save; pass checkpoint.every=null")
    if run.fault_tolerance.on:
        raise PlanError("checkpoint.every=auto: steps of replica groups have no predicted time; pass steps, such as "
                        "checkpoint.every=500, or fault_tolerance=none")  # fmt: skip
    if not isinstance(run.cluster, SiteFacts) or run.cluster.mtbf_hours_per_gpu is None:
        raise PlanError("checkpoint.every=auto: how often a GPU fails is not known; pass cluster.mtbf_hours_per_gpu, "
                        f"such as cluster.mtbf_hours_per_gpu=50000, {OTHERWISE}")  # fmt: skip
    # Of a plan that has problems, the one that follows tells all of them.
    legal, *stages = (
        replace(each, checkpoint=run.checkpoint.model_copy(update={"every": 1})) for each in (run, *run.stages)
    )
    try:
        time = plan_run(replace(legal, stages=tuple(stages)), run.cluster.devices(), interruptions=known).time
    except PlanError:
        return 1
    if time is None or (failures := time.failures) is None:
        raise PlanError("checkpoint.every=auto: how long a step takes is not known; pass cluster.gpu_model "
                        f"({', '.join(sorted(GPUS))}), {OTHERWISE}")  # fmt: skip
    every = nearest(min(failures.checkpoint_every, run.task.steps), run.checkpoint.keep_every)
    source = "measured" if failures.measured else "planned"
    told = (
        f"checkpoint.every=auto: {every:,} steps, {every * time.step.seconds / 60:.3g} min: a failure every "
        f"{failures.hours_between:.3g} h, and a save stops training for {failures.save_seconds:.2g} s ({source})"
    )
    to_stderr([told])
    return every


def nearest(every: int, keep_every: int | None) -> int:
    """The divisor of checkpoint.keep_every that is the fewest times longer or shorter; without it `every` itself."""
    if keep_every is None:
        return every
    small = [each for each in range(1, isqrt(keep_every) + 1) if keep_every % each == 0]
    return min([*small, *(keep_every // each for each in small)], key=lambda each: abs(log(each / every)))
