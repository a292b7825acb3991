"""parallel=auto: the layout that is predicted to be the fastest, decided by the launcher before the plan."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from src.config.base import Line
from src.config.bounds import Count
from src.distributed.parallel_dims import ParallelDims
from src.errors import PlanError
from src.planning.layout_search import Found, Space, best
from src.planning.plan import load_of
from src.planning.time.devices import GPUS
from src.planning.time.site import SiteFacts
from src.planning.time.step import Question
from src.run import Run
from src.runs.cluster import Devices

BEST = 5  # that are shown
MOST_PLACES = 99
GIB = 2**30


class AutoLayout(ParallelDims):
    """A layout whose degrees are still to be chosen; those that are typed stay as they are."""

    gpus: Count | None
    """GPUs of the run; null: cluster.gpus, or all of this machine."""
    place: Annotated[int, Field(ge=1, le=MOST_PLACES)] | None
    """Which of the fastest is taken; null: the first; parallel=auto:5 stands for a sweep over five places, which
    task=bench measures.
    """
    write: Line | None
    """Name of a new option of conf/parallel that keeps what was chosen, with its evidence; null: none."""

    def problems(self, *, flex: bool, compiled_blocks: bool, gpu: bool) -> list[str]:
        """That it is no layout yet, where nobody has chosen one."""
        return ["parallel=auto is decided by launch.py alone; pass a layout, such as parallel=fsdp8"]


@dataclass(frozen=True)
class Decision:
    """The fastest layouts that fit, fastest first, and what they were chosen for."""

    found: tuple[Found, ...]
    gpus: int
    gpu: str
    tokens_per_step: int
    place: int  # of the one that is taken, from 1

    @property
    def chosen(self) -> Found:
        return self.found[self.place - 1]

    @property
    def degrees(self) -> ParallelDims:
        """Of the one that is taken."""
        values = dict(self.chosen.load.degrees)
        return ParallelDims(**{name: values[name] for name in ParallelDims.model_fields})

    def speed(self, found: Found) -> float:
        """Tokens per second of one GPU."""
        return self.tokens_per_step / found.step.seconds / self.gpus


def decide(run: Run, typed: Mapping[str, str], devices: Devices | None) -> Decision:
    """PlanError where devices are not known, or no layout fits. `typed`: keys of the command line."""
    auto, site = run.parallel, run.cluster
    assert isinstance(auto, AutoLayout)
    count = None if devices is None else devices.count
    if (gpus := auto.gpus or count) is None:
        raise PlanError("parallel=auto: the number of GPUs is not known; pass parallel.gpus, such as parallel.gpus=8")
    gpu = site.gpu(devices) if isinstance(site, SiteFacts) else None
    if gpu is None or not isinstance(site, SiteFacts):
        raise PlanError(f"parallel=auto: the device is not known; pass cluster.gpu_model ({', '.join(sorted(GPUS))})")
    memory = run.cluster.gpu_memory_gib or (None if devices is None else devices.memory_gib) or gpu.gib
    space = Space(
        gpus=gpus,
        degrees={name: getattr(auto, name) for name in ParallelDims.model_fields if f"parallel.{name}" in typed},
        micro_batch=run.task.micro_batch if "task.micro_batch" in typed else None,
        recompute=run.recompute
        if {"recompute", "recompute.mode"} & set(typed) and run.recompute.mode != "auto"
        else None,
        global_batch=run.task.global_batch,
    )
    question = Question(load_of(run), gpu, site.fabric(gpu, run.cluster.gpus_per_node, gpus))
    place = auto.place or 1
    found = best(question, space, int(memory * GIB), max(BEST, place))
    if not found:
        raise PlanError(
            f"parallel=auto: no layout of {gpus} {gpu.name} with {memory:g} GiB holds this model with "
            f"task.global_batch={run.task.global_batch}; pass more parallel.gpus, or a task.global_batch of which "
            "the GPUs divide a part"
        )
    if place > len(found):
        raise PlanError(f"parallel.place={place}: {len(found)} layouts fit; at most parallel.place={len(found)}")
    return Decision(tuple(found), gpus, gpu.name, run.task.global_batch * run.task.seq_len, place)
