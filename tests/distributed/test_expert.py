"""Routed experts on several ranks: the same gradients, weights and checkpoints wherever they lie."""

from typing import Any

import pytest
import torch
from torch import Tensor

from src.distributed.expert import grouping, permute
from src.distributed.precision import Precision
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
