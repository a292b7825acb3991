"""What a sweep is called, which group its runs share, and what is asked of it."""

import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from src.config.composition.requests import asked
from src.config.tree import Tree, identity
from src.errors import ConfigError
from src.sweeps.grid import in_group, one_run, title


def named(*names: str, chosen: str | None = None) -> list[Tree]:
    return [
        {"name": name, "sweep": {"name": chosen}, "tracker": {"wandb": None}, "at": at} for at, name in enumerate(names)
    ]


@pytest.mark.parametrize(
    ("names", "shared"),
    [
        (["demo", "demo"], "demo"),
        (["lr_0.0001", "lr_0.0002"], "lr"),
        (["llama3_debug-ddp2", "llama3_debug-fsdp2"], "llama3_debug"),
        (["a", "b"], "sweep"),
    ],
)
def test_a_sweep_is_named_by_what_its_points_share(names: list[str], shared: str) -> None:
    trees = named(*names)
    assert title(trees).rpartition("-")[0] == shared
    assert title(trees[::-1]) == title(trees), "the order of asking makes no other sweep"
    assert title(trees[:1]) != title(trees)
    assert title(named(*names, chosen="mine")).startswith("mine-")


def test_the_sweep_is_the_wandb_group_of_its_runs() -> None:
    (plain,) = named("a")
    watched: Tree = plain | {"tracker": {"wandb": {"project": "p", "group": None}}}
    grouped: Tree = plain | {"tracker": {"wandb": {"group": "own"}}}
    found = in_group([plain, watched, grouped], "lr-1")
    assert [each["tracker"]["wandb"] for each in found] == [None, {"project": "p", "group": "lr-1"}, {"group": "own"}]
    assert watched["tracker"]["wandb"]["group"] is None, "a tree is not changed"
    assert [identity(each) for each in found] == [identity(each) for each in (plain, watched, grouped)]


def test_what_a_command_line_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with patch.object(sys, "argv", ["launch.py"]):
        single = asked(["seed=3"])
        assert (single.swept, [point.overrides for point in single.points]) == (False, [{"seed": "3"}])
        sweep = asked(["seed=3,4", "-m", "optim.lr=1e-3"])
        assert (sweep.swept, [point.tree["seed"] for point in sweep.points]) == (True, [3, 4])
        assert [point.overrides for point in sweep.points] == [
            {"seed": seed, "optim.lr": "0.001"} for seed in ("3", "4")
        ]
        assert asked(["-m", "seed=3"]).swept
        assert sys.argv == ["launch.py"], "the ledger keeps what was typed"
        file = tmp_path / "experiment" / "half.yaml"
        file.parent.mkdir()
        file.write_text('# @package _global_\nhydra: {sweeper: {params: {seed: "1,2"}}}\n')
        path = f"hydra.searchpath=[file://{tmp_path}]"
        with pytest.raises(ConfigError, match=r"without hydra[.]mode: MULTIRUN"):
            asked([path, "experiment=half"])
        assert [point.tree["seed"] for point in asked(["-m", path, "experiment=half"]).points] == [1, 2]


def test_points_that_differ_in_no_number_are_told_to_be_one_run() -> None:
    points: list[Tree] = [{"seed": seed, "task": {"log_every": every}} for seed in (0, 1) for every in (5, 10)]
    none = [dict[str, str]()] * 4
    assert one_run(points, none) == (
        "4 points are 2 runs, each with the last value of task.log_every, which decides no number; for runs of their "
        "own pass name=...-${task.log_every}"
    )
    assert one_run([each | {"name": f"log-{each['task']['log_every']}"} for each in points], none) is None
    assert one_run([points[0], points[0], points[2]], none[:3]) is None
    told = one_run([points[0]] * 2, [{"seed": "0", "cluster.partition": name} for name in "ab"])
    assert told is not None
    assert told.startswith("2 points are 1 run, each with the last value of cluster.partition, which decides no number")
    assert "for one run in any of several pass cluster.partition='\"a,b\"'" in told
