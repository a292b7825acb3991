"""muP: init, learning rates and decay by width, against the paper's table and against singular values."""

from dataclasses import replace
from math import sqrt
from typing import Any

import pytest
import torch

from src.config.tree import difference, identity
from src.distributed.init_weights import initialise
from src.errors import PlanError
from src.models.base import ModelConfig
from src.models.parametrization.config import MuP, Standard, grown
from src.models.parametrization.init import Normal
from src.planning.plan import plan
from src.tasks.verify.certificate import Certificate
from tests.models.shapes import tiny_deepseek, tiny_llama
from tests.ranks import RankPool
from tests.tasks.test_verify import TASK, certified
from tests.test_conf import composed
from tests.train.runs import changed, make_run, section

CPU = torch.device("cpu")
# A llama 4 times as wide by heads of one width: all sizes of matrices grow by 4 but the vocabulary; feed forwards of
# 128 and 512.
NARROW = tiny_llama(ffn_dim_multiplier=0.75)
WIDE = tiny_llama(ffn_dim_multiplier=0.75, dim=256, n_heads=32, n_kv_heads=16)
MUP = MuP(base_width=64, base={"n_heads": 8, "n_kv_heads": 4})


def rates(model: ModelConfig, mup: MuP, optim: str) -> dict[str, float]:
    return dict(mup.rates(model, section("optim", optim).orthogonal))


def test_adamw_and_init_are_those_of_the_paper() -> None:
    """arXiv 2203.03466, table 3: hidden 1 / width; head the same, and so its deviation; embedding and norms 1."""
    found, plan_of = rates(WIDE, MUP, "adamw"), MUP.initializers(WIDE, WIDE.build().initializers())
    narrow = NARROW.build().initializers()
    assert set(found) == set(plan_of) == set(narrow)
    for name, rate in found.items():
        hidden = name.startswith("layers.") and "norm" not in name
        assert rate == pytest.approx(0.25 if hidden or name == "output.weight" else 1.0), name
        shrink = 0.5 if hidden else 0.25 if name == "output.weight" else 1.0
        assert plan_of[name] == narrow[name].scaled(shrink), name
    assert rates(WIDE, MUP, "lion") == found


def test_the_base_width_is_the_standard_parametrization() -> None:
    model = NARROW
    one, other = model.build(), model.build()
    initialise(one, 3, MUP.initializers(model, one.initializers()))
    initialise(other, 3, Standard().initializers(model, other.initializers()))
    assert all(torch.equal(*pair) for pair in zip(one.parameters(), other.parameters(), strict=True))
    for optim in ("adamw", "muon", "normuon"):
        assert set(rates(model, MUP, optim).values()) == {1.0}


def test_wider_heads_have_logits_of_one_over_width() -> None:
    """The same heads four times as wide: queries start at half of what they would, and move so."""
    wide, mup = tiny_llama(dim=256, n_heads=8, n_kv_heads=4), MuP(base_width=64, base={})
    assert wide.head_width == 4 * tiny_llama().head_width
    found = rates(wide, mup, "adamw")
    assert found["layers.0.attention.wq.weight"] == pytest.approx(0.5 * 0.25)
    assert found["layers.0.attention.wk.weight"] == pytest.approx(0.25)
    started = mup.initializers(wide, wide.build().initializers())
    assert started["layers.0.attention.wq.weight"] == Normal(0.02 * 0.5 * 0.5)


def test_experts_routers_and_latents_have_their_own_growth() -> None:
    """Routers write as many numbers at any width: a head. Latents of a fixed rank are read as an embedding is."""
    mup = MuP(base_width=64, base={})
    wide = grown(tiny_deepseek(), 64, {}, 256)  # heads, experts and ranks as they are: only the stream grows
    found = rates(wide, mup, "adamw")
    started = mup.initializers(wide, wide.build().initializers())
    narrow = tiny_deepseek().build().initializers()
    for name, (rate, shrink) in {
        "layers.1.moe.router.gate.weight": (0.25, 0.25),
        "layers.1.moe.experts.w1": (0.25, 0.25),
        "layers.1.moe.experts.w2": (1.0, 1.0),
        "layers.1.attention.wkv_a.weight": (0.25, 0.25),
        "layers.1.attention.wkv_b.weight": (1.0, 1.0),
    }.items():
        assert found[name] == pytest.approx(rate), name
        assert started[name] == narrow[name].scaled(shrink), name


@pytest.mark.parametrize(
    "shapes", [((24, 24), (96, 96)), ((16, 40), (64, 160)), ((8, 24), (8, 96)), ((40, 8), (160, 8))]
)
def test_updates_of_muon_change_activations_alike(shapes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    """The largest that an update makes of an input of size 1, per number: sqrt(columns / rows) * its spectral norm."""
    optim, sizes = section("optim", "muon"), []
    (small, large), name = shapes, "layers.0.attention.wo.weight"
    growth = [new / old for new, old in zip(large, small, strict=True)]
    factor = sqrt(growth[0] / growth[1]) * sqrt(max(small) / max(large))
    for shape, rate in ((small, 1.0), (large, factor)):
        assert optim.orthogonal(name, shape, {}) == shape
        left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
        spectral = torch.linalg.matrix_norm(left @ right * rate * max(shape) ** 0.5, ord=2).item()
        sizes.append(spectral * sqrt(shape[1] / shape[0]))
    assert sizes[1] == pytest.approx(sizes[0], rel=1e-4)


def test_muon_has_rates_of_its_own_and_heads_theirs() -> None:
    found = rates(WIDE, MUP, "muon")
    assert found["layers.0.attention.wq.weight"] == pytest.approx(0.5)
    assert found["output.weight"] == pytest.approx(0.25), "AdamW's"
    assert found["norm.weight"] == found["tok_embeddings.weight"] == 1.0
    apart = MUP.rates(WIDE, changed(section("optim", "muon"), per_head=True).orthogonal)
    # A head's matrix reads 4 times as much and writes as much: sqrt(1 / 4) over sqrt(4).
    assert apart["layers.0.attention.wq.weight"] == pytest.approx(0.25)
    assert apart["layers.0.feed_forward.w1.weight"] == pytest.approx(0.5)


def test_a_step_decays_as_much_at_any_width() -> None:
    model = WIDE.build()
    adamw = section("optim", "adamw")
    optimizer = adamw.build(model.named_parameters(), CPU, None, None, rates(WIDE, MUP, "adamw"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        assert group["lr"] * group["weight_decay"] == pytest.approx(adamw.lr * adamw.weight_decay)
        assert group["peak_lr"] == group["lr"]
        for parameter in group["params"]:
            assert group["lr"] == pytest.approx(adamw.lr * rates(WIDE, MUP, "adamw")[names[id(parameter)]])


@pytest.mark.parametrize(
    ("mup", "model", "said"),
    [
        ({}, {"tie_word_embeddings": True}, "model.tie_word_embeddings=true makes one matrix embedding and head"),
        (
            {"base_width": 100},
            {},
            "parametrization.base_width=100 with base={} makes no model: model.head_dim: null means",
        ),
        ({"base": {"n_head": 4}}, {}, "model has no key n_head; did you mean n_heads?"),
        ({"base": {"n_layers": 2}}, {}, "has other weights than the model; only sizes may differ"),
        ({"base": {"dim": 32}}, {}, "parametrization.base.dim=32: is base_width=64; leave it out"),
    ],
)
def test_what_has_no_base_is_refused(mup: dict[str, Any], model: dict[str, Any], said: str) -> None:
    run = make_run(model=tiny_llama(**model), parametrization=MuP(**({"base_width": 64, "base": {}} | mup)))
    with pytest.raises(PlanError) as caught:
        plan(run)
    assert any(said in line for line in caught.value.problems), caught.value.problems


def test_the_standard_one_is_no_part_of_a_run_s_identity() -> None:
    tree, mup = composed(), composed("parametrization=mup")
    without = {key: value for key, value in tree.items() if key != "parametrization"}
    assert identity(tree) == identity(without) != identity(mup)
    assert difference(without, tree) == []
    assert "parametrization._target_: absent" in "\n".join(difference(tree, mup))


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "optim"), [("tp2", "adamw"), ("fsdp2", "muon"), ("pp2", "adamw")])
def test_a_layout_trains_with_it_like_one_device(ranks: RankPool, layout: str, optim: str) -> None:
    run = replace(make_run(model=WIDE, parallel=layout, optim=optim, parametrization=MUP), task=TASK)
    certificates: list[Certificate] = ranks(2, certified, run)
    assert [certificate.failed for certificate in certificates] == [[], []]
