"""The tasks of a run by their names, and what is wrong with them, told before anything starts."""

from dataclasses import dataclass
from pathlib import Path

from src.config.groups import options as clusters
from src.config.wording import nearest
from src.errors import DataError
from src.evaluation import harness
from src.evaluation.config import BITS_PER_BYTE, Evaluation
from src.evaluation.task_file import TaskFile, local_tasks

FORMS = (".yaml", ".yml")


@dataclass(frozen=True)
class ChosenTasks:
    """Of `evaluate.tasks`, by who answers for them."""

    files: tuple[TaskFile, ...]
    library: tuple[str, ...]  # names that lm-evaluation-harness knows
    bits_per_byte: bool

    @classmethod
    def of(cls, options: Evaluation) -> "ChosenTasks":
        """DataError with every file that cannot be read as a task."""
        local, files, library = local_tasks(), list[TaskFile](), list[str]()
        problems: list[str] = []
        for name in options.tasks:
            if name == BITS_PER_BYTE:
                continue
            if name not in local and not name.endswith(FORMS):
                library.append(name)
                continue
            try:
                files.append(TaskFile.read(local.get(name) or Path(name).expanduser()))
            except DataError as error:
                problems += error.problems
        if problems:
            raise DataError(problems)
        return cls(tuple(files), tuple(library), BITS_PER_BYTE in options.tasks)


def problems(options: Evaluation, averaged: bool, saves_every: int | None = None) -> list[str]:
    """What of `evaluate` cannot be done; empty where nothing is evaluated. `averaged`: the run keeps an average;
    `saves_every`: steps between its checkpoints, None: it saves none.
    """
    if options.every and not options.tasks:
        return [f"evaluate.every={options.every} names no task; pass 'evaluate.tasks=[{BITS_PER_BYTE}]' or every=0"]
    if not options.tasks:
        return []
    found = _problems_beside(options, saves_every) if options.cluster is not None else []
    if options.arguments and options.cluster is None:
        found.append(
            f"evaluate.arguments={','.join(options.arguments)}: there is no command to give them to; pass "
            "evaluate.cluster=local, or arguments=[]"
        )
    if options.ema and not averaged:
        found.append("evaluate.ema=true: the run keeps no average (task.ema_decay=null); pass evaluate.ema=false")
    try:
        chosen = ChosenTasks.of(options)
    except DataError as error:
        return [*found, *error.problems]
    names = [each.name for each in chosen.files]
    twice = sorted({name for name in names if names.count(name) > 1})
    found += [f"evaluate.tasks: two files are the task {name!r}; give one another name" for name in twice]
    if chosen.library and not harness.installed():
        known = (BITS_PER_BYTE, *local_tasks())
        found += [f"evaluate.tasks: {name!r} is {_no_task(name, known)}" for name in chosen.library]
    elif chosen.library:
        found += harness.problems(chosen.library)
    found += [line for each in chosen.files for line in _too_few_examples(each, options.fewshot)]
    draws = bool(chosen.library) or any(
        (each.fewshot if options.fewshot is None else options.fewshot) and each.kind != "loglikelihood_rolling"
        for each in chosen.files
    )
    if not draws and options.seeds > 1:
        found.append(f"evaluate.seeds={options.seeds}: no task has worked examples to draw; pass seeds=1, or fewshot=1")
    if not draws and options.fewshot:
        found.append(f"evaluate.fewshot={options.fewshot}: no task has questions; pass evaluate.fewshot=null")
    return found


def _too_few_examples(task: TaskFile, fewshot: int | None) -> list[str]:
    """Where a question is to stand behind more worked examples than there are. `fewshot`: None: as the task says."""
    asked = task.fewshot if fewshot is None else fewshot
    if not asked or task.kind == "loglikelihood_rolling":
        return []
    try:
        pool, same = task.examples()
    except DataError as error:
        return [*error.problems]
    if asked <= (there := len(pool) - same):
        return []
    key = f"{task.path}: num_fewshot" if fewshot is None else "evaluate.fewshot"
    return [f"{key}={asked}: task {task.name!r} has {there} worked examples for a question; at most {there}"]


def _problems_beside(options: Evaluation, saves_every: int | None) -> list[str]:
    """Of commands that read checkpoints."""
    found = []
    if options.cluster not in (known := clusters("cluster")):
        near = nearest(str(options.cluster), known) or known[0]
        found.append(f"evaluate.cluster={options.cluster}: one of {', '.join(known)}; did you mean {near}?")
    if saves_every is None or options.every % saves_every:
        nearest_step = (
            "" if saves_every is None else f"; pass evaluate.every={-(-options.every // saves_every) * saves_every}"
        )
        saves = "null" if saves_every is None else saves_every
        found.append(
            f"evaluate.every={options.every} with evaluate.cluster={options.cluster} reads checkpoints, and "
            f"checkpoint.every={saves} saves others{nearest_step}"
        )
    return found


def _no_task(name: str, known: tuple[str, ...]) -> str:
    near = nearest(name, known)
    meant = f"did you mean {near}? " if near else ""
    return (
        f"none of {', '.join(known)}; {meant}A file ends in .yaml, and names of lm-evaluation-harness need "
        f"`{harness.INSTALL}`"
    )
