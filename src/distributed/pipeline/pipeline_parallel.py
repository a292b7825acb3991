"""Pipeline parallelism (arXiv 1811.06965, 2104.04473, 2401.10241): torch's schedules over the stages of this rank.

A schedule sees only numbers of micro-batches. What a stage needs of one (tokens, labels, positions, mask) waits here
and is put in its place by a hook, so nothing is cut or joined, and a mask always meets the rows that it was made for.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch._functorch.config
import torch.distributed as dist
from torch import Tensor

from src.data.batches import Batch
from src.distributed.fsdp.one_device import ComputeWeights
from src.distributed.mesh import Mesh
from src.distributed.model_stages import ModelStages, SingleStage, ready
from src.distributed.parallel_dims import ParallelDims
from src.distributed.pipeline.stages import SCHEDULES, module_of, owned, split, stage_count
from src.distributed.precision.config import Precision
from src.models.decoder import Decoder

if TYPE_CHECKING:
    from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle

    Schedule = PipelineScheduleSingle | PipelineScheduleMulti


def build(make: Callable[[], Decoder], n_layers: int, degrees: ParallelDims, rank: int) -> dict[int, Decoder]:
    """The stages of a pipeline rank, on the meta device; without a pipeline, stage 0 is the whole model."""
    cut, ranks = split(degrees, n_layers), degrees.pipeline
    stages = {}
    for stage in owned(rank, ranks, len(cut), degrees.pipeline_schedule) if ranks > 1 else (0,):
        with torch.device("meta"):
            stages[stage] = make()
        keep(stages[stage], cut[stage])
    return stages


def keep(model: Decoder, modules: Sequence[str]) -> None:
    """Drop every module of `model` that is not named, nor is where a named one is; the others keep their names."""
    for name, _ in list(model.named_children()):
        if name == "layers":
            for layer in list(model.layers):
                if f"layers.{layer}" not in modules:
                    del model.layers[layer]
        elif module_of(name) not in modules:
            setattr(model, name, None)


def connect(stages: Mapping[int, Decoder], mesh: Mesh, device: torch.device, precision: Precision) -> ModelStages:
    """The stages of this rank, on its device, as a network; hidden states travel between them in `compute`."""
    degrees = mesh.degrees
    if degrees.pipeline > 1:
        return Pipeline(stages, mesh, device, getattr(torch, precision.compute))
    (model,) = stages.values()
    if not degrees.on_one_device:
        return SingleStage([model], mesh, device)
    weights = ComputeWeights(model, precision, sync_each_micro_batch=degrees.sync_each_micro_batch)
    return SingleStage([model], mesh, device, weights)


class Pipeline(ModelStages):
    """Some stages of the model are on this rank, and hidden states travel between ranks."""

    def __init__(self, stages: Mapping[int, Decoder], mesh: Mesh, device: torch.device, hidden: torch.dtype) -> None:
        super().__init__(list(stages.values()), mesh, device)
        self.degrees, self.hidden, self.by_number = mesh.degrees, hidden, dict(stages)
        self.count = stage_count(self.degrees, self.stages[0].config.n_layers)
        self.width = self.count
        self.group, ranks = mesh.pipeline.get_group(), self.degrees.pipeline
        name = self.degrees.pipeline_schedule
        self.rank_of = {stage: rank for rank in range(ranks) for stage in owned(rank, ranks, self.count, name)}
        if self.degrees.splits_backward:
            # The pass for inputs must leave what the pass for weights reads; compiled FlexAttention would reuse it.
            torch._functorch.config.donated_buffer = False
        self._waiting: list[tuple[Tensor, dict[str, Any]]] = []
        self._scale = torch.ones((), device=device)
        self._shape: tuple[int, ...] | None = None
        for part in self.stages:
            # Before the hooks of FSDP, which would send the number to the GPU, and those that cut what enters a model.
            part.register_forward_pre_hook(self._look_up, prepend=True, with_kwargs=True)

    def backward(self, batches: Sequence[Batch], scale: Tensor) -> Tensor:
        self._waiting, self._scale = self._ready(batches), scale.float()
        schedule = self._schedule(len(batches), *batches[0].tokens.shape)
        numbers, losses = torch.arange(len(batches)), list[Tensor]()
        first = [numbers] if 0 in self.by_number else []
        schedule.step(*first, micro_batch=numbers, target=numbers, losses=losses, return_outputs=False)
        self._waiting = []
        return torch.stack(losses).detach().sum() if losses else torch.zeros((), device=self.device)

    def loss(self, batches: Sequence[Batch]) -> Tensor:
        losses = self._forward(self._ready(batches))
        return torch.stack(losses).sum() if losses else torch.zeros((), device=self.device)

    def _row_losses(self, batches: Sequence[Batch]) -> Tensor:
        losses = self._forward(self._ready(batches))
        shape = (len(batches), len(batches[0].tokens))
        return torch.stack(losses) if losses else torch.zeros(shape, device=self.device)

    def logits(self, tokens: Tensor, column: int, positions: Tensor | None, mask: Tensor | None) -> Tensor:
        results = self._forward([(tokens, {"positions": positions, "mask": mask})])
        shape = (len(tokens), self.stages[0].config.vocab_size)
        rows = torch.empty(shape, dtype=self.hidden, device=self.device)
        if results:
            rows.copy_(results[0][:, column])
        dist.broadcast(rows, group=self.group, group_src=self.rank_of[self.count - 1])
        return rows

    def _ready(self, batches: Sequence[Batch]) -> list[tuple[Tensor, dict[str, Any]]]:
        return [ready(self.stages[0], batch, self.device) for batch in batches]

    def _look_up(
        self, part: Decoder, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """From the number of a micro-batch to what the stage computes with."""
        if "micro_batch" not in kwargs:
            return args, kwargs
        tokens, inputs = self._waiting[int(kwargs["micro_batch"])]
        return (tokens if part.tok_embeddings is not None else args[0],), inputs

    def _travelling(self, batch: int, length: int) -> tuple[int, int, int]:
        """Shape of what travels between two stages, where sequences stay cut: hidden states, `batch` rows of them with
        all that comes along.
        """
        degrees = self.degrees
        return batch, length // (degrees.context * degrees.tensor), self.stages[0].config.dim

    def _schedule(self, micro_batches: int, batch: int, length: int) -> "Schedule":
        """Made at the first step, when the shapes are known; it keeps a buffer to receive each micro-batch."""
        shape = (micro_batches, batch, length)
        if self._shape != shape:
            rows = (1 + self.stages[0].config.prediction_depths) * batch  # with the embeddings of tokens ahead
            self._shape, self._made = shape, self._make(micro_batches, self._travelling(rows, length))
        return self._made

    def _make(self, micro_batches: int, shape: tuple[int, int, int]) -> "Schedule":
        # Here: it brings torch's compiler along, which takes longer to import than all of ours.
        from torch.distributed.pipelining import PipelineStage
        from torch.distributed.pipelining.schedules import (
            PipelineScheduleMulti,
            PipelineScheduleSingle,
            get_schedule_class,
        )

        empty = partial(torch.empty, device="meta")
        hidden = empty(shape, dtype=self.hidden, requires_grad=True)
        number, loss = empty(1, dtype=torch.int64), empty((), dtype=torch.float32)
        stages = [
            PipelineStage(
                part,
                stage,
                self.count,
                self.device,
                input_args=number if stage == 0 else hidden,
                output_args=loss if stage == self.count - 1 else hidden,
                group=self.group,
            )
            for stage, part in self.by_number.items()
        ]
        if self.device.type == "cpu":
            for stage in stages:
                # torch 2.11 greets all neighbours, in a V also itself, to whom gloo has no connection and needs none.
                stage._get_init_p2p_neighbors_ops = list  # type: ignore[method-assign]
        made = get_schedule_class(self.degrees.pipeline_schedule)
        given = stages if SCHEDULES[self.degrees.pipeline_schedule].several else stages[0]
        schedule = made(given, micro_batches, loss_fn=self._scaled, scale_grads=False)
        assert isinstance(schedule, PipelineScheduleSingle | PipelineScheduleMulti)
        return schedule

    def _scaled(self, loss: Tensor, number: Tensor) -> Tensor:
        """Inside the schedule, so that the backward pass starts from it."""
        return loss * self._scale

    def _forward(self, given: Sequence[tuple[Tensor, dict[str, Any]]]) -> list[Tensor]:
        """What the last stage makes of each micro-batch, on the rank that has it; nothing elsewhere.

        A rank with one stage goes on to the next micro-batch at once; with several, a micro-batch ends first, because
        two ranks that both send before they receive would wait for ever.
        """
        results: list[Tensor] = []
        sent: list[tuple[dist.Work | None, Tensor]] = []
        for tokens, inputs in given:
            state = tokens
            for stage, part in self.by_number.items():
                if stage > 0 and stage - 1 not in self.by_number:
                    state = torch.empty(self._travelling(*tokens.shape), dtype=self.hidden, device=self.device)
                    dist.recv(state, group=self.group, group_src=self.rank_of[stage - 1])
                state = part(state, **inputs)
                if stage == self.count - 1:
                    results.append(state)
                elif stage + 1 not in self.by_number:
                    state = state.contiguous()
                    sent.append((dist.isend(state, group=self.group, group_dst=self.rank_of[stage + 1]), state))
        for work, _ in sent:
            if work is not None:
                work.wait()
        return results
