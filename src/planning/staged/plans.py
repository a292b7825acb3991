"""What the launcher makes of a run in stages: the plan of each and of all together, and the data that each reads."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from math import ceil

from src.data.corpus import Corpus
from src.data.tokenizer import Kept, StoredTokenizer
from src.errors import PlanError
from src.planning.plan import Plan, plan
from src.planning.time.interruptions import NOTHING_MEASURED, Interruptions
from src.planning.time.prediction import Prediction
from src.run import Run
from src.runs.cluster import Devices


def plan_run(
    run: Run,
    devices: Devices | None,
    problems_of: Callable[[Run], list[str]] = lambda _: [],
    interruptions: Interruptions = NOTHING_MEASURED,
) -> Plan:
    """The plan of a run, in stages or not. PlanError. `problems_of`: what other rooms say against it, or a stage."""
    if run.stages:
        return plan_stages(run, devices, problems_of, interruptions)
    return plan(run, None, devices, problems_of(run), interruptions)


def plan_stages(
    run: Run, devices: Devices | None, problems_of: Callable[[Run], list[str]], interruptions: Interruptions
) -> Plan:
    """The plan of a run in stages: sums over them, and the memory of the one that needs most. PlanError.

    `problems_of`: what other rooms say against a stage.
    """
    plans: list[Plan] = []
    problems: dict[str, list[int]] = {}
    for number, stage in enumerate(run.stages, 1):
        try:
            plans.append(plan(_unscheduled(stage), None, devices, problems_of(stage), interruptions))
        except PlanError as error:
            for line in error.problems:
                problems.setdefault(line, []).append(number)
    if found := [*_rules(run), *_named(problems, len(run.stages))]:
        raise PlanError(found)
    ends = accumulate(stage.task.steps for stage in run.stages)
    scheduled = [
        replace(each, steps=end, schedule_end=end, last_lr=stage.optim.lr * schedule.multiplier(end - 1, end))
        for each, end, stage, schedule in zip(plans, ends, run.stages, run.stage_schedules(), strict=True)
    ]
    heaviest, last = max(scheduled, key=lambda each: each.memory.peak), scheduled[-1]
    return _warned(
        replace(
            scheduled[0],
            steps=last.steps,
            tokens=sum(each.tokens for each in scheduled),
            schedule_end=last.steps,
            last_lr=last.last_lr,
            memory=heaviest.memory,
            time=_together([each.time for each in scheduled]),
            training_stages=tuple(scheduled),
        ),
        run,
    )


def with_data(planned: Plan, run: Run, corpora: Sequence[Corpus]) -> Plan:
    """Once the data of all stages are prepared: how often each reads its own."""
    stages = [
        each.with_data(_unscheduled(stage), corpus)
        for each, stage, corpus in zip(planned.training_stages, run.stages, corpora, strict=True)
    ]
    return _warned(replace(planned, epochs=stages[0].epochs, training_stages=tuple(stages)), run)


def read_by_stages(run: Run) -> Iterator[Run]:
    """The run of each stage, with as many steps as take the samples that stages of its data have read by its end."""
    orders = _orders(run)
    for index, stage in enumerate(run.stages):
        task, before = stage.task, zip(run.stages[:index], orders, strict=False)
        read = sum(each.task.steps * each.task.global_batch for each, order in before if order == orders[index])
        assert hasattr(task, "model_copy"), "a task is a config section"
        yield replace(stage, task=task.model_copy(update={"steps": task.steps + ceil(read / task.global_batch)}))


def tokenizing_as(run: Run, first: Corpus) -> Run:
    """A stage with the tokenizer that the first one has, which may have been trained on that one's text."""
    if not isinstance(first.tokenizer, StoredTokenizer):
        return run
    return replace(run, tokenizer=Kept(path=first.tokenizer.folder))


def _rules(run: Run) -> list[str]:
    """What stages ask of the run as a whole."""
    found = []
    first, checkpoint = run.stages[0], run.checkpoint
    for number, stage in enumerate(run.stages, 1):
        if stage.parallel.world != first.parallel.world:
            found.append(
                f"stage {number}: parallel asks for {stage.parallel.world} ranks, and stage 1 for "
                f"{first.parallel.world}; stages share their ranks: choose a layout of {first.parallel.world}"
            )
        if stage.schedule.total_steps is not None:
            found.append(
                f"stage {number}: schedule.total_steps={stage.schedule.total_steps}: with stages a schedule ends with "
                "the last stage that follows it; pass schedule.total_steps=null"
            )
    if run.fault_tolerance.on:
        found.append("task.stages: replica groups go through no stages; pass fault_tolerance=none")
    if checkpoint.every is None:
        found.append(
            "checkpoint.every=null: a stage hands over to the next one in a checkpoint; pass steps, such as "
            "checkpoint.every=500"
        )
    if checkpoint.initial is not None and checkpoint.foreign is None:
        if checkpoint.progress == "all":
            found.append(
                "checkpoint.progress=all goes on with the steps of checkpoint.initial, and stages count theirs from "
                "0; pass checkpoint.progress=samples, or none"
            )
        if checkpoint.progress == "samples" and (again := _reads_again(run.stages)) is not None:
            found.append(
                f"stage {again} reads sources of stage 1 again, of which checkpoint.progress=samples has used up some "
                "in another run; pass checkpoint.progress=none"
            )
    return found


def _orders(run: Run) -> list[object]:
    """Equal where two stages read the same samples, as far as the config says."""
    return [(stage.data, stage.task.seq_len) for stage in run.stages]


def _reads_again(stages: Sequence[Run]) -> int | None:
    """Number of the first stage that begins an order of its own over a source of stage 1, in the same length."""
    first = stages[0]
    theirs = [source for _, source in first.data.parts().values()]
    left = False
    for number, stage in enumerate(stages, 1):
        left = left or (stage.data, stage.task.seq_len) != (first.data, first.task.seq_len)
        shared = any(source in theirs for _, source in stage.data.parts().values())
        if left and shared and stage.task.seq_len == first.task.seq_len:
            return number
    return None


def _unscheduled(stage: Run) -> Run:
    """A stage whose schedule says nothing: alone it knows only the steps of the stage."""
    silent = {"warmup_steps": 0, "decay_ratio": 0.0, "total_steps": None}
    return replace(stage, schedule=stage.schedule.model_copy(update=silent))


def _warned(planned: Plan, run: Run) -> Plan:
    """With the warnings of all stages, each line once."""
    found: dict[str, list[int]] = {}
    for number, (each, schedule) in enumerate(zip(planned.training_stages, run.stage_schedules(), strict=True), 1):
        for line in [*each.warnings, *(schedule.warnings() if schedule.span.before == 0 else ())]:
            found.setdefault(line, []).append(number)
    return replace(planned, warnings=tuple(_named(found, len(run.stages))))


def _named(lines: Mapping[str, Sequence[int]], count: int) -> list[str]:
    """Lines with the stages that they are about, where those are not all."""
    return [
        line if len(numbers) == count else f"stage {', '.join(map(str, numbers))}: {line}"
        for line, numbers in lines.items()
    ]


def _together(times: Sequence[Prediction | None]) -> Prediction | None:
    """Sums of hours, energy and money; all else is that of the stage that takes the longest."""
    known = [each for each in times if each is not None]
    if len(known) < len(times):
        return None
    money = [each.money for each in known if each.money is not None]
    return replace(
        max(known, key=lambda each: each.hours),
        hours=sum(each.hours for each in known),
        gpu_hours=sum(each.gpu_hours for each in known),
        kilowatt_hours=sum(each.kilowatt_hours for each in known),
        money=sum(money) if money else None,
    )
