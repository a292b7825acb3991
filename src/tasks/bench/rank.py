"""What each rank of task=bench does: warm up, time each step, look at the memory, optionally profile two steps."""

import json
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from src.data.batches import Batch
from src.metrics.console import Console
from src.metrics.kernels import KernelTime, breakdown, markdown
from src.metrics.memory import memory
from src.metrics.throughput import Throughput, peak_flops
from src.models.attention import flash_attention
from src.models.kernels import fused_swiglu
from src.planning.plan import Plan
from src.planning.recompute_choice import resolve_auto_recompute
from src.run import Run
from src.storage.atomic_write import atomic_write
from src.tasks.bench.config import BENCH_FILE, Bench
from src.train.expert_load import expert_load
from src.train.setup import Training, build_training, join_ranks
from src.train.step.stepper import Readback

PROFILED_STEPS = 2


def bench(task: Bench, run: Run, folder: Path) -> bool:
    """Measure and write bench.json. Collective. Always True: a benchmark that was stopped is started again."""
    ranks = join_ranks(run, folder)
    run = resolve_auto_recompute(run, folder)
    training = build_training(run, ranks, skips=0)
    planned = Plan.read(folder)
    batches = [_random(planned, task.seq_len, run, training, index) for index in range(planned.micro_batches)]
    losses = _steps(training, batches, task.warmup_steps)
    memory(ranks.device)  # warm-up's peaks do not count
    figures = _measure(task, run, planned, training, batches, losses)
    if task.profile:
        figures["profile"] = _profile(training, batches, folder)
    if ranks.rank == 0:
        atomic_write(folder / BENCH_FILE, json.dumps(figures, indent=2) + "\n")
        _tell(figures)
    ranks.leave()
    return True


def _random(planned: Plan, seq_len: int, run: Run, training: Training, index: int) -> Batch:
    """Rows of one micro-batch, on the device: the loader is not what is measured.

    A row depends on its place in the global batch alone, so every layout computes the same losses.
    """
    first = (index * training.mesh.data_ranks + training.mesh.data_rank) * planned.micro_batch
    generators = (torch.Generator().manual_seed(first + row) for row in range(planned.micro_batch))
    window = torch.stack([torch.randint(run.model.vocab_size, (seq_len + 1,), generator=one) for one in generators])
    window = window.to(training.ranks.device)
    documents = torch.zeros(window[:, 1:].shape, dtype=torch.int32)  # one a row; where the loader has them
    return Batch(window[:, :-1].contiguous(), window[:, 1:].contiguous(), None, documents, ())


def _steps(training: Training, batches: list[Batch], count: int) -> list[float]:
    """Run `count` steps, one host-device wait late as in training; returns their losses."""
    readback, outcomes = Readback(), []
    for step in range(count):
        outcomes += readback.push(step, training.stepper(batches, stop=False))
    return [outcome.loss for outcome in [*outcomes, *readback.flush()]]


def _measure(
    task: Bench, run: Run, planned: Plan, training: Training, batches: list[Batch], losses: list[float]
) -> dict[str, Any]:
    """tokens/s per device of each step and over all of them; the losses go on from those of the warm-up."""
    device = training.ranks.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    peak = peak_flops(name, run.precision.arithmetic) if device.type == "cuda" else None
    throughput = Throughput(
        devices=planned.world,
        flops_per_token=planned.flops_per_token,
        flops_per_token_causal=planned.flops_per_token_causal,
        peak=peak,
        predicted=planned.predicted_rate,
    )
    # As in training: nothing waits for the device between two steps, so the figure is the mean over all of them.
    losses = losses + _steps(training, batches, task.steps)
    for _ in range(task.steps):
        throughput.step(planned.tokens_per_step, data_seconds=0.0)
    mean = throughput.report()
    load = expert_load(training.network, planned.tokens_per_step)
    return {
        "device": name,
        "torch": torch.__version__,
        "flash_attn_4": flash_attention.version() if device.type == "cuda" else None,
        "quack": fused_swiglu.version() if device.type == "cuda" else None,
        "world": planned.world,
        "layout": planned.axes,
        "arithmetic": run.precision.arithmetic,
        "recompute": str(run.recompute),
        "mean_of_steps": task.steps,
        **{key: value for key, value in mean.items() if key != "data_seconds"},
        "mfu_of": None if peak is None else peak.label,
        **_predicted(planned),
        "routing": _routing(run),
        **({} if load is None else load.values(layers=False)),
        "losses": losses,
        **memory(device, training.stepper.captured_bytes),
        "planned_peak_gib": planned.memory.peak / 2**30,
    }


def _predicted(planned: Plan) -> dict[str, Any]:
    """What the plan says of the same steps, beside what was measured; nothing of a device that it does not know."""
    if (time := planned.time) is None:
        return {}
    return {
        "predicted_of": time.gpu,
        "predicted_tokens_per_second": time.tokens_per_second,
        "predicted_step_seconds": time.step.seconds,
        "predicted_within": time.within,
        "predicted_parts": time.step.parts,
    }


def _routing(run: Run) -> str | None:
    """What belongs beside every figure of a model with experts."""
    mixture = run.model.mixture
    return None if mixture is None else "forced balance" if mixture.force_load_balance else "natural"


def _profile(training: Training, batches: list[Batch], folder: Path) -> dict[str, Any]:
    """Where this rank's time goes; rank 0's also as tables and as a trace for a browser."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if training.ranks.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        _steps(training, batches, PROFILED_STEPS)
    stages = breakdown(_kernels(profiler.events() or [], training.ranks.device), PROFILED_STEPS)
    if training.ranks.rank == 0:
        atomic_write(folder / "profile.md", markdown(stages))
        key = "self_device_time_total" if training.ranks.device.type == "cuda" else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=key, row_limit=60, max_name_column_width=110)
        atomic_write(folder / "profile.txt", table)
        profiler.export_chrome_trace(str(folder / "profile_trace.json.gz"))
    return stages


def _kernels(events: Iterable[Any], device: torch.device) -> list[KernelTime]:
    """What ran on the GPU. On the CPU: each operator's own time, one after another."""
    if device.type == "cuda":
        found = [event for event in events if event.device_type.name == "CUDA" and not event.is_user_annotation]
        return [KernelTime(event.name, event.time_range.start, event.time_range.end) for event in found]
    own = [(event.name, event.self_cpu_time_total) for event in events if not event.is_user_annotation]
    ends = list(accumulate(spent for _, spent in own))
    return [KernelTime(name, end - spent, end) for (name, spent), end in zip(own, ends, strict=True)]


def _tell(figures: dict[str, Any]) -> None:
    with Console(0) as console:  # no bar
        for key, value in figures.items():
            if value is None or value == {}:
                continue  # of another device, model or layout; bench.json has it
            if key == "profile":
                console.say(markdown(value))
                continue
            if key == "losses":
                value = " ".join(f"{loss:.4f}" for loss in value)
            console.say(f"{key:28} {value:,.3f}" if isinstance(value, float) else f"{key:28} {value}")
