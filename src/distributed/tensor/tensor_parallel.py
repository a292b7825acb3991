"""Tensor parallelism with sequence parallelism (Megatron, arXiv 1909.08053 and 2205.05198): the table of roles.

A model family gives every module with weights a role (`roles` of its config); here roles become parallel styles. A
rank of the axis `tensor` holds 1/t of each sharded weight, and 1/t of the sequence between blocks.

| role                     | forward                                    | gradient                         | weight |
|--------------------------|--------------------------------------------|----------------------------------|--------|
| `embedding`              | vocabulary sharded; reduce-scatter of the  | all-gather of the sequence       | 1/t    |
|                          | looked-up rows along the sequence          |                                  |        |
| `vocabulary`             | the head: vocabulary sharded, and so its   | hidden state: reduce-scatter     | 1/t    |
|                          | cross entropy; no rank holds all logits    |                                  |        |
| `sequence_parallel`      | a norm on this rank's part of the sequence | weight: all-reduce               | all    |
| `sequence_parallel_local`| the same; the result is a plain tensor     | weight: all-reduce               | all    |
| `gather_sequence`        | all-gather of the sequence before a module | reduce-scatter, once for all     | none   |
|                          | of `colwise` and `rowwise` matrices        | matrices inside                  |        |
| `gather_sequence_local`  | the same before `*_local`, `replicated`    | the same: Partial behind it      | none   |
| `colwise`                | output features sharded, no communication  | input: Partial                   | 1/t    |
| `colwise_local`          | the same on plain tensors                  | input: Partial                   | 1/t    |
| `rowwise`                | input features sharded; reduce-scatter of  | all-gather of the sequence       | 1/t    |
|                          | the product along the sequence             |                                  |        |
| `rowwise_local`          | the same on plain tensors                  | all-gather of the sequence       | 1/t    |
| `replicated`             | every rank computes with the whole weight  | weight: Partial, one all-reduce  | all    |
| `moe`                    | all-gather of the sequence, reduce-scatter | the reverse                      | none   |
|                          | of the result; neither if tokens are       |                                  |        |
|                          | divided over ranks (expert parallel)       |                                  |        |
| `shared_experts`         | nothing, since `moe` gathers; an all-gather| nothing; a reduce-scatter of     | none   |
|                          | of tokens if ranks divide them             | tokens if ranks divide them      |        |
| `shared_experts_rowwise` | `rowwise_local` without the reduce, which  | as the forward, reversed         | 1/t    |
|                          | `moe` does; with it if tokens are divided  |                                  |        |

`colwise`, `rowwise` and `gather_sequence` compute on DTensors, `*_local` on plain tensors (plain_tensor.py says why).
Inside one gathered module take all from one of the two sets; `replicated` may stand in either (a norm of each head).
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
    """Vocabulary-parallel embedding: rows of the table are sharded."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        style = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
        module = style._apply(module, device_mesh)
        # What comes out is a view of a DTensor. FSDP hangs its hook on it, and an operation in place would lose that.
        module.register_forward_hook(lambda _module, _inputs, hidden: hidden.clone())
        return module


class _Gather(ParallelStyle):
    """All-gather the sequence of the first argument, as a DTensor; its gradient is reduce-scattered, once for all."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.register_forward_pre_hook(partial(self._gather, device_mesh))
        return module

    @staticmethod
    def _gather(mesh: DeviceMesh, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = inputs[0]  # a DTensor after a norm with the role `sequence_parallel`
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, mesh, [Shard(1)], run_check=False)
        return x.redistribute(placements=[Replicate()]), *inputs[1:]


class _ShardedVocabulary:
    """This rank's shard of the vocabulary, token ids [offset, offset + held), and its reductions over `mesh`."""

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
    """Vocabulary-parallel head and cross entropy; without labels the logits come out whole on every rank."""

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
        case "sequence_parallel":
            return SequenceParallel()
        case "sequence_parallel_local":
            return SequenceParallel(use_local_output=True)
        case "gather_sequence":
            return _Gather()
        case "colwise":
            return ColwiseParallel()
        case "rowwise":
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
    """Shard every module that has a role over `mesh`; all parameters but those of routed experts become DTensors.

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
