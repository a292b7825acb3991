"""Tokens per second of task=generate beside transformers' on the same weights, greedily, on one thread of the CPU.

python -m benchmarks.generation                              llama3_debug in float32, 1 and 8 prompts
python -m benchmarks.generation --precision bf16_full        weights in bfloat16

Random weights. Both generate the same prompts in turns, --rounds times, and the best of each counts. Seconds are those
of this process on the processor, so that other work on the machine changes them little. The last column says how many
tokens are the same: all of them in float32; in bfloat16 each rounds elsewhere.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers

from src.distributed.mesh import Mesh
from src.distributed.process.rank_context import RankContext
from src.models.hugging_face import config_json
from src.tasks.generate.decoding import generate
from src.tasks.generate.sampling import SamplingParams
from src.train.resume import adopt
from src.train.setup import build_uninitialized
from tests.train.runs import make_run, section

PROMPT = 16  # tokens

Texts = list[list[int]]


def cpu_seconds(act: Callable[[], Texts]) -> tuple[float, Texts]:
    began = time.process_time()
    texts = act()
    return time.process_time() - began, texts


def measure(option: str, precision: str, count: int, rounds: int, folder: Path) -> None:
    """Print a row for each number of prompts."""
    config = section("model", option)
    torch.manual_seed(0)
    values = config_json(config)
    family: Any = getattr(transformers, values["architectures"][0])
    theirs = family(family.config_class(**values)).eval()
    run = make_run(model=config, precision=section("precision", precision)).holding_weights()
    theirs.to(getattr(torch, run.precision.compute)).save_pretrained(folder)
    ranks = RankContext.join("cpu", 1, timeout_seconds=60.0)
    network = build_uninitialized(run, ranks, Mesh(run.parallel, "cpu"))
    adopt(network, folder)
    print("| prompts | ours tok/s | transformers tok/s | ratio | equal tokens |\n|---:|---:|---:|---:|---:|")
    for prompts in (1, 8):
        rows = torch.randint(1, config.vocab_size, (prompts, PROMPT))

        def ours(rows: Any = rows) -> Texts:
            rule = SamplingParams(0.0)
            return generate(network, rows.tolist(), count=count, rule=rule, seed=0, ends=(), batch=len(rows))

        def reference(rows: Any = rows) -> Texts:
            written: Any = theirs.generate(
                rows,
                attention_mask=torch.ones_like(rows),
                max_new_tokens=count,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            return [row[PROMPT:].tolist() for row in written]

        turns = [(cpu_seconds(ours), cpu_seconds(reference)) for _ in range(rounds)]
        best = [min(turn[side][0] for turn in turns) for side in (0, 1)]
        mine, there = turns[0][0][1], turns[0][1][1]
        equal = sum(a == b for x, y in zip(mine, there, strict=True) for a, b in zip(x, y, strict=True))
        speeds = [prompts * count / seconds for seconds in best]
        print(f"| {prompts} | {speeds[0]:.1f} | {speeds[1]:.1f} | {speeds[0] / speeds[1]:.2f} | ", end="")
        print(f"{equal} of {prompts * count} |", flush=True)
    ranks.leave()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama3_debug")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with TemporaryDirectory() as folder:
        measure(given.model, given.precision, given.tokens, given.rounds, Path(folder))


if __name__ == "__main__":
    main()
