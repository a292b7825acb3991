"""Training state in a checkpoint (weights, optimizer, data position), independent of the layout that saved it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.optim import Optimizer

from src.distributed.model_stages import ModelStages
from src.optim.state import optimizer_state
from src.train.average import WeightAverage
from src.train.border import StageBorder
from src.train.stability.spikes import SpikeWatch


class Stateful(Protocol):
    """Has something of its own to remember, under keys of its own."""

    def tree(self) -> dict[str, Any]: ...
    def adopt(self, tree: dict[str, Any]) -> None: ...


def mark_of(values: Mapping[str, Any]) -> tuple[int, int]:
    """Of a checkpoint's values; from the start on where an older version wrote it."""
    position, total = values.get("digest_mark", (0, 0))
    return int(position), int(total)


@dataclass
class TrainState:
    """`step` optimizer steps are done, over `tokens` valid labels, and samples [0, `position`) are used up."""

    network: ModelStages
    optimizer: Optimizer
    seed: int
    step: int = 0
    tokens: int = 0
    position: int = 0
    digest: str = ""  # of the ids of samples [0, position)
    mark: tuple[int, int] = (0, 0)  # from where on a resume counts it again: src.data.batches.Batches.mark
    more: Stateful | None = None
    average: WeightAverage | None = None
    spikes: SpikeWatch | None = None
    border: StageBorder | None = None  # None: there is no stage before

    @property
    def at_new_samples(self) -> bool:
        """Whether a stage begins here, with samples of an order that no step of the stage before was taken from."""
        return self.border is not None and self.step == self.border.step and self.border.position is not None

    def tree(self, learning_rate: float) -> dict[str, Any]:
        """What a checkpoint holds; the tensors are the live ones."""
        return {
            "model": self.network.tensors(),
            "optimizer": optimizer_state(self.optimizer, self.network.named_parameters()),
            "step": self.step,
            "tokens": self.tokens,
            "position": self.position,
            "digest": self.digest,
            "digest_mark": list(self.mark),
            # Weights and sample order are functions of the seed; nothing else in a run is random, but torch's own
            # generator is kept for whoever adds dropout.
            "rng": {"seed": self.seed, "torch": torch.get_rng_state()},
            "schedule": {"step": self.step, "learning_rate": learning_rate},
            **({} if self.average is None else {"ema": self.average.tree()}),
            **({} if self.spikes is None else {"spikes": self.spikes.tree()}),
            **({} if self.more is None else self.more.tree()),
        }

    def adopt(self, tree: dict[str, Any]) -> None:
        """Take over the small values of a loaded tree; its tensors were filled in place."""
        self.step, self.tokens, self.position = tree["step"], tree["tokens"], tree["position"]
        self.digest, self.mark = tree["digest"], mark_of(tree)
        torch.set_rng_state(tree["rng"]["torch"])
        if self.average is not None and "ema" not in tree:  # of a run that kept none
            self.average.restart()
        if self.spikes is not None and "spikes" in tree:
            self.spikes.adopt(tree["spikes"])
        if self.more is not None:
            self.more.adopt(tree)
        if self.border is not None and self.step == self.border.step:
            self._cross(self.border)

    def _cross(self, border: StageBorder) -> None:
        """From the end of the stage before to the first sample of this one."""
        if border.position is not None:
            self.position = border.position
        if self.spikes is not None:
            self.spikes.begin_anew(forget=border.position is not None)
