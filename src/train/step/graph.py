"""The whole step of one GPU as one CUDA graph: forward, backward, norm, clipping, update, for small models.

Python needs about 20 ms to launch the kernels of a step of 12 layers, whatever their size; replaying a graph needs
none. The kernels are those of `Stepper` with the same arguments, so every number is the same to the last bit. What
changes from step to step lies at fixed addresses: tokens and labels with their sums, learning rates, the vote to stop.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from src.data.batches import Batch
from src.errors import ConfigError
from src.optim.elementwise import Elementwise
from src.train.step.stepper import TOTALS, Stepper

# Steps without a graph: the first compiles, the second has the memory and the tables of all later ones.
EAGER_STEPS = 2


class GraphedStepper(Stepper):
    """`Stepper`, whose third step and all later ones are replays. All batches have the shapes of the first."""

    def __init__(self, *arguments: Any) -> None:
        """`arguments`: of `Stepper`. Raises ConfigError where the optimizer's rates cannot lie on the device."""
        super().__init__(*arguments)
        if self.device.type != "cuda":
            raise ConfigError(f"compile.graph=true needs a CUDA device, not {self.device.type}; pass compile=blocks")
        if not isinstance(self.optimizer, Elementwise):
            raise ConfigError(
                f"compile.graph=true: {type(self.optimizer).__name__} keeps its learning rate on the host; pass an "
                "optimizer of src/optim/elementwise.py, or compile=blocks"
            )
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream = torch.cuda.Stream(self.device)  # autograd remembers on which stream a weight was first used
        self._eager = 0
        self._votes = torch.zeros((), device=self.device)
        self._own = torch.zeros(len(TOTALS), dtype=torch.float64, device=self.device)
        self._rates = [torch.zeros((), dtype=torch.float64, device=self.device) for _ in self.optimizer.param_groups]
        self._batches: list[Batch] = []
        self._outcome: dict[str, Tensor] = {}

    def __call__(self, batches: Sequence[Batch], stop: bool) -> dict[str, Tensor]:
        """As `Stepper`; the tensors that are returned are overwritten by the next step."""
        if self._eager < EAGER_STEPS:
            self._eager += 1
            return self._beside(batches, stop)
        if not self._batches:
            self._batches = [self._at_home(batch) for batch in batches]
        for batch, home in zip(batches, self._batches, strict=True):
            for name, place in _tensors(home).items():
                place.copy_(getattr(batch, name), non_blocking=True)
        for rate, group in zip(self._rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        self._votes.fill_(float(stop))
        self._own.copy_(self._mine(batches))
        if self._graph is None:
            self._graph = self._captured()
        self._graph.replay()
        return self._outcome

    def _beside(self, batches: Sequence[Batch], stop: bool) -> dict[str, Tensor]:
        """A step without a graph, on the stream that will be captured."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outcome = super().__call__(batches, stop)
        current.wait_stream(self._stream)
        return outcome

    def _captured(self) -> torch.cuda.CUDAGraph:
        """The graph of a step; nothing is computed yet."""
        assert isinstance(self.optimizer, Elementwise)
        graph = torch.cuda.CUDAGraph()
        self.optimizer.learning_rates = self._rates
        # relaxed: page-locked memory for tables may be asked for meanwhile, here and by the thread that reads ahead
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="relaxed"):
            self._outcome = self._step(self._batches, self._own, self._votes)
        kept = [each for each in torch.cuda.memory_snapshot() if each["segment_pool_id"] == graph.pool()]
        self.captured_bytes = sum(each["total_size"] - each["allocated_size"] for each in kept)
        return graph

    def _at_home(self, batch: Batch) -> Batch:
        moved: dict[str, Any] = {name: each.to(self.device, copy=True) for name, each in _tensors(batch).items()}
        return replace(batch, **moved)


def _tensors(batch: Batch) -> dict[str, Tensor]:
    pairs = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value for name, value in pairs.items() if isinstance(value, Tensor)}
