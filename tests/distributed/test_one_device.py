"""Computing on one device without FSDP is bitwise what FSDP over one rank computes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from src.distributed.fsdp.shard import shard
from src.distributed.model_stages import ModelStages, SingleStage
from src.distributed.precision.config import Dtype, Precision
from src.models.base import ModelConfig
from src.optim.adamw import AdamW
from src.optim.elementwise import local
from src.train.step.stepper import Stepper
from tests.distributed.layouts import degrees, parallel_network, rows
from tests.models.shapes import tiny_deepseek, tiny_llama
from tests.ranks import RankPool

Numbers = tuple[list[float], dict[str, Tensor]]

PRECISIONS: dict[str, tuple[Dtype, Dtype, Dtype]] = {
    "fp32": ("float32", "float32", "float32"),
    "bf16": ("float32", "bfloat16", "float32"),
    "bf16_reduce16": ("float32", "bfloat16", "bfloat16"),
    "bf16_full": ("bfloat16", "bfloat16", "float32"),
}


def tied_llama() -> ModelConfig:
    return tiny_llama(tie_word_embeddings=True)


def trained(make: Callable[[], ModelConfig], name: str, micro_batches: int, recompute: str, fsdp: bool) -> Numbers:
    """Losses, gradient norms and the last weights of three steps."""
    storage, compute, reduce = PRECISIONS[name]
    precision = Precision(storage=storage, compute=compute, reduce=reduce, float8=None)
    network: ModelStages = parallel_network(make(), degrees("single"), precision=precision, recompute=recompute)
    if fsdp:
        (model,) = network.stages
        shard(model, network.mesh, precision)
        network = SingleStage([model], network.mesh, network.device)
    optim = AdamW(
        lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, decay_norms_and_embeddings=False, max_norm=1.0,
        moments="float32", fused=storage == "float32",
    )  # fmt: skip
    stepper = Stepper(network, optim.build(network.named_parameters(), network.device), 1.0, skips=0)
    vocabulary = network.stages[0].config.vocab_size
    batches = [rows(2, 16, vocabulary) for _ in range(micro_batches)]
    outcomes = [stepper(batches, stop=False) for _ in range(3)]
    numbers = [float(outcome[key]) for outcome in outcomes for key in ("loss", "grad_norm")]
    return numbers, {key: local(tensor).detach().clone() for key, tensor in network.tensors().items()}


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("make", [tiny_llama, tied_llama, tiny_deepseek])
def test_the_same_bits_as_fsdp(ranks: RankPool, make: Callable[[], ModelConfig], name: str, micro_batches: int) -> None:
    recompute = "full" if micro_batches == 1 else "selective"
    ours = ranks(1, trained, make, name, micro_batches, recompute, False)[0]
    theirs = ranks(1, trained, make, name, micro_batches, recompute, True)[0]
    assert ours[0] == theirs[0]
    assert ours[1].keys() == theirs[1].keys()
    for key, tensor in theirs[1].items():
        assert torch.equal(ours[1][key], tensor), key


def changed_between() -> list[float]:
    """Losses before and after a write to a weight, and after the optimizer said that it wrote the copies."""
    storage, compute, reduce = PRECISIONS["bf16"]
    precision = Precision(storage=storage, compute=compute, reduce=reduce, float8=None)
    network = parallel_network(tiny_llama(), degrees("single"), precision=precision)
    assert network.weights is not None
    batch, found = rows(2, 16, 64), []
    for loaded in (False, True):
        found.append(float(network.loss([batch]).detach()))
        network.weights.written()
        if loaded:
            with torch.no_grad():
                network.stages[0].get_parameter("norm.weight").mul_(2.0)
    found.append(float(network.loss([batch]).detach()))
    return found


def test_a_weight_that_was_loaded_is_read(ranks: RankPool) -> None:
    before, still, after = ranks(1, changed_between)[0]
    assert before == still != after
