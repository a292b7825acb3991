"""Tensor parallelism without DTensor, for modules that mix sharded and replicated weights (latent attention, MoE).

Replicated weights (low-rank projections, routers) make vectors that are equal on all ranks, and each rank uses them for
other heads, features or experts. So every gradient behind `gather_sequence_local` is Partial over the axis `tensor`. It
stays Partial until one all-reduce for each replicated weight and one reduce-scatter for the hidden state: exact, since
every backward is linear in its gradient. The table of roles is in tensor_parallel.py.
"""

from functools import cache, partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

SEQUENCE = 1  # dimension of (batch, length, features)
ROWS = 0  # of (tokens, features)


def gathered(x: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    """All-gather along `dim`, to a plain tensor; its gradient is Partial and is reduce-scattered along `dim`."""
    if not isinstance(x, DTensor):
        x = DTensor.from_local(x, mesh, [Shard(dim)], run_check=False)
    return x.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])


def scattered(x: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    """Reduce-scatter along `dim` of a Partial plain tensor; its gradient is all-gathered."""
    return DTensor.from_local(x, mesh, [Partial()], run_check=False).redistribute(placements=[Shard(dim)]).to_local()


class GatherSequenceLocal(ParallelStyle):
    """All-gather the first argument along `dim` before the module runs; the module gets a plain tensor."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.register_forward_pre_hook(partial(self._enter, device_mesh, self.dim))
        return module

    @staticmethod
    def _enter(mesh: DeviceMesh, dim: int, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return gathered(inputs[0], mesh, dim), *inputs[1:]


class LocalParallel(ParallelStyle):
    """Shard or replicate a module's weight as `placement` says; the module computes with the local part."""

    def __init__(self, placement: Placement, scatter: int | None = None) -> None:
        """`scatter`: the dimension along which results are reduce-scattered; None: they stay Partial or sharded."""
        super().__init__()
        self.placement, self.scatter = placement, scatter

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        whole = module.get_parameter("weight").detach()
        weight = distribute_tensor(whole, device_mesh, [self.placement], src_data_rank=None)
        module.register_parameter("weight", nn.Parameter(weight))
        kind: Any = type(module)  # a checker takes a class of modules for no key of a cache
        module.__class__ = _with_part(kind)
        if self.scatter is not None:
            module.register_forward_hook(partial(self._leave, device_mesh, self.scatter))
        return module

    @staticmethod
    def _leave(mesh: DeviceMesh, dim: int, module: nn.Module, inputs: tuple[Any, ...], result: Tensor) -> Tensor:
        return scattered(result, mesh, dim)


class _Here:
    """A module whose weight is the part that is here."""

    def __init__(self, module: nn.Module, weight: Tensor) -> None:
        self._module, self.weight = module, weight

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@cache
def _with_part(kind: type[nn.Module]) -> type[nn.Module]:
    """The kind of module that computes as `kind` does, with the part of its weight that is here.

    One class for all layers: a function bound to each module would make a compiler compile each anew.
    """

    def forward(self: nn.Module, x: Tensor) -> Any:
        weight = self.weight
        assert isinstance(weight, DTensor)
        whole = isinstance(weight.placements[0], Replicate)
        part = weight.to_local(grad_placements=[Partial()] if whole else weight.placements)
        return kind.forward(_Here(self, part), x)

    return type(f"Part{kind.__name__}", (kind,), {"forward": forward})


class MoEParallel(ParallelStyle):
    """All-gather before a mixture of experts, reduce-scatter after it; neither where ranks divide the tokens."""

    def __init__(self, divided: bool) -> None:
        super().__init__()
        self.divided = divided

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.register_forward_pre_hook(partial(self._enter, None if self.divided else device_mesh))
        if not self.divided:
            module.register_forward_hook(partial(self._leave, device_mesh))
        return module

    @staticmethod
    def _enter(mesh: DeviceMesh | None, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = inputs[0]  # a DTensor after a norm with the role `sequence_parallel`
        return (x.to_local() if mesh is None else gathered(x, mesh, SEQUENCE)), *inputs[1:]

    @staticmethod
    def _leave(
        mesh: DeviceMesh, module: nn.Module, inputs: tuple[Any, ...], result: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        return scattered(result[0], mesh, SEQUENCE), result[1]


class Nothing(ParallelStyle):
    """The module is as it should be."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return module


def style(role: str, divided: bool) -> ParallelStyle | None:
    """The style of a local role, None for a DTensor's. `divided`: ranks divide a mixture's tokens, not its experts."""
    match role:
        case "gather_sequence_local":
            return GatherSequenceLocal(SEQUENCE)
        case "replicated":
            return LocalParallel(Replicate())
        case "colwise_local":
            return LocalParallel(Shard(0))
        case "rowwise_local":
            return LocalParallel(Shard(1), scatter=SEQUENCE)
        case "moe":
            return MoEParallel(divided)
        case "shared_experts":
            return GatherSequenceLocal(ROWS) if divided else Nothing()
        case "shared_experts_rowwise":
            return LocalParallel(Shard(1), scatter=ROWS if divided else None)
    return None
