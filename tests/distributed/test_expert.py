"""Routed experts on several ranks: the same gradients, weights and checkpoints wherever they lie."""

from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from src.checkpoint.store import Store
from src.distributed.compile import Compile
from src.distributed.expert.all_to_all import SplitSizes
from src.distributed.expert.expert_parallel import grouping, permute, split_experts
from src.distributed.mesh import Mesh
from src.distributed.precision.config import Precision
from src.models.moe.experts import grouped_product
from src.models.moe.moe import MoE
from src.train.state import TrainState
from src.train.step.stepper import Stepper
from tests.checkpoint.options import options
from tests.distributed.layouts import FP32, adamw, degrees, parallel_network, rows, share
from tests.distributed.test_layouts import whole
from tests.models.shapes import STRETCHED, tiny_deepseek, tiny_moe
from tests.ranks import RankPool
from tests.train.runs import changed, section

BF16 = Precision(storage="float32", compute="bfloat16", reduce="float32", float8=None)


def grid() -> list[str]:
    """tensor 1, 2, 4 x expert 1, 2, 4 x experts whole or cut by the tensor ranks, on 2 ranks or as many as it takes.

    All but 4 x 4 with experts cut, which takes 16.
    """
    found = []
    for tensor, expert in product((1, 2, 4), repeat=2):
        for cut in sorted({1, tensor}):
            if (world := max(2, tensor, expert * cut)) <= 8:
                found.append(f"tp{tensor}_fsdp{world // tensor}_ep{expert}_etp{cut}")
    return found


def gradients(
    layouts: list[str], changes: dict[str, Any], precision: Precision = FP32, length: int = 16, shunned: int = 0
) -> list[dict[str, Tensor]]:
    """The loss, and of every parameter the whole gradient, of one step over the same eight rows.

    No token goes to the first `shunned` experts of a layer.
    """
    config = tiny_deepseek(**changes)
    found = []
    for layout in layouts:
        network = parallel_network(config, degrees(layout), precision)
        for moe in (moe for part in network.stages for moe in part.mixtures()):
            moe.expert_bias[:shunned] = -10.0
        loss = network.backward(share(rows(8, length, config.vocab_size), network.mesh, 1), torch.tensor(1e-2))
        torch.distributed.all_reduce(loss)
        named = network.named_parameters()
        found.append({name: whole(each.grad) for name, each in named if each.grad is not None})
        found[-1]["loss"] = loss / network.mesh.loss_copies
    return found


def compared(
    ranks: RankPool, layouts: list[str], changes: dict[str, Any], *more: Any
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Of each layout and tensor: both their names, what the layout's last rank found, and what one device finds."""
    (single,) = ranks(1, gradients, ["single"], changes, *more)[0]
    for world in sorted({degrees(layout).world for layout in layouts}):
        group = [layout for layout in layouts if degrees(layout).world == world]
        for layout, found in zip(group, ranks(world, gradients, group, changes, *more)[-1], strict=True):
            assert set(found) == set(single)
            yield from ((f"{layout} {name}", found[name], expected) for name, expected in single.items())


SHAPES: dict[str, dict[str, Any]] = {
    "v3": {
        "n_layers": 2,
        "q_lora_rank": 40,
        "rope_scaling": STRETCHED,
        "moe": {
            "hidden_dim": 32,
            "score_func": "sigmoid",
            "route_norm": True,
            "num_expert_groups": 4,
            "num_limited_groups": 2,
        },
    },
    "v2": {
        "n_layers": 2,
        "moe": {"hidden_dim": 32, "score_before_experts": True, "route_scale": 4.0, "num_shared_experts": 0},
    },
}
IN_TURN: dict[str, Any] = {"n_layers": 2, "moe": {"hidden_dim": 32, "force_load_balance": True}}
OTHERS = ["hsdp2x2_ep2", "cp2_fsdp2_ep4", "cp2_tp2_ep2", "cp2_tp2_ep2_etp2"]


@pytest.mark.slow
def test_each_gradient_is_that_of_one_device(ranks: RankPool) -> None:
    for name, found, expected in compared(ranks, [*grid(), *OTHERS], SHAPES["v3"]):
        difference = (found - expected).norm() / expected.norm()
        assert difference < 1e-4, f"{name}: {difference:.1e}"


def test_experts_in_turn_compute_what_one_device_does(ranks: RankPool) -> None:
    """Rows of 16 positions, or 8 on a tensor rank, times 3 choices are multiples of 8 experts: all turns agree."""
    layouts = ["fsdp4_ep2", "fsdp4_ep4", "tp2_fsdp2_ep4", "tp2_fsdp2_ep2_etp2"]
    for name, found, expected in compared(ranks, layouts, IN_TURN):
        assert (found - expected).norm() <= 1e-4 * expected.norm(), name


@pytest.mark.slow
def test_ranks_to_whose_experts_no_token_goes(ranks: RankPool) -> None:
    """Of eight experts only the last four are chosen: half of the ranks that hold them get no row."""
    layouts = ["fsdp4_ep2", "fsdp4_ep4", "tp2_fsdp2_ep4", "tp2_fsdp2_ep2_etp2", "tp4_ep2", "tp4_etp4"]
    for name, found, expected in compared(ranks, layouts, SHAPES["v2"], FP32, 16, 4):
        assert (found - expected).norm() <= 1e-4 * expected.norm(), name
        assert not (".experts." in name and found[:4].any()), name


@pytest.mark.slow
def test_gradient_norms_of_bf16(ranks: RankPool) -> None:
    """Vectors of 64 numbers over 2,048 tokens: with fewer the rounding of one device itself is as large.

    A gradient differs by up to 7.5e-3 in all, two roundings of bf16 (2^-8), and its norm by up to 2.8e-3 on one
    processor and 3.3e-3 on another. 1e-2 is three times that; where one rank's part of four is missing, the norm is off
    by 1 - sqrt(3/4) = 0.13.
    """
    changes = SHAPES["v3"] | {"kv_lora_rank": 64, "max_seq_len": 256}
    layouts = ["fsdp4_ep4", "tp2_fsdp2_ep2_etp2", "tp4", "tp4_etp4"]
    for name, found, expected in compared(ranks, layouts, changes, BF16, 256):
        assert found.norm() / expected.norm() == pytest.approx(1.0, abs=1e-2), name


def in_bf16(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """As GPUs take it, and so tensors without values."""
    return grouped_product(rows.bfloat16(), matrices.bfloat16(), ends).float()


class Words(TorchDispatchMode):
    """What a mixture does that takes time: rows go, rows must have come, matrices of the shared experts multiply."""

    names: ClassVar = {"all_to_all_single": "go", "wait_tensor": "wait", "mm": "product"}

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.said += [word] if (word := self.names.get(operation.overloadpacket.__name__)) else []
        return operation(*args, **(kwargs or {}))


def told(layout: str, in_turn: bool = False) -> tuple[str, str]:
    """The words of a layer's forward and of its backward; `ask` is the host's, for numbers of rows.

    Tensors have no values here: whatever else were asked of them, a number, a comparison, a size, would raise.
    """
    mesh = Mesh(degrees(layout), "cpu")
    mesh.spread_experts()
    with FakeTensorMode(), Words() as words:

        def read(_: SplitSizes) -> tuple[tuple[int, ...], tuple[int, ...]]:
            words.said.append("ask")
            return (40, 8), (40, 40)

        moe = MoE(16, tiny_moe(force_load_balance=in_turn), balanced=True)
        moe.experts.product = in_bf16
        split_experts(moe, mesh)
        x = torch.randn(2, 8, 16, requires_grad=True)
        with patch.object(SplitSizes, "read", read):
            routed, counts = moe(x)
        forward, words.said = " ".join(words.said), []
        routed.sum().backward()
        backward = " ".join(words.said)
        asked = [] if layout == "single" or in_turn else [lambda: moe(x)]
        for value in (counts.tolist, counts.nonzero, *asked):
            with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
                value()
    return forward, backward


def test_the_host_asks_once_and_shared_experts_compute_while_rows_travel(ranks: RankPool) -> None:
    assert ranks(1, told, "single") == [("product product product", " ".join(["product"] * 8))]
    for forward, backward in ranks(2, told, "fsdp2_ep2"):
        # Numbers of rows; rows and their weights, beside three matrices; results home.
        assert forward == "go wait ask go go product product product wait wait go wait"
        # Results; rows and weights, beside the six products of three matrices; the router.
        assert backward == f"go wait go go {'product ' * 6}wait wait product product"


def test_nobody_asks_where_experts_take_turns(ranks: RankPool) -> None:
    for forward, backward in ranks(2, told, "fsdp2_ep2", True):
        assert forward == "go go product product product wait wait go wait"
        assert backward == f"go wait go go {'product ' * 6}wait wait product product"


def test_rows_are_grouped_by_expert() -> None:
    counts = torch.tensor([[4, 2, 0, 3], [1, 0, 0, 4]])  # from two ranks, for four experts
    expert = torch.arange(4).repeat(2).repeat_interleave(counts.flatten())
    index, inverse = grouping(counts, int(counts.sum()))
    assert torch.equal(expert[index], expert.sort(stable=True).values)
    assert torch.equal(index, expert.argsort(stable=True))
    x = torch.randn(len(index), 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(permute(permute(x, index, inverse), inverse, index), x)
    assert torch.autograd.gradcheck(lambda rows: permute(rows, index, inverse), (x,))


ODD = {"n_layers": 2, "moe": {"num_experts": 6, "hidden_dim": 32}}


def test_experts_that_cannot_be_dealt_out_are_cut_inside(ranks: RankPool) -> None:
    """6 experts over 4 ranks, and 3 over 2: FSDP cuts the features of each."""
    layouts = ["fsdp4", "fsdp4_ep2", "tp2_fsdp2_ep2"]
    assert all(degrees(layout).cuts_inside(6) for layout in layouts)
    for name, found, expected in compared(ranks, layouts, ODD):
        assert (found - expected).norm() < 1e-4 * expected.norm(), name


def tree_of(layout: str, seed: int, steps: int) -> dict[str, Any]:
    """What a checkpoint holds before or after some steps."""
    config = tiny_deepseek(n_layers=2)
    network = parallel_network(config, degrees(layout), seed=seed)
    optimizer = changed(section("optim", "adamw"), lr=1e-2).build(network.named_parameters(), torch.device("cpu"))
    stepper = Stepper(network, optimizer, max_norm=1.0, skips=0)
    for _ in range(steps):
        stepper(share(rows(8, 16, config.vocab_size, seed=seed), network.mesh, 1), stop=False)
    return TrainState(network, optimizer, seed, step=steps).tree(0.0)


def tensors(tree: dict[str, Any]) -> dict[str, Tensor]:
    """Of the model and the optimizer, whole."""
    found = {f"model.{name}": whole(each) for name, each in tree["model"].items()}
    for name, moments in tree["optimizer"].items():
        found |= {f"{key}.{name}": whole(moment) for key, moment in moments.items()}
    return found


def carried(folder: Path, source: str, targets: list[str]) -> list[str]:
    """Tensors that another layout reads differently from how `source` wrote them."""
    written = tree_of(source, seed=1, steps=1)
    store = Store(folder, options())
    store.save(1, written, {})
    store.finish()
    right, wrong = tensors(written), []
    for target in targets:
        path = store.newest()
        assert path is not None
        found = tensors(store.load(path, tree_of(target, seed=2, steps=0)))
        assert set(found) == set(right)
        wrong += [f"{target}: {name}" for name in right if not torch.equal(found[name], right[name])]
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "targets"),
    [
        ("fsdp4_ep4", ["fsdp4", "hsdp2x2_ep2", "tp4_ep2", "tp2_fsdp2_ep2_etp2"]),
        ("tp2_fsdp2_ep2_etp2", ["fsdp4_ep2", "tp4_ep2", "fsdp4_ep4"]),
    ],
)
def test_a_checkpoint_fits_every_layout(ranks: RankPool, tmp_path: Path, source: str, targets: list[str]) -> None:
    assert ranks(4, carried, tmp_path, source, targets) == [[]] * 4


def repeated(layout: str) -> list[float]:
    """Norms of three steps, under deterministic algorithms."""
    torch.use_deterministic_algorithms(mode=True)
    try:
        config = tiny_deepseek(n_layers=2)
        network = parallel_network(config, degrees(layout))
        optimizer = adamw(network)
        stepper = Stepper(network, optimizer, max_norm=1.0, skips=0)
        return [
            stepper(share(rows(8, 16, config.vocab_size, seed=step), network.mesh, 2), stop=False)["grad_norm"].item()
            for step in range(3)
        ]
    finally:
        torch.use_deterministic_algorithms(mode=False)


def test_the_same_bits_every_time(ranks: RankPool) -> None:
    first, second = (ranks(2, repeated, "fsdp2_ep2") for _ in range(2))
    assert first == second


def compile_regions(layout: str, recompute: str = "none") -> int:
    """How many a compiler makes of three layers, two of them with experts."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    made = partial(torch.compile, backend="eager", fullgraph=True)
    with patch("torch.compile", lambda function, **_: made(function)):
        compile = Compile(blocks=True, loss=False, graph=False, mode="default")
        network = parallel_network(tiny_deepseek(n_layers=3), degrees(layout), BF16, recompute, compile)
    for seed in range(2):
        network.backward(share(rows(4, 16, 96, seed=seed), network.mesh, 1), torch.tensor(1e-2))
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.slow
def test_all_layers_share_their_graphs(ranks: RankPool) -> None:
    """A dense block, and of a block with experts all of it; or its attention, router, experts, shared experts, and the
    three things that are done between transfers.
    """
    assert ranks(2, compile_regions, "tp2_etp2") == [2, 2]
    assert ranks(2, compile_regions, "fsdp2_ep2") == ranks(2, compile_regions, "fsdp2_ep2", "selective") == [8, 8]
