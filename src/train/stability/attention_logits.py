"""Attention logits: the largest of each head, and QK-clip (arXiv 2507.20534, algorithm 1), which keeps them bounded.

Kernels of attention say nothing of their logits, so these are multiplied once more, in slices of queries, which takes
about half the flops of a forward pass of the core. Weights are scaled after the update, each shard by itself: all ranks
know all heads' factors.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.optim import Optimizer

from src.distributed.collectives import world_max
from src.distributed.matrix_owners import box_of
from src.distributed.model_stages import ModelStages
from src.distributed.precision.float8 import plain
from src.optim.base import skipped_update
from src.optim.elementwise import local

QUERIES = 256  # of a slice: (batch, heads, 256, length) logits are there at once


class AttentionLogits:
    """The largest logit of each head in the forward passes of a step, where `wanted`; ranks must want alike."""

    def __init__(self, network: ModelStages) -> None:
        config, mesh = network.stages[0].config, network.mesh.tensor
        self.wanted = False
        layers = config.n_layers + config.prediction_depths
        self.largest = torch.full((layers, config.n_heads), -math.inf, device=network.device)  # once `reduce` has run
        self._seen = self.largest.clone()
        self._tensor_rank = 0 if mesh is None else mesh.get_local_rank()
        for part in network.stages:
            for number, block in part.numbered_blocks().items():
                core = block.get_submodule("attention.core")
                core.register_forward_pre_hook(partial(self._before_core, number))

    def reduce(self) -> Tensor:
        """Collective. (layers, heads): the maximum over ranks and micro-batches since the last call."""
        self.largest.copy_(world_max(self._seen))
        self._seen.fill_(-math.inf)
        return self.largest

    @torch.no_grad()
    def _before_core(self, number: int, core: nn.Module, arguments: tuple[Any, ...]) -> None:
        if not self.wanted or not core.training:
            return
        q, k, _, mask, *scale = arguments
        found = largest_logits(q, k, mask, scale[0] if scale else None)
        here = self._seen[number].narrow(0, self._tensor_rank * len(found), len(found))
        here.copy_(torch.maximum(here, found))


def largest_logits(q: Tensor, k: Tensor, mask: BlockMask | Tensor | None, scale: float | None) -> Tensor:
    """(heads,) float32: the largest of q k^T * scale that a query sees; arguments as those of an attention core.

    With a mask of documents' starts, whose form is the kernel's, of all keys before: then it is a bound.
    """
    q, k = local(q), local(k)
    length, heads = q.shape[2], q.shape[1]
    keys = k.repeat_interleave(heads // k.shape[1], dim=1).mT
    places = torch.arange(length, device=q.device)
    found = torch.full((heads,), -math.inf, device=q.device)
    for first in range(0, length, QUERIES):
        last = min(first + QUERIES, length)  # what comes later is seen by none of them
        logits = (q[:, :, first:last] @ keys[..., :last]).float()
        seen = _seen(mask, len(q), places[first:last], places[:last])
        found = torch.maximum(found, logits.masked_fill(~seen, -math.inf).amax(dim=(0, 2, 3)))
    return found * (q.shape[-1] ** -0.5 if scale is None else scale)


def _seen(mask: BlockMask | Tensor | None, batch: int, queries: Tensor, keys: Tensor) -> Tensor:
    """(batch or 1, 1, queries, keys) bool."""
    if not isinstance(mask, BlockMask):
        return (queries[:, None] >= keys)[None, None]
    rows = torch.arange(batch, device=queries.device)[:, None, None]
    allowed: Tensor = mask.mask_mod(rows, rows.new_zeros(()), queries[None, :, None], keys[None, None, :])
    return allowed.unsqueeze(1)


class QKClip:
    """After each update, weights of heads whose largest logit was above the threshold are scaled down to it."""

    def __init__(self, logits: AttentionLogits, network: ModelStages, optimizer: Optimizer, threshold: float) -> None:
        logits.wanted = True
        self._logits, self._optimizer, self._threshold = logits, optimizer, threshold
        self._rows: list[tuple[int, Tensor, Tensor, Tensor]] = []  # layer, weight, head and power of each of its rows
        rules: Mapping[str, Sequence[tuple[int, float]]] = network.stages[0].config.logit_rows()
        for part in network.stages:
            for number, block in part.numbered_blocks().items():
                for name, widths in rules.items():
                    weight = plain(block.get_parameter(f"attention.{name}.weight"))
                    self._rows.append((number, weight, *_heads_and_powers(weight, widths)))

    @torch.no_grad()
    def clip(self) -> None:
        """Collective. After a step; one that was skipped changes nothing. Does not wait for the device."""
        largest = self._logits.reduce()
        factors = torch.where(largest > self._threshold, self._threshold / largest, 1.0)
        skipped = skipped_update(self._optimizer)
        if skipped is not None:
            factors = torch.where(skipped.to(factors.device) > 0, torch.ones_like(factors), factors)
        for layer, weight, heads, powers in self._rows:
            shard = local(weight)
            shard.mul_(factors[layer].to(shard.device)[heads].pow(powers).unsqueeze(1).to(shard.dtype))


def _heads_and_powers(weight: Tensor, widths: Sequence[tuple[int, float]]) -> tuple[Tensor, Tensor]:
    """Of the rows that are here, of a weight whose heads each have rows of these widths and powers."""
    (first, _), (count, _) = box_of(weight)
    of_head = torch.cat([torch.full((width,), power) for width, power in widths])
    rows = torch.arange(first, first + count)
    device = local(weight).device
    return (rows // len(of_head)).to(device), of_head[rows % len(of_head)].to(device)
