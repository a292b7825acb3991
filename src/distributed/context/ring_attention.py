"""Ring attention for context parallelism: causal attention of a sequence sharded over ranks, with load balancing.

A sequence is cut into 2n chunks and rank r holds chunks r (its head) and 2n-1-r (its tail): under a causal mask all
ranks then have equal work. A query sees its own rank's keys causally, and a chunk of another rank either whole or not
at all: all queries see the head of s < r, and the tail's queries see both chunks of s > r. So one causal kernel and a
few dense ones make up the attention of a rank, joined by their log sum exp as in ring attention (arXiv 2310.01889);
each kernel's backward, given the joined result, is its part of the true gradient. Grouped keys travel once, not once
per query head.

allgather: all keys and values come at once and stay for one attention: at most two dense kernels.
alltoall: they come from one rank after the other, straight from their owner: memory of two ranks' share.

Both run in the forward and again in the backward pass, beside the first kernel. `torch.compile` sees one operator.
"""

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import ProcessGroup, _resolve_process_group  # type: ignore[attr-defined]

from src.distributed.context.attention_kernels import AttentionKernel, fastest


def cut(x: Tensor, rank: int, ranks: int, dim: int = 1) -> Tensor:
    """The two chunks of a whole sequence that a rank holds, head first."""
    chunks = x.chunk(2 * ranks, dim)
    return torch.cat((chunks[rank], chunks[-1 - rank]), dim)


def in_order(gathered: Tensor, ranks: int) -> Tensor:
    """(ranks * 2 * chunk, ...) as ranks hold them -> the whole sequence."""
    pairs = gathered.unflatten(0, (ranks, 2, -1))
    return torch.cat((pairs[:, 0], pairs[:, 1].flip(0))).flatten(0, 1)


def by_rank(whole: Tensor, ranks: int) -> Tensor:
    """The inverse of `in_order`."""
    heads, tails = whole.unflatten(0, (2, ranks, -1))
    return torch.stack((heads, tails.flip(0)), dim=1).flatten(0, 2)


class KeyValueRotation(Protocol):
    """Rows are positions of the sequence: (positions, batch, kv heads, width of a key + width of a value)."""

    steps: range

    def take(self, step: int) -> tuple[slice, Tensor]:
        """Which local queries look at which rows of others; steps are taken in order."""

    def give(self, step: int, gradient: Tensor) -> None:
        """Hand the gradient of a step's rows to their owners."""

    def total(self) -> Tensor:
        """Gradients of this rank's rows from all ranks, summed in fp32 or better."""


class AllGatherRotation:
    """Gathers the keys and values of all ranks at once (all_gather)."""

    def __init__(self, rows: Tensor, group: ProcessGroup) -> None:
        self.group, self.ranks, rank = group, group.size(), group.rank()
        chunk = len(rows) // 2
        self.gathered = _gathered(rows, group)
        # In the order of the sequence: heads of ranks before this one, then all between its own head and its tail.
        seen = [
            (slice(None), slice(0, rank * chunk)),
            (slice(chunk, None), slice((rank + 1) * chunk, (2 * self.ranks - 1 - rank) * chunk)),
        ]
        self.seen = [(queries, keys) for queries, keys in seen if keys.start < keys.stop]
        self.steps = range(len(self.seen))
        self.gradients: list[Tensor] = []

    def take(self, step: int) -> tuple[slice, Tensor]:
        if step == 0:
            self.gathered = in_order(_arrived(self.gathered), self.ranks)
        queries, keys = self.seen[step]
        return queries, self.gathered[keys]

    def give(self, step: int, gradient: Tensor) -> None:
        self.gradients.append(gradient)

    def total(self) -> Tensor:
        whole = torch.zeros_like(self.gathered)
        for (_, keys), gradient in zip(self.seen, self.gradients, strict=True):
            whole[keys] = gradient
        return add_up(whole, self.group)


class AllToAllRotation:
    """In step i rank r receives the rows of rank r - i and sends its own to r + i; gradients go the reverse way."""

    def __init__(self, rows: Tensor, group: ProcessGroup) -> None:
        self.rows, self.group, self.ranks, self.rank = rows, group, group.size(), group.rank()
        self.chunk = len(rows) // 2
        self.steps = range(1, self.ranks)
        self.sum = torch.zeros_like(rows, dtype=precise(rows.dtype))
        self.coming = self._fetch(1)
        self.returning: tuple[Tensor, Any] | None = None

    def _needed(self, owner: int, reader: int) -> int:
        """How many rows of `owner`, from the first: only the head for ranks behind it."""
        return self.chunk if owner < reader else 2 * self.chunk

    def _others(self, step: int) -> tuple[int, int]:
        """Whose rows come, and who gets this rank's."""
        return (self.rank - step) % self.ranks, (self.rank + step) % self.ranks

    def _send(self, rows: Tensor, to: int, source: int, arriving: int) -> tuple[Tensor, Any]:
        """Rows for `to`, while `arriving` rows come from `source`."""
        here = rows.new_empty(arriving, *rows.shape[1:])
        sizes = [len(rows) if rank == to else 0 for rank in range(self.ranks)]
        arrivals = [arriving if rank == source else 0 for rank in range(self.ranks)]
        work = dist.all_to_all_single(here, rows, arrivals, sizes, group=self.group, async_op=True)
        return here, work

    def _fetch(self, step: int) -> tuple[Tensor, Any]:
        source, reader = self._others(step)
        rows = self.rows[: self._needed(self.rank, reader)]
        return self._send(rows, reader, source, self._needed(source, self.rank))

    def take(self, step: int) -> tuple[slice, Tensor]:
        rows, work = self.coming
        work.wait()
        if step + 1 < self.ranks:
            self.coming = self._fetch(step + 1)
        source, _ = self._others(step)
        return slice(None) if source < self.rank else slice(self.chunk, None), rows

    def give(self, step: int, gradient: Tensor) -> None:
        self._arrived()
        source, reader = self._others(step)
        self.returning = self._send(gradient.contiguous(), source, reader, self._needed(self.rank, reader))

    def _arrived(self) -> None:
        if self.returning is not None:
            gradient, work = self.returning
            work.wait()
            self.sum[: len(gradient)] += gradient

    def total(self) -> Tensor:
        self._arrived()
        return self.sum


def _gathered(rows: Tensor, group: ProcessGroup) -> Tensor:
    """The rows of all ranks, one rank after the other, once they have `_arrived`; this returns before.

    The operator under torch's collectives: the function above it has one name in torch 2.11 and another in 2.13.
    """
    coming: Tensor = torch.ops._c10d_functional.all_gather_into_tensor(rows, group.size(), group.group_name)
    return coming


def _arrived(coming: Tensor) -> Tensor:
    result: Tensor = torch.ops._c10d_functional.wait_tensor(coming)
    return result


def precise(dtype: torch.dtype) -> torch.dtype:
    """The dtype to accumulate in: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def add_up(whole: Tensor, group: ProcessGroup) -> Tensor:
    """Gradients of a whole sequence, one from each rank -> their sum for this rank's rows.

    A reduce-scatter that sends the dtype it is given and adds in fp32.
    """
    ranks = group.size()
    sent = by_rank(whole, ranks)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    parts: Tensor = received.unflatten(0, (ranks, -1))
    return parts.sum(0, dtype=precise(whole.dtype))


EXCHANGES: dict[str, type[AllGatherRotation] | type[AllToAllRotation]] = {
    "allgather": AllGatherRotation,
    "alltoall": AllToAllRotation,
}


def _group(name: str) -> ProcessGroup:
    """Operators take a group by its name, as torch's own collectives do."""
    return _resolve_process_group(name)  # type: ignore[arg-type]


def _rows(k: Tensor, v: Tensor) -> Tensor:
    """(batch, heads, length, width) each -> (length, batch, heads, both widths), contiguous."""
    return torch.cat((k, v), dim=-1).movedim(2, 0).contiguous()


def _parts(rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The inverse of `_rows`, as views."""
    both = rows.movedim(0, 2)
    return both[..., :width], both[..., width:]


def _stored(like: Tensor, width: int) -> Tensor:
    """Unfilled (batch, heads, length, width), in memory as linears want it: (batch, length, heads, width)."""
    batch, heads, length, _ = like.shape
    return like.new_empty(batch, length, heads, width).transpose(1, 2)


@torch.library.custom_op("context_parallel::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None, group: str, rotate: str) -> tuple[Tensor, Tensor]:
    """Causal attention of this rank's queries over the sequence of the whole `group`: see `Kernel.forward`."""
    kernel: type[AttentionKernel] = fastest(q, k, v)
    exchange: KeyValueRotation = EXCHANGES[rotate](_rows(k, v), _group(group))
    out, lse = kernel.forward(q, k, v, causal=True, scale=scale)
    out = out.to(lse.dtype)
    for step in exchange.steps:
        queries, rows = exchange.take(step)
        part, part_lse = kernel.forward(q[:, :, queries], *_parts(rows, k.shape[-1]), causal=False, scale=scale)
        _join(out[:, :, queries], lse[:, :, queries], part, part_lse)
    return _stored(q, v.shape[-1]).copy_(out), lse


def _join(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Two softmaxes over different keys become one over both, in place."""
    out.lerp_(part.to(out.dtype), torch.sigmoid(part_lse - lse))
    lse.copy_(torch.logaddexp(lse, part_lse))


@torch.library.custom_op("context_parallel::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float | None,
    group: str,
    rotate: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of this rank's q, k and v from all ranks of `group`."""
    kernel: type[AttentionKernel] = fastest(q, k, v)
    exchange: KeyValueRotation = EXCHANGES[rotate](_rows(k, v), _group(group))
    grad_q, grad_k, grad_v = kernel.backward(grad, q, k, v, out, lse, causal=True, scale=scale)
    grad_q, own = grad_q.to(lse.dtype), _rows(grad_k, grad_v).to(lse.dtype)
    for step in exchange.steps:
        queries, rows = exchange.take(step)
        some_k, some_v = _parts(rows, k.shape[-1])
        some_grad, some_q, some_out, some_lse = (x[:, :, queries] for x in (grad, q, out, lse))
        part_q, part_k, part_v = kernel.backward(
            some_grad, some_q, some_k, some_v, some_out, some_lse.contiguous(), causal=False, scale=scale
        )
        grad_q[:, :, queries] += part_q
        exchange.give(step, _rows(part_k, part_v))
    grad_k, grad_v = _parts(own + exchange.total(), k.shape[-1])
    return tuple(_stored(x, x.shape[-1]).copy_(y) for x, y in ((q, grad_q), (k, grad_k), (v, grad_v)))  # type: ignore[return-value]


@attention.register_fake
def _(q: Tensor, _k: Tensor, v: Tensor, *_how: float | str | None) -> tuple[Tensor, Tensor]:
    return _stored(q, v.shape[-1]), q.new_empty(*q.shape[:3], 1, dtype=precise(q.dtype))


@attention_backward.register_fake
def _(_grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_rest: Tensor | float | str | None) -> tuple[Tensor, ...]:
    return _stored(q, q.shape[-1]), _stored(k, k.shape[-1]), _stored(v, v.shape[-1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.how = inputs
    ctx.save_for_backward(q, k, v, *output)


def _back(ctx: Any, grad: Tensor, _lse: Tensor) -> tuple[Tensor | None, ...]:
    return (*attention_backward(grad, *ctx.saved_tensors, *ctx.how), None, None, None)


attention.register_autograd(_back, setup_context=_keep)


@torch.library.custom_op("context_parallel::gather", mutates_args=())
def gather(x: Tensor, dim: int, group: str) -> Tensor:
    """This rank's chunks along `dim` -> the whole sequence in order; gradients of all ranks are added up."""
    ranks = _group(group)
    gathered = _arrived(_gathered(x.movedim(dim, 0).contiguous(), ranks))
    return in_order(gathered, ranks.size()).movedim(0, dim).contiguous()


@torch.library.custom_op("context_parallel::gather_backward", mutates_args=())
def gather_backward(grad: Tensor, dim: int, group: str) -> Tensor:
    """Backward of the all-gather: sums gradients of the whole sequence over ranks, and returns this rank's chunks."""
    mine = add_up(grad.movedim(dim, 0), _group(group))
    return mine.movedim(0, dim).to(grad.dtype).contiguous()


@gather.register_fake
def _(x: Tensor, dim: int, group: str) -> Tensor:
    shape = list(x.shape)
    shape[dim] *= _group(group).size()
    return x.new_empty(shape)


@gather_backward.register_fake
def _(grad: Tensor, dim: int, group: str) -> Tensor:
    shape = list(grad.shape)
    shape[dim] //= _group(group).size()
    return grad.new_empty(shape)


def _keep_how(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001  (passed by name)
    _, *ctx.how = inputs


def _gather_back(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (gather_backward(grad, *ctx.how), None, None)


gather.register_autograd(_gather_back, setup_context=_keep_how)
