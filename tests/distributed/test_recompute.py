"""Each way to recompute changes no number, runs again what it says and keeps the bytes that are planned."""

import gc
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from src.distributed.compile import Compile, within_budget
from src.distributed.mesh import Mesh
from src.distributed.pipeline.pipeline_parallel import keep
from src.distributed.recompute import Recompute
from src.distributed.tensor.tensor_parallel import split_tensor
from src.models.accounting import Slice
from src.models.base import ModelConfig
from src.models.decoder import Decoder
from src.models.llama3.config import Llama3Config
from src.optim.elementwise import local
from tests.distributed.layouts import degrees, parallel_network, recomputed, rows
from tests.distributed.test_layouts import trained
from tests.models.shapes import tiny_deepseek, tiny_llama
from tests.ranks import RankPool

# The compiler's own cut into forward and backward, without the time that it takes to generate kernels.
PARTITIONER = "aot_eager_decomp_partition"


@pytest.mark.parametrize("layout", ["fsdp2", pytest.param("tp2_fsdp2", marks=pytest.mark.slow)])
def test_no_number_changes(ranks: RankPool, layout: str) -> None:
    world, micro_batches = degrees(layout).world, {"micro_batches": 1}
    kept = ranks(world, trained, layout, micro_batches, {})[0]
    for option in ("selective", "every2", "full"):
        again = ranks(world, trained, layout, micro_batches | {"recompute": option}, {})[0]
        assert again["losses"] == kept["losses"], option
        assert again["norms"] == kept["norms"], option
        assert again["names"] == kept["names"], option
        for name, weight in kept["end"].items():
            assert torch.equal(again["end"][name], weight), (option, name)


class Operators(TorchDispatchMode):
    """Counts what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func._overloadpacket._qualified_op_name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def apply(chosen: Recompute, model: Decoder) -> None:
    """Both halves, with nothing compiled between them."""
    chosen.apply_within(model)
    chosen.apply_around(model)


def block_of(config: ModelConfig, option: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A block, its input and its rotary table."""
    torch.manual_seed(0)
    model = config.build()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    apply(recomputed(option), model)
    return model.layers["1"], torch.randn(2, 96, config.dim, requires_grad=True), model.rotary


ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


@pytest.mark.parametrize(("option", "matmuls", "attentions"), [("none", 0, 0), ("selective", 3, 0), ("full", 7, 1)])
def test_what_runs_again(option: str, matmuls: int, attentions: int) -> None:
    """A block has seven matrices: wq wk wv wo w1 w3 w2. Every second result is computed again: wk, wo, w3."""
    block, x, rotary = block_of(tiny_llama(), option)
    with Operators() as forward:
        result, _ = block(x, rotary, None)
    with Operators() as backward:
        result.sum().backward()
    assert (forward.counts["mm"], forward.counts[ATTENTION]) == (7, 1)
    assert (backward.counts["mm"], backward.counts[ATTENTION]) == (2 * 7 + matmuls, attentions)


@pytest.mark.parametrize(("option", "products", "choices"), [("none", 0, 0), ("selective", 0, 0), ("full", 3, 1)])
def test_experts_are_chosen_once_and_multiply_once(option: str, products: int, choices: int) -> None:
    block, x, rotary = block_of(tiny_deepseek(), option)
    with Operators() as forward:
        result, _ = block(x, rotary, None)
    with Operators() as backward:
        result.sum().backward()
    assert (forward.counts["_grouped_mm"], forward.counts["topk"]) == (3, 1)
    assert (backward.counts["_grouped_mm"], backward.counts["topk"]) == (2 * 3 + products, choices)


def test_every_second_block_by_its_number_in_the_whole_model() -> None:
    config = tiny_llama(n_layers=6)
    whole, part = config.build(), config.build()
    keep(part, ["layers.1", "layers.2", "layers.3"])
    for model in (whole, part):
        apply(Recompute(mode="every", every=2, budget=None), model)
    wrapped = [[name for name, block in model.layers.items() if "forward" in vars(block)] for model in (whole, part)]
    assert wrapped == [["1", "3", "5"], ["1", "3"]]


@pytest.mark.parametrize("option", ["full", "selective"])
def test_random_numbers_are_the_same_again(option: str) -> None:
    model = tiny_llama().build()
    block = model.layers["0"]
    block.forward = lambda x: F.dropout(x, 0.5) * x
    apply(recomputed(option), model)
    x = torch.randn(64, 64, requires_grad=True)
    result = block(x)
    torch.rand(7)
    result.sum().backward()
    mask = result.detach() / x.detach().square()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2 * mask * x.detach())


# checkpoint keeps the state of the random generator: nothing on a GPU's scale.
RANDOM_STATE_BYTES = torch.get_rng_state().nbytes


def live_bytes() -> int:
    """Of all tensors that Python can reach, each storage once."""
    gc.collect()
    # A tensor that a compiler only imagined holds nothing.
    tensors = [each for each in gc.get_objects() if isinstance(each, Tensor) and not isinstance(each, FakeTensor)]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


def test_a_selective_block_keeps_what_is_planned() -> None:
    """Without a compiler: what the contexts hold, beside the input."""
    config = tiny_llama()
    block, x, rotary = block_of(config, "selective")
    planned = config.saved_by_block(Slice(tokens=2 * 96, tensor=1, element_bytes=4, compiled=False)).selective
    before = live_bytes()
    result, _ = block(x, rotary, None)
    kept = live_bytes() - before - result.untyped_storage().nbytes() + x.untyped_storage().nbytes()
    assert kept == planned + RANDOM_STATE_BYTES


def partitioned_bytes(block: nn.Module, x: Tensor, rotary: Tensor, compiler: Any = PARTITIONER) -> int:
    """What a compiled block hands from its forward to its backward, weights and tables aside; each storage once."""
    known = {_local(tensor).untyped_storage().data_ptr() for tensor in (*block.parameters(), rotary)}
    kept: dict[int, int] = {}

    def keep_one(tensor: Any) -> Any:
        storage = _local(tensor).untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    forward = torch.compile(block.forward, fullgraph=True, backend=compiler)
    with torch.autograd.graph.saved_tensors_hooks(keep_one, lambda tensor: tensor):
        result, _ = forward(x, rotary, None)
    result.sum().backward()
    return sum(size for pointer, size in kept.items() if pointer not in known)


def _local(tensor: Any) -> Any:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 1, "head_dim": 32, "multiple_of": 256}])
def test_a_compiled_block_keeps_what_is_planned(changes: dict[str, Any]) -> None:
    config = tiny_llama(**changes)
    block, x, rotary = block_of(config, "selective")
    planned = config.saved_by_block(Slice(tokens=2 * 96, tensor=1, element_bytes=4, compiled=True)).selective
    assert partitioned_bytes(block, x, rotary) in (planned, planned + RANDOM_STATE_BYTES)


def test_a_split_selective_block_keeps_its_share(ranks: RankPool) -> None:
    config = tiny_llama()
    cut = Slice(tokens=2 * 96, tensor=2, element_bytes=4, compiled=True)
    for kept in ranks(2, _kept_by_split_block, config):
        assert kept == pytest.approx(config.saved_by_block(cut).selective, rel=0.01)


def _kept_by_split_block(config: Llama3Config) -> int:
    model = config.build()
    split_tensor(model, Mesh(degrees("tp2"), "cpu").tensor)
    apply(recomputed("selective"), model)
    x = torch.randn(2, 96 // 2, config.dim, requires_grad=True)  # this rank's half of the sequence
    return partitioned_bytes(model.layers["0"], x, model.rotary)


@pytest.mark.parametrize("budget", [0.0, 0.3, 0.7, 1.0])
def test_a_budget_is_kept_and_used(budget: float) -> None:
    config = tiny_llama()
    block, x, rotary = block_of(config, f"budget{budget}")
    saved = config.saved_by_block(Slice(tokens=2 * 96, tensor=1, element_bytes=4, compiled=True))
    compiler = within_budget(torch._dynamo.lookup_backend(PARTITIONER), budget)
    kept = partitioned_bytes(block, x, rotary, compiler)
    planned = saved.input + budget * (saved.whole - saved.input)
    assert kept <= planned * 1.01
    # Whole tensors are kept or not: the largest, a result of w1, is an eighth of all.
    assert kept >= planned - 0.2 * saved.whole
    assert torch._functorch.config.activation_memory_budget == 1.0


@pytest.mark.parametrize("option", ["none", "full", "selective", "every2"])
def test_all_blocks_share_a_graph(option: str) -> None:
    torch._dynamo.reset()
    config = tiny_llama(n_layers=4)
    model = config.build()
    chosen, counter = recomputed(option), CompileCounterWithBackend(PARTITIONER)
    chosen.apply_within(model)
    for block in model.blocks():
        block.forward = torch.compile(block.forward, fullgraph=True, backend=counter)
    chosen.apply_around(model)
    batch = rows(2, 16, config.vocab_size)
    for _ in range(2):
        model(batch.tokens, labels=batch.labels).backward()
    assert counter.frame_count == 1


def losses(option: str, compiled: bool) -> list[float]:
    config = tiny_llama(n_layers=1)
    compile = Compile(blocks=compiled, loss=False, graph=False, mode="default")
    (model,) = parallel_network(config, degrees("single"), recompute=option, compile=compile).stages
    batch = rows(2, 16, config.vocab_size)
    loss = model(batch.tokens, labels=batch.labels)
    loss.backward()
    grad = model.layers["0"].attention.wq.weight.grad
    return [loss.item(), local(grad).norm().item()]


@pytest.mark.slow
def test_kernels_within_a_budget_compute_the_same(ranks: RankPool) -> None:
    """By the real compiler, under FSDP."""
    assert ranks(1, losses, "budget0.5", True)[0] == pytest.approx(ranks(1, losses, "none", False)[0], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["full", "every2", "selective"])
def test_a_block_that_is_cut_and_compiled_runs_again(ranks: RankPool, option: str) -> None:
    eager, compiled = (ranks(2, captured, option, wanted)[0] for wanted in (False, True))
    assert compiled == pytest.approx(eager, rel=1e-6)


def captured(option: str, compiled: bool) -> float:
    """The gradient's norm under tensor parallelism, with graphs that are captured whole but not turned into kernels."""
    torch._dynamo.reset()
    config = tiny_llama(n_layers=2)
    compile = Compile(blocks=compiled, loss=False, graph=False, mode="default")
    with patch("torch.compile", partial(torch.compile, backend="aot_eager")):
        (model,) = parallel_network(config, degrees("tp2"), recompute=option, compile=compile).stages
        batch = rows(2, 16, config.vocab_size)
        model(batch.tokens, labels=batch.labels).backward()
    return float(model.layers["1"].attention.wq.weight.grad.full_tensor().norm())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"mode": "every"}, "mode=every needs the number recompute.every; recompute=every2 has one"),
        ({"mode": "budget"}, "mode=budget needs the number recompute.budget; recompute=budget has one"),
        ({"mode": "full", "every": 2}, "every=2 does nothing to mode=full; set it to null or choose mode=every"),
        ({"mode": "none", "budget": 0.5}, "budget=0.5 does nothing to mode=none"),
        ({"mode": "budget", "budget": 1.5}, "less than or equal to 1"),
    ],
)
def test_numbers_belong_to_modes(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Recompute(**({"every": None, "budget": None} | values))


def test_what_people_read() -> None:
    said: Callable[[str], str] = lambda option: str(recomputed(option))  # noqa: E731
    assert [said(option) for option in ("none", "every4", "budget0.5")] == ["none", "every 4", "budget 0.5"]
