"""Stages train like one device, under every schedule and next to every other cut."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from src.checkpoint.store import Store
from src.distributed.fsdp.gradient_norm import Gradients
from src.distributed.model_stages import ModelStages
from src.models.cache import Cache, attending
from src.train.state import TrainState
from src.train.step.stepper import Stepper
from tests.checkpoint.options import options
from tests.distributed.layouts import Rows, adamw, degrees, parallel_network, rows, share
from tests.distributed.test_layouts import whole
from tests.models.shapes import tiny_llama
from tests.ranks import RankPool
from tests.train.runs import changed, section

STEPS = 2
LAYERS = 6


def trained(layout: str, keys: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """Losses, norms, held-out loss, logits and last weights of a few steps."""
    config = tiny_llama(n_layers=LAYERS, **others.get("model", {}))
    network = parallel_network(config, degrees(layout, **keys), recompute=others.get("recompute", "none"))
    optimizer = adamw(network)
    stepper = Stepper(network, optimizer, max_norm=1.0, skips=0)
    found: dict[str, Any] = {"losses": [], "norms": [], "tokens": []}
    for step in range(STEPS):
        batches = share(rows(8, 16, config.vocab_size, seed=step), network.mesh, 8 // network.mesh.data_ranks)
        if config.within_documents:
            batches = [with_documents(batch) for batch in batches]
        outcome = stepper(batches, stop=False)
        for key, name in (("losses", "loss"), ("norms", "grad_norm"), ("tokens", "tokens")):
            found[key].append(outcome[name].item())
    return found | {
        "weights": {name: whole(parameter) for name, parameter in network.named_parameters()},
        "held_out": held_out(network),
        "logits": logits(network),
    }


def with_documents(batch: Rows) -> Rows:
    """Borders that depend on the row's tokens, so that another micro-batch's mask would be a wrong one."""
    starts = batch.tokens % 5 == 0
    places = torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens)
    first = torch.where(starts, places, 0).cummax(dim=1).values
    return Rows(batch.tokens, batch.labels, places - first, starts.cumsum(dim=1).int())


def held_out(network: ModelStages) -> float:
    words = network.stages[0].config.vocab_size
    with network.inference():
        batches = share(rows(4, 16, words, seed=99), network.mesh, 4 // network.mesh.data_ranks)
        part = network.loss([with_documents(batch) for batch in batches])
    torch.distributed.all_reduce(part)
    return part.item() / network.mesh.loss_copies


def logits(network: ModelStages) -> torch.Tensor:
    tokens = rows(1, 16, network.stages[0].config.vocab_size, seed=98).tokens
    cache = Cache(network.stages[0].config, [0], 16, network.device)
    with network.inference(), ExitStack() as stack:
        for part in network.stages:
            stack.enter_context(attending(part, cache))
        return network.logits(tokens, 5, cache.positions(16), cache.mask(16))


@pytest.fixture(scope="module")
def single(ranks: RankPool) -> dict[str, Any]:
    return ranks(1, trained, "single", {}, {})[0]


def assert_like(expected: dict[str, Any], results: list[dict[str, Any]]) -> None:
    names = set()
    for result in results:
        assert result["tokens"] == expected["tokens"]
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert result["norms"] == pytest.approx(expected["norms"], rel=1e-4)
        assert result["held_out"] == pytest.approx(expected["held_out"], rel=1e-4)
        # AdamW divides by the root of a moment, which magnifies what is near zero.
        torch.testing.assert_close(result["logits"], expected["logits"], rtol=0, atol=5e-3)
        for name, weight in result["weights"].items():
            torch.testing.assert_close(weight, expected["weights"][name], rtol=0, atol=2e-3, msg=name)
        names |= set(result["weights"])
    assert names == set(expected["weights"])


SCHEDULES = ["GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_trains_like_one_device(ranks: RankPool, single: dict[str, Any], schedule: str) -> None:
    assert_like(single, ranks(2, trained, "pp2", {"pipeline_schedule": schedule}, {}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "keys"),
    [
        ("pp2_tp2", {}),
        ("pp2_tp2", {"pipeline_schedule": "ZBVZeroBubble"}),
        ("pp2_tp2", {"pipeline_schedule": "InterleavedZeroBubble"}),
        ("pp2_fsdp2", {}),
        ("pp2_fsdp2", {"pipeline_schedule": "GPipe", "reshard": "always"}),
        ("pp2_fsdp2", {"pipeline_schedule": "Interleaved1F1B", "reshard": "never"}),
        ("pp2_fsdp2", {"pipeline_schedule": "ZBVZeroBubble"}),
        ("pp2_ddp2", {}),
        ("pp4", {}),
        ("pp4", {"pipeline_schedule": "Interleaved1F1B"}),
        ("pp4", {"pipeline_schedule": "DualPipeV"}),
        ("pp2_cp2", {"pipeline_schedule": "LoopedBFS"}),
    ],
)
def test_stages_go_with_every_other_cut(
    ranks: RankPool, single: dict[str, Any], layout: str, keys: dict[str, Any]
) -> None:
    assert_like(single, ranks(4, trained, layout, keys, {}))


@pytest.mark.slow
def test_three_cuts_at_once(ranks: RankPool, single: dict[str, Any]) -> None:
    assert_like(single, ranks(8, trained, "pp2_tp2_fsdp2", {}, {}))


LAYER_NAMES = [f"layers.{layer}" for layer in range(LAYERS)]
STAGES = [["tok_embeddings"], [*LAYER_NAMES, "norm", "output"]]


@pytest.mark.parametrize(
    "keys",
    [
        {"stages": STAGES},
        {"first_stage_less": 0, "last_stage_less": 3},
        {"pipeline_schedule": "Interleaved1F1B", "layers_per_stage": 1, "first_stage_less": 0, "last_stage_less": 0},
    ],
)
def test_where_the_cut_is_changes_no_number(ranks: RankPool, single: dict[str, Any], keys: dict[str, Any]) -> None:
    assert_like(single, ranks(2, trained, "pp2", keys, {}))


@pytest.mark.parametrize("schedule", ["1F1B", "InterleavedZeroBubble"])
def test_recompute_goes_with_stages(ranks: RankPool, single: dict[str, Any], schedule: str) -> None:
    assert_like(single, ranks(2, trained, "pp2", {"pipeline_schedule": schedule}, {"recompute": "full"}))


def unscaled(layout: str, keys: dict[str, Any]) -> list[float]:
    """Norms when the schedule's loss is left undivided: what `scale` is worth."""
    config = tiny_llama(n_layers=LAYERS)
    network = parallel_network(config, degrees(layout, **keys))
    gradients = Gradients([parameter for _, parameter in network.named_parameters()], 1)
    found = []
    for scale in (1.0, 0.5):
        network.backward(share(rows(4, 16, config.vocab_size), network.mesh, 4), torch.tensor(scale))
        squares = gradients.squares()
        torch.distributed.all_reduce(squares)
        found.append(squares.sqrt().item())
        for _, parameter in network.named_parameters():
            parameter.grad = None
    return found


def test_the_loss_is_scaled_inside_the_schedule(ranks: RankPool) -> None:
    whole_norm, half_norm = ranks(2, unscaled, "pp2", {})[0]
    assert half_norm == pytest.approx(whole_norm / 2, rel=1e-5)
    assert ranks(1, unscaled, "single", {})[0] == pytest.approx([whole_norm, half_norm], rel=1e-5)


FLEX = {"model": {"attention": "flex", "mask": "block_causal"}}


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1F1B", "Interleaved1F1B", "InterleavedZeroBubble"])
def test_each_micro_batch_has_its_own_documents(ranks: RankPool, schedule: str) -> None:
    expected = ranks(1, trained, "single", {}, FLEX)[0]
    assert_like(expected, ranks(2, trained, "pp2", {"pipeline_schedule": schedule}, FLEX))


def checkpointed(layout: str, keys: dict[str, Any], source: Path | None, target: Path) -> dict[str, torch.Tensor]:
    """Load `source`, or take one step; then save to `target`. Weights and moments of this rank by name."""
    config = tiny_llama(n_layers=LAYERS)
    network = parallel_network(config, degrees(layout, **keys), seed=0 if source is None else 1)
    optimizer = changed(section("optim", "adamw"), lr=1e-2).build(network.named_parameters(), torch.device("cpu"))
    state = TrainState(network, optimizer, seed=0)
    store = Store(target, options(asynchronous=False))
    if source is None:
        batches = share(rows(8, 16, config.vocab_size), network.mesh, 8 // network.mesh.data_ranks)
        Stepper(network, optimizer, max_norm=1.0, skips=0)(batches, stop=False)
    else:
        state.adopt(store.load(source, state.tree(0.0)))
    store.save(1, state.tree(0.0), {}, wait=True)
    return {
        f"{name} {key}": whole(tensor)
        for name, parameter in network.named_parameters()
        for key, tensor in (("", parameter), *optimizer.state[parameter].items())
    }


def test_stages_are_saved_and_loaded_bit_for_bit_by_any_layout(ranks: RankPool, tmp_path: Path) -> None:
    path: Path | None = None
    written: dict[str, torch.Tensor] = {}
    layouts = [("pp2_fsdp2", "Interleaved1F1B"), ("fsdp2", "1F1B"), ("single", "1F1B"), ("pp2_fsdp2", "1F1B")]
    for number, (layout, schedule) in enumerate(layouts):
        keys = {"pipeline_schedule": schedule}
        found: dict[str, torch.Tensor] = {}
        for result in ranks(degrees(layout).world, checkpointed, layout, keys, path, tmp_path / str(number)):
            found |= result
        written = written or found
        assert found.keys() == written.keys()
        assert all(torch.equal(found[name], written[name]) for name in written), layout
        path = tmp_path / str(number) / "step_00000001"
    assert len(written) == 4 * (2 + 1 + 9 * LAYERS)  # weight, step and two moments of each parameter
