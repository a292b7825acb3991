"""`from=<run>[@step]`: a new run with another's weights and moments, judged by the launcher and begun by the ranks."""

import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from src.config.composition.requests import ConfigPoint, asked
from src.config.tree import identity
from src.errors import UserError
from src.launch.start import checked
from src.tasks.source import completed
from tests.end_to_end.lives import TINY, Shot, live, opened, series, write_text
from tests.ranks import RankPool

STABLE = ("schedule=constant", "schedule.warmup_steps=0")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("from")
    return (*TINY, *write_text(folder), f"root={folder / 'runs'}", *STABLE)


@pytest.fixture(scope="module")
def stable(text: tuple[str, ...], ranks: RankPool) -> Path:
    """Six steps at one learning rate, kept after 2, 4 and 6."""
    folder = opened(*text, "name=stable", "task.steps=6", "checkpoint.every=2", "checkpoint.keep=null")
    assert ranks(1, live, folder) == [True]
    return folder


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["launch.py"])
    GlobalHydra.instance().clear()


def point(*argv: str) -> ConfigPoint:
    (found,) = asked(list(argv), completed).points
    return found


def told(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        checked(asked(list(argv), completed).trees)
    return "\n".join(caught.value.problems)


def begun(stable: Path, *argv: str) -> Path:
    return opened(f"from={stable}@2", f"root={stable.parent}", "cluster.gpus=0", *argv)


def losses(folder: Path) -> dict[int, float]:
    return series(folder, "loss")


def test_it_has_the_runs_config_but_for_what_is_typed(stable: Path) -> None:
    found = point(f"from={stable}@4", "task.steps=3", "optim.lr=1e-3", "schedule=decay", "cluster.gpus=0")
    tree, plain = found.tree, point("cluster.gpus=0").tree
    assert (tree["model"]["dim"], tree["task"]["seq_len"], tree["task"]["steps"], tree["optim"]["lr"]) == (
        32,
        32,
        3,
        1e-3,
    )
    assert tree["schedule"] == plain["schedule"] | {"warmup_steps": 0, "decay_ratio": None}
    assert tree["checkpoint"]["initial"] == str(stable / "checkpoints/step_00000004")
    assert (tree["checkpoint"]["progress"], tree["checkpoint"]["every"], tree["name"]) == ("samples", 2, "stable-from4")
    assert "from" not in tree
    assert str(found.origins.of("model.dim")) == f"from {stable}@4"
    assert [str(found.origins.of(key)) for key in ("optim.lr", "schedule.decay_ratio", "seed")] == [
        "command line", "command line, schedule=decay", "default",
    ]  # fmt: skip
    again = point(f"from={stable.name}@4", f"root={stable.parent}", "task.steps=3", "optim.lr=1e-3", "schedule=decay",
                  "cluster.gpus=0")  # fmt: skip
    assert identity(again.tree) == identity(tree), "a run's name in the root is that run"
    newest = point(f"from={stable}", "cluster.gpus=0")
    assert newest.tree["checkpoint"]["initial"].endswith("step_00000006")


@pytest.mark.parametrize(
    ("argv", "progress"),
    [
        ((), "samples"),
        (("task.global_batch=8", "parallel=fsdp2", "data.processes=2", "model.rope_theta=1e4"), "samples"),
        (("seq_len=16",), "none"),
        (("data=synthetic",), "none"),
        (("seed=3",), "none"),
        (("checkpoint.progress=none",), "none"),
    ],
)
def test_the_place_in_the_samples_is_kept_where_they_are_the_same(
    stable: Path, argv: tuple[str, ...], progress: str
) -> None:
    assert point(f"from={stable}", *argv).tree["checkpoint"]["progress"] == progress


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("from={run}@3",), "step=3: {run} has no complete checkpoint of that step; it has 2, 4, 6"),
        (
            ("from={root}/stable",),
            "from={root}/stable: no run folder, it has no config.yaml; did you mean {root}/stable",
        ),
        (("from={run}", "task=bench"), "from={run}: begins a run of task=pretrain; other tasks take run="),
        (("from={run}", "checkpoint.initial=/x"), "checkpoint.initial with from={run}: the run has it"),
        (("from={run}", "recipe=llama3_8b"), "recipe with from={run}: the run has values of its own"),
        (("from={run}", "model.dim=64"), "model.tok_embeddings.weight: expected [258, 64], found [258, 32]"),
        (("from={run}", "model.n_layers=1"), "weights in it that this run has no place for: model.layers.1."),
        (
            ("from={run}", "seed=3", "checkpoint.progress=samples"),
            "drawn its samples by seed=0, not 3; pass seed=0",
        ),
        (("checkpoint.progress=samples",), "progress=samples is about a checkpoint, and initial=null"),
    ],
)
def test_what_cannot_begin_is_told_by_the_launcher(stable: Path, argv: tuple[str, ...], words: str) -> None:
    places = {"run": stable, "root": stable.parent}
    said = told(*(each.format(**places) for each in argv), f"root={stable.parent}", "cluster.gpus=0", "dry_run=true")
    assert words.format(**places) in said


def test_the_launcher_says_what_differs_and_what_is_kept(stable: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = point(f"from={stable}@4", "optim.lr=1e-4", "seq_len=16", "cluster.gpus=0", "dry_run=true").tree
    checked([tree])
    assert capsys.readouterr().err == (
        f"from {stable / 'checkpoints/step_00000004'}: 4 steps, 16 samples\n"
        "  optim.lr: 0.003 -> 0.0001\n"
        "  task.seq_len: 32 -> 16\n"
        "  weights are kept; moments (exp_avg, exp_avg_sq) are kept; steps begin at 0, samples begin at 0\n"
    )
    checked([point(f"from={stable}", "optim=adamw_bf16", "cluster.gpus=0", "dry_run=true").tree])
    assert (
        "moments (exp_avg, exp_avg_sq) are kept as bfloat16; steps begin at 0, samples go on at 24"
        in capsys.readouterr().err
    )
    checked([point(f"from={stable}", "optim=lion", "cluster.gpus=0", "dry_run=true").tree])
    assert "weights are kept; moments (exp_avg) are kept; steps" in capsys.readouterr().err


def test_with_nothing_changed_it_trains_as_the_run_did(stable: Path, ranks: RankPool) -> None:
    """Weights, moments, their counts and the samples are those after step 2: steps 1 to 4 have the bits of 3 to 6."""
    folder = begun(stable, "task.steps=4")
    assert ranks(1, live, folder) == [True]
    before = losses(stable)
    assert losses(folder) == {step: before[step + 2] for step in range(1, 5)}
    assert series(folder, "tokens")[4] == series(stable, "tokens")[6]


@pytest.mark.parametrize("layout", ["fsdp2", "tp2"])
def test_another_layout_begins_alike(stable: Path, ranks: RankPool, layout: str) -> None:
    folder = begun(stable, "task.steps=1", f"parallel={layout}", "task.global_batch=4", f"name={layout}")
    assert ranks(2, live, folder) == [True, True]
    assert losses(folder)[1] == pytest.approx(losses(stable)[3], rel=1e-5)


@pytest.mark.parametrize(
    "argv",
    [
        ("seq_len=16", "data=synthetic", "data.documents=200"),
        ("optim=lion", "optim.lr=1e-4"),
        ("optim=adamw_bf16",),
        ("precision=bf16_full", "optim.fused=false"),
        ("task.global_batch=2", "model.rope_theta=1e4"),
    ],
)
def test_any_key_may_change(stable: Path, ranks: RankPool, argv: tuple[str, ...]) -> None:
    """Where samples go on, the first loss is that of the run's next step: with its weights, whatever else is new."""
    folder = begun(stable, "task.steps=2", "checkpoint.every=1", *argv)
    assert ranks(1, live, folder) == [True]
    if argv[0].startswith(("optim", "precision")):
        assert losses(folder)[1] == pytest.approx(losses(stable)[3], rel=1e-3)
    assert (folder / "checkpoints/step_00000002/COMPLETE.json").is_file()


def test_moments_that_do_not_fit_begin_at_zero(
    stable: Path, ranks: RankPool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lion's momentum is one of the two that AdamW wants."""
    folder = begun(stable, "task.steps=1", "checkpoint.every=1", "optim=lion", "optim.lr=1e-4", "name=of_lion")
    assert ranks(1, live, folder) == [True]
    capsys.readouterr()
    back = opened(
        f"from={folder}", f"root={stable.parent}", "cluster.gpus=0", "task.steps=1", "optim=adamw", "name=back"
    )
    said = capsys.readouterr().err
    assert (
        "parameters are kept, the others begin at 0: this run's are exp_avg, exp_avg_sq, the checkpoint's exp_avg;"
        in said
    )
    assert ranks(1, live, back) == [True]
    assert losses(back)[1] == pytest.approx(losses(stable)[4], rel=0.05)


def test_its_own_checkpoint_is_what_it_goes_on_with(stable: Path, ranks: RankPool) -> None:
    argv = ("task.steps=4", "name=twice", "checkpoint.every=2", "checkpoint.progress=none")
    straight = begun(stable, *argv, "name=straight")
    assert ranks(1, live, straight) == [True]
    stopped = begun(stable, *argv)
    assert ranks(1, live, stopped, Shot("step", at=3)) == [False]
    assert begun(stable, *argv) == stopped
    assert ranks(1, live, stopped) == [True]
    assert losses(stopped) == losses(straight)


def test_one_run_has_many_ends(stable: Path) -> None:
    """Branches: a sweep over steps, each point a run of its own that decays from where the stable one was."""
    question = asked(
        ["-m", f"from={stable}@2,{stable}@4", "schedule=decay", "task.steps=2", "cluster.gpus=0"], completed
    )
    assert [tree["name"] for tree in question.trees] == ["stable-from2", "stable-from4"]
    assert len({identity(tree) for tree in question.trees}) == 2
    plans = [plan for _, _, plan in checked([tree | {"dry_run": True} for tree in question.trees])]
    assert [plan.steps for plan in plans] == [2, 2]
    assert all(plan.last_lr < 3e-3 for plan in plans)
