"""Outer weights of LocalSGD and DiLoCo, and the update that an exchange makes to them.

LocalSGD, https://arxiv.org/abs/1805.09767; DiLoCo, https://arxiv.org/abs/2311.08105; its streaming form,
https://arxiv.org/abs/2501.18512.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from src.distributed.model_stages import ModelStages
from src.distributed.pipeline.stages import module_of
from src.fault_tolerance.carry import local
from src.fault_tolerance.fragments import Modules

Place = Literal["cpu", "device"]


class Rule(Protocol):
    """Update of one tensor: `agreed` is the outer one, `mine` this group's; float32, of one shape."""

    @property
    def remembers(self) -> bool: ...

    def outgoing(self, agreed: Tensor, mine: Tensor) -> Tensor:
        """The tensor that is averaged over groups."""

    def moved(self, agreed: Tensor, mean: Tensor, velocity: Tensor | None) -> Tensor:
        """The new outer tensor; `velocity` (momentum) is updated in place."""


@dataclass(frozen=True)
class Averaging:
    """LocalSGD: the outer weights are the mean of the groups' weights."""

    remembers = False

    def outgoing(self, agreed: Tensor, mine: Tensor) -> Tensor:
        return mine

    def moved(self, agreed: Tensor, mean: Tensor, velocity: Tensor | None) -> Tensor:
        return mean


@dataclass(frozen=True)
class Nesterov:
    """DiLoCo: the mean of agreed - mine is a gradient for SGD with Nesterov momentum, as torch.optim.SGD defines it."""

    lr: float
    momentum: float

    @property
    def remembers(self) -> bool:
        return True

    def outgoing(self, agreed: Tensor, mine: Tensor) -> Tensor:
        return agreed - mine

    def moved(self, agreed: Tensor, mean: Tensor, velocity: Tensor | None) -> Tensor:
        assert velocity is not None, "Outer keeps one for each rule that remembers"
        velocity.mul_(self.momentum).add_(mean)
        return agreed - self.lr * (mean + self.momentum * velocity)


WHOLE_WAY = Nesterov(lr=1.0, momentum=0.0)  # of buffers, such as biases that balance experts: no optimizer moves them


@dataclass(frozen=True)
class Entry:
    """One weight or buffer of this rank, with its outer copy."""

    name: str
    live: Tensor
    agreed: Tensor  # of the same type and layout
    velocity: Tensor | None  # float32
    rule: Rule
    share: float  # one over the number of ranks that hold these numbers

    def outgoing(self) -> Tensor:
        agreed = local(self.agreed).to(self.live.device)
        return self.rule.outgoing(agreed.float(), local(self.live).float()).flatten()

    def restore(self) -> None:
        local(self.live).copy_(local(self.agreed))

    def merge(self, mean: Tensor, alpha: float) -> Tensor:
        """Update the outer tensor, and set the live one to it but for a share `alpha` of its own. Returns the
        squared norm of the update.
        """
        agreed, live = local(self.agreed), local(self.live)
        before = agreed.to(live.device).float()
        velocity = None if self.velocity is None else local(self.velocity).to(live.device)
        after = self.rule.moved(before, mean.view(before.shape), velocity)
        squares = (after - before).square().sum() * self.share
        agreed.copy_(after)
        if self.velocity is not None and velocity is not None:
            local(self.velocity).copy_(velocity)
        live.copy_(torch.lerp(after, live.float(), alpha) if alpha else after)
        return squares


class Outer:
    """Outer weights of all fragments, sharded like the live ones: each rank averages its shards with the same ranks
    of other groups.
    """

    def __init__(
        self, network: ModelStages, fragments: Modules, rule: Rule, place: Place, refresh: Sequence[Callable[[], None]]
    ) -> None:
        """`refresh`: what follows from new weights, in order; collective."""
        self.refresh = refresh
        trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
        buffers = WHOLE_WAY if rule.remembers else rule
        holders = network.mesh.world // network.mesh.degrees.pipeline
        self._fragments: list[list[Entry]] = [[] for _ in fragments]
        number = {module: index for index, modules in enumerate(fragments) for module in modules}
        for name, live in network.tensors().items():
            if live.is_floating_point():
                kind = rule if name in trained else buffers
                entry = _entry(name, live.detach(), kind, place, _pieces(live) / holders)
                self._fragments[number[module_of(name)]].append(entry)

    def __len__(self) -> int:
        """How many fragments there are."""
        return len(self._fragments)

    @torch.no_grad()
    def begin(self) -> None:
        """Copy the live weights to the outer ones: at the start, or after other weights were loaded."""
        for entry in self._all():
            local(entry.agreed).copy_(local(entry.live))

    @torch.no_grad()
    def outgoing(self, fragment: int) -> Tensor:
        """The tensors of a fragment to average, as one float32 vector on the weights' device."""
        stages = [entry.outgoing() for entry in self._fragments[fragment]]
        return torch.cat(stages) if stages else torch.zeros(0)

    @torch.no_grad()
    def merge(self, fragment: int, mean: Tensor, alpha: float) -> float:
        """Update the outer weights of a fragment from the mean. Returns this rank's part of the update's squared
        norm. Collective with `refresh`.
        """
        entries = self._fragments[fragment]
        means = mean.split([local(entry.agreed).numel() for entry in entries])
        squares = [entry.merge(part, alpha) for entry, part in zip(entries, means, strict=True)]
        self._refresh()
        return float(torch.stack(squares).sum()) if squares else 0.0

    @torch.no_grad()
    def restore(self, fragment: int) -> None:
        """Set the live weights of a fragment back to the outer ones, undoing the steps since. Collective with
        `refresh`.
        """
        for entry in self._fragments[fragment]:
            entry.restore()
        self._refresh()

    @torch.no_grad()
    def live(self, fragment: int) -> Tensor:
        """The live weights of a fragment, as one float32 vector on their device."""
        stages = [local(entry.live).float().flatten() for entry in self._fragments[fragment]]
        return torch.cat(stages) if stages else torch.zeros(0)

    @torch.no_grad()
    def set(self, fragment: int, weights: Tensor) -> None:
        """Let these, as `live` gives them, be a fragment's live and outer weights. Collective with `refresh`."""
        entries = self._fragments[fragment]
        parts = weights.split([local(entry.live).numel() for entry in entries])
        for entry, part in zip(entries, parts, strict=True):
            for tensor in (entry.live, entry.agreed):
                local(tensor).copy_(part.view(local(tensor).shape))
        self._refresh()

    def tensors(self) -> dict[str, Any]:
        """Outer weights and velocities by name, for checkpoints and healing groups: the tensors themselves, not
        copies.
        """
        velocity = {entry.name: entry.velocity for entry in self._all() if entry.velocity is not None}
        return {"weights": {entry.name: entry.agreed for entry in self._all()}, "velocity": velocity}

    def _all(self) -> list[Entry]:
        return [entry for fragment in self._fragments for entry in fragment]

    def _refresh(self) -> None:
        for act in self.refresh:
            act()


def _entry(name: str, live: Tensor, rule: Rule, place: Place, share: float) -> Entry:
    agreed = live.cpu() if place == "cpu" and not live.is_cpu else live.clone()
    velocity = torch.zeros_like(agreed, dtype=torch.float32) if rule.remembers else None
    return Entry(name, live, agreed, velocity, rule, share)


def _pieces(tensor: Tensor) -> int:
    """Into how many different shards the ranks of its mesh cut it."""
    if not isinstance(tensor, DTensor):
        return 1
    mesh, placements = tensor.device_mesh, tensor.placements
    return prod(mesh.size(axis) for axis, placement in enumerate(placements) if not isinstance(placement, Replicate))
