"""Norms of layers against sums by hand, and layouts against one device."""

import pytest
import torch
from torch import Tensor

from src.distributed.model_stages import ModelStages
from src.models.base import ModelConfig
from src.train.stability.attention_logits import AttentionLogits
from src.train.stability.layer_norms import LayerNorms
from src.train.step.stepper import Stepper
from tests.distributed.layouts import degrees, parallel_network, rows, share
from tests.models.shapes import NO_MTP, tiny_deepseek, tiny_llama
from tests.ranks import RankPool
from tests.train.runs import changed, section

MODEL = tiny_llama(n_layers=2)
BATCH = rows(8, 16, MODEL.vocab_size)


def measured(layout: str, model: ModelConfig = MODEL) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Of two steps, of which the first is wanted; and sums over what one device has, by hand."""
    network = parallel_network(model, degrees(layout))
    optimizer = changed(section("optim", "adamw"), lr=1e-2).build(network.named_parameters(), torch.device("cpu"))
    stepper = Stepper(network, optimizer, max_norm=1.0, skips=0)
    norms = LayerNorms(network, optimizer, stepper.gradients, AttentionLogits(network))
    before = {name: each.detach().clone() for name, each in network.named_parameters()}
    hidden = hiddens(network) if layout == "single" and model is MODEL else []
    batches, found = share(BATCH, network.mesh, 8 // network.mesh.data_ranks), []
    norms.wanted = True
    outcome = stepper(batches, stop=False)
    found.append(norms.values())
    by_hand = {"gradient": float(outcome["grad_norm"])} | {
        f"norms/layer_{layer:02}/hidden": float(each.square().mean().sqrt()) for layer, each in enumerate(hidden)
    }
    if layout == "single":
        changes = {name: (each.detach() - before[name]).square().sum() for name, each in network.named_parameters()}
        by_hand["update"] = float(sum(changes.values())) ** 0.5
        head = changes["norm.weight"] + changes["output.weight"]
        by_hand |= {"norms/head/update": float(head) ** 0.5}
    stepper(batches, stop=False)
    found.append(norms.values())
    return found, by_hand


@torch.no_grad()
def hiddens(network: ModelStages) -> list[Tensor]:
    """What each block makes of the batch."""
    (model,) = network.stages
    assert model.tok_embeddings is not None
    found = [model.tok_embeddings(BATCH.tokens)]
    for block in model.layers.values():
        found.append(block(found[-1], model.rotary, None)[0])
    return found[1:]


@pytest.fixture(scope="module")
def alone(ranks: RankPool) -> tuple[list[dict[str, float]], dict[str, float]]:
    found: tuple[list[dict[str, float]], dict[str, float]] = ranks(1, measured, "single")[0]
    return found


def test_they_are_the_sums_by_hand(alone: tuple[list[dict[str, float]], dict[str, float]]) -> None:
    (found, unwanted), by_hand = alone
    assert not any(unwanted.values())
    assert sum(name.endswith("/attention_logit") for name in found) == MODEL.n_layers
    for kind in ("gradient", "update"):
        parts = [value for name, value in found.items() if name.endswith(f"/{kind}")]
        assert len(parts) == MODEL.n_layers + 2
        assert min(parts) > 0
        assert sum(part**2 for part in parts) ** 0.5 == pytest.approx(by_hand[kind], rel=1e-5)
    for name in by_hand.keys() - {"gradient", "update"}:
        assert found[name] == pytest.approx(by_hand[name], rel=1e-5)


@pytest.mark.parametrize("layout", ["fsdp2", "tp2", "pp2"])
def test_layouts_say_the_same(
    ranks: RankPool, alone: tuple[list[dict[str, float]], dict[str, float]], layout: str
) -> None:
    for (found, _), _ in ranks(2, measured, layout):
        assert found == pytest.approx(alone[0][0], rel=1e-3)


def test_modules_of_multi_token_prediction_have_names_of_their_own(ranks: RankPool) -> None:
    model = tiny_deepseek(mtp=NO_MTP | {"depths": 1})
    (found, _), by_hand = ranks(1, measured, "single", model)[0]
    assert min(found[f"norms/mtp_00/{kind}"] for kind in ("gradient", "update", "hidden")) > 0
    parts = [value for name, value in found.items() if name.endswith("/gradient")]
    assert len(parts) == model.n_layers + 1 + 2
    assert sum(part**2 for part in parts) ** 0.5 == pytest.approx(by_hand["gradient"], rel=1e-5)
