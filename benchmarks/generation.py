"""Tokens per second of task=generate beside transformers' on the same weights, greedily, on one thread of the CPU or on
one GPU.

python -m benchmarks.generation                              llama3_debug in float32, 1 and 8 prompts
python -m benchmarks.generation --precision bf16_full        weights in bfloat16
python -m benchmarks.generation --gpu --model llama3_8b --precision bf16_full --tokens 512 --prompts 1 32
python -m benchmarks.generation --gpu --alone --model deepseek_v3_16b --precision bf16_full --tokens 512 --prompts 1 32

Random weights. Both generate the same prompts in turns, --rounds times, and the best of each counts. On the CPU seconds
are those of this process on the processor, so that other work on the machine changes them little; on a GPU those of a
clock, from the prompts to the last token. The last column says how many tokens are the same: all of them in float32; in
bfloat16 each rounds elsewhere, and from a row's first other token on all may differ.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import Tensor

from src.distributed.init_weights import initialise
from src.distributed.mesh import Mesh
from src.distributed.model_stages import ModelStages
from src.distributed.process.rank_context import RankContext
from src.models.base import ModelConfig
from src.models.hugging_face import config_json
from src.tasks.generate.decoding import generate
from src.tasks.generate.sampling import SamplingParams
from src.train.resume import adopt
from src.train.setup import build_uninitialized
from tests.train.runs import make_run, section

PROMPT = 16  # tokens

Texts = list[list[int]]


def seconds_of(act: Callable[[], Texts], device: torch.device) -> tuple[float, Texts]:
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    began = clock()
    texts = act()
    return clock() - began, texts


def measure(given: argparse.Namespace, folder: Path) -> None:
    """Print a row for each number of prompts."""
    device = "cuda" if given.gpu else "cpu"
    config = section("model", given.model)
    run = make_run(model=config, precision=section("precision", given.precision)).holding_weights()
    ranks = RankContext.join(device, 1, timeout_seconds=60.0)
    network = build_uninitialized(run, ranks, Mesh(run.parallel, device))
    torch.manual_seed(0)
    theirs = None
    if given.alone:
        for part in network.stages:
            initialise(part, seed=0)
        network.weights_written()
    else:
        theirs = transformers_model(config, getattr(torch, run.precision.compute), ranks.device)
        theirs.save_pretrained(folder)
        adopt(network, folder)
    print("| prompts | ours tok/s | transformers tok/s | ratio | equal tokens |\n|---:|---:|---:|---:|---:|")
    for prompts in given.prompts:
        rows = torch.randint(1, config.vocab_size, (prompts, PROMPT))
        ways = [partial(ours, network, rows, given.tokens)]
        ways += [] if theirs is None else [partial(reference, theirs, rows.to(ranks.device), given.tokens)]
        turns = [[seconds_of(way, ranks.device) for way in ways] for _ in range(given.rounds)]
        speeds = [prompts * given.tokens / min(turn[side][0] for turn in turns) for side in range(len(ways))]
        told = ["-"] * 3
        if theirs is not None:
            both = zip(turns[0][0][1], turns[0][1][1], strict=True)
            equal = sum(a == b for x, y in both for a, b in zip(x, y, strict=True))
            told = [f"{speeds[1]:.1f}", f"{speeds[0] / speeds[1]:.2f}", f"{equal} of {prompts * given.tokens}"]
        print(f"| {prompts} | {speeds[0]:.1f} | {' | '.join(told)} |", flush=True)
    ranks.leave()


def transformers_model(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Any:
    values = config_json(config)
    family: Any = getattr(transformers, values["architectures"][0])
    with device:
        return family._from_config(family.config_class(**values), dtype=dtype).eval()


def ours(network: ModelStages, rows: Tensor, count: int) -> Texts:
    rule = SamplingParams(0.0)
    return generate(network, rows.tolist(), count=count, rule=rule, seed=0, ends=(), batch=len(rows))


def reference(model: Any, rows: Tensor, count: int) -> Texts:
    mask = torch.ones_like(rows)
    options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return [row[PROMPT:].tolist() for row in model.generate(rows, attention_mask=mask, **options)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama3_debug")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--alone", action="store_true", help="without transformers")
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with TemporaryDirectory() as folder:
        measure(given, Path(folder))


if __name__ == "__main__":
    main()
