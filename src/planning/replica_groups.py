"""Rules of replica groups (fault tolerance): batch, machine and layout must suit any number of live groups."""

from collections.abc import Callable

from src.fault_tolerance.config import Asked
from src.run import Run, Validates
from src.runs.cluster import Devices


def problems(
    run: Run, devices: Devices | None, micro_batches: int, pipeline: Callable[[Run, int], list[str]]
) -> list[str]:
    """`micro_batches`: of a step on one data rank. `pipeline`: what its stages say of so many of them."""
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
