"""Routed experts on several ranks: the same gradients, weights and checkpoints wherever they lie."""

from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from src.checkpoint.store import Store
from src.distributed.compiling import Compile
from src.distributed.expert import grouping, permute
from src.distributed.precision import Precision
from src.train.state import TrainState
from src.train.step import Stepper
from tests.checkpoint.options import options
from tests.distributed.layouts import FP32, degrees, parallel_network, rows, share
from tests.distributed.test_layouts import whole
from tests.models.shapes import STRETCHED, tiny_deepseek
from tests.ranks import Ranks

# tensor 1, 2, 4 x expert 1, 2, 4 x experts whole or cut by tensor ranks, as far as 4 ranks go.
LAYOUTS = [
    *("fsdp4", "fsdp4_ep2", "fsdp4_ep4", "hsdp2x2_ep2", "cp2_fsdp2_ep4"),
    *("tp2_fsdp2", "tp2_fsdp2_ep2", "tp2_fsdp2_ep4", "tp2_fsdp2_etp2", "tp2_fsdp2_ep2_etp2"),
    *("tp4", "tp4_ep2", "tp4_ep4", "tp4_etp4", "cp2_tp2_ep2", "cp2_tp2_ep2_etp2"),
]
BF16 = Precision(storage="float32", compute="bfloat16", reduce="float32", float8=None)


def gradients(
    layouts: list[str], changes: dict[str, Any], precision: Precision = FP32, length: int = 16
) -> list[dict[str, Tensor]]:
    """Of every parameter, whole, after one step's passes over the same eight rows."""
    config = tiny_deepseek(**changes)
    found = []
    for layout in layouts:
        network = parallel_network(config, degrees(layout), precision)
        micro_batches = 8 // degrees(layout).data_ranks
        batches = share(rows(8, length, config.vocab_size), network.mesh, min(micro_batches, 2))
        network.backward(batches, torch.tensor(1e-2))
        named = network.named_parameters()
        found.append({name: whole(each.grad) for name, each in named if each.grad is not None})
    return found


SHAPES: dict[str, dict[str, Any]] = {
    "v3": {
        "n_layers": 2,
        "q_lora_rank": 40,
        "rope_scaling": STRETCHED,
        "moe": {"hidden_dim": 32, "score": "sigmoid", "normalise": True, "groups": 4, "groups_kept": 2},
    },
    "v2": {"n_layers": 2, "moe": {"hidden_dim": 32, "score_before_experts": True, "scale": 4.0, "n_shared": 0}},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_each_gradient_is_that_of_one_device(ranks: Ranks, shape: str) -> None:
    (single,) = ranks(1, gradients, ["single"], SHAPES[shape])[0]
    for layout, found in zip(LAYOUTS, ranks(4, gradients, LAYOUTS, SHAPES[shape])[3], strict=True):
        assert set(found) == set(single)
        for name, gradient in single.items():
            difference = (found[name] - gradient).norm() / gradient.norm()
            assert difference < 1e-4, f"{layout} {name}: {difference:.1e}"


def test_gradient_norms_of_bf16(ranks: Ranks) -> None:
    """Vectors of 64 numbers over 1,024 tokens: with fewer the rounding of one device itself is as large."""
    layouts, changes = ["fsdp4_ep4", "tp2_fsdp2_ep2_etp2", "tp4", "tp4_etp4"], SHAPES["v3"] | {"kv_lora_rank": 64}
    (single,) = ranks(1, gradients, ["single"], changes, BF16, 128)[0]
    for layout, found in zip(layouts, ranks(4, gradients, layouts, changes, BF16, 128)[0], strict=True):
        for name, gradient in single.items():
            ratio = found[name].norm() / gradient.norm()
            assert ratio == pytest.approx(1.0, abs=3e-3), f"{layout} {name}"


def test_rows_are_grouped_by_expert() -> None:
    counts = torch.tensor([[4, 2, 0, 3], [1, 0, 0, 4]])  # from two ranks, for four experts
    expert = torch.arange(4).repeat(2).repeat_interleave(counts.flatten())
    index, inverse = grouping(counts, int(counts.sum()))
    assert torch.equal(expert[index], expert.sort(stable=True).values)
    assert torch.equal(index, expert.argsort(stable=True))
    x = torch.randn(len(index), 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(permute(permute(x, index, inverse), inverse, index), x)
    assert torch.autograd.gradcheck(lambda rows: permute(rows, index, inverse), (x,))


ODD = {"n_layers": 2, "moe": {"n_experts": 6, "hidden_dim": 32}}


def test_experts_that_cannot_be_dealt_out_are_cut_inside(ranks: Ranks) -> None:
    """6 experts over 4 ranks, and 3 over 2: FSDP cuts the features of each."""
    layouts = ["fsdp4", "fsdp4_ep2", "tp2_fsdp2_ep2"]
    assert all(degrees(layout).cuts_inside(6) for layout in layouts)
    (single,) = ranks(1, gradients, ["single"], ODD)[0]
    for layout, found in zip(layouts, ranks(4, gradients, layouts, ODD)[1], strict=True):
        for name, gradient in single.items():
            assert (found[name] - gradient).norm() < 1e-4 * gradient.norm(), f"{layout} {name}"


def state_of(layout: str, seed: int) -> tuple[TrainState, dict[str, Any]]:
    """After one step, and the tree of a checkpoint."""
    config = tiny_deepseek(n_layers=2)
    network = parallel_network(config, degrees(layout), seed=seed)
    optimizer = torch.optim.AdamW((each for _, each in network.named_parameters()), lr=1e-2, fused=True)
    stepper = Stepper(network, optimizer, max_norm=1.0, skips=0)
    stepper(share(rows(8, 16, config.vocab_size, seed=seed), network.mesh, 1), stop=False)
    state = TrainState(network, optimizer, seed, step=1)
    return state, state.tree(0.0)


def tensors(tree: dict[str, Any]) -> dict[str, Tensor]:
    """Of the model and the optimizer, whole."""
    found = {f"model.{name}": whole(each) for name, each in tree["model"].items()}
    for name, moments in tree["optimizer"].items():
        found |= {f"{key}.{name}": whole(moment) for key, moment in moments.items()}
    return found


def carried(folder: Path, source: str, targets: list[str]) -> list[str]:
    """Tensors that another layout reads differently from how `source` wrote them."""
    _, written = state_of(source, seed=1)
    store = Store(folder, options())
    store.save(1, written, {})
    store.finish()
    right, wrong = tensors(written), []
    for target in targets:
        _, tree = state_of(target, seed=2)
        path = store.newest()
        assert path is not None
        found = tensors(store.load(path, tree))
        assert set(found) == set(right)
        wrong += [f"{target}: {name}" for name in right if not torch.equal(found[name], right[name])]
    return wrong


@pytest.mark.parametrize("source", ["fsdp4_ep4", "tp2_fsdp2_ep2_etp2"])
def test_a_checkpoint_fits_every_layout(ranks: Ranks, tmp_path: Path, source: str) -> None:
    targets = ["fsdp4", "fsdp4_ep2", "hsdp2x2_ep2", "tp4_ep2", "tp2_fsdp2_ep2_etp2", "fsdp4_ep4"]
    assert ranks(4, carried, tmp_path, source, targets) == [[]] * 4


def repeated(layout: str) -> list[float]:
    """Norms of three steps, under deterministic algorithms."""
    torch.use_deterministic_algorithms(mode=True)
    try:
        config = tiny_deepseek(n_layers=2)
        network = parallel_network(config, degrees(layout))
        optimizer = torch.optim.AdamW((each for _, each in network.named_parameters()), lr=1e-2, fused=True)
        stepper = Stepper(network, optimizer, max_norm=1.0, skips=0)
        return [
            stepper(share(rows(8, 16, config.vocab_size, seed=step), network.mesh, 2), stop=False)[1].item()
            for step in range(3)
        ]
    finally:
        torch.use_deterministic_algorithms(mode=False)


def test_the_same_bits_every_time(ranks: Ranks) -> None:
    first, second = (ranks(2, repeated, "fsdp2_ep2") for _ in range(2))
    assert first == second


def graphs(layout: str) -> int:
    """How many a compiler makes of four layers, three of them with experts."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    made = partial(torch.compile, backend="aot_eager", fullgraph=True)
    with patch("torch.compile", lambda function, **_: made(function)):
        compile = Compile(blocks=True, loss=False, mode="default")
        network = parallel_network(tiny_deepseek(n_layers=4), degrees(layout), BF16, compile=compile)
    for seed in range(2):
        network.backward(share(rows(4, 16, 96, seed=seed), network.mesh, 1), torch.tensor(1e-2))
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def test_all_layers_share_their_graphs(ranks: Ranks) -> None:
    """A dense block, and of a block with experts all of it, or what is before, beside and behind the exchange."""
    assert ranks(2, graphs, "tp2_etp2") == [2, 2]
    assert ranks(2, graphs, "fsdp2_ep2") == [5, 5]
