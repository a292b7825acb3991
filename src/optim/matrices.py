"""Muon and NorMuon (arXiv 2502.16982, 2510.05491) for matrices, AdamW for all else; matrices may be sharded.

A shard's momentum is its rank's own business. What follows needs the matrix: `Owners` bring its shards together.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from src.optim import adamw
from src.optim.elementwise import Elementwise, Launches, local, rows
from src.optim.newton_schulz import even_rows, of_heads, orthogonalise
from src.optim.owners import Owners, work_alone


@dataclass(frozen=True)
class MatrixRule:
    """The numbers of an update of matrices."""

    momentum: float
    steps: int
    update_rms: float
    row_beta: float | None  # of NorMuon's second moment; None: Muon
    eps: float


def advance(gradient: Tensor, momentum: Tensor, shrink: Tensor, skip: Tensor, beta: float) -> Tensor:
    """Move the momentum on, and return what it would be one gradient later (Nesterov), in bfloat16."""
    wide = gradient.float() * shrink
    moved = momentum.float().lerp(wide, 1.0 - beta)
    momentum.copy_(torch.where(skip, momentum, moved.to(momentum.dtype)))
    return wide.lerp(moved, beta).bfloat16()


def move(weight: Tensor, direction: Tensor, keep: Tensor, rate: Tensor, skip: Tensor) -> None:
    """Shrink a weight by its decay, then go against the direction."""
    moved = weight.float() * keep - rate * direction.float()
    weight.copy_(torch.where(skip, weight, moved.to(weight.dtype)))


class MatrixOptimizer(Elementwise):
    """State of a matrix: `momentum`, and `row_moment` of NorMuon; of all else AdamW's."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        rule: MatrixRule,
        betas: tuple[float, float],
        device: torch.device,
        owners: Owners | None,
        launches: Launches | None,
    ) -> None:
        """Groups say whether they hold `matrices`, and of which `heads`. `device`: where matrices are worked on."""
        super().__init__(groups, adamw.update, adamw.rates, (*betas, rule.eps), launches)
        self._rule, self._device, self._owners = rule, device, owners
        self._matrices: list[Tensor] = []
        self._heads: list[tuple[int, int] | None] = []
        self._numbers: list[int] = []
        for number, group in enumerate(self.param_groups):
            for parameter in group["params"] if group["matrices"] else ():
                assert owners is not None or local(parameter) is parameter, "a shard is no matrix"
                self._matrices.append(parameter)
                self._heads.append(group["heads"])
                self._numbers.append(number)
        scales = [self._scale(*each) for each in zip(self._matrices, self._heads, strict=True)]
        where = self._matrices[0].device if scales else device
        self._scales = torch.tensor(scales, dtype=torch.float64, device=where)
        self._factors_now = self._skip = torch.empty(0)  # of the update at work
        self._functions: tuple[Callable[..., Tensor], Callable[..., None]] = (advance, move)
        if where.type == "cuda":
            self._functions = (torch.compile(advance, fullgraph=True), torch.compile(move, fullgraph=True))

    def _scale(self, parameter: Tensor, heads: tuple[int, int] | None) -> float:
        """What an orthogonal matrix is multiplied by, beside the learning rate, to have AdamW's root mean square."""
        if self._rule.row_beta is not None:
            return self._rule.update_rms
        sides = [*parameter.shape[-2:]]
        if heads is not None:
            sides[heads[1]] //= heads[0]
        return float(self._rule.update_rms * max(sides) ** 0.5)

    def _step_groups(self, numbers: Sequence[int]) -> None:
        super()._step_groups([number for number in numbers if not self.param_groups[number]["matrices"]])
        if not self._matrices:
            return
        _, self._skip = self._count(self._matrices)
        self._factors_now = self._matrix_factors()
        if self._owners is None:
            work_alone([place for place, each in enumerate(self._matrices) if each.grad is not None], self)
        else:
            self._owners.run(self._matrices, self, with_rows=self._rule.row_beta is not None)

    def _matrix_factors(self) -> Tensor:
        """(matrices, 3) float32: what gradients are multiplied by, weights for their decay, and directions."""
        device = self._matrices[0].device
        lr = {number: self._learning_rate(number, device) for number in dict.fromkeys(self._numbers)}
        rates = torch.stack([lr[number] for number in self._numbers])
        keep = torch.stack([1.0 - lr[number] * self.param_groups[number]["weight_decay"] for number in self._numbers])
        shrink = torch.ones_like(rates)
        if self.grad_scale is not None:
            shrink = self.grad_scale.reciprocal().to(rates).expand_as(rates)
        return torch.stack((shrink, keep, rates * self._scales), dim=1).float()

    # ---- MatrixWork

    def take(self, place: int, index: int | None) -> tuple[Tensor, Tensor | None]:
        parameter = self._matrices[place]
        state, weight = self.state[parameter], local(parameter)
        momentum = _at(local(state["momentum"]), index)
        gradient = torch.zeros_like(weight) if parameter.grad is None else local(parameter.grad)
        factors = self._factors_now[place]
        views = _flat(_at(gradient, index), momentum)
        ahead = self._functions[0](*views, factors[0], self._skip, self._rule.momentum)
        numbers = _at(local(state["row_moment"]), index) if self._rule.row_beta is not None else None
        return ahead.view(momentum.shape).to(self._device), None if numbers is None else numbers.to(
            self._device, copy=True
        )

    def make(self, place: int, whole: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
        rule, heads = self._rule, self._heads[place]
        made = orthogonalise(whole, rule.steps) if heads is None else of_heads(whole, rule.steps, heads)
        if rows is None or rule.row_beta is None:
            return made, None
        return even_rows(made, rows, rule.row_beta, rule.eps)

    def give(self, place: int, index: int | None, made: Tensor, rows: Tensor | None) -> None:
        parameter = self._matrices[place]
        weight, (_, keep, rate) = _at(local(parameter), index), self._factors_now[place]
        self._functions[1](*_flat(weight, made.to(weight.device)), keep, rate, self._skip)
        if rows is not None:
            numbers = _at(local(self.state[parameter]["row_moment"]), index)
            numbers.copy_(torch.where(self._skip, numbers, rows.to(numbers.device)))
        if (copy := self.copies.get(parameter)) is not None:
            copy.copy_(weight)


def _at(shard: Tensor, index: int | None) -> Tensor:
    """One matrix of a stack, or all there is."""
    return shard if index is None or shard.ndim == 2 else shard[index]


def _flat(*tensors: Tensor) -> Sequence[Tensor]:
    """For a compiled kernel, where all of them lie alike: see `rows`."""
    if not tensors[0].is_cuda or not all(each.is_contiguous() for each in tensors):
        return tensors
    return [rows(each) for each in tensors]
