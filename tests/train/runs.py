"""Runs composed of conf's own presets, with a task and a cluster made of nothing but numbers."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from src.config.base import Config
from src.config.build import build
from src.run import Run

TOP = {"name": "test", "seed": 0, "root": "runs", "folder": None, "dry_run": True}
CONF = Path(__file__).parents[2] / "conf"


@dataclass(frozen=True)
class Numbers:
    """A task."""

    steps: int = 1000
    seq_len: int = 256
    global_batch: int = 8
    micro_batch: int | None = 4
    validate_every: int = 0
    validate_samples: int = 64
    needs_corpus: bool = True

    def run(self, run: Run, folder: Path) -> None:
        raise AssertionError(f"a plan starts nothing: {run.name} in {folder}")


@dataclass(frozen=True)
class Gpus:
    """Of one machine."""

    count: int | None = None
    memory_gib: float | None = None
    capability: tuple[int, int] | None = None
    host_gib: float | None = None


@dataclass(frozen=True)
class Here:
    """A cluster of one machine."""

    gpu_memory_gib: float | None = None
    gpus_per_node: None = None
    grace_seconds: float = 60.0

    def devices(self) -> Gpus:
        return Gpus()


@dataclass(frozen=True)
class There:
    """A cluster of several machines."""

    gpus_per_node: int = 8
    gpu_memory_gib: float | None = None
    grace_seconds: float = 60.0

    def devices(self) -> Gpus:
        return Gpus()


@dataclass(frozen=True)
class Tokens:
    """A prepared corpus."""

    train_tokens: int = 1_000_001

    def windows(self, split: str, seq_len: int) -> int:
        assert split == "train"
        return (self.train_tokens - 1) // seq_len


@cache
def section(group: str, option: str) -> Any:
    """conf/<group>/<option>.yaml as its object."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        # A model may choose a recipe, which is a line of the whole config, and a task gets its numbers from one.
        whole = group in ("model", "task")
        cfg = compose("config", [f"{group}={option}"]) if whole else compose(f"{group}/{option}")
        tree = OmegaConf.to_container(cfg[group], resolve=True)
    return build(TOP | {group: tree}, sections=(group,))[group]


def changed(config: Config, **changes: Any) -> Any:
    """The same config with other values, checked as the first was."""
    return type(config)(**(dict(config) | changes))


CHOICE = {
    "model": "llama3_debug",
    "parallel": "single",
    "precision": "fp32",
    "recompute": "none",
    "compile": "off",
    "data": "synthetic",
    "tokenizer": "bytes",
    "optim": "adamw",
    "parametrization": "standard",
    "schedule": "wsd",
    "checkpoint": "every_500",
    "tracker": "jsonl",
    "alert": "none",
    "evaluate": "none",
    "fault_tolerance": "none",
}


def make_run(task: dict[str, int | None] | None = None, cluster: Any = None, **choices: Any) -> Run:
    """`choices`: the name of a preset, or an object, by section."""
    sections = {
        group: section(group, option) if isinstance(option, str) else option
        for group, option in (CHOICE | choices).items()
    }
    return Run(
        task=replace(Numbers(), **(task or {})),
        cluster=cluster or Here(),
        name="test",
        seed=0,
        root=Path("runs"),
        folder=None,
        dry_run=True,
        **sections,
    )
