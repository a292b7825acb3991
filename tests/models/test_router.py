"""The choice of experts against brute force over all sets of groups and experts."""

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from src.models.moe.router import Router, Routing
from tests.models.shapes import tiny_moe


def routed(config_changes: dict[str, Any], bias: Tensor | None = None, tokens: int = 40) -> tuple[Routing, Tensor]:
    """A random router's choice, and its scores."""
    torch.manual_seed(3)
    config = tiny_moe(**config_changes)
    router = Router(16, config)
    x = torch.randn(tokens, 16)
    logits = x @ router.gate.weight.T
    scores = logits.softmax(-1) if config.score_func == "softmax" else logits.sigmoid()
    return router(x, torch.zeros(config.num_experts) if bias is None else bias), scores


def best(scores: list[float], groups: int, kept: int, top_k: int, how: str) -> set[int]:
    """Of all sets of groups the one with the largest sum of group scores; in it the top_k largest experts."""
    size = len(scores) // groups
    members = [range(group * size, (group + 1) * size) for group in range(groups)]

    def worth(group: int) -> float:
        ordered = sorted((scores[expert] for expert in members[group]), reverse=True)
        return ordered[0] if how == "max" else sum(ordered[:2])

    chosen = max(combinations(range(groups), kept), key=lambda some: sum(worth(group) for group in some))
    allowed = [expert for group in chosen for expert in members[group]]
    return set(sorted(allowed, key=lambda expert: -scores[expert])[:top_k])


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("how", ["max", "top2sum"])
@pytest.mark.parametrize(("groups", "kept", "top_k"), [(1, 1, 3), (4, 2, 3), (2, 1, 4), (4, 3, 1)])
def test_the_best_experts_of_the_best_groups(score: str, how: str, groups: int, kept: int, top_k: int) -> None:
    bias = torch.linspace(-0.3, 0.3, 8)  # makes some scores negative
    options = {
        "score_func": score,
        "group_score": how,
        "num_expert_groups": groups,
        "num_limited_groups": kept,
        "top_k": top_k,
    }
    routing, scores = routed(options, bias)
    for row in range(len(scores)):
        expected = best((scores[row] + bias).tolist(), groups, kept, top_k, how)
        assert set(routing.experts[row].tolist()) == expected


def test_bias_moves_the_choice_and_nothing_else() -> None:
    plain, scores = routed({"score_func": "sigmoid"})
    bias = torch.zeros(8)
    bias[5] = 10.0
    moved, _ = routed({"score_func": "sigmoid"}, bias)
    assert moved.counts[5] == 40 > plain.counts[5]
    torch.testing.assert_close(moved.weights, scores.gather(1, moved.experts))


def test_bias_gets_no_gradient() -> None:
    bias = torch.zeros(8, requires_grad=True)
    routing, _ = routed({"score_func": "sigmoid", "route_norm": True}, bias)
    (gradient,) = torch.autograd.grad(routing.weights.square().sum(), bias, allow_unused=True)
    assert gradient is None


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_normalised_weights_add_up_to_scale(score: str) -> None:
    routing, scores = routed({"score_func": score, "route_norm": True, "route_scale": 2.5})
    torch.testing.assert_close(routing.weights.sum(-1), torch.full((40,), 2.5))
    plain, _ = routed({"score_func": score, "route_scale": 2.0})
    torch.testing.assert_close(plain.weights, 2 * scores.gather(1, plain.experts))


def test_counts_are_whole_numbers_of_rows() -> None:
    routing, _ = routed({})
    assert routing.counts.dtype == torch.int64
    assert torch.equal(routing.counts, routing.experts.flatten().bincount(minlength=8))


@pytest.mark.parametrize("tokens", [40, 41])
def test_forced_balance_is_round_robin_with_true_weights(tokens: int) -> None:
    routing, scores = routed({"force_load_balance": True}, tokens=tokens)
    assert routing.experts.flatten().tolist() == [place % 8 for place in range(tokens * 3)]
    torch.testing.assert_close(routing.weights, scores.gather(1, routing.experts))
    most, least = int(routing.counts.max()), int(routing.counts.min())
    assert (most, least) == ((15, 15) if tokens == 40 else (16, 15))
    assert routing.even == (tokens == 40)


def test_a_bf16_router_decides_in_fp32() -> None:
    """Logits that bf16 cannot tell apart."""
    router = Router(4, tiny_moe(top_k=1)).bfloat16()
    with torch.no_grad():
        router.gate.weight.zero_()
        router.gate.weight[6] = torch.tensor([256.0, 0.5, 0, 0])
        router.gate.weight[2] = torch.tensor([256.0, 0.25, 0, 0])
    routing = router(torch.ones(5, 4, dtype=torch.bfloat16), torch.zeros(8))
    assert routing.experts.flatten().tolist() == [6] * 5
    assert routing.weights.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "key", "said"),
    [
        ({"num_expert_groups": 3}, "num_expert_groups", "3 does not divide num_experts=8 (1, 2, 4 or 8 do)"),
        ({"num_expert_groups": 2, "num_limited_groups": 3}, "num_limited_groups", "at most 2"),
        (
            {"num_expert_groups": 4, "num_limited_groups": 1},
            "top_k",
            "3 is more than the 2 experts of num_limited_groups=1; at most 2",
        ),
        ({"top_k": 9}, "top_k", "at most 8"),
        ({"hidden_dim": 20}, "hidden_dim", "16 or 24 would do"),
        ({"num_expert_groups": 8, "num_limited_groups": 4}, "group_score", "group_score=max does with one"),
    ],
)
def test_impossible_routers_are_refused_by_key(changes: dict[str, Any], key: str, said: str) -> None:
    with pytest.raises(ValueError, match="1 validation error") as caught:
        tiny_moe(**changes)
    (error,) = caught.value.errors()  # type: ignore[attr-defined]
    assert error["loc"] == (key,)
    assert said in error["msg"]


def test_a_bf16_router_has_gradients_as_exact_as_bf16_holds() -> None:
    """Against fp32 throughout: a gradient cut to bf16 before the product would be off by 2e-3."""
    torch.manual_seed(5)
    router, bias = Router(32, tiny_moe(score_func="sigmoid", route_scale=2.5)).bfloat16(), torch.zeros(8)
    x = torch.randn(200, 32).bfloat16().requires_grad_()
    exact = Router(32, tiny_moe(score_func="sigmoid", route_scale=2.5))
    exact.load_state_dict(router.state_dict())
    wide = x.detach().float().requires_grad_()
    probe = torch.randn(200, 3)
    ours, theirs = router(x, bias), exact(wide, bias)
    assert torch.equal(ours.experts, theirs.experts)
    grads = torch.autograd.grad((ours.weights * probe).sum(), [x, router.gate.weight])
    wanted = torch.autograd.grad((theirs.weights * probe).sum(), [wide, exact.gate.weight])
    for got, right in zip(grads, wanted, strict=True):
        assert got.dtype == torch.bfloat16
        assert float((got.float() - right.bfloat16().float()).norm() / right.norm()) < 3e-4


def test_z_loss_is_in_gradients_alone() -> None:
    """And in training alone."""
    torch.manual_seed(3)
    router, x = Router(16, tiny_moe(score_func="sigmoid")), torch.randn(40, 16, requires_grad=True)
    bias, weight = torch.zeros(8), torch.tensor(0.3)
    objective = router(x, bias).weights.square().sum()
    squares = router.gate(x).logsumexp(-1).square().sum()
    expected = torch.autograd.grad(objective + weight * squares, [x, router.gate.weight])
    without = torch.autograd.grad(router(x, bias).weights.square().sum(), [x, router.gate.weight])
    router.z_loss = weight
    found = torch.autograd.grad(router(x, bias).weights.square().sum(), [x, router.gate.weight])
    torch.testing.assert_close(found, expected)
    assert torch.equal(router(x, bias).weights.square().sum(), objective)
    router.eval()
    torch.testing.assert_close(
        torch.autograd.grad(router(x, bias).weights.square().sum(), [x, router.gate.weight]), without, rtol=0, atol=0
    )
