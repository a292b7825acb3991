"""Launch: build configs, check plans, prepare data and run folders, submit to the cluster.

`python launch.py` and `python -m src.sweeps` both start runs through these functions.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from src.cluster.backend import JobScheduler, Options, SilentError, backend_of
from src.config.build import build
from src.config.tree import Tree, identity
from src.distributed.process.rank_context import LauncherEnv, joined
from src.errors import DataError, FolderError, PlanError, UserError
from src.metrics.alerts.send import tell_end
from src.runs.folder import group_folder, place
from src.runs.frozen_code import Code
from src.runs.submissions import ended_in_shared_job, submissions
from src.storage.atomic_write import atomic_write
from src.storage.streams import Tell, to_stderr
from src.version import VERSION

if TYPE_CHECKING:
    from src.data.corpus import Corpus
    from src.hugging_face.hub import Fetched
    from src.planning.plan import Plan
    from src.run import Run
    from src.runs.folder import RunFolder

Item = TypeVar("Item")
Result = TypeVar("Result")


class EachOnce:
    """A `Tell` that says no line twice: what fifty points of a sweep have in common is one line."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def __call__(self, lines: Iterable[str]) -> None:
        fresh = [line for line in dict.fromkeys(lines) if line not in self._told]
        self._told.update(fresh)
        to_stderr(fresh)


class Shared:
    """What the runs have in common that one command prepares: the code and the data are read once."""

    def __init__(self, command: str | None = None) -> None:
        """`command`: as it was typed, of one run alone, which is then told what it is about to do."""
        self.command = command
        self.tell = EachOnce()
        self._opened: list[tuple[tuple[object, ...], Corpus]] = []

    @cached_property
    def code(self) -> Code:
        """As it was when the first of them was opened."""
        return Code.read()

    def corpus(self, run: "Run", commits: Mapping[str, str] | None = None) -> "Corpus":
        """The tokenised data, made now if they are not there yet. DataError."""
        from src.data.prepare import prepare

        wanted = (run.data, run.tokenizer, run.cache)
        found = next((corpus for given, corpus in self._opened if given == (*wanted, commits)), None)
        if found is None:
            found = prepare(*wanted, progress=True, commits=commits)
            self._opened.append(((*wanted, commits), found))
            self.tell(found.preparation.lines())
        return found


def map_collecting_errors(
    function: Callable[[Item], Result], items: Iterable[Item], names: Sequence[str] = ()
) -> list[Result]:
    """`function` of each item; one UserError that lists the problems of all items, each line once.

    `names`: of the items; a problem that not all of them have is told with those that have it.
    """
    results: list[Result] = []
    problems: dict[str, list[int]] = {}
    given = list(items)
    for number, item in enumerate(given):
        try:
            results.append(function(item))
        except UserError as error:
            for line in dict.fromkeys(error.problems):
                problems.setdefault(line, []).append(number)
    if problems:
        some = {line: [names[each] for each in at] for line, at in problems.items() if names and len(at) < len(given)}
        raise UserError(f"{'; '.join(some[line])}: {line}" if line in some else line for line in problems)
    return results


def checked(trees: list[Tree], names: Sequence[str] = ()) -> "list[tuple[Tree, Run, Plan]]":
    """Every point's objects and plan. What can take seconds to import comes after all configs are proven right.

    `names`: of the points, for what is wrong with some of them.
    """
    tell = EachOnce()
    sections = map_collecting_errors(build, trees, names)
    from src.launch.auto_cadence import interruptions
    from src.planning.staged.plans import plan_run
    from src.run import Run

    def planned(point: "tuple[Tree, Run]") -> "Plan":
        tree, run = point
        return plan_run(run, run.cluster.devices(), unfit, interruptions(tree, run))

    runs = map_collecting_errors(Run.from_sections, sections, names)
    plans = map_collecting_errors(planned, zip(trees, runs, strict=True), names)
    map_collecting_errors(lambda pair: examine(*pair, tell), zip(trees, runs, strict=True), names)
    return list(zip(trees, runs, plans, strict=True))


def ask_schedulers(points: "Sequence[tuple[Tree, Run, Plan]]") -> None:
    """UserError for what the schedulers of these points would refuse, before anything is made for them."""

    def ask(same: "Sequence[tuple[Tree, Run, Plan]]") -> None:
        backend_of(same[0][1].cluster).check(shapes(same), dry=all(run.dry_run is not False for _, run, _ in same))

    map_collecting_errors(ask, by_cluster(points, lambda point: point[1].cluster))


def shapes(points: "Sequence[tuple[Tree, Run, Plan]]") -> list[tuple[Path, Mapping[str, Any]]]:
    """What jobs are made of, as a backend takes it: folder and plan of each run, or of each of its replica groups."""
    return [(folder, plan.to_dict()) for tree, run, plan in points for folder in _folders(tree, run)]


def _folders(tree: Tree, run: "Run") -> list[Path]:
    whole, options = place(run.root, run.name, identity(tree), run.folder), run.fault_tolerance
    return [group_folder(whole, number) for number in range(options.copies)] if options.on else [whole]


def by_cluster(items: Iterable[Item], cluster: Callable[[Item], object]) -> list[list[Item]]:
    """Those of each cluster, in order. `cluster`: the section of an item."""
    found: list[list[Item]] = []
    for each in items:
        same = next((group for group in found if cluster(group[0]) == cluster(each)), None)
        if same is None:
            found.append(same := [])
        same.append(each)
    return found


def unfit(run: "Run") -> list[str]:
    """What is wrong with the tokenizer, before it has read a text, and with the task's own inputs."""
    from src.data.tokenizer import source_problems, vocabulary_problems
    from src.models.hugging_face import export_problems
    from src.run import Checks

    found = vocabulary_problems(run.tokenizer, run.model.vocab_size) if run.task.needs_corpus else []
    found += source_problems(run.tokenizer, run.data) if run.task.needs_corpus else []
    if run.task.needs_corpus and run.checkpoint.export_every is not None:
        found += export_problems(run.model)
    return found + _unscored(run) + (run.task.problems(run) if isinstance(run.task, Checks) else [])


def _unscored(run: "Run") -> list[str]:
    """What is wrong with the tasks that score the weights while they train."""
    from src.evaluation.chosen import problems
    from src.run import Averages, Evaluates, Validates

    options = run.evaluate
    if isinstance(run.task, Evaluates) and not options.every:
        return problems(options, averaged=False)
    if not isinstance(run.task, Validates):
        return ["evaluate: this task trains nothing; pass evaluate=none"] if options.every or options.tasks else []
    if options.tasks and not options.every:
        return [f"evaluate.tasks={','.join(options.tasks)} are asked at no step; pass evaluate.every=1000, or tasks=[]"]
    averaged = isinstance(run.task, Averages) and run.task.ema_decay is not None
    return problems(options, averaged, run.checkpoint.interval)


def examine(tree: Tree, run: "Run", tell: Tell = to_stderr) -> None:
    """Whether what the run starts from fits it: a checkpoint, or weights in Hugging Face layout on this machine."""
    from src.data.tokenizer import vocabulary_warnings
    from src.hugging_face.hub import is_local
    from src.launch.initial import check_initial, rewarming
    from src.launch.later import look_at_data
    from src.launch.taken import taken

    folder = place(run.root, run.name, identity(tree), run.folder)
    if run.task.needs_corpus:
        look_at_data(tree, run, tell)
        tell(f"warning: {line}" for line in vocabulary_warnings(run.tokenizer, run.model.vocab_size))
    check_initial(tree, run, folder)
    tell(taken(tree, run, folder))
    if (line := rewarming(run, folder)) is not None:
        tell([f"warning: {line}"])
    if (source := wanted(tree, run)) is not None and is_local(source):
        fetched(source, run, tell)


def wanted(tree: Tree, run: "Run") -> str | None:
    """Weights in Hugging Face layout that this run still needs: one that has saved never reads them again."""
    from src.checkpoint.folder import complete
    from src.hugging_face.load import pinned

    folder, source = place(run.root, run.name, identity(tree), run.folder), run.checkpoint.foreign
    return None if source is None or complete(folder / "checkpoints") else pinned(folder, source)


def fetched(source: str, run: "Run", tell: Tell = to_stderr) -> "Fetched":
    """Weights on this machine, downloaded if need be; CheckpointError when they do not fit the run."""
    from src.hugging_face.hub import fetch
    from src.hugging_face.load import examine as look

    found = fetch(source, weights=True)
    tell(f"warning: hf:{source}: {line}" for line in look(Path(found.folder), run.model))
    return found


def feed(run: "Run", shared: Shared, commits: Mapping[str, str] | None = None) -> "Corpus | None":
    """The tokenised data, made now if need be; DataError when they cannot feed this run. `commits`: of a begun run."""
    from src.data.corpus import check
    from src.evaluation.config import BITS_PER_BYTE
    from src.run import Evaluates, Validates

    task = run.task
    if not task.needs_corpus:
        return None
    corpus = shared.corpus(run, commits)
    problems = check(
        corpus,
        run.data,
        seq_len=task.seq_len,
        global_batch=task.global_batch,
        steps=0 if isinstance(task, Evaluates) else task.steps,
        validation_samples=task.validate_samples if isinstance(task, Validates) and task.validate_every else 0,
    )
    if run.evaluate.wanted and BITS_PER_BYTE in run.evaluate.tasks and not corpus.windows("validation", task.seq_len):
        problems.append(
            f"evaluate.tasks={BITS_PER_BYTE}: data.validation_fraction={run.data.validation_fraction} holds out no "
            f"window of task.seq_len={task.seq_len}; raise it, or leave that task out"
        )
    problems += task.corpus_problems(corpus) if isinstance(task, Evaluates) else []
    if problems:
        raise DataError(problems)
    shared.tell(corpus.notes(task.seq_len))
    return corpus


def check_same_data(corpus: "Corpus", folder: Path, stage: int = 1) -> None:
    """DataError where the run has begun with others: it goes on with its own data or not at all."""
    from src.data.corpus import read_recipe, recipe_file

    if not (folder / recipe_file(stage)).exists():
        return
    try:
        before = read_recipe(folder, stage)
    except DataError as error:  # its checkpoints say by their digest whether these are its samples
        to_stderr([f"note: {error}; made anew"])
        return
    if before["fingerprint"] != corpus.fingerprint:
        raise DataError(f"{folder}: data or tokenizer changed since this run began; pass another name= or folder=")


def record(corpus: "Corpus", folder: Path, stage: int = 1) -> None:
    """data.json: what the ranks open."""
    from src.data.corpus import recipe_file

    atomic_write(folder / recipe_file(stage), json.dumps(corpus.recipe(), indent=2) + "\n")


def refuse_queued(folder: Path, scheduler: JobScheduler) -> None:
    """FolderError while a job that was submitted for this run waits or runs, though nobody holds its lock."""
    submitted = submissions(folder)
    if not submitted or ended_in_shared_job(folder) or (job := submitted[-1]["job"]) == scheduler.current_job():
        return
    try:
        state = scheduler.states([job]).get(job)
    except SilentError:  # another machine than the one that it was submitted from: the lock decides
        return
    if state is not None and state.live:
        cancel = scheduler.cancel_command(folder, job)
        raise FolderError(f"{folder}: job {job} is queued or running it; wait for it, or {cancel}")


def opening(folder: "RunFolder") -> str:
    if folder.finished:
        return f"finished before: {folder.path}; for a run from the start pass another name= or seed="
    if not folder.resumed:
        return f"starts {folder.path}"
    before = folder.version_before
    return f"resumes {folder.path}" + (f", until now of version {before}" if before != VERSION else "")


def prepare(tree: Tree, run: "Run", planned: "Plan", shared: Shared) -> "tuple[RunFolder, Plan]":
    """The run's folder, held by us, with all that its ranks read: config, code, plan, data and where weights lie.

    Returns the plan with what the data say of it. `shared`: one for all points of a sweep.
    """
    from src.hugging_face.load import note
    from src.launch.initial import check_samples, reach_mirror
    from src.launch.opening import opening_lines
    from src.planning.staged.data import fed, feeds
    from src.run import Validates
    from src.runs.folder import RunFolder, may_change
    from src.runs.twins import near

    reach_mirror(run)
    source, tell = wanted(tree, run), shared.tell
    weights = None if source is None else fetched(source, run, tell)
    path = place(run.root, run.name, identity(tree), run.folder)
    corpora = feeds(run, path, lambda each, commits: feed(each, shared, commits))
    answers = fed(planned, run, corpora)
    tell(f"warning: {line}" for line in answers.warnings)
    tell(f"warning: {line}" for line in run.alert.unheard(os.environ))
    facts = answers.to_dict()
    scheduler = backend_of(run.cluster).scheduler

    def ask(folder: Path) -> None:
        refuse_queued(folder, scheduler)
        for number, each in enumerate(corpora, 1):
            check_same_data(each, folder, number)
        if corpora:
            check_samples(run, folder, corpora[0])

    where: dict[str, Any] = {"root": run.root, "name": run.name, "identity": identity(tree), "folder": path}
    folder = RunFolder.open(tree, facts, **where, scheduler=scheduler, ask=ask, code=shared.code)
    try:
        tell([opening(folder)])
        if not folder.resumed and run.folder is None and (twin := near(folder.path.parent, tree, may_change)):
            tell([f"note: {twin}"])
        for number, each in enumerate(corpora, 1):
            record(each, folder.path, number)
        if corpora and shared.command is not None and isinstance(run.task, Validates) and not folder.finished:
            tell(opening_lines(run, answers, corpora[0], folder.path, shared.command))
        if weights is not None:
            note(folder.path, weights)
    except BaseException:
        folder.close()
        raise
    return folder, answers


def start(tree: Tree, run: "Run", planned: "Plan", shared: Shared) -> tuple[str, int]:
    """How the run ended, and the exit code that says so."""
    if joined():
        return _join(tree, run, planned, shared), 0
    folder, _ = prepare(tree, run, planned, shared)
    with folder:
        if folder.finished and run.evaluate.cluster is not None:
            from src.tasks.evaluate.side_job import enter_late

            shared.tell(enter_late(run, folder.path))
        cluster, world = backend_of(run.cluster), run.parallel.world
        if isinstance(run.fault_tolerance, Options):
            outcome = cluster.submit_groups(folder, world, run.fault_tolerance)
        else:
            outcome = cluster.submit(folder, world)
        if outcome.status != "submitted":
            tell_end(folder.path, run.alert)
        return outcome.status, outcome.exit_code


def _join(tree: Tree, run: "Run", planned: "Plan", shared: Shared) -> str:
    """Be a rank of an outer launcher."""
    if run.fault_tolerance.on:
        raise PlanError(
            "fault_tolerance: each group is started and watched by launch.py, not by another launcher; start launch.py "
            "itself, or pass fault_tolerance=none"
        )
    from src.cluster.rank import RankJob, run_rank

    outer = LauncherEnv.read()
    if outer.world != run.parallel.world:
        raise PlanError(f"WORLD_SIZE={outer.world}, but parallel asks for {run.parallel.world} ranks")
    if run.cluster.devices().count is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # cluster.gpus=0 holds for ranks that we have not started, too
    if outer.rank > 0:  # it meets rank 0, which makes the folder first, in the process group
        job = RankJob(place(run.root, run.name, identity(tree), run.folder), None)
        return "finished" if run_rank(job, tree) else "stopped"
    folder, _ = prepare(tree, run, planned, shared)
    with folder:
        folder.begin(run.parallel.world)
        try:
            return "finished" if run_rank(RankJob(folder.path, None)) else "stopped"
        finally:
            tell_end(folder.path, run.alert)
