"""What a block of a DeepSeek-V3 keeps for its backward, against autograd."""

from typing import Any

import pytest
import torch
from torch import nn

from src.models.accounting import Slice
from tests.distributed.test_recompute import PARTITIONER, RANDOM_STATE_BYTES, block_of, live_bytes
from tests.models.shapes import tiny_deepseek
from tests.models.test_accounting import kept_bytes

TOKENS = 2 * 96


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"n_dense_layers": 3}, id="dense"),
        pytest.param({"n_dense_layers": 0}, id="experts"),
        pytest.param(
            {"n_dense_layers": 0, "moe": {"score_before_experts": True, "num_shared_experts": 0}}, id="score-before"
        ),
        pytest.param({"n_dense_layers": 0, "moe": {"score_func": "sigmoid", "route_norm": True}}, id="sigmoid"),
    ],
)
def test_a_block_keeps_what_autograd_keeps(dtype: torch.dtype, changes: dict[str, Any]) -> None:
    config = tiny_deepseek(**changes)
    model = config.build()
    block, rotary = model.layers["0"].to(dtype), model.rotary
    # Without norms a block's input is also the input of its matrices: kept once, where a fused norm's would be twice.
    block.attention_norm, block.ffn_norm = nn.Identity(), nn.Identity()
    block.attention.kv_norm = nn.Identity()
    x = torch.randn(2, 96, config.dim, dtype=dtype, requires_grad=True)
    cut = Slice(tokens=TOKENS, tensor=1, element_bytes=dtype.itemsize, compiled=False)
    # The latent that a fused norm reads is a part of what the shared key turns out of, so wkv_a's result stays.
    norms = TOKENS * ((2 * config.dim + config.kv_lora_rank) * cut.element_bytes + 3 * 4)
    assert kept_bytes(block, x, rotary, block) == config.saved_by_block(cut).whole - norms


@pytest.mark.parametrize("dense", [3, 0])
def test_a_compiled_block_keeps_what_the_partitioner_keeps(dense: int) -> None:
    """The same cut into forward and backward as inductor's, run eagerly."""
    config = tiny_deepseek(n_dense_layers=dense)
    model = config.build()
    block = model.layers["0"].to(torch.bfloat16)
    x = torch.randn(2, 96, config.dim, dtype=torch.bfloat16, requires_grad=True)
    cut = Slice(tokens=TOKENS, tensor=1, element_bytes=2, compiled=True)
    forward = torch.compile(block.forward, fullgraph=True, backend=PARTITIONER)
    measured = kept_bytes(block, x, model.rotary, lambda *args: forward(*args)[0])
    assert measured == pytest.approx(config.saved_by_block(cut).whole, rel=0.01)


@pytest.mark.parametrize("dense", [3, 0])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_selective_block_keeps_what_is_planned(dense: int, compiled: bool) -> None:
    """Among it the products of all experts, which are dear, and the choice of experts, which must not differ."""
    config = tiny_deepseek(n_dense_layers=dense)
    block, x, rotary = block_of(config, "selective")
    block.bfloat16()
    x = x.detach().bfloat16().requires_grad_()
    cut = Slice(tokens=TOKENS, tensor=1, element_bytes=2, compiled=compiled)
    if compiled:
        forward = torch.compile(block.forward, fullgraph=True, backend=PARTITIONER)
        kept = kept_bytes(block, x, rotary, lambda *args: forward(*args)[0])
    else:
        before = live_bytes()
        result, counts = block(x, rotary, None)
        result_bytes = result.untyped_storage().nbytes() + (0 if counts is None else counts.untyped_storage().nbytes())
        kept = live_bytes() - before - result_bytes + x.untyped_storage().nbytes() - RANDOM_STATE_BYTES
    assert kept == pytest.approx(config.saved_by_block(cut).selective, rel=0.01)


def test_blocks_of_two_kinds_are_averaged() -> None:
    cut = Slice(tokens=64, tensor=1, element_bytes=2, compiled=False)
    mixed, dense, experts = (tiny_deepseek(n_dense_layers=count).saved_by_block(cut) for count in (1, 3, 0))
    assert mixed.whole == pytest.approx((dense.whole + 2 * experts.whole) / 3, abs=4)
    assert mixed.selective == pytest.approx((dense.selective + 2 * experts.selective) / 3, abs=4)
    assert mixed.working == max(dense.working, experts.working)
    assert mixed.input == dense.input == experts.input == 64 * 2 * 64
