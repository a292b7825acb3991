"""Attention logits against a product in float64, and QK-clip: heads come down to the threshold, others stay."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from src.models.attention.cores import block_mask
from src.models.base import ModelConfig
from src.train.stability.attention_logits import AttentionLogits, QKClip, largest_logits
from tests.distributed.layouts import degrees, parallel_network, rows, share
from tests.distributed.test_layouts import whole
from tests.models.shapes import tiny_deepseek, tiny_llama
from tests.ranks import RankPool

MODELS: dict[str, ModelConfig] = {
    "grouped queries": tiny_llama(n_layers=1),
    "as many keys": tiny_llama(n_layers=1, n_kv_heads=8),
    "latent": tiny_deepseek(n_layers=1, n_dense_layers=1),
}


def test_the_largest_of_what_is_seen() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 600, 8), torch.randn(2, 2, 600, 8)
    documents = (torch.arange(600) // 77).int().expand(2, -1)
    mask = block_mask("block_causal", documents, None, 2, 600, q.device)
    logits = q.double() @ k.double().repeat_interleave(2, dim=1).mT
    causal = torch.ones(600, 600, dtype=torch.bool).tril()
    same = documents[0][:, None] == documents[0]
    for given, seen in ((None, causal), (mask, causal & same)):
        expected = logits.masked_fill(~seen, -torch.inf).amax(dim=(0, 2, 3))
        torch.testing.assert_close(largest_logits(q, k, given, 0.5).double(), 0.5 * expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(largest_logits(q, k, given, None).double(), expected / 8**0.5, rtol=1e-5, atol=0)


def clipped(model: str, layout: str, skipped: float = 0.0) -> dict[str, Any]:
    """The largest logits before and after a clip to their median, and the weights of attention after it."""
    config = MODELS[model]
    network = parallel_network(config, degrees(layout))  # type: ignore[arg-type]
    parameters = [nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    optimizer.found_inf = torch.tensor(skipped)  # type: ignore[attr-defined]
    logits = AttentionLogits(network)
    with torch.no_grad():  # heads that differ
        for name, weight in network.named_parameters():
            if ".attention." in name and weight.ndim == 2:
                weight.mul_(20.0)
    logits.wanted = True
    before = _largest(network, logits)
    threshold = float(before.median())
    clip = QKClip(logits, network, optimizer, threshold)
    _run(network)
    clip.clip()
    weights = {name: whole(each) for name, each in network.tensors().items() if ".attention." in name}
    return {"before": before, "after": _largest(network, logits), "threshold": threshold, "weights": weights}


def _run(network: Any) -> None:
    batches = share(rows(4, 16, 96), network.mesh, 1)
    network.backward(batches, torch.ones(()))


def _largest(network: Any, logits: AttentionLogits) -> Tensor:
    _run(network)
    return logits.reduce()[0].clone()


@pytest.mark.parametrize("model", MODELS)
def test_heads_above_come_down_to_the_threshold(ranks: RankPool, model: str) -> None:
    (found,) = ranks(1, clipped, model, "single")
    before, after, threshold = found["before"], found["after"], found["threshold"]
    assert (before > threshold).any()
    torch.testing.assert_close(after, before.clamp(max=threshold), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "layout"), [("grouped queries", "tp2"), ("latent", "tp2"), ("as many keys", "fsdp2")]
)
def test_layouts_clip_as_one_device(ranks: RankPool, model: str, layout: str) -> None:
    (alone,) = ranks(1, clipped, model, "single")
    for found in ranks(2, clipped, model, layout):
        torch.testing.assert_close(found["before"], alone["before"], rtol=1e-4, atol=1e-6)
        for name, weight in found["weights"].items():
            torch.testing.assert_close(weight, alone["weights"][name], rtol=1e-4, atol=1e-6)


def test_a_skipped_step_clips_nothing(ranks: RankPool) -> None:
    (found,) = ranks(1, clipped, "latent", "single", 1.0)
    assert torch.equal(found["after"], found["before"])
