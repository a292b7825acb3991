"""parallel=auto: the layout that is predicted to be the fastest, decided by the launcher before the plan."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field

from src.config.base import Line
from src.config.bounds import Count
from src.distributed.parallel_dims import ParallelDims
from src.distributed.precision.config import Precision
from src.errors import PlanError
from src.planning.layout_search import Found, Space, best, fitting, legal
from src.planning.memory import Load, estimate
from src.planning.plan import load_of
from src.planning.precision_choice import checks
from src.planning.recompute_choice import FULL, NONE
from src.planning.time.devices import GPUS
from src.planning.time.site import SiteFacts
from src.planning.time.step import Question, step_time
from src.run import Run
from src.runs.cluster import Devices

BEST = 5  # that are shown
MOST_PLACES = 99
MOST_REASONS = 3  # why layouts that have the memory are refused, where nothing is left
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
    others: Mapping[str, float]  # seconds of a step on its layout with each other precision that was open
    refused: Mapping[str, str]  # and of each that this layout cannot have the first reason

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


def decide(
    run: Run, typed: Mapping[str, str], devices: Devices | None, precisions: Mapping[str, Precision] | None = None
) -> Decision:
    """PlanError where devices are not known, or no layout fits. `typed`: keys of the command line; `precisions`: those
    that are open, by option.
    """
    auto, site = run.parallel, run.cluster
    assert isinstance(auto, AutoLayout)
    stages = [each for each in run.stages if isinstance(each.parallel, AutoLayout)]
    run = max(stages, key=lambda each: each.task.steps * each.task.global_batch * each.task.seq_len, default=run)
    elsewhere = [(load_of(each), each.task.global_batch) for each in stages if each is not run]
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
        precisions=precisions or {},
    )
    question = Question(load_of(run), gpu, site.fabric(gpu, run.cluster.gpus_per_node, gpus))
    place = auto.place or 1
    problems, refused = checks(run, devices), dict[str, None]()

    def unfit(load: Load) -> list[str]:
        said = problems(load) or _of_stages(load, elsewhere, int(memory * GIB))
        refused.update(dict.fromkeys(said))
        return said

    found = best(question, space, int(memory * GIB), max(BEST, place), problems=unfit)
    if not found:
        raise PlanError([_none(question.load, space, gpu.name, memory), *list(refused)[:MOST_REASONS]])
    if place > len(found):
        raise PlanError(f"parallel.place={place}: {len(found)} layouts fit; at most parallel.place={len(found)}")
    others, barred = _others(question, found[place - 1], space, int(memory * GIB), problems)
    return Decision(tuple(found), gpus, gpu.name, run.task.global_batch * run.task.seq_len, place, others, barred)


def _of_stages(load: Load, others: Sequence[tuple[Load, int]], room: int) -> list[str]:
    """Why the other stages of the run, each with its sequences of a step, cannot have this layout and micro-batch,
    whatever is computed again.
    """
    degrees = load.degrees
    for other, sequences in others:
        numbers, rest = divmod(sequences, load.micro_batch * degrees.data_ranks)
        if rest or other.seq_len % degrees.sequence_parts:
            return ["parallel=auto: a stage's batch or sequences have no equal parts in layouts of the longest stage"]
        again = NONE if degrees.splits_backward else FULL
        there = other.changed(degrees=degrees, precision=load.precision, micro_batch=load.micro_batch,
                              micro_batches=numbers, recompute=again)  # fmt: skip
        if estimate(there).peak > room:
            return ["parallel=auto: a stage does not fit in layouts of the longest stage"]
    return []


def _none(load: Load, space: Space, gpu: str, gib: float) -> str:
    """Why nothing is found: no layout is legal, or none has the memory."""
    gpus, batch = space.gpus, space.global_batch
    given = "".join(f" with parallel.{name}={value}" for name, value in space.degrees.items())
    if next(legal(load, space), None) is None:
        power, more = 2 ** (gpus.bit_length() - 1), -(-batch // gpus) * gpus
        ways = ["leave degrees open"] if given else []
        ways += [f"pass parallel.gpus={power}"] if power != gpus else []
        ways += [f"pass task.global_batch={more}"] if more != batch else []
        return (
            f"parallel=auto: no layout of {gpus} GPUs{given} has equal parts of this model, of its sequences and of "
            f"task.global_batch={batch}; {', or '.join(ways) or 'pass fewer parallel.gpus'}"
        )
    return (
        f"parallel=auto: no layout of {gpus} {gpu} with {gib:g} GiB{given} holds this model with "
        f"task.global_batch={batch}; pass more parallel.gpus, or a smaller model"
    )


def _others(
    question: Question, found: Found, space: Space, room: int, problems: Callable[[Load], list[str]]
) -> tuple[dict[str, float], dict[str, str]]:
    seconds, refused = dict[str, float](), dict[str, str]()
    for name, precision in space.precisions.items():
        load = found.load.changed(precision=precision)
        if name == found.precision:
            continue
        if said := problems(load):
            refused[name] = said[0]
        elif (fits := fitting(replace(question, load=load), space, room)) is None:
            refused[name] = "it does not fit in this layout"
        else:
            seconds[name] = step_time(fits[0]).seconds
    return seconds, refused
