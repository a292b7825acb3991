"""The moving average of the weights: by hand, lent and given back, through checkpoints and layouts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from src.checkpoint.store import Store
from src.distributed.model_stages import ModelStages
from src.planning.memory import estimate
from src.planning.plan import load_of
from src.run import Run
from src.train.average import WeightAverage
from src.train.state import TrainState
from tests.checkpoint.options import options
from tests.distributed.layouts import degrees, parallel_network, rows, share
from tests.distributed.test_layouts import whole
from tests.models.shapes import tiny_llama
from tests.ranks import RankPool
from tests.train.runs import changed, make_run, section

MODEL = tiny_llama(n_layers=2)
BATCH = rows(8, 16, MODEL.vocab_size)
DECAY = 0.75


def trained(layout: str, source: Path | None, target: Path | None) -> dict[str, dict[str, Tensor]]:
    """From `source` or anew, three updates of which the second is skipped; the average is saved in `target`."""
    network = parallel_network(MODEL, degrees(layout))
    optimizer = changed(section("optim", "lion"), lr=1e-2).build(network.named_parameters(), torch.device("cpu"))
    average = WeightAverage(network, optimizer, DECAY, torch.float32, offload=layout == "tp2")
    state = TrainState(network, optimizer, seed=0, average=average)
    if source is not None:
        store = Store(source, options(asynchronous=False))
        state.adopt(store.load(store.newest() or source, state.tree(0.0), optional=("ema",)))
    loaded = {name: whole(each) for name, each in average.tensors.items()}
    expected = {name: each.double() for name, each in loaded.items()}
    for step in range(3):
        gradients(network, step)
        optimizer.found_inf = torch.tensor(float(step == 1))  # type: ignore[attr-defined]
        optimizer.step()
        average.update()
        for name, each in network.tensors().items() if step != 1 else ():
            expected[name] = DECAY * expected[name] + (1 - DECAY) * whole(each).double()
    if target is not None:
        Store(target, options(asynchronous=False)).save(3, state.tree(0.0), {}, wait=True)
    before, loss = {name: whole(each) for name, each in network.tensors().items()}, _loss(network)
    with average.in_place():
        lent, other = {name: whole(each) for name, each in network.tensors().items()}, _loss(network)
    assert all(torch.equal(whole(each), before[name]) for name, each in network.tensors().items())
    assert torch.equal(_loss(network), loss)
    assert not torch.equal(other, loss)
    kept = {name: whole(each) for name, each in average.tensors.items()}
    return {"loaded": loaded, "expected": expected, "average": kept, "lent": lent}


def gradients(network: ModelStages, step: int) -> None:
    for place, (_, parameter) in enumerate(sorted(network.named_parameters())):
        made = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * step + place))
        if isinstance(parameter, DTensor):
            made = distribute_tensor(made, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.grad = made


def _loss(network: ModelStages) -> Tensor:
    with network.inference():
        return network.loss(share(BATCH, network.mesh, 1))


@pytest.mark.parametrize("layout", ["single", "fsdp2"])
def test_it_is_the_average(ranks: RankPool, layout: str) -> None:
    for found in ranks(degrees(layout).world, trained, layout, None, None):
        assert len(found["average"]) == len(MODEL.weights())
        for name, average in found["average"].items():
            torch.testing.assert_close(average.double(), found["expected"][name], rtol=1e-6, atol=1e-7)
            assert torch.equal(average, found["lent"][name])
            assert not torch.equal(average, found["loaded"][name])


def test_another_layout_goes_on_with_it(ranks: RankPool, tmp_path: Path) -> None:
    saved = ranks(2, trained, "fsdp2", None, tmp_path)[0]
    for found in ranks(2, trained, "tp2", tmp_path, None):
        assert found["loaded"].keys() == saved["average"].keys()
        for name, each in found["loaded"].items():
            assert torch.equal(each, saved["average"][name])
            torch.testing.assert_close(found["average"][name].double(), found["expected"][name], rtol=1e-6, atol=1e-7)


def test_an_average_that_cannot_move_is_refused() -> None:
    task = section("task", "pretrain")
    with pytest.raises(ValidationError, match=r"ema_decay=0.999 hardly moves an average in ema_dtype=bfloat16"):
        changed(task, ema_decay=0.999, ema_dtype="bfloat16")
    assert changed(task, ema_decay=0.99, ema_dtype="bfloat16").ema_decay == 0.99


def averaged(ema_dtype: str = "float32", *, offload: bool = False, **choices: Any) -> Run:
    task = changed(section("task", "pretrain"), ema_decay=0.9, ema_dtype=ema_dtype, ema_offload=offload)
    return replace(make_run(model="llama3_8b", precision="bf16", **choices), task=task)


def test_the_plan_counts_its_bytes() -> None:
    none = replace(averaged(), task=changed(section("task", "pretrain")))
    before = estimate(load_of(none))
    for run, size in ((averaged(), 4), (averaged("bfloat16"), 2), (averaged(offload=True), 0)):
        found = estimate(load_of(run))
        assert found.average == size * before.parameters // 4
        assert found.at_update == before.at_update + found.average
