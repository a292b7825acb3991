"""The peer's speed on the same machine and the same random tokens: torchtitan 0.2.2 through its own public classes.

    pip install torchtitan==0.2.2
    torchrun --nproc-per-node 2 -m benchmarks.peer llama3 8B training.seq_len=8192 training.local_batch_size=2 \
        activation_checkpoint.mode=selective activation_checkpoint.selective_ac_option=op compile.enable=true

A word `section.key=value` sets that key of its config, `model_args.key=value` one of its model. Steps 11 to 20 are
timed; rank 0 prints one line of JSON.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
import yaml

WARMUP_STEPS, STEPS = 10, 20


class RandomTokens:
    """Endless batches, each row by its place in the global batch; as much of a loader as the peer asks for."""

    def __init__(self, words: int, seq_len: int, rows: int, rank: int) -> None:
        self.words, self.seq_len, self.rows, self.rank = words, seq_len, rows, rank

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        first = self.rank * self.rows
        generators = [torch.Generator().manual_seed(first + row) for row in range(self.rows)]
        window = torch.stack([torch.randint(self.words, (self.seq_len + 1,), generator=one) for one in generators])
        while True:
            yield {"input": window[:, :-1].contiguous()}, window[:, 1:].contiguous()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class NoDocuments:
    """Its attention masks ask a tokenizer for the end of a document: no token is one."""

    eos_id = -1


def configure(model: str, flavor: str, words: list[str]) -> Any:
    """The peer's config, with each `section.key=value` of `words` set; a key that it does not have is an error."""
    from torchtitan.config import JobConfig

    config = JobConfig()
    config.model.name, config.model.flavor = f"{model}_random", flavor
    config.training.steps = STEPS
    config.metrics.log_freq = STEPS
    assign(config, [word for word in words if not word.startswith("model_args.")])
    return config


def assign(target: Any, words: list[str]) -> None:
    """`path.to.key=value` on nested objects; AttributeError where there is no such key."""
    for word in words:
        path, value = word.split("=", 1)
        *sections, key = path.split(".")
        section = reduce(getattr, sections, target)
        getattr(section, key)
        setattr(section, key, yaml.safe_load(value))


def register(model: str, config: Any, words: list[str]) -> None:
    """Its model with our tokens."""
    import importlib

    from torchtitan.protocols.train_spec import register_train_spec

    spec = importlib.import_module(f"torchtitan.models.{model}").get_train_spec()
    arguments = spec.model_args[config.model.flavor]
    assign(arguments, [word.removeprefix("model_args.") for word in words if word.startswith("model_args.")])

    def loader(*, dp_rank: int, job_config: Any, **_others: Any) -> RandomTokens:
        training = job_config.training
        return RandomTokens(arguments.vocab_size, training.seq_len, training.local_batch_size, dp_rank)

    def tokenizer(_config: Any) -> NoDocuments:
        return NoDocuments()

    spec = replace(spec, build_dataloader_fn=loader, build_tokenizer_fn=tokenizer, state_dict_adapter=None)
    register_train_spec(config.model.name, spec)


def measure(config: Any) -> dict[str, Any]:
    """Collective. The mean over the steps after the warm-up, without a wait between two of them."""
    from torchtitan.train import Trainer

    trainer = Trainer(config)
    batches = trainer.batch_generator(trainer.dataloader)
    peaks = _peaks_before_resets()
    seconds = 0.0
    for step in range(1, STEPS + 1):
        trainer.step = step
        trainer.gc_handler.run(step)
        trainer.train_step(batches)
        if step == WARMUP_STEPS:
            peaks.clear()
            torch.cuda.reset_peak_memory_stats()
        if step in (WARMUP_STEPS, STEPS):
            torch.cuda.synchronize()
            seconds = time.monotonic() - seconds
    tokens = config.training.local_batch_size * config.training.seq_len * trainer.gradient_accumulation_steps
    world = torch.distributed.get_world_size()
    dims = trainer.parallel_dims
    data_ranks = dims.dp_replicate * dims.dp_shard
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "world": world,
        "tokens_per_second_per_device": (STEPS - WARMUP_STEPS) * tokens * data_ranks / seconds / world,
        "peak_allocated_gib": max([*peaks, torch.cuda.max_memory_allocated()]) / 2**30,
    }


def _peaks_before_resets() -> list[int]:
    """Bytes at the peak each time that the peer, which logs them at some steps, is about to forget them."""
    peaks: list[int] = []
    reset = torch.cuda.reset_peak_memory_stats

    def keep(*arguments: Any, **options: Any) -> None:
        peaks.append(torch.cuda.max_memory_allocated())
        reset(*arguments, **options)

    torch.cuda.reset_peak_memory_stats = keep
    return peaks


def main() -> None:
    model, flavor, *words = sys.argv[1:]
    config = configure(model, flavor, words)
    register(model, config, words)
    figures = measure(config)
    if torch.distributed.get_rank() == 0:
        print(json.dumps({"model": f"{model} {flavor}", "options": words, **figures}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
