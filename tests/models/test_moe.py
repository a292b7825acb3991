"""The mixture of experts against a loop over experts, and the update of its biases."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from src.models.moe.experts import Experts
from src.models.moe.moe import MoE, arrange, balance, combine, dispatch, sorting
from tests.models.shapes import tiny_deepseek, tiny_moe


def made(**changes: Any) -> MoE:
    torch.manual_seed(0)
    moe = MoE(16, tiny_moe(**changes), balanced=True)
    for parameter in moe.parameters():
        nn.init.normal_(parameter, std=0.3)
    return moe


def swiglu(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    return (F.silu(x @ w1.T) * (x @ w3.T)) @ w2.T


def by_loop(moe: MoE, x: Tensor) -> Tensor:
    """One expert at a time, over the tokens that chose it."""
    rows = x.flatten(0, 1)
    routing, experts, out = moe.router(rows, moe.expert_bias), moe.experts, torch.zeros_like(rows)
    for expert in range(len(experts.w1)):
        token, slot = torch.where(routing.experts == expert)
        weight = routing.weights[token, slot].unsqueeze(-1)
        before = moe.dispatcher.score_before_experts
        y = swiglu(rows[token] * (weight if before else 1), experts.w1[expert], experts.w2[expert], experts.w3[expert])
        out = out.index_add(0, token, y if before else y * weight)
    if (shared := moe.shared_experts) is not None:
        out = out + swiglu(rows, shared.w1.weight, shared.w2.weight, shared.w3.weight)
    return out.view_as(x)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="after"),
        pytest.param({"score_before_experts": True}, id="before"),
        pytest.param(
            {"num_shared_experts": 0, "score_func": "sigmoid", "route_norm": True, "route_scale": 2.5}, id="no-shared"
        ),
        pytest.param({"top_k": 1}, id="one-expert"),
        pytest.param({"force_load_balance": True}, id="forced"),
    ],
)
def test_output_and_gradients_equal_a_loop_over_experts(changes: dict[str, Any]) -> None:
    moe = made(**changes)
    moe.expert_bias[2] -= 10.0  # nobody chooses it: an empty segment
    x = torch.randn(2, 25, 16, requires_grad=True)
    ours, counts = moe(x)
    expected = by_loop(moe, x)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert int(counts.sum()) == 50 * moe.router.config.top_k
    assert (int(counts[2]) == 0) == (not moe.router.config.force_load_balance)
    inputs = [x, *moe.parameters()]
    probe = torch.randn_like(ours)
    gradients = torch.autograd.grad((ours * probe).sum(), inputs)
    for got, wanted in zip(gradients, torch.autograd.grad((expected * probe).sum(), inputs), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_bf16_experts_are_as_good_as_bf16_allows() -> None:
    """Off by 5.7e-3, one and a half roundings (2^-8); 1.2e-2 is twice that."""
    experts = Experts(4, 32, 24)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.2)
    rows, counts = torch.randn(30, 32), torch.tensor([12, 0, 17, 1])
    weights = torch.rand(30)
    exact = experts(rows, counts, weights)
    error = (experts.bfloat16()(rows.bfloat16(), counts, weights).float() - exact).norm() / exact.norm()
    assert error < 1.2e-2


def test_rows_are_sorted_by_expert_and_find_their_way_back() -> None:
    chosen = torch.tensor([[3, 0], [1, 3], [0, 1]])
    order, places = sorting(chosen)
    assert order.tolist() == [1, 4, 2, 5, 0, 3]  # slots in the order of experts 0 0 1 1 3 3, stable
    assert chosen.flatten()[order].tolist() == [0, 0, 1, 1, 3, 3]
    assert places.tolist() == [[4, 0], [2, 5], [1, 3]]
    x = torch.randn(3, 5)
    rows = dispatch(x, order, places)
    assert torch.equal(rows, x[[0, 2, 1, 2, 0, 1]])
    torch.testing.assert_close(combine(rows, order, places), 2 * x)


def test_every_slot_has_a_place_though_some_experts_stay_empty() -> None:
    experts = torch.rand(57, 12).topk(5).indices % 9
    order, places = sorting(experts)
    assert torch.equal(order[places.flatten()], torch.arange(57 * 5))
    assert experts.flatten()[order].tolist() == sorted(experts.flatten().tolist())


def test_dispatch_and_combine_have_exact_gradients() -> None:
    order, places = sorting(torch.stack([torch.randperm(6)[:3] for _ in range(4)]))
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(12, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(dispatch, (x, order, places))
    assert torch.autograd.gradcheck(combine, (rows, order, places))
    choices = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(arrange(choices, order, places), choices.flatten()[order])
    assert torch.autograd.gradcheck(arrange, (choices, order, places))


def test_a_sum_over_experts_is_made_in_fp32() -> None:
    rows = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)  # bf16 has no 257
    order, places = sorting(torch.tensor([[0, 1, 2]]))
    assert combine(rows, order, places).item() == 258.0


def balanced(counts: list[list[int]], rates: list[float | None], applied: float = 1.0, copies: int = 1) -> list[MoE]:
    layers = []
    for row, rate in zip(counts, rates, strict=True):
        moe = MoE(16, tiny_moe(num_experts=4, load_balance_coeff=rate), balanced=True)
        moe.tokens_per_expert += torch.tensor(row)
        layers.append(moe)
    balance(layers, lambda counts: counts * copies, torch.tensor(applied))
    return layers


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize(
    ("counts", "moved"),
    [([10, 0, 5, 5], [-1e-3, 1e-3, 0, 0]), ([9, 1, 1, 1], [-1.5e-3, 0.5e-3, 0.5e-3, 0.5e-3]), ([0, 0, 0, 0], [0] * 4)],
)
def test_biases_move_towards_equal_loads(counts: list[int], moved: list[float], copies: int) -> None:
    (moe,) = balanced([counts], [1e-3], copies=copies)
    torch.testing.assert_close(moe.expert_bias, torch.tensor(moved, dtype=torch.float32), atol=1e-9, rtol=0)
    assert moe.tokens_per_expert.tolist() == [0] * 4


def test_a_layer_that_is_not_balanced_does_not_keep_others_from_it() -> None:
    first, second, third = balanced([[9, 1, 1, 1]] * 3, [None, 1e-3, 2e-3])
    assert first.expert_bias.tolist() == [0] * 4
    torch.testing.assert_close(third.expert_bias, 2 * second.expert_bias)
    assert second.expert_bias.abs().sum() > 0


def test_a_skipped_step_moves_no_bias_and_counts_anew() -> None:
    (moe,) = balanced([[9, 1, 1, 1]], [1e-3], applied=0.0)
    assert moe.expert_bias.tolist() == moe.tokens_per_expert.tolist() == [0] * 4


def test_no_mixture_means_no_sum() -> None:
    def summed(counts: Tensor) -> Tensor:
        raise AssertionError("a stage without experts must not wait for others")

    balance([], summed, torch.tensor(1.0))
    tiny_deepseek(n_dense_layers=3).build().post_optimizer_step(summed, torch.tensor(1.0))


def test_balancing_evens_the_loads() -> None:
    """A router that prefers some experts; weights stand still."""
    moe = made(score_func="sigmoid", load_balance_coeff=2e-3)
    nn.init.normal_(moe.router.gate.weight, std=0.1)
    with torch.no_grad():
        moe.router.gate.weight[:2] += 0.3
    x = torch.rand(1, 512, 16)
    spread = []
    for _ in range(400):
        counts = moe(x)[1]
        moe.tokens_per_expert += counts
        balance([moe], lambda counts: counts, torch.tensor(1.0))
        spread.append(float(counts.max() / counts.float().mean()))
    assert spread[0] > 2
    assert spread[-1] < 1.2


def counted(model: nn.Module) -> list[int]:
    return [int(moe.tokens_per_expert.sum()) for moe in model.mixtures()]


def test_tokens_are_counted_in_training_only() -> None:
    model = tiny_deepseek().build()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    tokens = torch.randint(96, (2, 10))
    model(tokens)
    model(tokens)
    assert counted(model) == [2 * 2 * 10 * 3] * 2
    model.eval()
    with torch.no_grad():
        model(tokens)
    assert counted(model) == [2 * 2 * 10 * 3] * 2


def test_buffers_keep_their_dtypes_in_a_bf16_model() -> None:
    """A cast of the whole model, as setup makes it, must not reach biases whose steps bf16 would swallow."""
    with torch.device("meta"):
        model = tiny_deepseek().build().bfloat16()
    model.to_empty(device="cpu")
    model.reset_buffers()
    for moe in model.mixtures():
        assert (moe.expert_bias.dtype, moe.tokens_per_expert.dtype) == (torch.float32, torch.int64)
        assert moe.expert_bias.tolist() == moe.tokens_per_expert.tolist() == [0] * 8
    assert model.rotary.dtype == torch.float32
    assert "layers.1.moe.expert_bias" in model.state_dict()
    assert "layers.1.moe.tokens_per_expert" not in model.state_dict()


def test_all_blocks_with_experts_share_one_graph() -> None:
    """Whatever a layer's number, its balancing, or which experts its tokens choose."""
    torch._dynamo.reset()
    model = tiny_deepseek(
        n_layers=5, n_dense_layers=1, moe={"score_func": "sigmoid", "unbalanced_layers": (3,)}
    ).build()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.bfloat16()
    model.reset_buffers()
    counter = CompileCounterWithBackend("aot_eager_decomp_partition")
    for owner, method in model.compile_regions(experts_apart=False):
        setattr(owner, method, torch.compile(getattr(owner, method), fullgraph=True, backend=counter))
    chosen = []
    for _ in range(2):
        model(torch.randint(96, (2, 10)), labels=torch.randint(96, (2, 10))).backward()
        chosen.append([moe.tokens_per_expert.tolist() for moe in model.mixtures()])
        model.post_optimizer_step(lambda counts: counts, torch.tensor(1.0))
    assert counter.frame_count == 2  # of the dense block and of the others
    assert chosen[0] != chosen[1]
