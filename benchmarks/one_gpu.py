"""One GPU, ours beside torchtitan 0.2.2 on the same machine: tokens per second, peak memory and their ratio.

    pip install torchtitan==0.2.2        # on torch 2.11; without it the peer's column stays empty
    pip install -r requirements-cuda.txt # on Hopper: flash-attn-4
    python -m benchmarks.one_gpu [--rows 8b_bf16 small_4 ...] [--steps 20] [--record benchmarks/records/one_gpu.json]

Each row is two processes, one after the other; both read random tokens and time the mean of steps after a warm-up.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PER_PROCESS_SECONDS = 600


@dataclass(frozen=True)
class Row:
    """`ours`: words of launch.py; `peer`: of benchmarks.peer, the model's name and flavor first."""

    work: str
    ours: tuple[str, ...]
    peer: tuple[str, ...]


def row(work: str, seq_len: int, sequences: int, ours: str, peer: str) -> Row:
    batch = f"task.seq_len={seq_len} task.micro_batch={sequences} task.global_batch={sequences}"
    theirs = f"training.seq_len={seq_len} training.local_batch_size={sequences}"
    common = "compile.enable=true activation_checkpoint.mode=none"
    return Row(work, (*ours.split(), *batch.split()), (*peer.split(), *theirs.split(), *common.split()))


FP8 = "model.converters=[quantize.linear.float8] quantize.linear.float8.filter_fqns=[output]"
ONE_B = "model=llama3_1b model.tie_word_embeddings=false"
ONE_B_PEER = (
    "llama3 8B model_args.dim=2048 model_args.n_layers=16 model_args.n_heads=32 model_args.n_kv_heads=8 "
    "model_args.ffn_dim_multiplier=1.5 model_args.multiple_of=256"
)
SMALL = (
    "model=llama3_1b model.tie_word_embeddings=false model.dim=768 model.n_layers=12 model.n_heads=12 "
    "model.n_kv_heads=12 model.vocab_size=32000 model.ffn_dim_multiplier=1.0 model.rope_scaling=null compile=graph"
)
SMALL_PEER = (
    "llama3 debugmodel model_args.dim=768 model_args.n_layers=12 model_args.n_heads=12 model_args.n_kv_heads=12 "
    "model_args.vocab_size=32000 model_args.multiple_of=256"
)
EIGHT_B = "model=llama3_8b model.n_layers=16"
ROWS = {
    "8b_bf16": row(
        "Llama 3 8B, 16 layers, bf16", 8192, 2, f"{EIGHT_B} compile=graph", "llama3 8B model_args.n_layers=16"
    ),
    "8b_fp8": row(
        "the same, fp8", 8192, 2, f"{EIGHT_B} precision=fp8", f"llama3 8B model_args.n_layers=16 {FP8}"
    ),
    "8b_documents": row(
        "the same, bf16, documents masked", 8192, 2,
        f"{EIGHT_B} model.attention=flex model.mask=block_causal data.document_masks=true",
        "llama3 8B_flex model_args.n_layers=16",
    ),
    "16b": row(
        "DeepSeek-V3 16B, 9 layers, bf16", 4096, 4, "model=deepseek_v3_16b model.n_layers=9",
        "deepseek_v3 16B model_args.n_layers=9",
    ),
    "1b": row("Llama 3.2 1B untied, bf16", 8192, 2, f"{ONE_B} compile=graph", ONE_B_PEER),
    "small_32": row("124M Llama, bf16", 1024, 32, SMALL, SMALL_PEER),
    "small_4": row("124M Llama, bf16", 1024, 4, SMALL, SMALL_PEER),
}  # fmt: skip


def ours(chosen: Row, steps: int) -> dict[str, Any]:
    """Figures of task=bench."""
    with tempfile.TemporaryDirectory() as root:
        words = ["task=bench", "precision=bf16", "compile=blocks", *chosen.ours, "optim.lr=1e-5", f"root={root}"]
        words += [f"task.steps={steps}", "task.warmup_steps=10"]
        _run([sys.executable, "launch.py", *words])
        (file,) = Path(root).glob("*/bench.json")
        figures: dict[str, Any] = json.loads(file.read_text())
    return figures


def peer(chosen: Row) -> dict[str, Any]:
    """Figures of benchmarks.peer."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "-m", "benchmarks.peer"]
    output = _run([*launcher, *chosen.peer])
    line = next(line for line in reversed(output.splitlines()) if line.startswith("{"))
    figures: dict[str, Any] = json.loads(line)
    return figures


def _run(command: list[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PER_PROCESS_SECONDS, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-1500:]}")
    return done.stdout


def _line(work: str, mine: dict[str, Any] | None, theirs: dict[str, Any] | None) -> str:
    rates = [
        None if mine is None else mine["tokens_per_second"],
        None if theirs is None else theirs["tokens_per_second_per_device"],
    ]
    memory = [None if each is None else each["peak_allocated_gib"] for each in (mine, theirs)]
    ratio = f"{rates[0] / rates[1]:.3f}" if rates[0] and rates[1] else "-"
    cells = [*("-" if each is None else f"{each:,.0f}" for each in rates), ratio]
    cells += ["-" if each is None else f"{each:.1f}" for each in memory]
    return f"| {work} | {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--record", type=Path)
    chosen = parser.parse_args()
    print(
        "| work | ours tok/s | peer tok/s | ratio | ours GiB | peer GiB |\n|---|---:|---:|---:|---:|---:|", flush=True
    )
    records, broken = [], False
    for name in chosen.rows:
        figures: list[dict[str, Any] | None] = []
        for measure in (lambda one: ours(one, chosen.steps), peer):
            try:
                figures.append(measure(ROWS[name]))
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                print(error, file=sys.stderr)
                figures.append(None)
                broken = True
        records.append(
            {"row": name, **asdict(ROWS[name]), "measured": dict(zip(("ours", "peer"), figures, strict=True))}
        )
        print(_line(ROWS[name].work, *figures), flush=True)
        if chosen.record is not None:  # after each row: a time limit loses one, not all
            chosen.record.write_text(json.dumps(records, indent=1) + "\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
