"""A sequence cut over ranks trains as on one: the cut, the joined attention, whole models."""

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from src.distributed.context.ring_attention import attention, by_rank, cut, in_order
from src.distributed.mesh import Mesh
from src.models.llama3.config import Llama3Config
from src.tasks.generate.decoding import generate
from src.tasks.generate.sampling import SamplingParams
from src.train.step.stepper import Stepper
from src.train.validate import validate
from tests.distributed.layouts import Rows, adamw, degrees, parallel_network, rows
from tests.distributed.test_layouts import whole
from tests.models.shapes import tiny_llama
from tests.ranks import RankPool


@pytest.mark.parametrize(
    ("rank", "held"), [(0, [0, 1, 14, 15]), (1, [2, 3, 12, 13]), (2, [4, 5, 10, 11]), (3, [6, 7, 8, 9])]
)
def test_a_rank_holds_its_head_and_its_tail(rank: int, held: list[int]) -> None:
    rows = torch.stack((torch.arange(16), torch.arange(16) + 100))
    assert cut(rows, rank, 4).tolist() == [held, [row + 100 for row in held]]


def test_ranks_hold_equal_work_and_everything_once() -> None:
    positions = torch.arange(48)
    shares = [cut(positions, rank, 3, dim=0) for rank in range(3)]
    assert len({int((share + 1).sum()) for share in shares}) == 1  # keys that causal queries see
    gathered = torch.cat(shares)
    assert torch.equal(in_order(gathered, 3), positions)
    assert torch.equal(by_rank(positions, 3), gathered)


def inputs(length: int, width: int, value_width: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v and the result's gradient: 2 rows, 4 heads on 2 kv heads."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, length, width), (2, 2, length, width), (2, 2, length, value_width), (2, 4, length, value_width)]
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def joined(rotate: str, width: int, value_width: int, scale: float | None) -> float:
    """The largest difference of result and gradients from one device's, in fp64."""
    *given, grad = inputs(6 * dist.get_world_size(), width, value_width)
    whole = [x.clone().requires_grad_() for x in given]
    expected = F.scaled_dot_product_attention(*whole, is_causal=True, scale=scale, enable_gqa=True)
    expected.backward(grad)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = [cut(x, rank, ranks, dim=2).requires_grad_() for x in given]
    group = dist.group.WORLD.group_name  # type: ignore[union-attr]
    out, _ = attention(*mine, scale, group, rotate)
    out.backward(cut(grad, rank, ranks, dim=2))
    pairs = [(out, expected), *((x.grad, y.grad) for x, y in zip(mine, whole, strict=True))]
    return max(float((x - cut(y, rank, ranks, dim=2)).detach().abs().max()) for x, y in pairs)  # type: ignore[arg-type]


@pytest.mark.parametrize("ranks_used", [2, 3, 4])
@pytest.mark.parametrize("rotate", ["allgather", "alltoall"])
def test_joined_attention_is_attention(ranks: RankPool, rotate: str, ranks_used: int) -> None:
    assert max(ranks(ranks_used, joined, rotate, 8, 8, None)) < 1e-12
    assert max(ranks(ranks_used, joined, rotate, 12, 8, 0.7)) < 1e-12  # values narrower than keys, another scale


def batch_of(config: Llama3Config, step: int, *, documents: bool) -> Rows:
    """Four rows of 16 tokens, unequal in valid labels; with documents of random lengths and positions inside them."""
    batch = rows(4, 16, config.vocab_size, seed=step)
    if not documents:
        return batch
    starts = torch.rand(4, 16, generator=torch.Generator().manual_seed(step)) < 0.2
    starts[:, 0] = False
    number = starts.cumsum(1)
    place = torch.arange(16).expand(4, 16)
    begin = torch.where(starts, place, 0).cummax(1).values
    return Rows(batch.tokens, batch.labels, place - begin, number.to(torch.int32))


def part(batch: Rows, mesh: Mesh) -> Rows:
    """This data rank's rows."""
    size = len(batch.tokens) // mesh.data_ranks
    mine = slice(mesh.data_rank * size, (mesh.data_rank + 1) * size)
    fields = (batch.tokens, batch.labels, batch.positions, batch.documents)
    return Rows(*(None if field is None else field[mine] for field in fields))  # type: ignore[arg-type]


def trained(layout: str, changes: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Losses, norms, tokens and the end weights of three steps; then held-out loss and a greedy continuation."""
    config = tiny_llama(n_layers=2, **changes)
    how = degrees(layout, **options.get("degrees", {}))
    network = parallel_network(config, how, recompute=options.get("recompute", "none"))
    if compiler := options.get("compile"):
        for block in network.stages[0].blocks():
            block.forward = torch.compile(block.forward, backend=compiler, fullgraph=True)
    optimizer = adamw(network)
    stepper = Stepper(network, optimizer, max_norm=1.0, skips=0)
    documents, mesh = changes.get("mask") == "block_causal", network.mesh
    steps = [batch_of(config, step, documents=documents) for step in range(3)]
    outcomes = [stepper([part(batch, mesh)], stop=False) for batch in steps]  # type: ignore[list-item]
    held: Any = SimpleNamespace(validation=lambda _: iter([part(batch_of(config, 9, documents=documents), mesh)]))
    return {
        "losses": [outcome["loss"].item() for outcome in outcomes],
        "norms": [outcome["grad_norm"].item() for outcome in outcomes],
        "tokens": [outcome["tokens"].item() for outcome in outcomes],
        "weights": {name: whole(parameter) for name, parameter in network.named_parameters()},
        "validation": validate(network, held, 4, lambda: False),
        "sample": generate(network, [[5, 7, 11]], count=3, rule=SamplingParams(0.0), seed=0, ends=(), batch=1),
    }


def agree(result: dict[str, Any], single: dict[str, Any]) -> None:
    assert result["losses"][0] == pytest.approx(single["losses"][0], rel=1e-6)
    assert result["losses"] == pytest.approx(single["losses"], rel=1e-5)
    assert result["norms"] == pytest.approx(single["norms"], rel=1e-4)
    assert result["tokens"] == single["tokens"]
    assert result["validation"] == pytest.approx(single["validation"], rel=1e-5)
    assert result["sample"] == single["sample"]
    for name, weight in single["weights"].items():
        torch.testing.assert_close(result["weights"][name], weight, rtol=0, atol=2e-3, msg=name)


MASKS: dict[str, dict[str, Any]] = {
    "sdpa": {},
    "flex": {"attention": "flex"},
    "documents": {"attention": "flex", "mask": "block_causal"},
    "blocks": {"attention": "flex", "mask": "block_causal", "fixed_block": 5},
}


@pytest.fixture(scope="module")
def single(ranks: RankPool) -> Callable[[str], dict[str, Any]]:
    """What one device makes of a mask."""
    return cache(lambda mask: ranks(1, trained, "single", MASKS[mask], {})[0])


@pytest.mark.parametrize(
    ("layout", "mask", "options"),
    [
        pytest.param("cp2", "sdpa", {}, id="cp2"),
        pytest.param("cp4", "sdpa", {}, id="cp4"),
        pytest.param("cp4", "sdpa", {"degrees": {"rotate": "alltoall"}}, id="cp4-alltoall"),
        pytest.param("cp2_fsdp2", "sdpa", {}, id="fsdp"),
        pytest.param("cp2_ddp2", "sdpa", {}, id="hsdp"),
        pytest.param("cp2_tp2", "sdpa", {}, id="tp"),
        pytest.param("cp2", "sdpa", {"recompute": "selective"}, id="selective"),
        pytest.param("cp2", "sdpa", {"compile": "aot_eager"}, id="compiled", marks=pytest.mark.slow),
        pytest.param("cp2", "flex", {}, id="flex"),
        pytest.param("cp2_tp2", "flex", {}, id="flex-tp", marks=pytest.mark.slow),
        pytest.param("cp2_fsdp2", "documents", {}, id="documents"),
        pytest.param("cp4", "blocks", {}, id="blocks"),
    ],
)
def test_a_cut_sequence_trains_like_a_whole_one(
    ranks: RankPool, single: Callable[[str], dict[str, Any]], layout: str, mask: str, options: dict[str, Any]
) -> None:
    for result in ranks(degrees(layout).world, trained, layout, MASKS[mask], options):
        agree(result, single(mask))


@pytest.mark.slow
def test_all_three_ways_to_cut(ranks: RankPool, single: Callable[[str], dict[str, Any]]) -> None:
    agree(ranks(8, trained, "cp2_tp2_fsdp2", {}, {})[7], single("sdpa"))
