"""experiment=ladder: one dial turns depth, width, batch, learning rate and tokens, and whatever is typed wins."""

from collections.abc import Callable

import pytest

from src.config.build import build
from src.config.tree import Tree
from src.errors import ConfigError
from src.models.base import ModelConfig
from src.tasks.ladder import BATCH_COEFFICIENT, BATCH_EXPONENT, RATE_COEFFICIENT, RATE_EXPONENT
from src.tasks.source import completed
from tests.test_conf import composed


def ladder(*typed: str) -> Tree:
    pairs = dict(each.split("=", 1) for each in typed)
    return completed(composed("experiment=ladder", *(f"++{each}" for each in typed)), pairs)


def model_of(tree: Tree) -> ModelConfig:
    model = build(tree)["model"]
    assert isinstance(model, ModelConfig)
    return model


@pytest.mark.parametrize("scale", [1, 4, 12])
def test_all_follows_from_the_dial(scale: int) -> None:
    tree = ladder(f"scale={scale}")
    model, task = tree["model"], tree["task"]
    assert (model["n_layers"], model["dim"], model["n_heads"]) == (scale, 64 * scale, scale)
    assert not {"scale", "ladder"} & tree.keys()
    counts = model_of(tree).counts(task["seq_len"])
    step = task["global_batch"] * task["seq_len"]
    tokens = task["steps"] * step
    assert tokens == pytest.approx(20 * counts.active, rel=0.51 / task["steps"])
    flops = 20 * counts.active * counts.flops_per_token
    assert BATCH_COEFFICIENT * flops**BATCH_EXPONENT / 1.5 < step < 1.5 * BATCH_COEFFICIENT * flops**BATCH_EXPONENT
    assert tree["optim"]["lr"] == pytest.approx(RATE_COEFFICIENT * flops**RATE_EXPONENT, rel=1e-2)
    assert tree["schedule"]["warmup_steps"] == round(0.05 * task["steps"])
    assert tree["name"] == f"ladder-{scale}"


def test_larger_is_larger_in_everything_but_the_learning_rate() -> None:
    small, large = ladder("scale=2"), ladder("scale=8")
    for section, key in (("model", "dim"), ("task", "steps"), ("task", "global_batch")):
        assert small[section][key] < large[section][key]
    assert small["optim"]["lr"] > large["optim"]["lr"]


@pytest.mark.parametrize("scale", [2, 3, 6])
def test_equal_compute_at_every_size(scale: int) -> None:
    tree = ladder(f"scale={scale}", "ladder.flops=1e13")
    task = tree["task"]
    per_token = model_of(tree).counts(task["seq_len"]).flops_per_token
    spent = task["steps"] * task["global_batch"] * task["seq_len"] * per_token
    assert spent == pytest.approx(1e13, rel=0.51 / task["steps"])


def test_what_is_typed_wins() -> None:
    tree = ladder("scale=4", "optim.lr=1e-3", "task.steps=7", "model.dim=128", "ladder.head_width=32")
    assert (tree["optim"]["lr"], tree["task"]["steps"], tree["model"]["dim"]) == (1e-3, 7, 128)
    assert tree["model"]["n_heads"] == 8


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: ladder("scale=0"), "ladder.scale: 0 is not at least 1"),
        (lambda: ladder("scale=big"), "ladder.scale"),
        (lambda: ladder("ladder.flops=-1"), "ladder.flops: -1 is not"),
        (lambda: ladder("ladder.width=3"), "ladder.width"),
        (lambda: completed(composed("++scale=4"), {"scale": "4"}), "is the dial of experiment=ladder"),
    ],
)
def test_a_dial_that_cannot_be_turned_so_is_named(make: Callable[[], Tree], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        make()


def test_a_task_without_steps_takes_the_model_alone() -> None:
    tree = ladder("scale=3", "task.steps=20")
    assert tree["model"]["dim"] == 192
