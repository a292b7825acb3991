"""Groups that train apart, written out on one device: networks in a list, and outer steps on plain tensors."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.config.build import build
from src.config.tree import read
from src.data.batches import Batches
from src.data.corpus import reopen
from src.distributed.pipeline.stages import module_of
from src.distributed.process.rank_context import RankContext
from src.fault_tolerance.carry import fill, shards
from src.fault_tolerance.fragments import cut
from src.optim.state import scale_learning_rates
from src.planning.plan import plan
from src.run import Run
from src.train.setup import Training, build_training
from tests.fault_tolerance.life import digest


@dataclass(frozen=True)
class Method:
    """The paper's letters: fragments P, delay tau, share alpha. `averages`: LocalSGD."""

    sync_steps: int
    fragments: int = 1
    delay: int = 0
    lr: float = 0.7
    momentum: float = 0.9
    alpha: float = 0.0
    averages: bool = False

    def keys(self) -> tuple[str, ...]:
        prefix, common = "fault_tolerance", (f"fault_tolerance.sync_steps={self.sync_steps}",)
        if self.averages:
            return (f"{prefix}=local_sgd", *common)
        found = {"fragments": self.fragments, "delay_steps": self.delay, "outer_lr": self.lr}
        found |= {"outer_momentum": self.momentum, "own_share": self.alpha}
        return (f"{prefix}=diloco", *common, *(f"{prefix}.{key}={value}" for key, value in found.items()))


@dataclass
class Life:
    """Of one group: the losses of its steps, and a digest of the weights that it has in the end."""

    losses: list[float] = field(default_factory=list)
    weights: str = ""


class ByHand:
    """`away`: by group, the step in which it dies, and the one after which it meets the others again.

    `refused`: the step after which a merge fails. `resumed`: one after which all stop, and how many groups go on.
    """

    def __init__(
        self,
        folder: Path,
        method: Method,
        groups: int,
        away: dict[int, tuple[int, int]],
        refused: int = 0,
        resumed: tuple[int, int] = (0, 0),
    ) -> None:
        run = Run.from_sections(build(read(folder / "config.yaml"))).on_one_device()
        ranks = RankContext.join("cpu", 1, timeout_seconds=60.0)
        self.run, self.method, self.away, self.refused, self.resumed = run, method, away, refused, resumed
        self.plan = plan(run)
        self.groups: list[Training] = [build_training(run, ranks, skips=0) for _ in range(groups)]
        self.lives = [Life() for _ in range(groups)]
        self.others = [build_training(run, ranks, skips=0) for _ in range(resumed[1] - groups)]  # that come later
        self.batches = Batches(
            reopen(json.loads((folder / "data.json").read_text()), run.cache),
            run.data,
            seq_len=run.task.seq_len,
            seed=run.seed,
            rank=0,
            ranks=1,
            micro_batch=self.plan.micro_batch,
            micro_batches=self.plan.micro_batches,
        )
        self.trained = {name for name, _ in self.groups[0].network.named_parameters()}
        self.agreed = {name: tensor.clone() for name, tensor in plain(self.groups[0]).items()}
        self.velocity = {name: torch.zeros_like(tensor) for name, tensor in self.agreed.items()}
        fragments = cut(run.model.n_layers, method.fragments, None)
        self.fragments = [[name for name in self.agreed if module_of(name) in modules] for modules in fragments]

    @torch.no_grad()
    def mean(self, names: Sequence[str], there: Sequence[int]) -> dict[str, Tensor]:
        """Of what the groups send."""
        found = {}
        for name in names:
            theirs = [plain(self.groups[group])[name] for group in there]
            sent = theirs if self.method.averages else [self.agreed[name] - tensor for tensor in theirs]
            found[name] = sum(sent[1:], sent[0]) / len(sent)
        return found

    @torch.no_grad()
    def move(self, mean: dict[str, Tensor], there: Sequence[int]) -> None:
        method = self.method
        for name, gradient in mean.items():
            if method.averages:
                self.agreed[name] = gradient
            elif name not in self.trained:  # biases that balance experts: their mean
                self.agreed[name] = self.agreed[name] - gradient
            else:
                self.velocity[name] = self.velocity[name] * method.momentum + gradient
                self.agreed[name] = self.agreed[name] - method.lr * (gradient + method.momentum * self.velocity[name])
            for group in there:
                mine = plain(self.groups[group])[name]
                mine.copy_(self.agreed[name] * (1.0 - method.alpha) + mine * method.alpha)

    @torch.no_grad()
    def go_back(self, names: Iterable[str]) -> None:
        for training in self.groups:
            for name in names:
                plain(training)[name].copy_(self.agreed[name])

    @torch.no_grad()
    def even_out(self, there: Sequence[int]) -> None:
        """At the end: their mean."""
        for name in self.agreed:
            theirs = [plain(self.groups[group])[name] for group in there]
            mean = sum(theirs[1:], theirs[0]) / len(theirs)
            for tensor in theirs:
                tensor.copy_(mean)

    def resume(self, count: int) -> None:
        """All groups go on from what the first one has."""
        self.groups = (self.groups + self.others)[:count]
        self.lives += [Life() for _ in self.others]
        for training in self.groups[1:]:
            fill(training.state.tree(0.0), shards(self.groups[0].state.tree(0.0)))

    def steps(self) -> list[Life]:
        interval, merges, sent = self.method.sync_steps // self.method.fragments, 0, dict[str, Tensor]()
        everyone = range(len(self.groups))
        share = list(everyone)  # who the data are divided among: known at a meeting
        for step in range(1, self.run.task.steps + 1):
            if step == self.resumed[0] + 1 > 1:
                self.resume(self.resumed[1])
                everyone = range(len(self.groups))
                share = list(everyone)
            there = [group for group in everyone if not within(step, self.away.get(group))]
            for group in there:
                self.train(step, group, share.index(group), len(share))
            if (step + self.method.delay) % interval == 0:
                sent = self.mean(self.fragments[merges % self.method.fragments], there)
                share = [group for group in everyone if group in there or self.away[group][1] == step]
                for group in set(share) - set(there):  # it takes over a state, and has nothing of its own to send
                    source, target = (self.groups[each].state.tree(0.0) for each in (there[0], group))
                    fill(target, shards(source))
            if step == self.refused:
                self.go_back(sent)
            elif step % interval == 0:
                self.move(sent, share)
                merges += 1
        if self.method.fragments > 1 or self.method.delay or self.method.alpha:
            self.even_out(share)
        for life, training in zip(self.lives, self.groups, strict=False):  # of those that are there in the end
            life.weights = digest(training.network)
        return self.lives

    def train(self, step: int, group: int, rank: int, size: int) -> None:
        training, each = self.groups[group], self.plan.micro_batches // size
        mine = range(rank * each, (rank + 1) * each)
        batches = self.batches.step((step - 1) * self.plan.sequences_per_step, mine)
        scale_learning_rates(training.state.optimizer, self.run.schedule.multiplier(step - 1, self.run.task.steps))
        self.lives[group].losses.append(training.stepper(batches, stop=False)["loss"].item())


def within(step: int, away: tuple[int, int] | None) -> bool:
    return away is not None and away[0] <= step <= away[1]


def plain(training: Training) -> dict[str, Any]:
    """Live weights without their mesh."""
    tensors = training.network.tensors()
    return {name: getattr(tensor, "to_local", lambda tensor=tensor: tensor)() for name, tensor in tensors.items()}


def simulate(*story: Any) -> list[Life]:
    """`story`: what ByHand is told."""
    return ByHand(*story).steps()
