"""Rates, shares of the peak, memory and the startup waterfall, against hand-made clocks."""

import os
import time

import pytest
import torch

from src.metrics.memory import GIB, memory, report
from src.metrics.startup import Startup, process_started
from src.metrics.throughput import Throughput, peak_flops


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("device", "flops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("nvidia h200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA B200", 2.25e15),
        ("AMD Instinct MI300X", 1300e12),
        ("AMD Instinct MI325X", 1300e12),
        ("AMD Instinct MI355X", 2500e12),
        ("AMD Instinct MI250X", 191.5e12),
        ("NVIDIA L40S", 362e12),
    ],
)
def test_peak(device: str, flops: float) -> None:
    peak = peak_flops(device, "bfloat16")
    assert peak is not None
    assert peak.flops_per_second == flops
    assert device in peak.label


@pytest.mark.parametrize("device", ["cpu", "NVIDIA RTX A1000", "NVIDIA GeForce RTX 4090"])
def test_unknown_peak_is_none_and_said(device: str, caplog: pytest.LogCaptureFixture) -> None:
    assert peak_flops(device, "bfloat16") is None
    assert [record.message for record in caplog.records] == [
        f"MFU is not shown: the peak of '{device}' is not known"
    ]  # fmt: skip


def test_other_precisions_are_labelled() -> None:
    peak = peak_flops("NVIDIA H200", "float8")
    assert peak is not None
    assert peak.label == "float8 work against 989 TFLOP/s bfloat16 dense, NVIDIA H200"


def test_rates_per_device_and_both_conventions() -> None:
    clock = Clock()
    peak = peak_flops("NVIDIA H200", "bfloat16")
    rates = Throughput(
        devices=4, flops_per_token=60e9, flops_per_token_causal=50e9, peak=peak, predicted=8_000.0, clock=clock
    )
    for _ in range(5):
        clock.now += 2.0
        rates.step(tokens=80_000, data_seconds=0.25)
    values = rates.report()
    assert values == {
        "tokens_per_second": 10_000.0,  # 5 * 80,000 tokens in 10 s on 4 devices
        "step_seconds": 2.0,
        "data_seconds": 0.25,
        "tflops_full": 600.0,
        "mfu_full_percent": pytest.approx(60.667, abs=1e-3),
        "tflops_causal": 500.0,
        "mfu_causal_percent": pytest.approx(50.556, abs=1e-3),
        "throughput/predicted_ratio": 1.25,
    }
    clock.now += 1.0
    rates.step(tokens=80_000, data_seconds=0.0)
    assert rates.report()["step_seconds"] == 1.0  # counted afresh, by steps and not by the interval


def test_validation_time_is_left_out_and_no_peak_means_no_mfu() -> None:
    clock = Clock()
    rates = Throughput(
        devices=1, flops_per_token=1e9, flops_per_token_causal=1e9, peak=None, predicted=None, clock=clock
    )
    clock.now += 50.0
    rates.restart()
    clock.now += 2.0
    rates.step(tokens=100, data_seconds=0.5)
    values = rates.report()
    assert values["tokens_per_second"] == 50.0
    assert values.keys() == {"tokens_per_second", "step_seconds", "data_seconds", "tflops_full", "tflops_causal"}


def test_resident_memory_of_the_host() -> None:
    before = memory(torch.device("cpu"))["peak_rss_gib"]
    block = bytearray(os.urandom(1 << 20) * 300)
    after = memory(torch.device("cpu"))["peak_rss_gib"]
    assert 0.05 < before < 100
    assert after >= 300 / 1024
    assert after >= before
    assert len(block) == 300 << 20


def test_allocator_statistics_and_their_warning(caplog: pytest.LogCaptureFixture) -> None:
    statistics = {
        "num_alloc_retries": 0,
        "num_ooms": 0,
        "allocated_bytes.all.peak": 3 * GIB,
        "reserved_bytes.all.peak": 5 * GIB,
    }
    assert report(statistics) == {
        "peak_allocated_gib": 3.0,
        "peak_reserved_gib": 5.0,
        "allocation_retries": 0.0,
        "out_of_memory": 0.0,
    }
    assert not caplog.records
    assert report(statistics | {"num_alloc_retries": 2})["allocation_retries"] == 2.0
    assert "2 allocations retried" in caplog.records[0].message


@pytest.mark.gpu
def test_peak_memory_of_a_gpu_is_reset_by_each_report() -> None:
    device = torch.device("cuda", 0)
    memory(device)
    block = torch.empty(2**30, dtype=torch.uint8, device=device)
    assert memory(device)["peak_allocated_gib"] >= 1.0
    del block
    memory(device)
    assert memory(device)["peak_allocated_gib"] < 1.0


def test_startup_waterfall() -> None:
    clock = Clock()
    startup = Startup(started=98.0, clock=clock)
    for stage, until in (
        ("import", 101.0),
        ("init", 101.5),
        ("load", 105.5),
        ("compile", 125.5),
        ("first_step", 126.0),
    ):
        clock.now = until
        startup.done(stage)
    assert startup.seconds == {"import": 3.0, "init": 0.5, "load": 4.0, "compile": 20.0, "first_step": 0.5}
    assert startup.metrics()["startup/compile_seconds"] == 20.0
    assert startup.metrics()["startup/total_seconds"] == 28.0


def test_a_stage_leaves_out_the_parts_that_went_on_inside_it() -> None:
    clock = Clock()
    startup = Startup(started=90.0, clock=clock)
    startup.done("first_step", compile=7.5)
    assert startup.seconds == {"compile": 7.5, "first_step": 2.5}


def test_process_start_lies_before_now_and_stays() -> None:
    first = process_started()
    assert 0 < time.time() - first < 3600 * 24
    assert abs(process_started() - first) < 0.1
