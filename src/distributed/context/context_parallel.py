"""Context parallelism: sequences are sharded over ranks, so that a causal mask leaves each rank equal work.

Whole batches come in and whole logits go out: the cut happens at the model's own border, so training, validation and
sampling all call a model as if it were alone, and labels are counted before the cut. A summed loss is this rank's part.
Between the borders only the attention cores know: see src/distributed/context/ring_attention.py for the cut and for
causal attention.

A core with a block mask (FlexAttention) gets the keys and values of the whole sequence, gathered, and a mask made for
the positions of this rank's queries; its gradients of keys and values go back to their owners, added up.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from src.distributed.context.ring_attention import attention, cut, gather
from src.distributed.parallel_dims import ParallelDims
from src.models.decoder import Decoder

ARGUMENTS = ("tokens", "labels", "positions", "mask", "ahead")  # of `Decoder.forward`


class SharedAttention(nn.Module):
    """Attention over a sequence that is cut over ranks. Replaces the attention core: local queries, keys and values
    in, local result out.
    """

    def __init__(self, core: nn.Module, group: str, rotate: str) -> None:
        super().__init__()
        self.core, self.group, self.rotate = core, group, rotate

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None = None, scale: float | None = None
    ) -> Tensor:
        if mask is None:
            result: Tensor = attention(q, k, v, scale, self.group, self.rotate)[0]
        else:
            result = self.core(q, gather(k, 2, self.group), gather(v, 2, self.group), mask, scale)
        return result


class Border:
    """The hooks around a model, or around a part of its pipeline."""

    def __init__(self, mesh: DeviceMesh, tensor: int) -> None:
        self.rank, self.ranks, self.group = mesh.get_local_rank(), mesh.size(), mesh.get_group().group_name
        self.tensor = tensor  # ranks that cut a hidden state's sequence once more

    def enter(
        self, model: Decoder, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Cut what describes the sequence; without positions, say which ones these are."""
        given = dict(zip(ARGUMENTS, args, strict=False)) | kwargs
        tokens, labels, positions, mask, ahead = (given.get(name) for name in ARGUMENTS)
        assert tokens is not None
        first = model.tok_embeddings is not None
        length = tokens.shape[1] if first else tokens.shape[1] * self.ranks * self.tensor
        places = self._mine(torch.arange(length, device=tokens.device).unsqueeze(0))
        return (self._mine(tokens) if first else tokens,), {
            "labels": None if labels is None else self._mine(labels),
            "positions": places if positions is None else self._mine(positions),
            "mask": None if mask is None else rows_of(mask, places[0]),
            "ahead": None if ahead is None else ahead._make(map(self._mine, ahead)),
        }

    def leave(self, model: Decoder, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> Tensor:
        """Logits meet again; a loss and a hidden state stay parts."""
        logits = model.output is not None and kwargs.get("labels") is None
        return gather(result, 1, self.group) if logits else result

    def _mine(self, x: Tensor) -> Tensor:
        return cut(x, self.rank, self.ranks)


def rows_of(mask: BlockMask | Tensor, queries: Tensor) -> BlockMask | Tensor:
    """The same mask for some of its queries, by their positions, and for all keys; a dense one is of a cache."""
    if isinstance(mask, Tensor):
        return mask[:, :, queries]
    batch, heads, _, keys = mask.shape
    allowed = mask.mask_mod

    def mine(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return allowed(b, h, queries[q], k)

    compiled = queries.is_cuda
    return create_block_mask(mine, batch, heads, len(queries), keys, device=queries.device, _compile=compiled)


def split_context(model: Decoder, mesh: DeviceMesh | None, degrees: ParallelDims) -> None:
    """Let every attention core reach over `mesh`, and cut what enters the model; no parameter changes."""
    if mesh is None:
        return
    border = Border(mesh, degrees.tensor)
    for block in model.blocks():
        holder = block.get_submodule("attention")
        holder.core = SharedAttention(holder.get_submodule("core"), border.group, degrees.rotate)
    model.register_forward_pre_hook(border.enter, with_kwargs=True)
    model.register_forward_hook(border.leave, with_kwargs=True)
