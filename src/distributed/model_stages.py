"""The model stages that a rank holds and their forward and backward: one whole model here, stages in pipeline/."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from src.data.batches import Batch
from src.distributed.fsdp.one_device import ComputeWeights
from src.distributed.fsdp.shard import synchronise_gradients
from src.distributed.mesh import Mesh
from src.distributed.precision.float8 import plain
from src.models.decoder import Decoder


class ModelStages(ABC):
    """`parts` are in the model's order and keep its names; together with those of other ranks they are all of it."""

    # How many micro-batches `loss` likes at once: enough to keep every rank busy.
    width: int
    weights: ComputeWeights | None = None  # on one device, where FSDP has nothing to gather
    router_z_loss = 0.0  # of the task
    follow: Sequence[Callable[[], None]] = ()  # what else is derived from weights; collective
    any_gradient_dtype = False  # what the optimizer reads: see ComputeWeights.after_backward

    def __init__(self, stages: Sequence[Decoder], mesh: Mesh, device: torch.device) -> None:
        self.stages, self.mesh, self.device = tuple(stages), mesh, device

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters under their names in the whole model."""
        return chain.from_iterable(part.named_parameters() for part in self.stages)

    def weigh_router_z_loss(self, scale: Tensor) -> None:
        """For backward passes of the summed cross entropy times `scale`. Tensor ranks that all route the same tokens
        have equal parts in it, as in all gradients of replicated weights.
        """
        if self.router_z_loss > 0.0:
            degrees = self.mesh.degrees
            weight = scale.float() * (self.router_z_loss / (1 if degrees.divides_tokens else degrees.tensor))
            for part in self.stages:
                part.set_router_z_loss(weight)

    def tensors(self) -> dict[str, Tensor]:
        """Live parameters and persistent buffers by name; a tied weight once, by its first name."""
        return {name: plain(tensor) for part in self.stages for name, tensor in _unshared(part)}

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Forward passes without a trace: no gradients, and gathered weights let go of, since no backward pass will."""
        for part in self.stages:
            part.eval()
        try:
            with torch.no_grad(), self._weights_in_place():
                yield
        finally:
            for part in self.stages:
                part.train()
                for module in part.modules():
                    if isinstance(module, FSDPModule):
                        module.reshard()

    def weights_written(self) -> None:
        """Collective. Derive anew what comes from weights, after others than the optimizer wrote them."""
        for act in self.follow:
            act()
        if self.weights is not None:  # copies in the compute dtype; a CUDA graph looks at no version
            with self.weights.in_place():
                pass

    def before_step(self, step: float, steps: float) -> None:
        """Set what follows a schedule besides the learning rate; `step` is counted from 0, of `steps`."""
        for part in self.stages:
            part.before_step(step, steps)

    def _weights_in_place(self) -> AbstractContextManager[None]:
        return nullcontext() if self.weights is None else self.weights.in_place()

    @abstractmethod
    def backward(self, batches: Sequence[Batch], scale: Tensor) -> Tensor:
        """Forward and backward of the summed cross entropy times `scale`. Returns this rank's part of that loss.
        Collective.
        """

    @abstractmethod
    def loss(self, batches: Sequence[Batch]) -> Tensor:
        """This rank's part of the summed cross entropy, without gradients. Collective."""

    def row_losses(self, batches: Sequence[Batch]) -> Tensor:
        """As `loss`, for each sequence: (batches, rows), 0 on ranks without the head. Collective."""
        heads = [part.output for part in self.stages if part.output is not None]
        for head in heads:
            head.by_row = True
        try:
            return self._row_losses(batches)
        finally:
            for head in heads:
                head.by_row = False

    @abstractmethod
    def _row_losses(self, batches: Sequence[Batch]) -> Tensor:
        """While the head gives a loss for each row."""

    @abstractmethod
    def logits(self, tokens: Tensor, column: int, positions: Tensor | None, mask: Tensor | None) -> Tensor:
        """Collective. (rows, vocabulary) after that column of tokens (rows, length), on all ranks of these rows.

        `positions`, `mask`: of src/models/cache.py, whose attention cores the parts have; None without a cache.
        """


class SingleStage(ModelStages):
    """The model without a pipeline: one stage, all of whose layers this rank runs."""

    width = 1

    def __init__(
        self, stages: Sequence[Decoder], mesh: Mesh, device: torch.device, weights: ComputeWeights | None = None
    ) -> None:
        super().__init__(stages, mesh, device)
        self.weights = weights

    def backward(self, batches: Sequence[Batch], scale: Tensor) -> Tensor:
        (model,) = self.stages
        total = torch.zeros((), device=self.device)
        with self._weights_in_place():
            if self.weights is not None:
                self.weights.before_backward(len(batches))
            for index, batch in enumerate(batches):
                last = index == len(batches) - 1
                if self.weights is None:
                    synchronise_gradients(model, last or self.mesh.degrees.sync_each_micro_batch, last=last)
                loss = forward_loss(model, batch, self.device) * scale.float()
                loss.backward()
                total += loss.detach()
        if self.weights is not None:
            self.weights.after_backward(any_dtype=self.any_gradient_dtype)
        return total

    def loss(self, batches: Sequence[Batch]) -> Tensor:
        (model,) = self.stages
        with self._weights_in_place():
            return torch.stack([forward_loss(model, batch, self.device) for batch in batches]).sum()

    def _row_losses(self, batches: Sequence[Batch]) -> Tensor:
        (model,) = self.stages
        with self._weights_in_place():
            return torch.stack([forward_loss(model, batch, self.device) for batch in batches])

    def logits(self, tokens: Tensor, column: int, positions: Tensor | None, mask: Tensor | None) -> Tensor:
        (model,) = self.stages
        with self._weights_in_place():
            result: Tensor = model(tokens, positions=positions, mask=mask)
        return result[:, column]


def forward_loss(model: Decoder, batch: Batch, device: torch.device) -> Tensor:
    """The summed cross entropy of one micro-batch through a whole model; its gradient is of all that is trained on."""
    tokens, inputs = ready(model, batch, device)
    loss: Tensor = model(tokens, **inputs)
    return loss


def ready(model: Decoder, batch: Batch, device: torch.device) -> tuple[Tensor, dict[str, Any]]:
    """The batch on the device, as arguments of `Decoder.forward`: what is embedded, and what every stage must know."""
    tokens, labels = (x.to(device, non_blocking=True) for x in (batch.tokens, batch.labels))
    positions = None if batch.positions is None else batch.positions.to(device, non_blocking=True)
    mask = model.attention_mask(batch.documents, *tokens.shape)
    inputs = {"labels": labels, "positions": positions, "mask": mask}
    ahead = model.look_ahead(tokens, labels)
    return tokens, inputs if ahead is None else inputs | {"ahead": ahead}


def _unshared(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    shared = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    shared -= {name for name, _ in model.named_parameters()}
    return ((name, tensor) for name, tensor in model.state_dict().items() if name not in shared)
