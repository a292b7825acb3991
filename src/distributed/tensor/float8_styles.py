"""Tensor parallelism of float8 matrices with one scale a tensor: what ranks exchange is float8 already.

torch is imported with torchao, so only where a run asks for float8.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle
from torchao.float8.config import e4m3_dtype
from torchao.float8.float8_linear import Float8Linear
from torchao.float8.float8_scaling_utils import hp_tensor_to_float8_dynamic
from torchao.float8.float8_tensor_parallel import Float8ColwiseParallel, Float8RowwiseParallel
from torchao.float8.float8_training_tensor import GemmInputRole


class _Float8Gather(ParallelStyle):
    """All-gather the sequence of the first argument in float8, once for all matrices inside; gradients stay wide."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        multiplication = next(each.linear_mm_config for each in module.modules() if isinstance(each, Float8Linear))
        module.register_forward_pre_hook(partial(self._gather, device_mesh, multiplication))
        return module

    @staticmethod
    def _gather(mesh: DeviceMesh, multiplication: Any, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = inputs[0]
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, mesh, [Shard(1)], run_check=False)
        # The largest value of all ranks makes the scale, so their parts fit together.
        x = hp_tensor_to_float8_dynamic(x, e4m3_dtype, multiplication, gemm_input_role=GemmInputRole.INPUT)
        return x.redistribute(placements=[Replicate()]), *inputs[1:]


def float8_styles(model: nn.Module, roles: Mapping[str, str]) -> dict[str, ParallelStyle]:
    """Parallel style by module name, for the modules with a role in which every matrix is float8."""
    styles = {name: _style(role, model.get_submodule(name)) for name, role in roles.items()}
    return {name: style for name, style in styles.items() if style is not None}


def _style(role: str, module: nn.Module) -> ParallelStyle | None:
    matrices = [each for each in module.modules() if isinstance(each, nn.Linear)]
    if not matrices or not all(isinstance(each, Float8Linear) for each in matrices):
        return None
    match role:
        case "gather_sequence":
            return _Float8Gather()
        case "colwise":
            return Float8ColwiseParallel()  # type: ignore[no-any-return]
        case "rowwise":
            return Float8RowwiseParallel(output_layouts=Shard(1))  # type: ignore[no-any-return]
    return None
