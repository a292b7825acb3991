"""`benchmarks.kernels` measures a device's matrix products, and plans take its speed from there."""

import json
import shutil
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import kernels
from src.planning.time import devices
from src.planning.time.devices import GPUS

TIMES = (2.0, 4.0)  # milliseconds of a forward and of its backward


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the planner's table, in its place."""

    def forget() -> None:
        devices.measured_products.cache_clear()
        devices._bare.cache_clear()

    file = tmp_path / "products.json"
    shutil.copy(devices.PRODUCTS_FILE, file)
    monkeypatch.setattr(devices, "PRODUCTS_FILE", file)
    forget()
    yield file
    forget()


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Of a device that needs as long for every product: tensors without bytes, and a clock that is told."""
    clock = cycle(TIMES)

    def milliseconds(_run: Callable[[], Any], _repeats: int, _device: torch.device) -> float:
        return next(clock)

    monkeypatch.setattr(kernels, "milliseconds", milliseconds)
    return kernels.measure("products", kernels.Shape(), torch.device("meta"), "NVIDIA H100 80GB HBM3", 3)


def seconds(name: str, columns: int, inner: int) -> float:
    return GPUS[name].product_seconds(8192, columns, inner)


def test_plans_take_what_was_measured(table: Path, lines: dict[str, Any]) -> None:
    found = kernels.rates(lines)
    by_hand = 3 * 2 * 8192 * 6144 * 4096 / (sum(TIMES) * 1e-3) / 1e12
    assert found["6144x4096"] == pytest.approx(by_hand, abs=0.05)
    assert len(found) == 5
    before = {name: seconds(name, 6144, 4096) for name in GPUS}
    assert before["H100"] == before["H200"], "nobody has measured it: the datasheet's bf16 peak is the same"
    kernels.tell_planner("H100", lines, table)
    devices.measured_products.cache_clear()
    devices._bare.cache_clear()
    share = GPUS["H100"].shares.products
    assert seconds("H100", 6144, 4096) == pytest.approx(TIMES[0] * 1e-3 / share, rel=1e-3)
    assert {name: seconds(name, 6144, 4096) for name in GPUS if name != "H100"} == {
        name: time for name, time in before.items() if name != "H100"
    }
    assert json.loads(table.read_text())["H100"]["device"] == "NVIDIA H100 80GB HBM3"


def test_a_device_has_a_record_of_its_own(tmp_path: Path, lines: dict[str, Any]) -> None:
    file = kernels.keep(lines, tmp_path)
    assert file.name == "kernels_nvidia_h100_80gb_hbm3.json"
    kernels.keep({"device": lines["device"], "router: one": {"forward_ms": 1.0}}, tmp_path)
    assert json.loads(file.read_text()).keys() == {*lines, "router: one"}, "one part leaves the others"
    assert kernels.keep({"device": "NVIDIA H200"}, tmp_path).name == "kernels.json"


def test_tiny_products_run_on_a_cpu() -> None:
    found = kernels.rates(kernels.measure("products", kernels.TINY, torch.device("cpu"), "CPU", 1))
    assert found.keys() == {f"{columns}x{inner}" for columns, inner in devices.measured_products()["H200"]}
