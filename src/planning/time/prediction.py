"""What a run will take: seconds of a step, tokens per second, hours, energy and money, each within an interval."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from src.planning.memory import Load, estimate
from src.planning.time.failures import best_interval, goodput
from src.planning.time.interruptions import Interruptions
from src.planning.time.site import SiteFacts
from src.planning.time.step import Question, StepTime, Terms, step_time, terms
from src.planning.time.traffic import Collective
from src.planning.time.work import ProductTime
from src.run import Run
from src.runs.cluster import Devices

# Half of the interval in which the truth is expected: docs/predicted_time.md has the rows. On a device that was
# measured and in one node the worst of four GPUs is 7 % off; elsewhere it is held against figures of other people.
NEAR, FAR = 0.12, 0.25


# Seconds that a save stops training for: weights and state leave the GPU at so many bytes/s. Stated, not measured.
SAVED_PER_SECOND = 10 * 2**30
RESTART_SECONDS = 300.0  # from a failure to the next step: a start, its imports, a load, kernels from the cache. Stated


@dataclass(frozen=True)
class Failures:
    """What failures cost a run that saves as often as is best for it: failures.py."""

    hours_between: float  # of the whole run
    save_seconds: float  # that training stands still for a save
    restart_seconds: float
    measured: bool  # whether the run itself has saved; else bytes and a stated speed
    checkpoint_every: int  # steps
    goodput: float  # share of all hours that are steps which are kept, 0 to 1
    own_goodput: float | None  # the same with the run's own checkpoint.every; None: it never saves


@dataclass(frozen=True)
class Prediction:
    """For all ranks of a run, unless it says otherwise."""

    gpu: str
    measured: bool  # whether records of this device are behind it
    step: StepTime
    terms: Terms
    tokens_per_second: float  # of one GPU
    mfu: float  # 0 to 1, attention counted in full, against the bf16 peak
    within: float  # half of the interval, relative
    hours: float  # of all steps, without starts, saves and failures
    gpu_hours: float
    kilowatt_hours: float  # of the GPUs' boards alone
    money: float | None  # in the currency of cluster.price_per_gpu_hour
    failures: Failures | None  # None: cluster.mtbf_hours_per_gpu is not known

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the sum of the step's parts."""
        named = {name: [each._asdict() for each in found] for name, found in vars(self.terms).items()}
        return asdict(self) | {"step": asdict(self.step) | {"seconds": self.step.seconds}, "terms": named}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        step = StepTime(**{each.name: values["step"].get(each.name, 0.0) for each in fields(StepTime)})
        failed, named = values["failures"], values["terms"]
        found = Terms(
            tuple(ProductTime(**each) for each in named["products"]),
            tuple(Collective(**each) for each in named["collectives"]),
        )
        failures = None if failed is None else Failures(**failed)
        return cls(**values | {"step": step, "terms": found, "failures": failures})


def predict(run: Run, load: Load, devices: Devices | None, interruptions: Interruptions) -> Prediction | None:
    """None of a device that is not known, of what takes no training steps, and of replica groups, which are no part of
    the model of a step. `devices`: of the machine that shall run it, if it was asked.
    """
    site = run.cluster
    if load.forward_only or run.fault_tolerance.on or not isinstance(site, SiteFacts):
        return None
    if (gpu := site.gpu(devices)) is None:
        return None
    world = run.parallel.world
    fabric = site.fabric(gpu, run.cluster.gpus_per_node, world)
    question = Question(load, gpu, fabric, graph=run.compile.graph)
    step = step_time(question)
    hours = run.task.steps * step.seconds / 3600.0
    rate = run.task.global_batch * run.task.seq_len / step.seconds / world
    price = site.price_per_gpu_hour
    return Prediction(
        gpu=gpu.name,
        measured=gpu.measured,
        step=step,
        terms=terms(question),
        tokens_per_second=rate,
        mfu=rate * run.model.counts(run.task.seq_len).flops_per_token / gpu.bf16,
        within=NEAR if gpu.measured and world <= fabric.per_node else FAR,
        hours=hours,
        gpu_hours=hours * world,
        kilowatt_hours=hours * world * (site.gpu_watts or gpu.watts) / 1000.0,
        money=None if price is None else price * hours * world,
        failures=_failures(run, site, load, step.seconds, interruptions),
    )


def _failures(run: Run, site: SiteFacts, load: Load, step_seconds: float, known: Interruptions) -> Failures | None:
    if site.mtbf_hours_per_gpu is None:
        return None
    hours = site.mtbf_hours_per_gpu / run.parallel.world
    memory, mtbf = estimate(load), 3600.0 * hours
    save, restart = known.save, known.restart
    if save is None:
        save = (memory.parameters + memory.optimizer) / SAVED_PER_SECOND
    if restart is None:
        restart = RESTART_SECONDS
    every, own = max(1, round(best_interval(save, mtbf) / step_seconds)), run.checkpoint.every

    def kept(steps: int) -> float:
        return goodput(steps * step_seconds, save, restart, mtbf)

    return Failures(
        hours_between=hours,
        save_seconds=save,
        restart_seconds=restart,
        measured=known.save is not None,
        checkpoint_every=every,
        goodput=kept(every),
        own_goodput=kept(min(own, run.task.steps)) if isinstance(own, int) else None,
    )
