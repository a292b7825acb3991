"""How large activations are at several widths, step after step, with and without muP: the coordinate check.

With it a width does not show: each curve is that of the narrowest model. One process, one device, a few small models.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from src.distributed.init_weights import initialise, seed_of
from src.models.base import ModelConfig
from src.models.parametrization.config import MuP, Parametrization, Standard, grown
from src.optim.base import Optimizer

# Module of a block, by the end of its name -> what its result is called. The stream itself is mostly the embedding's.
LOOKED_AT = {"attention": "attention", "feed_forward": "feed forward", "moe": "experts"}
LOGITS = "logits"
MOST_SEEDS = 8


@dataclass(frozen=True)
class SameTokens:
    """The same random tokens in every step, so that the loss falls and updates add up."""

    sequences: int = 2
    length: int = 32
    seed: int = 0


@dataclass(frozen=True)
class Coordinates:
    """Root mean squares, a mean over blocks and seeds: `sizes[what][width]` has one before each step and one more."""

    name: str  # of the parametrization
    sizes: Mapping[str, Mapping[int, Sequence[float]]]

    def spread(self, what: str) -> float:
        """By how much the largest of all widths lies above the smallest, at the worst step: 0.1 is 10 %."""
        steps = zip(*self.sizes[what].values(), strict=True)
        return float(max(max(each) / min(each) for each in steps)) - 1.0

    @property
    def activations(self) -> list[str]:
        """What should not follow the width. Logits may at first: muP lets those of a new model shrink."""
        return [what for what in self.sizes if what != LOGITS]


def coordinates(
    model: ModelConfig, optim: Optimizer, mup: MuP, widths: Sequence[int], *, steps: int, seeds: int, batch: SameTokens
) -> list[Coordinates]:
    """With muP, then without. `seeds`: models of the widest; of a narrow one, whose numbers are few, as many more as it
    is narrower, at most MOST_SEEDS times as many. ValidationError for a width that makes no model.
    """
    choices: tuple[tuple[str, Parametrization], ...] = (("muP", mup), ("standard", Standard()))
    return [
        Coordinates(name, sizes_of(model, optim, mup, parametrization, widths, steps=steps, seeds=seeds, batch=batch))
        for name, parametrization in choices
    ]


def sizes_of(
    model: ModelConfig,
    optim: Optimizer,
    mup: MuP,
    parametrization: Parametrization,
    widths: Sequence[int],
    *,
    steps: int,
    seeds: int,
    batch: SameTokens,
) -> dict[str, dict[int, list[float]]]:
    """Of one parametrization, as `Coordinates` has them. `mup`: says what grows with the width."""
    found: dict[str, dict[int, list[float]]] = {}
    for width in widths:
        config = grown(model, mup.base_width, mup.base, width)
        count = seeds * min(MOST_SEEDS, max(widths) // width)
        runs = [_trained(config, optim, parametrization, steps, batch, seed) for seed in range(count)]
        for what in runs[0]:
            of_steps = zip(*(run[what] for run in runs), strict=True)
            found.setdefault(what, {})[width] = [sum(each) / count for each in of_steps]
    return found


def _trained(
    config: ModelConfig, optim: Optimizer, parametrization: Parametrization, steps: int, batch: SameTokens, seed: int
) -> dict[str, list[float]]:
    """By what is looked at, its size before each step and after the last."""
    model = config.build()
    initialise(model, seed, parametrization.initializers(config, model.initializers()))
    rates = parametrization.rates(config, optim.orthogonal)
    optimizer = optim.build(model.named_parameters(), torch.device("cpu"), None, config.heads(), rates)
    generator = torch.Generator().manual_seed(seed_of(batch.seed, "coordinates"))
    tokens = torch.randint(config.vocab_size, (batch.sequences, batch.length + 1), generator=generator)
    labels, tokens = tokens[:, 1:].contiguous(), tokens[:, :-1].contiguous()
    found: dict[str, list[float]] = {}
    for step in range(steps + 1):
        with watched(model) as seen, torch.no_grad():
            seen(LOGITS, model(tokens))
        for what, sizes in seen.means().items():
            found.setdefault(what, []).append(sizes)
        if step < steps:
            loss: Tensor = model(tokens, labels=labels) / labels.numel()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return found


class _Seen:
    """Root mean squares of one forward pass."""

    def __init__(self) -> None:
        self._sizes: dict[str, list[float]] = {}

    def __call__(self, what: str, tensor: Tensor) -> None:
        self._sizes.setdefault(what, []).append(float(tensor.detach().float().square().mean().sqrt()))

    def means(self) -> dict[str, float]:
        """Over all blocks."""
        return {what: sum(each) / len(each) for what, each in self._sizes.items()}


@contextmanager
def watched(model: nn.Module) -> Iterator[_Seen]:
    """While this is open, forward passes are measured."""
    seen = _Seen()

    def look(what: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, result: Any) -> None:
            seen(what, result[0] if isinstance(result, tuple) else result)

        return hook

    modules = ((LOOKED_AT.get(name.rpartition(".")[2]), module) for name, module in model.named_modules())
    handles = [module.register_forward_hook(look(what)) for what, module in modules if what is not None]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
