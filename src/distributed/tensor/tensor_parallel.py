"""Tensor parallelism with sequence parallelism (arXiv 1909.08053, 2205.05198): a model's roles become parallel styles.

Between blocks the sequence is cut; inside attention and feed forward the features are. A model only says which word
fits which module, and the words mean:

    embedding    rows of the table (words) are cut; the result leaves cut by sequence
    sequence     a norm: weight on every rank, activations cut by sequence
    gather       before it the sequence is put together, for all column-wise modules inside at once
    columns      output features are cut; the result stays on this rank
    rows         input features are cut; partial results are summed and scattered by sequence
    vocabulary   the head: words are cut, and so is the cross entropy; logits never meet on one rank

plain_tensor.py has more of them.
"""

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from src.distributed.tensor.plain_tensor import style
from src.models.cross_entropy import Output
from src.models.decoder import Decoder
from src.models.moe.experts import Experts


class _Embedding(ParallelStyle):
    """Cut the words of the table."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        style = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
        module = style._apply(module, device_mesh)
        # What comes out is a view of a DTensor. FSDP hangs its hook on it, and an operation in place would lose that.
        module.register_forward_hook(lambda _module, _inputs, hidden: hidden.clone())
        return module


class _Gather(ParallelStyle):
    """Put the sequence of the first argument together; its gradient is scattered again, summed once for all users."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.register_forward_pre_hook(partial(self._gather, device_mesh))
        return module

    @staticmethod
    def _gather(mesh: DeviceMesh, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = inputs[0]  # a DTensor after a norm with the role `sequence`
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, mesh, [Shard(1)], run_check=False)
        return x.redistribute(placements=[Replicate()]), *inputs[1:]


class _ShardedVocabulary:
    """Words [offset, offset + held) are here, the others on the other ranks of `mesh`."""

    def __init__(self, mesh: DeviceMesh, held: int) -> None:
        self.mesh = mesh
        self.offset = mesh.get_local_rank() * held

    def logsumexp(self, x: Tensor) -> Tensor:
        peak: Tensor = all_reduce(x, "max", self.mesh)
        return peak + self.sum((x - peak).exp()).log()

    def sum(self, x: Tensor) -> Tensor:
        total: Tensor = all_reduce(x, "sum", self.mesh)
        return total


class _Vocabulary(ParallelStyle):
    """Cut the head's words. With labels each rank computes its part of every row; without, logits come out whole."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, Output), "the role `vocabulary` is the head's"
        weight = distribute_tensor(module.weight.detach(), device_mesh, [Shard(0)], src_data_rank=None)
        module.register_parameter("weight", nn.Parameter(weight))
        module.vocabulary = _ShardedVocabulary(device_mesh, weight.to_local().shape[0])
        module.cross_entropy = partial(self._cross_entropy, module.cross_entropy)  # type: ignore[method-assign]
        module.register_forward_pre_hook(partial(_Gather._gather, device_mesh))
        module.register_forward_hook(self._whole_logits)
        return module

    @staticmethod
    def _cross_entropy(whole: Callable[..., Tensor], hidden: DTensor, weight: DTensor, labels: Tensor) -> Tensor:
        # Each rank's part of the words gives a part of the hidden gradient: a sum over ranks, scattered by the hook
        # above.
        return whole(hidden.to_local(grad_placements=[Partial()]), weight.to_local(), labels)

    @staticmethod
    def _whole_logits(module: nn.Module, inputs: tuple[Any, ...], result: Tensor) -> Tensor:
        return result.full_tensor() if isinstance(result, DTensor) else result


def _style(role: str, divided: bool) -> ParallelStyle:
    if (found := style(role, divided)) is not None:
        return found
    match role:
        case "embedding":
            return _Embedding()
        case "sequence":
            return SequenceParallel()
        case "gather":
            return _Gather()
        case "columns":
            return ColwiseParallel()
        case "rows":
            return RowwiseParallel(output_layouts=Shard(1))
        case "vocabulary":
            return _Vocabulary()
    raise AssertionError(f"no such role: {role}")


def _modules(model: nn.Module, pattern: str) -> Iterator[str]:
    """Names that match, where * stands for one layer number."""
    depth = pattern.count(".")
    return (name for name, _ in model.named_modules() if name.count(".") == depth and fnmatchcase(name, pattern))


def split_tensor(
    model: Decoder, mesh: DeviceMesh | None, *, divided_tokens: bool = False, float8: bool = False
) -> None:
    """Cut every module that has a role over `mesh`; every parameter but those of routed experts becomes a DTensor.

    `divided_tokens`: the ranks divide the tokens of a mixture, not each of its experts.
    `float8`: ranks exchange float8 activations where every matrix that reads them is float8 too.
    """
    if mesh is None:
        return
    roles = {name: role for pattern, role in model.config.roles.items() for name in _modules(model, pattern)}
    plan = {name: _style(role, divided_tokens) for name, role in roles.items()}
    if float8:
        from src.distributed.tensor.float8_styles import float8_styles

        plan |= float8_styles(model, roles)
    parallelize_module(model, mesh, plan)
    routed = {each for module in model.modules() if isinstance(module, Experts) for each in module.parameters()}
    whole = [name for name, each in model.named_parameters() if not isinstance(each, DTensor) and each not in routed]
    assert not whole, f"no role cuts {whole}"
    model.tie_weights()
