"""Expert parallelism (GShard, arXiv 2006.16668): experts sharded over ranks, an all-to-all token dispatcher.

How many rows go where is known to the device only, and a transfer wants to know it on the host: one reading a layer,
and none where experts take turns. While the host waits for it the device sorts rows; while rows travel it computes
the shared experts.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from src.distributed.expert.all_to_all import AllToAllSplits, AsyncAllToAll, SplitSizes, transposed
from src.distributed.mesh import Mesh
from src.models.moe.experts import Experts
from src.models.moe.moe import MoE, arrange, combine, dispatch, sorting
from src.models.moe.router import Routing


def split_experts(model: nn.Module, mesh: Mesh) -> None:
    """Shard the experts of every MoE layer and give it the all-to-all dispatcher. In place, on the meta device."""
    cut, moes = mesh.experts, [module for module in model.modules() if isinstance(module, MoE)]
    for moe in moes if cut is not None else []:
        assert cut is not None
        _cut(moe.experts, cut)
        if mesh.degrees.expert > 1:
            before = moe.dispatcher.score_before_experts
            moe.register_module("dispatcher", AllToAllTokenDispatcher(cut["expert"], before))


def _cut(experts: Experts, mesh: DeviceMesh) -> None:
    """Whole experts over the axis `expert`; the hidden features of each over the other axis."""
    assert mesh.mesh_dim_names is not None
    for name, hidden in (("w1", 1), ("w2", 2), ("w3", 1)):
        placements = [Shard(0 if axis == "expert" else hidden) for axis in mesh.mesh_dim_names]
        weight = distribute_tensor(getattr(experts, name).detach(), mesh, placements, src_data_rank=None)
        experts.register_parameter(name, nn.Parameter(weight))
    kind: Any = type(experts)  # a checker takes a class of modules for no key of a cache
    experts.__class__ = _with_parts(kind)


@cache
def _with_parts(kind: type[Experts]) -> type[Experts]:
    """The kind of experts that compute as `kind` does, with the parts of their matrices that are here."""

    def matrices(self: Experts) -> tuple[Tensor, ...]:
        return tuple(weight.to_local() for weight in (self.w1, self.w2, self.w3) if isinstance(weight, DTensor))

    return type(f"Part{kind.__name__}", (kind,), {"matrices": matrices})


class AllToAllTokenDispatcher(nn.Module):
    """Token dispatcher of expert parallelism: each rank of a group holds num_experts / ranks neighbouring experts."""

    # What runs between two transfers. A compiler may make a graph of each; they keep only places for the backward, so
    # there is nothing in them to recompute.
    compile_regions = ("pack", "regroup", "unpack")

    def __init__(self, mesh: DeviceMesh, score_before_experts: bool) -> None:
        super().__init__()
        self.ranks, self.group = mesh.size(), mesh.get_group().group_name
        self.score_before_experts = score_before_experts

    def forward(self, x: Tensor, routing: Routing, experts: Experts, shared: nn.Module | None = None) -> Tensor:
        """As `LocalTokenDispatcher.forward`, with tokens sent to the ranks of their experts. Collective."""
        going = routing.counts.view(self.ranks, -1)  # (rank, its expert): rows of mine
        coming = going if routing.even else transposed(going, self.group)  # (rank, my expert): rows of that rank
        sizes = None if routing.even else SplitSizes(going, coming)
        rows, scales, order, places = self.pack(x, routing.experts, routing.weights)
        out = (
            AllToAllSplits(self.group, *sizes.read())
            if sizes
            else AllToAllSplits.even(self.group, self.ranks, len(rows))
        )
        first, second = AsyncAllToAll(rows, out), None if scales is None else AsyncAllToAll(scales, out)
        beside = None if shared is None else shared(x)
        rows, scales = first.wait(), None if second is None else second.wait()
        _any_length(rows, scales)
        rows, scales, index, inverse = self.regroup(rows, scales, coming)
        _any_length(rows, scales)
        rows = permute(experts(rows, coming.sum(0), scales), inverse, index)
        return self.unpack(AsyncAllToAll(rows, out.reversed()).wait(), order, places, beside)

    def pack(self, x: Tensor, experts: Tensor, weights: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """x (tokens, dim) -> rows (tokens * top_k, dim), sorted by expert and so by rank; what scales their results,
        where it is not scaled already; and for `unpack`, where rows came from and went to.
        """
        order, places = sorting(experts)
        rows, scales = dispatch(x, order, places), arrange(weights, order, places)
        if self.score_before_experts:
            return (rows * scales.unsqueeze(-1)).to(x.dtype), None, order, places
        return rows, scales, order, places

    def regroup(
        self, rows: Tensor, scales: Tensor | None, coming: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Reorder received rows from (rank, expert) to expert order. Also returns the index that does it, and its
        inverse.
        """
        index, inverse = grouping(coming, len(rows))
        return (
            permute(rows, index, inverse),
            scales if scales is None else permute(scales, index, inverse),
            index,
            inverse,
        )

    def unpack(self, rows: Tensor, order: Tensor, places: Tensor, beside: Tensor | None) -> Tensor:
        """Rows as `pack` sorted them -> (tokens, dim), the sum of each token's rows and of what it met `beside`."""
        result = combine(rows, order, places)
        return result if beside is None else result + beside


def _any_length(*tensors: Tensor | None) -> None:
    """Every number of rows is one graph's: a recomputation must not meet another one than the forward did."""
    for each in tensors:
        if each is not None:
            torch._dynamo.maybe_mark_dynamic(each, 0)


def grouping(counts: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Of `rows` rows ordered by rank, then expert, with their counts (ranks, experts): where each place of the order by
    expert, then rank, finds its row, and the inverse.
    """
    ends, lengths = counts.flatten().cumsum(0).view_as(counts).T.flatten(), counts.T.flatten()
    shifts = ends - lengths.cumsum(0)  # from a run's place by expert to its place by rank
    places = torch.arange(rows, device=counts.device)
    index = places + shifts.repeat_interleave(lengths, output_size=rows)  # told its length, the host need not wait
    return index, torch.empty_like(index).scatter(0, index, places)


def permute(rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """rows[index], whose gradient gathers as well: no atomic addition."""
    apply: Callable[..., Tensor] = _Permute.apply
    return apply(rows, index, inverse)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse), None, None
