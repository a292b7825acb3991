"""parallel=auto: the layout that is predicted to be the fastest, decided by the launcher before the plan."""

from collections.abc import Mapping
from dataclasses import dataclass

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
GIB = 2**30
OPEN = ("replicate", "shard", "context", "tensor", "expert", "pipeline")


class AutoLayout(ParallelDims):
    """A layout whose degrees are still to be chosen; those that are typed stay as they are."""

    gpus: Count | None
    """GPUs of the run; null: cluster.gpus, or all of this machine."""
    write: Line | None
    """Name of a new option of conf/parallel that keeps what was chosen, with its evidence; null: none."""


@dataclass(frozen=True)
class Decision:
    """The fastest layouts that fit, fastest first, and what they were chosen for."""

    found: tuple[Found, ...]
    gpus: int
    gpu: str
    tokens_per_step: int

    @property
    def chosen(self) -> Found:
        return self.found[0]

    @property
    def degrees(self) -> ParallelDims:
        """Of the first."""
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
        degrees={name: getattr(auto, name) for name in OPEN if f"parallel.{name}" in typed},
        micro_batch=run.task.micro_batch if "task.micro_batch" in typed else None,
        recompute=run.recompute
        if {"recompute", "recompute.mode"} & set(typed) and run.recompute.mode != "auto"
        else None,
        global_batch=run.task.global_batch,
    )
    question = Question(load_of(run), gpu, site.fabric(gpu, run.cluster.gpus_per_node))
    found = best(question, space, int(memory * GIB), BEST)
    if not found:
        raise PlanError(
            f"parallel=auto: no layout of {gpus} {gpu.name} with {memory:g} GiB holds this model with "
            f"task.global_batch={run.task.global_batch}; pass more parallel.gpus, or a task.global_batch of which "
            "the GPUs divide a part"
        )
    return Decision(tuple(found), gpus, gpu.name, run.task.global_batch * run.task.seq_len)
