"""A run in stages is the chain of runs that one would make by hand with `from=`, to the bit, whatever happens to it."""

import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from hydra.core.global_hydra import GlobalHydra

from src.config.composition.requests import asked
from src.config.tree import Tree
from src.errors import ConfigError
from src.launch.as_it_was import completed
from src.launch.start import Shared, checked, prepare
from src.metrics.history import borders, read
from src.runs.commands.extend import extend
from src.runs.commands.figures.curves import curves
from src.runs.commands.figures.groups import Group
from src.runs.commands.summary import summaries
from tests.end_to_end.lives import TINY, Shot, contents, live, records, series, values, write_text
from tests.ranks import RankError, RankPool

STEPS = 3  # of each stage
KEPT = ("schedule=constant", "schedule.warmup_steps=0", "checkpoint.every=2", "checkpoint.keep=null")
# What changes, as three commands say it and as three stages do.
CHAIN = (
    ("task.global_batch=2",),
    ("task.global_batch=4", "optim.lr=1e-3"),
    (
        "seq_len=16",
        "data=synthetic",
        "data.documents=200",
        "model.rope_theta=1e4",
        "schedule=linear",
        "schedule.warmup_steps=1",
    ),
)
STAGES = (
    f"stages=[{{until:{STEPS},global_batch:2}},{{until:{2 * STEPS},global_batch:4,lr:1e-3}},"
    "{seq_len:16,data:synthetic,data.documents:200,model.rope_theta:1e4,schedule:linear,schedule.warmup_steps:1}]"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("stages")
    return (*TINY, *write_text(folder), f"root={folder / 'runs'}", *KEPT, f"task.steps={3 * STEPS}")


def opened(*argv: str) -> Path:
    """The run folder of this command line, ready for its ranks."""
    before = list(sys.argv)
    GlobalHydra.instance().clear()
    try:
        sys.argv[:] = ["launch.py"]
        ((tree, run, planned),) = checked(asked(list(argv), completed).trees)
    finally:
        sys.argv[:] = before
    folder, _ = prepare(tree, run, planned, Shared())
    with folder:
        folder.begin(run.parallel.world)
        return folder.path


@pytest.fixture(scope="module")
def chain(base: tuple[str, ...], ranks: RankPool) -> list[Path]:
    """Three runs, each from the one before."""
    root, folders = next(each for each in base if each.startswith("root=")), list[Path]()
    for changed in CHAIN:
        begun = (f"from={folders[-1]}", root, "cluster.gpus=0") if folders else base
        folders.append(opened(*begun, f"task.steps={STEPS}", f"name=chain{len(folders) + 1}", *changed))
        assert ranks(1, live, folders[-1]) == [True]
    return folders


@pytest.fixture(scope="module")
def staged(base: tuple[str, ...], ranks: RankPool) -> Path:
    folder = opened(*base, STAGES, "name=staged")
    assert ranks(1, live, folder) == [True]
    return folder


def by_hand(chain: list[Path], name: str) -> dict[int, float]:
    """The numbers of the chain, by the steps that they have in one run."""
    return {
        number * STEPS + step: value for number, run in enumerate(chain) for step, value in series(run, name).items()
    }


def test_it_is_the_chain_that_is_made_by_hand(chain: list[Path], staged: Path) -> None:
    for name in ("loss", "grad_norm", "lr"):
        assert series(staged, name) == by_hand(chain, name)
    assert len(series(staged)) == 3 * STEPS
    for number, run in enumerate(chain, 1):
        here, there = contents(staged, number * STEPS), contents(run, STEPS)
        tensors = [name for name in there if name.endswith(".distcp")]
        assert tensors
        assert {name: here[name] for name in tensors} == {name: there[name] for name in tensors}


def test_the_samples_are_a_function_of_the_stage(staged: Path, chain: list[Path]) -> None:
    """The second stage goes on with the samples of the first, the third begins those of its own data."""
    assert [values(staged, step)["position"] for step in (3, 4, 6, 8, 9)] == [6, 10, 18, 8, 12]
    for number, run in enumerate(chain, 1):
        assert values(staged, number * STEPS)["digest"] == values(run, STEPS)["digest"]
    assert values(staged, 9)["tokens"] == sum(series(run, "tokens")[STEPS] for run in (chain[1], chain[2]))


def test_each_step_says_its_stage(staged: Path) -> None:
    assert series(staged, "stage") == {step: 1.0 + (step - 1) // STEPS for step in range(1, 3 * STEPS + 1)}


MOMENTS = {
    "in_the_first": Shot("step", at=2),
    "in_the_second": Shot("step", at=5, saved=4),
    "in_the_third": Shot("step", at=8, saved=6),
    "between_two": Shot("start", at=2, saved=3),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_whenever_it_ends_it_goes_on_as_if_it_had_not(
    base: tuple[str, ...], staged: Path, ranks: RankPool, moment: str, number: int
) -> None:
    folder, shot = opened(*base, STAGES, f"name={moment}-{number}"), replace(MOMENTS[moment], number=number)
    if number == signal.SIGTERM:
        assert ranks(1, live, folder, shot) == [False]
    else:
        with pytest.raises(RankError, match="died of SIGKILL"):
            ranks(1, live, folder, shot)
    assert ranks(1, live, folder) == [True]
    assert series(folder) == series(staged)
    assert contents(folder, 3 * STEPS) == contents(staged, 3 * STEPS)


def test_the_layout_may_change_within_a_stage_and_with_it(base: tuple[str, ...], staged: Path, ranks: RankPool) -> None:
    """Two ranks, the last stage on a layout of its own; stopped in the second stage, and gone on with cut matrices."""
    stages = STAGES.replace("seq_len:16", "seq_len:16,parallel:tp2")
    folder = opened(*base, stages, "parallel=fsdp2", "name=layouts")
    assert ranks(2, live, folder, Shot("step", at=5)) == [False, False]
    opened(*base, stages, "parallel=tp2", f"folder={folder}")
    assert ranks(2, live, folder) == [True, True]
    assert series(folder) == pytest.approx(series(staged), rel=1e-4)
    assert [values(folder, step)["digest"] for step in (6, 9)] == [values(staged, step)["digest"] for step in (6, 9)]


def test_who_comes_back_to_a_source_reads_on_in_it(base: tuple[str, ...], ranks: RankPool) -> None:
    """Stages 1 and 3 together are the six steps of a run that never left: the same samples, each once."""
    files = next(each for each in base if each.startswith("data.files=")).replace("=", ":", 1)
    text = f"data:text,{files},data.validation_fraction:0.1"
    stages = f"stages=[{{until:3}},{{until:4,data:synthetic,data.documents:200}},{{until:7,{text}}}]"
    lr = "optim.lr=1e-30"  # weights stay, and losses say which samples they are of
    folder, straight = (
        opened(*base, stages, lr, "task.steps=7", "name=back"),
        opened(*base, lr, "task.steps=6", "name=straight"),
    )
    assert ranks(1, live, folder) == ranks(1, live, straight) == [True]
    found = series(folder)
    assert [found[step] for step in (1, 2, 3, 5, 6, 7)] == [*series(straight).values()]


def test_other_commands_take_the_stage_that_a_checkpoint_is_of(staged: Path, tmp_path: Path) -> None:
    def tree(*argv: str) -> Tree:
        GlobalHydra.instance().clear()
        return asked([*argv, f"root={tmp_path}", "cluster.gpus=0"], completed).trees[0]

    thetas = [tree("task=generate", f"run={staged}", f"step={at}", "prompt=a")["model"]["rope_theta"] for at in (6, 9)]
    assert thetas == [500000.0, 1e4]
    early, late = (tree(f"from={staged}@{at}") for at in (3, 9))
    assert (early["task"]["global_batch"], early["task"]["steps"], early["task"]["seq_len"]) == (2, STEPS, 32)
    assert (late["task"]["global_batch"], late["task"]["seq_len"], late["schedule"]["shape"]) == (4, 16, "linear")
    assert early["task"]["stages"] is late["task"]["stages"] is None
    assert early["checkpoint"]["progress"] == late["checkpoint"]["progress"] == "samples"
    with pytest.raises(ConfigError, match="has stages, whose schedules know how many steps there are"):
        extend(staged, None, ["steps=20"], yes=False, as_json=False)


SCORED = ("evaluate.every=3", "evaluate.tasks=[bits_per_byte,copy_words]", "evaluate.samples=4")


def test_scores_are_of_the_stage_that_took_the_step(base: tuple[str, ...], staged: Path, ranks: RankPool) -> None:
    """At the borders too, once, though a stop cuts off the one of step 6, the last of its stage."""
    straight, cut = (opened(*base, STAGES, *SCORED, f"name={name}") for name in ("scored", "cut_off"))
    assert ranks(1, live, straight) == [True]
    assert series(straight) == series(staged), "scores decide no number"
    bits = "evaluate/bits_per_byte/"
    assert [*series(straight, f"{bits}text")] == [3, 6]
    assert [*series(straight, f"{bits}synthetic")] == [9]
    assert ranks(1, live, cut, Shot("evaluation", at=4 + 2)) == [False]  # each evaluation has four batches of one row
    assert [*series(cut, f"{bits}text")] == [3]
    assert ranks(1, live, cut) == [True]
    assert series(cut) == series(staged)
    for name in (f"{bits}text", f"{bits}synthetic", "evaluate/copy_words/exact_match"):
        assert series(cut, name) == series(straight, name)
    for each in (straight, cut):
        scored = [line["step"] for line in records(each) if "evaluate/bits_per_byte/seconds" in line]
        assert scored == [3, 6, 9]


def live_beside(folder: Path) -> tuple[bool | tuple[str, ...], list[str]]:
    """A rank's life, and the steps whose checkpoints a command was started to score; none of the commands ends."""
    steps: list[str] = []

    def started(command: list[str], **_: object) -> SimpleNamespace:
        steps.extend(word for word in command if word.startswith("step="))
        return SimpleNamespace(poll=lambda: None)

    with patch("src.tasks.evaluate.side_job.subprocess", SimpleNamespace(Popen=started, DEVNULL=None)):
        return live(folder), steps


def test_a_command_that_scores_outlives_its_stage(base: tuple[str, ...], ranks: RankPool) -> None:
    options = ("evaluate.cluster=local", "evaluate.wait_seconds=0", "checkpoint.every=3")
    folder = opened(*base, STAGES, *SCORED, *options, "name=beside")
    assert ranks(1, live_beside, folder) == [(True, ["step=3", "step=6", "step=9"])]


def test_curves_mark_the_borders(staged: Path) -> None:
    assert borders(read(staged)) == {2: STEPS, 3: 2 * STEPS}
    (curve,), _ = curves([Group(tuple(summaries([staged])), {})], "step", "loss")
    assert curve.borders == (float(STEPS), 2.0 * STEPS)
