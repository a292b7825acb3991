"""Outer weights of a model on a GPU, kept there or in the host's memory, against the same arithmetic on the host."""

from pathlib import Path
from typing import Any

import pytest
import torch

from src.checkpoint.store import Store
from src.distributed.process.rank_context import RankContext
from src.fault_tolerance.carry import local
from src.fault_tolerance.fragments import cut
from src.fault_tolerance.outer import Nesterov, Outer, Place
from src.train.setup import build_training
from tests.checkpoint.options import options
from tests.fault_tolerance.test_outer import whole
from tests.train.runs import make_run


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["cpu", "device"])
def test_outer_weights_of_a_gpu(place: Place, tmp_path: Path) -> None:
    run, ranks = make_run(), RankContext.join("cuda", 1, timeout_seconds=60.0)
    try:
        network = build_training(run, ranks, skips=0).network
        outer = Outer(network, cut(run.model.n_layers, 1, None), Nesterov(0.7, 0.9), place, ())
        outer.begin()
        expected = {name: tensor.cpu() for name, tensor in whole(network.tensors()).items()}
        velocity = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
        for _ in range(2):
            for name, tensor in network.tensors().items():
                local(tensor).mul_(1.5)
                mean = expected[name] - local(tensor).cpu()
                velocity[name] = velocity[name] * 0.9 + mean
                expected[name] = expected[name] - 0.7 * (mean + 0.9 * velocity[name])
            outer.merge(0, outer.outgoing(0), 0.0)
        held: dict[str, Any] = outer.tensors()
        for name, tensor in network.tensors().items():
            assert local(held["weights"][name]).device.type == ("cpu" if place == "cpu" else "cuda")
            torch.testing.assert_close(local(tensor).cpu(), expected[name], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(local(held["weights"][name]).cpu(), expected[name], rtol=1e-5, atol=1e-6)
        store = Store(tmp_path, options())
        store.save(1, {"outer": held}, {}, wait=True)
        outer.begin()
        for tensor in held["weights"].values():
            local(tensor).zero_()
        store.load(tmp_path / "step_00000001", {"outer": held})
        for name, tensor in held["weights"].items():
            torch.testing.assert_close(local(tensor).cpu(), expected[name], rtol=1e-5, atol=1e-6)
    finally:
        ranks.leave()
