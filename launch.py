"""Compose -> check -> plan -> run folder -> submit. The only entry that knows Hydra.

Exit code 0: fine, also after a stop that saved; 2: the command or its config is wrong; any other comes from the run.
Every point of a sweep is checked before the first one starts. A point that fails does not stop the later ones, and the
sweep ends with the first code that is not 0; Ctrl-C ends all of it.
"""

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

import hydra
from omegaconf import DictConfig

from src.config.build import build
from src.config.command_line import COMPOSITION_ERRORS, arguments, problem
from src.config.groups import CONF
from src.config.tree import Tree, identity, resolve
from src.errors import DataError, PlanError, UserError, VerdictError

if TYPE_CHECKING:
    from src.cluster.folder import RunFolder
    from src.cluster.local import Outcome
    from src.data.corpus import Corpus
    from src.train.plan import Plan
    from src.train.run import Run

Given = TypeVar("Given")
Made = TypeVar("Made")

PATIENCE_SECONDS = 5.0  # torchrun looks at its ranks every 0.1 s


class Cluster(Protocol):
    """What every class of the group cluster can do."""

    def submit(self, folder: "RunFolder", world: int) -> "Outcome": ...


def composed(argv: list[str]) -> list[Tree]:
    """The resolved config of every point; more than one for a sweep, none for --help. Hydra's part ends here."""
    trees: list[Tree] = []

    @hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
    def compose(cfg: DictConfig) -> None:
        trees.append(resolve(cfg))

    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, instead of printing and leaving with code 1
    with TemporaryDirectory() as scratch:  # for the multirun.yaml that Hydra's sweeper insists on
        sys.argv[1:] = [*arguments(argv), f"hydra.sweep.dir={scratch}"]
        try:
            compose()
        except COMPOSITION_ERRORS as error:
            raise UserError(problem(error)) from error
    return trees


def every(act: Callable[[Given], Made], given: Iterable[Given]) -> list[Made]:
    """What `act` makes of each; the problems of all of them at once."""
    made: list[Made] = []
    problems: list[str] = []
    for each in given:
        try:
            made.append(act(each))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(dict.fromkeys(problems))
    return made


def checked(trees: list[Tree]) -> "list[tuple[Tree, Run, Plan]]":
    """Every point's objects and plan. What can take seconds to import comes after all configs are proven right."""
    sections = every(build, trees)
    from src.train.plan import plan
    from src.train.run import Run

    runs = every(Run.from_sections, sections)
    plans = every(lambda run: plan(run, None, run.cluster.devices(), unfit(run)), runs)
    return list(zip(trees, runs, plans, strict=True))


def unfit(run: "Run") -> list[str]:
    """What is wrong with the tokenizer, before it has read a text."""
    from src.data.tokenizer import vocabulary_problems

    return vocabulary_problems(run.tokenizer, run.model.vocab_size) if run.task.needs_corpus else []


def show(run: "Run", plan: "Plan") -> list[str]:
    """The table for people on stderr, the JSON for machines on stdout; returns where ranks that were built disagree."""
    from rich.console import Console

    from src.train.rehearse import rehearse
    from src.train.rehearse import render as compared
    from src.train.run import Rehearses
    from src.train.table import render

    terminal = Console(stderr=True)
    terminal.print(render(plan))
    if not isinstance(run.task, Rehearses) or not run.task.rehearse:
        print(plan.to_json())
        return []
    built = rehearse(replace(run, recompute=plan.recompute), run.task.rehearse_ranks)
    terminal.print(compared(built))
    print(json.dumps(plan.to_dict() | {"rehearsal": [each.to_dict() for each in built]}, indent=2))
    return [problem for each in built for problem in each.problems]


def feed(run: "Run") -> "Corpus | None":
    """The tokenised data, made now if they are not there yet; DataError when they cannot feed this run."""
    from src.data.corpus import check
    from src.data.prepare import prepare
    from src.train.run import Validates

    task = run.task
    if not task.needs_corpus:
        return None
    corpus = prepare(run.data, run.tokenizer, run.cache, progress=True)
    print(corpus.preparation.line(), file=sys.stderr)
    problems = check(
        corpus,
        run.data,
        seq_len=task.seq_len,
        global_batch=task.global_batch,
        steps=task.steps,
        validation_samples=task.validate_samples if isinstance(task, Validates) and task.validate_every else 0,
    )
    if problems:
        raise DataError(problems)
    return corpus


def record(corpus: "Corpus", folder: Path) -> None:
    """data.json: what the ranks open. A run that has begun goes on with its own data or not at all."""
    file = folder / "data.json"
    recipe = corpus.recipe()
    if file.exists() and json.loads(file.read_text())["fingerprint"] != recipe["fingerprint"]:
        raise DataError(f"{folder}: data or tokenizer changed since this run began; pass another name= or folder=")
    file.write_text(json.dumps(recipe, indent=2) + "\n")


def opening(folder: "RunFolder") -> str:
    if folder.finished:
        return f"finished before: {folder.path}; for a run from the start pass another name= or seed="
    return f"{'resumes' if folder.resumed else 'starts'} {folder.path}"


def start(tree: Tree, run: "Run") -> tuple[str, int]:
    """How the run ended, and the exit code that says so."""
    from src.cluster.folder import RunFolder, place
    from src.cluster.job import perform
    from src.distributed.process import Facts, joined
    from src.train.plan import plan

    path = place(run.root, run.name, identity(tree), run.folder)
    if joined():
        outer = Facts.read()
        if outer.world != run.parallel.world:
            raise PlanError(f"WORLD_SIZE={outer.world}, but parallel asks for {run.parallel.world} ranks")
        if run.cluster.devices().count is None:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # cluster.gpus=0 holds for ranks that we have not started, too
        if outer.rank > 0:  # it meets rank 0, which makes the folder first, in the process group
            return "finished" if perform(tree, path) else "stopped", 0
    corpus = feed(run)
    answers = plan(run, corpus, run.cluster.devices())
    print(*(f"warning: {line}\n" for line in answers.warnings), sep="", end="", file=sys.stderr)
    facts = answers.to_dict()
    with RunFolder.open(tree, facts, root=run.root, name=run.name, identity=identity(tree), folder=path) as folder:
        print(opening(folder), file=sys.stderr)
        if corpus is not None:
            record(corpus, folder.path)
        if joined():
            folder.begin(run.parallel.world)
            return "finished" if perform(tree, folder.path) else "stopped", 0
        outcome = cast(Cluster, run.cluster).submit(folder, run.parallel.world)
        return outcome.status, outcome.exit_code


def sweep(points: "list[tuple[Tree, Run, Plan]]") -> int:
    """One point after the other, each in its own folder."""
    failed: dict[str, int] = {}
    for number, (tree, run, _) in enumerate(points, start=1):
        label = f"[{number}/{len(points)}] {run.name}-{identity(tree)}"
        if len(points) > 1:
            print(label, file=sys.stderr)
        try:
            status, code = start(tree, run)
        except UserError as error:
            status, code = "refused", refused(error)
        if code:
            failed[label] = code
        if status in ("stopped", "killed"):
            break
    if len(points) > 1:
        print(*(f"{label} ended with code {code}" for label, code in failed.items()), sep="\n", file=sys.stderr)
    return next(iter(failed.values()), 0)


def refused(error: UserError) -> int:
    """Says what is wrong, once: rank 0 goes first, and its outer launcher then ends the others."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(PATIENCE_SECONDS)
    print(*error.problems, sep="\n", file=sys.stderr, flush=True)
    return error.exit_code


def main() -> int:
    command = shlex.join(["python", *sys.argv])
    try:
        points = checked(composed(sys.argv[1:]))
    except UserError as error:
        return refused(error)
    dry = [point for point in points if point[1].dry_run]
    if disagreements := [line for _, run, plan in dry for line in show(run, plan)]:
        return refused(VerdictError(disagreements))
    code = sweep([point for point in points if point not in dry])
    if code == 0 and len(dry) < len(points) and "RANK" not in os.environ:
        print(f"to go on from there: {command}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
