"""Tensor parallelism in plain tensors, where matrices that are cut stand among such as are not.

Latent attention and mixtures make narrow vectors that all ranks compute alike and that meet another share of heads,
features or experts on each. So the gradient of all that lies behind `together` is a part on each rank, to be added up
over ranks, and since every backward is linear in its gradient it may stay a part: it is added up once for each weight,
and once, scattered by sequence, for the hidden state. The words of tensor.py that are meant for this:

    together       before it the sequence is put together
    alike          a norm or matrix that every rank computes with all of; its weight's gradient is a part
    outputs        output features are cut
    inputs         input features are cut; partial results are summed, and scattered by sequence
    mixture        together, and its partial result is summed; or, where ranks divide tokens, neither
    shared         the experts that all tokens meet: nothing to do; or together, where ranks divide tokens
    shared inputs  as inputs, but not summed, for the mixture sums; or, where ranks divide tokens, as inputs
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
    """The parts of all ranks, joined; a gradient that is a part on each rank is summed and scattered."""
    if not isinstance(x, DTensor):
        x = DTensor.from_local(x, mesh, [Shard(dim)], run_check=False)
    return x.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])


def scattered(x: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    """The sum over ranks, of which each gets its part."""
    return DTensor.from_local(x, mesh, [Partial()], run_check=False).redistribute(placements=[Shard(dim)]).to_local()


class Together(ParallelStyle):
    """Put the parts of the first argument together."""

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
    """Cut a module's weight as `placement` says, and let it compute with what is here."""

    def __init__(self, placement: Placement, scatter: int | None = None) -> None:
        """`scatter`: the dimension by which the sum of all ranks' results is scattered; None: it stays here."""
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
    """Router and experts see all tokens, and what they make is summed; or, with `divided` tokens, this rank's own."""

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
        x = inputs[0]  # a DTensor after a norm with the role `sequence`
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
    """None: a word of tensor.py's own. `divided`: ranks of `tensor` divide the tokens of a mixture, not its experts."""
    match role:
        case "together":
            return Together(SEQUENCE)
        case "alike":
            return LocalParallel(Replicate())
        case "outputs":
            return LocalParallel(Shard(0))
        case "inputs":
            return LocalParallel(Shard(1), scatter=SEQUENCE)
        case "mixture":
            return MoEParallel(divided)
        case "shared":
            return Together(ROWS) if divided else Nothing()
        case "shared inputs":
            return LocalParallel(Shard(1), scatter=ROWS if divided else None)
    return None
