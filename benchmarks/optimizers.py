"""Optimizers beside each other: validation loss on real text by seeds, and what an update costs on a GPU.

    python -m benchmarks.optimizers [--seeds 0 1 2] [--record benchmarks/records/optimizers.json]
    python -m benchmarks.optimizers --seconds --record benchmarks/records/optimizers.json    on an idle machine
    python -m benchmarks.optimizers --transfer [--record benchmarks/records/transfer.json]
    python -m benchmarks.optimizers --update-cost [--record benchmarks/records/update_cost.json]

The first trains small models on this Python's standard library, one process a run, on this CPU: 48 runs, a quarter of
an hour of one core, whatever runs beside it. The second takes one of each again, for the seconds of a step, and the
table anew. The third looks for the best learning rate at two widths, with muP and without: 20 runs, ten minutes. The
fourth times whole steps of Llama 3 8B with 16 layers on one GPU of 120 GB or more, a process an optimizer, seven
minutes; what a step costs more than AdamW's is the update's.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from math import prod
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from src.config.build import Top, build
from src.config.composition.requests import asked
from src.models.base import ModelConfig
from src.optim.base import Optimizer

ROOT = Path(__file__).resolve().parent.parent
PER_PROCESS_SECONDS = 1200
# Row -> words of launch.py.
OPTIMIZERS = {
    "AdamW": "optim=adamw",
    "lean AdamW": "optim=adamw_bf16",
    "Muon": "optim=muon",
    "NorMuon": "optim=normuon",
}
HEADS = """\
| model | optimizer | lr | validation loss | s / step | bytes of state / parameter |
|---|---|---:|---:|---:|---:|"""
STEPS, WARM = 60, 10
TRAINING = (
    f"tokenizer=bytes task.steps={STEPS} task.seq_len=128 task.global_batch=8 task.micro_batch=8 "
    f"task.log_every={WARM} task.validate_every={STEPS} task.validate_samples=128 "
    f"schedule=cosine schedule.warmup_steps={WARM} checkpoint=none data.processes=1 cluster.gpus=0"
)
# Each optimizer has the best of them, by the first seed: in a short run AdamW's first updates are larger than Muon's.
RATES = (3e-3, 6e-3, 1.2e-2, 2.4e-2)
MODELS = {
    "llama3_debug": "model=llama3_debug model.dim=64 model.n_layers=3 model.n_heads=4 model.n_kv_heads=4 "
    "model.multiple_of=32 model.vocab_size=384",
    "deepseek_v3_debug": "model=deepseek_v3_debug model.dim=64 model.n_layers=3 model.n_heads=4 model.ffn_dim=192 "
    "model.kv_lora_rank=32 model.qk_nope_head_dim=16 model.qk_rope_head_dim=16 model.v_head_dim=16 "
    "model.moe.hidden_dim=32 model.vocab_size=384",
}
WIDTHS = (64, 256)
TRANSFER_LR = 8e-3
NARROW = "model=llama3_debug model.n_layers=2 model.multiple_of=32 model.vocab_size=384"
GROWN = {
    "mup": "parametrization=mup parametrization.base_width=64 parametrization.base.n_heads=2 "
    "parametrization.base.n_kv_heads=2",
    "standard": "",
}
# 262,144 tokens a step: the update costs the same whatever the batch, and small steps are no pretraining.
COST = (
    "task=bench model=llama3_8b model.n_layers=16 precision=bf16 compile=blocks task.seq_len=8192 task.micro_batch=1 "
    "task.global_batch=32 task.steps=4 task.warmup_steps=2 optim.lr=1e-5"
)


def state_bytes(words: Sequence[str]) -> float:
    """Bytes of state of a parameter, the mean over all of a model."""
    (tree,) = asked(list(words)).trees
    top = {key: value for key, value in tree.items() if key in Top.model_fields}
    sections = build(top | {key: tree[key] for key in ("model", "optim")}, sections=("model", "optim"))
    model, optim = sections["model"], sections["optim"]
    assert isinstance(model, ModelConfig)
    assert isinstance(optim, Optimizer)
    weights = model.weights()
    kept = (each.bytes for one in weights for each in optim.state(one.name, one.shape).values())
    return sum(kept) / sum(prod(each.shape) for each in weights)


def launched(words: Sequence[str], root: Path) -> Path:
    """The folder of a run that has ended well."""
    command = [sys.executable, "launch.py", *words, f"root={root}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PER_PROCESS_SECONDS, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-1500:]}")
    (folder,) = {path.parent for path in root.glob("*/attempts.jsonl")}
    return folder


def trained(words: Sequence[str], root: Path) -> dict[str, float]:
    """Validation loss after the last step, and the seconds of a step after the first lines, which warm up."""
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        (Path(scratch) / "cache").symlink_to(root / "cache")  # one corpus for all
        folder = launched([*words, "name=run"], Path(scratch))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (loss,) = (line["validation_loss"] for line in lines if "validation_loss" in line)
    seconds = [line["step_seconds"] for line in lines if line.get("step", 0) > WARM and "step_seconds" in line]
    return {"validation_loss": loss, "step_seconds": mean(seconds)}


def evidence(seeds: Sequence[int], record: Path | None) -> None:
    """Train all and print a table."""
    found: dict[str, Any] = {"training": TRAINING, "models": MODELS, "optimizers": OPTIMIZERS, "runs": []}
    print(HEADS)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        (root / "cache").mkdir()
        for model in MODELS:
            for optim, words in OPTIMIZERS.items():
                chosen = [*MODELS[model].split(), *words.split()]
                train = [*chosen, *TRAINING.split()]
                tried = {lr: trained([*train, f"optim.lr={lr}", f"seed={seeds[0]}"], root) for lr in RATES}
                lr = min(tried, key=lambda each: tried[each]["validation_loss"])
                others = [trained([*train, f"optim.lr={lr}", f"seed={seed}"], root) for seed in seeds[1:]]
                runs = [tried[lr], *others]
                kept = state_bytes(chosen)
                found["runs"].append(
                    {"model": model, "optimizer": optim, "lr": lr, "state_bytes": kept, "seeds": runs, "tried": tried}
                )
                print(line(found["runs"][-1]), flush=True)
                write(record, found)


def seconds(record: Path) -> None:
    """One run of each row of a record again; its steps' seconds go there."""
    found = json.loads(record.read_text())
    print(HEADS)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        (root / "cache").mkdir()
        for row in found["runs"]:
            words = f"{MODELS[row['model']]} {OPTIMIZERS[row['optimizer']]} {TRAINING} optim.lr={row['lr']}"
            row["step_seconds"] = trained(words.split(), root)["step_seconds"]
            print(line(row), flush=True)
            write(record, found)


def line(row: dict[str, Any]) -> str:
    """Of the table."""
    losses = [run["validation_loss"] for run in row["seeds"]]
    spread = f" ± {stdev(losses):.3f}" if len(losses) > 1 else ""
    quickest = row.get("step_seconds") or min(run["step_seconds"] for run in row["seeds"])
    figures = f"{row['lr']:g} | {mean(losses):.3f}{spread} | {quickest:.3f} | {row['state_bytes']:.2f}"
    return f"| {row['model']} | {row['optimizer']} | {figures} |"


def transfer(record: Path | None) -> None:
    """The best learning rate of a narrow and of a wide model, by a parabola through the lowest losses."""
    found: dict[str, Any] = {"training": TRAINING, "model": NARROW, "runs": []}
    rates = [TRANSFER_LR * 2.0**power for power in range(-2, 3)]
    print(f"| parametrization | width | {' | '.join(f'{lr:g}' for lr in rates)} | best |\n|---|---:|{'---:|' * 6}")
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        (root / "cache").mkdir()
        for name in ("mup", "standard"):
            for width in WIDTHS:
                more = f"model.dim={width} model.n_heads={width // 32} model.n_kv_heads={width // 32} {GROWN[name]}"
                losses = [
                    trained([*NARROW.split(), *TRAINING.split(), *more.split(), f"optim.lr={lr}"], root)[
                        "validation_loss"
                    ]
                    for lr in rates
                ]
                best = lowest(rates, losses)
                found["runs"].append(
                    {"parametrization": name, "width": width, "lr": rates, "validation_loss": losses, "best": best}
                )
                print(f"| {name} | {width} | {' | '.join(f'{loss:.3f}' for loss in losses)} | {best:.2g} |", flush=True)
                write(record, found)


def lowest(rates: Sequence[float], losses: Sequence[float]) -> float:
    """Where a parabola in the logarithm, through the lowest point and its neighbours, has its minimum; an end is it."""
    at = losses.index(min(losses))
    if at in (0, len(losses) - 1):
        return rates[at]
    left, middle, right = losses[at - 1 : at + 2]
    shift = 0.5 * (left - right) / (left - 2 * middle + right)
    return float(rates[at] * (rates[at + 1] / rates[at]) ** shift)


def update_cost(record: Path | None) -> None:
    """Steps of each optimizer on a GPU; what one costs more than AdamW's is the update's."""
    found: dict[str, Any] = {"words": COST}
    base: float | None = None
    print("| optimizer | s / step | more than AdamW | tokens/s | peak GiB |\n|---|---:|---:|---:|---:|", flush=True)
    for optim in ("AdamW", "Muon", "NorMuon"):
        with tempfile.TemporaryDirectory() as root:
            folder = launched([*COST.split(), OPTIMIZERS[optim]], Path(root))
            figures = json.loads((folder / "bench.json").read_text())
        seconds = figures["step_seconds"]
        base = seconds if base is None else base
        found[optim] = figures
        print(
            f"| {optim} | {seconds:.3f} | {seconds - base:.3f} s, {100 * (seconds / base - 1):.1f} % | "
            f"{figures['tokens_per_second']:,.0f} | {figures['peak_allocated_gib']:.1f} |",
            flush=True,
        )
        write(record, found)


def write(record: Path | None, found: dict[str, Any]) -> None:
    """After each row: a time limit loses one, not all."""
    if record is not None:
        record.write_text(json.dumps(found, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", action="store_true", help="of a step, for the losses in --record")
    parser.add_argument("--transfer", action="store_true", help="learning rates at two widths, instead of the losses")
    parser.add_argument("--update-cost", action="store_true", help="on one GPU, instead of the losses")
    parser.add_argument("--record", type=Path)
    chosen = parser.parse_args()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    if chosen.update_cost:
        update_cost(chosen.record)
    elif chosen.seconds and chosen.record is None:
        parser.error("--seconds needs the --record of the losses")
    elif chosen.seconds:
        seconds(chosen.record)
    elif chosen.transfer:
        transfer(chosen.record)
    else:
        evidence(chosen.seeds, chosen.record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
