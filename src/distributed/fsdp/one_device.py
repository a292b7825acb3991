"""Mixed precision on one device, without FSDP: weights in the compute dtype beside those that rest in another.

FSDP over one rank gathers from and reduces to itself: 48 of 851 ms of a step of Llama 3 8B with 16 layers on an H200,
and half of the host's work in a step of a small model. Here nothing moves. Forward and backward passes read copies in
the compute dtype; the weights that optimizer, checkpoint and export know stay what they are. The arithmetic is FSDP's
to the last bit: gradients come in the compute dtype, and those of several micro-batches add up in the reduce dtype.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.distributed.precision.config import Precision
from src.models.block import FeedForward
from src.models.kernels.fused_swiglu import takes
from src.models.moe.experts import Experts


class ComputeWeights:
    """For each parameter of a model the one that its passes read: a copy in the compute dtype, or itself.

    An embedding that is not also the head needs none: only rows of it are read, and those are cast then.

    The two matrices that a fused SwiGLU reads as one have their copies in one parameter: see `Joined`.

    Copies are renewed at each `in_place`, unless an optimizer that wrote both said so (`written`) and nobody has
    written to the weights since, which torch counts.
    """

    def __init__(self, model: nn.Module, precision: Precision, *, sync_each_micro_batch: bool) -> None:
        """`sync_each_micro_batch`: micro-batches add up in the dtype of the weights, as they would over ranks."""
        self._compute, self._reduce = (getattr(torch, name) for name in (precision.compute, precision.reduce))
        self._sum = getattr(torch, precision.storage) if sync_each_micro_batch else self._reduce
        self.weights = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
        self._embeddings = _only_looked_up(model)
        self._joined = [Joined(module, self._compute) for module in model.modules() if is_fused(module)]
        self._views = {weight: view for joined in self._joined for weight, view in joined.views.items()}
        self.copies = [self._copy(weight) for weight in self.weights]
        for weight, copy in zip(self.weights, self.copies, strict=True):
            if copy is not weight and weight in self._embeddings:
                _cast_rows(self._embeddings[weight], weight, copy)
        number = {weight: index for index, weight in enumerate(self.weights)}
        self._places = [
            (module._parameters, name, number[parameter])
            for module in model.modules()
            for name, parameter in module._parameters.items()
            if parameter in number
        ]
        self._versions: list[int] | None = None  # of the weights when their copies were written with them
        self._inside = False
        self._sums: dict[nn.Parameter, Tensor] = {}  # by copy
        self._adding = False
        for copy in (*self.copies, *(joined.parameter for joined in self._joined)):
            if copy.requires_grad and copy.dtype != self._sum:
                copy.register_post_accumulate_grad_hook(self._add)

    def _copy(self, weight: nn.Parameter) -> nn.Parameter:
        if weight.dtype == self._compute:
            return weight
        if weight in self._views:
            return self._views[weight]
        if weight in self._embeddings:  # a gradient's dtype and shape, without memory
            made = torch.empty((), dtype=self._compute, device=weight.device).expand(weight.shape)
        else:
            made = torch.empty_like(weight, dtype=self._compute)
        return nn.Parameter(made, requires_grad=weight.requires_grad)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Passes in here read the copies, those of a recomputation included."""
        if self._inside:
            yield
            return
        self._renew()
        self._put(self.copies)
        for joined in self._joined:
            joined.module.w13 = joined.parameter
        self._inside = True
        try:
            yield
        finally:
            self._put(self.weights)
            for joined in self._joined:
                joined.module.w13 = None
            self._inside = False

    def before_backward(self, micro_batches: int) -> None:
        """So many backward passes follow. The gradient of one alone stays in the dtype in which it comes."""
        self._adding = micro_batches > 1 or self._sum.itemsize < self._compute.itemsize

    def after_backward(self, *, any_dtype: bool) -> None:
        """Gradients of the copies become those of the weights: as they are where the optimizer reads any dtype, and
        parts of another's rows, else in the weights' dtype and contiguous.
        """
        for weight, gradient in self._gradients():
            weight.grad_dtype = gradient.dtype if any_dtype else weight.dtype
            weight.grad = gradient if any_dtype else gradient.to(weight.dtype).contiguous()

    def _gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for weight, copy in zip(self.weights, self.copies, strict=True):
            if (gradient := self._taken(copy)) is not None:
                yield weight, gradient
        for joined in self._joined:
            if (gradient := self._taken(joined.parameter)) is not None:
                yield from zip(joined.views, gradient.chunk(2, dim=-2), strict=True)

    def _taken(self, copy: nn.Parameter) -> Tensor | None:
        gradient, copy.grad = self._sums.pop(copy, copy.grad), None
        return gradient

    def beside(self) -> dict[Tensor, Tensor]:
        """What an optimizer may write together with each weight."""
        pairs = zip(self.weights, self.copies, strict=True)
        return {weight: copy for weight, copy in pairs if copy is not weight and weight not in self._embeddings}

    def written(self) -> None:
        """The optimizer has just written all copies with their weights."""
        self._versions = [weight._version for weight in self.weights]

    def _add(self, copy: nn.Parameter) -> None:
        """As soon as the gradient of a micro-batch is whole, so that never all of them are there beside their sums."""
        if not self._adding:
            return
        gradient, copy.grad = copy.grad, None
        assert gradient is not None
        if copy in self._sums:
            self._sums[copy].add_(gradient)
        else:
            self._sums[copy] = gradient.to(self._sum)

    @torch.no_grad()
    def _renew(self) -> None:
        versions, self._versions = self._versions, None
        if versions is not None and versions == [weight._version for weight in self.weights]:
            return
        if pairs := self.beside():
            torch._foreach_copy_(list(pairs.values()), list(pairs))

    def _put(self, parameters: list[nn.Parameter]) -> None:
        for where, name, index in self._places:
            where[name] = parameters[index]


class Joined:
    """The copies of the two matrices that a fused SwiGLU reads as one: views of `parameter`, which stands in the
    module while passes run and gets the gradient of both.
    """

    def __init__(self, module: FeedForward | Experts, dtype: torch.dtype) -> None:
        weights = module.gates()
        *experts, hidden, dim = weights[0].shape
        both = torch.empty(*experts, 2 * hidden, dim, dtype=dtype, device=weights[0].device)
        self.module, self.parameter = module, nn.Parameter(both)
        halves = (nn.Parameter(half, requires_grad=False) for half in both.chunk(2, dim=-2))
        self.views = dict(zip(weights, halves, strict=True))


def is_fused(module: nn.Module) -> TypeGuard[FeedForward | Experts]:
    """Whether `fuse_swiglu` has marked it."""
    return isinstance(module, FeedForward | Experts) and module.fused


def fuse_swiglu(model: nn.Module, precision: Precision) -> None:
    """Mark each SwiGLU whose weights have copies, and whose products kernels here can fuse it with."""
    compute = getattr(torch, precision.compute)
    for module in model.modules():
        if isinstance(module, FeedForward | Experts) and precision.storage != precision.compute:
            weight, learns = module.gates()[0], {each.requires_grad for each in module.parameters()}
            module.fused = (
                precision.float8 is None and learns == {True} and takes((weight.shape[-1], weight.shape[-2]), compute)
            )


def _only_looked_up(model: nn.Module) -> dict[nn.Parameter, nn.Embedding]:
    """Embeddings by their weights, where no other module has them too."""
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, []).append(module)
    return {weight: each[0] for weight, each in owners.items() if len(each) == 1 and isinstance(each[0], nn.Embedding)}


def _cast_rows(embedding: nn.Embedding, weight: nn.Parameter, copy: nn.Parameter) -> None:
    """Where `copy` stands in the weight's place, `embedding` reads the weight and gives rows in the copy's dtype."""

    def forward(tokens: Tensor) -> Tensor:
        if embedding.weight is not copy:
            return F.embedding(tokens, embedding.weight)
        cast_rows: Callable[..., Tensor] = _CastRows.apply
        return cast_rows(copy, weight.detach(), tokens)

    embedding.forward = forward  # type: ignore[assignment, method-assign]


class _CastRows(torch.autograd.Function):
    """weight[tokens] in the dtype of `copy`, which gets the gradient: a row's is the sum over its tokens."""

    @staticmethod
    def forward(ctx: Any, copy: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.words = len(weight)
        return F.embedding(tokens, weight).to(copy.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (tokens,) = ctx.saved_tensors
        summed = torch.ops.aten.embedding_dense_backward
        return summed(grads[0], tokens, ctx.words, padding_idx=-1, scale_grad_by_freq=False), None, None
