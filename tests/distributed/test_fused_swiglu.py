"""A model on one device whose SwiGLUs are fused, by torch's operators here: what is joined, read, written and named."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from src.distributed.fsdp import one_device
from src.distributed.fsdp.one_device import is_fused
from src.distributed.model_stages import ModelStages
from src.distributed.precision.config import Dtype, Precision
from src.models.base import ModelConfig
from src.optim.adamw import AdamW
from src.optim.elementwise import Elementwise, local
from src.train.step.stepper import Stepper
from tests.distributed.layouts import degrees, parallel_network, rows
from tests.models.shapes import tiny_deepseek, tiny_llama
from tests.ranks import RankPool


@contextmanager
def kernels(*, there: bool) -> Iterator[None]:
    """As if quack's kernels were here, or not; torch's operators do their work."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_device, "takes", lambda *_: there)
        yield


def network(make: Callable[[], ModelConfig], recompute: str = "none", storage: Dtype = "float32") -> ModelStages:
    precision = Precision(storage=storage, compute="bfloat16", reduce="float32", float8=None)
    return parallel_network(make(), degrees("single"), precision=precision, recompute=recompute)


def fused_in(made: ModelStages) -> int:
    return sum(is_fused(module) for module in made.stages[0].modules())


def trained(
    make: Callable[[], ModelConfig], micro_batches: int, recompute: str, own_kernel: bool, fused: bool
) -> tuple[int, list[float], set[str]]:
    """How many SwiGLUs are fused; losses and gradient norms of three steps; names of what a checkpoint holds."""
    with kernels(there=fused):
        made = network(make, recompute)
        optim = AdamW(
            lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, decay_norms_and_embeddings=False, max_norm=1.0,
            moments="float32", fused=not own_kernel,
        )  # fmt: skip
        optimizer = optim.build(made.named_parameters(), made.device)
        assert made.weights is not None
        if isinstance(optimizer, Elementwise):  # as src/train/setup.py
            made.any_gradient_dtype, optimizer.copies = True, made.weights.beside()
        stepper = Stepper(made, optimizer, 1.0, skips=0)
        batches = [rows(2, 16, made.stages[0].config.vocab_size) for _ in range(micro_batches)]
        outcomes = [stepper(batches, stop=False) for _ in range(3)]
        for weight, copy in made.weights.beside().items() if own_kernel else ():
            assert torch.equal(local(weight).bfloat16(), copy), "the optimizer writes each part in its place"
        numbers = [float(outcome[key]) for outcome in outcomes for key in ("loss", "grad_norm")]
        return fused_in(made), numbers, set(made.tensors())


@pytest.mark.parametrize(("make", "swiglus"), [(tiny_llama, 3), (tiny_deepseek, 5)])
@pytest.mark.parametrize(("micro_batches", "recompute"), [(1, "none"), (3, "full")])
@pytest.mark.parametrize("own_kernel", [True, False])
def test_it_trains_as_the_plain_one(
    ranks: RankPool, make: Callable[[], ModelConfig], swiglus: int, micro_batches: int, recompute: str, own_kernel: bool
) -> None:
    """bf16 rounds at other places: losses and norms of three steps differ by 1e-3 of themselves at most, seen 9e-4."""
    fused, ours, names = ranks(1, trained, make, micro_batches, recompute, own_kernel, True)[0]
    none, plain, same = ranks(1, trained, make, micro_batches, recompute, own_kernel, False)[0]
    assert (fused, none) == (swiglus, 0)
    assert names == same
    assert ours == pytest.approx(plain, rel=5e-3)


def marks(make: Callable[[], ModelConfig], recompute: str, storage: Dtype) -> int:
    with kernels(there=True):
        return fused_in(network(make, recompute, storage))


@pytest.mark.parametrize(
    ("recompute", "storage", "swiglus"), [("none", "float32", 3), ("selective", "float32", 0), ("none", "bfloat16", 0)]
)
def test_only_copies_are_joined(ranks: RankPool, recompute: str, storage: Dtype, swiglus: int) -> None:
    """Weights that passes read themselves lie where they are; what is kept product by product stays in products."""
    assert ranks(1, marks, tiny_llama, recompute, storage)[0] == swiglus
