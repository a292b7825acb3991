"""An optimizer whose update of a number reads that number's gradient and state alone, so any shard updates by itself.

State of any width, arithmetic in float32, no wait for the host. What differs between optimizers is an `Update`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# A number of elements that is known to be a multiple lets a compiled kernel read and write 16 bytes at a time.
ROW = 256


# (weight, gradient, state, rates, *options) -> (new weight, new state): one step of one tensor, out of place. All are
# float32 and of one shape; the weight is decayed already, the gradient clipped; `rates` are 0-dim.
Update = Callable[..., tuple[Tensor, Sequence[Tensor]]]
# One step of many tensors: (gradients, factors, skip, *options) of those of which `Launches` was told.
Launch = Callable[..., None]
# ((weight, *state, copy) of each tensor, types of gradients) -> launches by the places of their tensors; an example is
# src/optim/kernels/adamw.py.
Launches = Callable[[Sequence[tuple[Any, ...]], Sequence[torch.dtype]], Mapping[tuple[int, ...], Launch]]
# (learning rate, 0-dim float64; updates of each parameter with this one, float32; options) -> for each parameter, in
# float32, what its update shall read.
Rates = Callable[..., Sequence[Tensor]]


def learning_rate(lr: Tensor, steps: Tensor, *_: float) -> tuple[Tensor]:
    """The `Rates` of an update that needs the learning rate and nothing else."""
    return (lr.to(steps.dtype).expand_as(steps),)


def apply(
    update: Update,
    weight: Tensor,
    gradient: Tensor,
    state: Sequence[Tensor],
    factors: Tensor,
    skip: Tensor,
    options: tuple[float, ...],
) -> None:
    """Update one tensor, in place. `factors`: a row of `Elementwise._factors`; `skip`: change nothing."""
    shrink, keep, *rates = factors.unbind()
    wide = update(weight.float() * keep, gradient.float() * shrink, [each.float() for each in state], rates, *options)
    for old, new in zip((weight, *state), (wide[0], *wide[1]), strict=True):
        old.copy_(torch.where(skip, old, new.to(old.dtype)))


class Elementwise(Optimizer):
    """State per parameter: `step` (float32 scalar), and in the order of the config's `state` what `update` returns."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        update: Update,
        rates: Rates,
        options: tuple[float, ...],
        launches: "Launches | None" = None,
    ) -> None:
        """`options`: numbers that `update` and `rates` get last, such as decay factors. Groups have a weight_decay.
        `launches`: the same update of many tensors on a GPU by kernels of its own.
        """
        super().__init__(groups, {})
        self._update, self._rates, self._options, self._launches = update, rates, options, launches
        # By where a group's weights lie and the types of its gradients; empty where they do not lie as kernels want it.
        self._ready: dict[tuple[Any, ...], list[tuple[tuple[int, ...], Tensor, Launch]]] = {}
        self.copies: Mapping[Tensor, Tensor] = {}  # of some weights, to be written with them
        # By the names, and with the meaning, that torch's fused optimizers know them.
        self.found_inf: Tensor | None = None
        self.learning_rates: Sequence[Tensor] | None = None  # of the groups, where a CUDA graph reads them, not `lr`
        self.grad_scale: Tensor | None = None
        # One kernel for a tensor instead of about fifteen, for any shape; the CPU has nothing to gain from the wait.
        self._compiled = torch.compile(apply, fullgraph=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_groups(range(len(self.param_groups)))
        return loss

    def _step_groups(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            group = self.param_groups[number]
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._step_all(parameters, self._learning_rate(number, parameters[0].device), group["weight_decay"])

    def _learning_rate(self, number: int, device: torch.device) -> Tensor:
        """0-dim, float64: of the group with this number."""
        if self.learning_rates is not None:
            return self.learning_rates[number]
        return torch.full((), self.param_groups[number]["lr"], dtype=torch.float64, device=device)

    def _step_all(self, parameters: list[Tensor], lr: Tensor, weight_decay: float) -> None:
        steps, skip = self._count(parameters)
        factors = self._factors(torch.stack(steps), lr, weight_decay)
        if self._launches is not None and self._launch(self._launches, parameters, factors, skip):
            return
        for parameter, row in zip(parameters, factors, strict=True):
            weight = local(parameter)
            if weight.numel() == 0:  # an uneven shard can leave a rank without rows
                continue
            state = [rows(each) for each in self._state(parameter)]
            run: Callable[..., None] = self._compiled if weight.is_cuda else apply
            gradient = local(parameter.grad).contiguous()
            run(self._update, rows(weight), rows(gradient), state, row, skip, self._options)
            if (copy := self.copies.get(parameter)) is not None:
                copy.copy_(weight)

    def _count(self, parameters: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """The updates of each parameter with this one, and whether it is none."""
        found_inf = torch.zeros((), device=parameters[0].device) if self.found_inf is None else self.found_inf
        steps = [self.state[parameter]["step"] for parameter in parameters]
        torch._foreach_add_(steps, [1.0 - found_inf] * len(steps))  # one tensor for all would be read by the host
        return steps, found_inf > 0

    def _state(self, parameter: Tensor) -> list[Tensor]:
        return [local(each) for name, each in self.state[parameter].items() if name != "step"]

    def _launch(self, launches: "Launches", parameters: list[Tensor], factors: Tensor, skip: Tensor) -> bool:
        """False where the tensors do not lie as kernels of many tensors want them; nothing has happened then."""
        gradients = [local(parameter.grad) for parameter in parameters]
        weights = [local(parameter) for parameter in parameters]
        copies = [self.copies.get(parameter) for parameter in parameters]
        if not all(map(_lies_well, gradients, copies)):
            return False
        dtypes = [gradient.dtype for gradient in gradients]
        key = (*(weight.data_ptr() for weight in weights), *dtypes)
        if key not in self._ready:
            self._ready[key] = self._prepare(launches, parameters, weights, dtypes)
        for places, rows_of_factors, launch in self._ready[key]:
            table = factors if len(places) == len(parameters) else factors[rows_of_factors]
            launch([gradients[place] for place in places], table, skip, *self._options)
        return bool(self._ready[key])

    def _prepare(
        self, launches: "Launches", parameters: list[Tensor], weights: list[Tensor], dtypes: list[torch.dtype]
    ) -> "list[tuple[tuple[int, ...], Tensor, Launch]]":
        """Places in `parameters`, the same on the device, and the launch of those; shards without rows have none."""
        here = [place for place, weight in enumerate(weights) if weight.numel() > 0]
        columns = [(weights[place], *self._state(parameters[place])) for place in here]
        if not all(_is_aligned(each) for column in columns for each in column):
            return []
        copies = [self.copies.get(parameters[place]) for place in here]
        made = launches(
            [(*column, copy) for column, copy in zip(columns, copies, strict=True)], [dtypes[place] for place in here]
        )
        chosen = [(tuple(here[place] for place in places), launch) for places, launch in made.items()]
        return [(places, torch.tensor(places, device=weights[0].device), launch) for places, launch in chosen]

    def _factors(self, steps: Tensor, lr: Tensor, weight_decay: float) -> Tensor:
        """(parameters, 2 + rates) float32, of which each kernel reads a row, or its every element would take powers.

        What the gradient is multiplied by, the weight for its decay, and the rates of the update.
        """
        shrink = torch.ones_like(steps) if self.grad_scale is None else self.grad_scale.reciprocal().expand_as(steps)
        keep = (1.0 - lr * weight_decay).to(steps.dtype).expand_as(steps)
        return torch.stack((shrink, keep, *self._rates(lr, steps, *self._options)), dim=1)


def _is_aligned(tensor: Tensor) -> bool:
    """Whether a kernel may read it 16 bytes at a time, from its first number to its last."""
    return tensor.is_cuda and tensor.is_contiguous() and tensor.data_ptr() % 16 == 0


def _lies_well(gradient: Tensor, copy: Tensor | None) -> bool:
    """Whether kernels can read it beside the weight's copy: whole, or as parts of the same rows of something larger."""
    parts = copy is not None and gradient.stride() == copy.stride() and _is_aligned(gradient[0])
    return parts or _is_aligned(gradient)


def local(tensor: Tensor | None) -> Tensor:
    """Our own part of a DTensor, sharing memory; any other tensor is its own part."""
    assert tensor is not None
    to_local: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)  # DTensor itself belongs to higher floors
    return tensor if to_local is None else to_local()


def rows(tensor: Tensor) -> Tensor:
    """(any, ROW), or one axis, where memory allows it, so that one or two compiled kernels serve every shape."""
    if not tensor.is_contiguous():
        return tensor
    view = tensor.view(-1, ROW) if tensor.numel() % ROW == 0 else tensor.view(-1)
    torch._dynamo.maybe_mark_dynamic(view, 0)
    return view
