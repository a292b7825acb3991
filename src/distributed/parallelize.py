"""The order in which a layout is applied to a plain model. Each line leaves the names of the parameters as they were."""

from torch import nn

from src.distributed.compiling import Compile
from src.distributed.mesh import Mesh
from src.distributed.precision import Precision
from src.distributed.recompute import Recompute
from src.distributed.shard import shard
from src.distributed.tensor import split_tensor


def parallelize(model: nn.Module, mesh: Mesh, precision: Precision, recompute: Recompute, compile: Compile) -> None:
    """In place, on the meta device: cut matrices, choose what to recompute, compile, cut parameters."""
    split_tensor(model, model.roles, mesh.tensor)
    recompute.apply(model.layers)
    compile.apply(model)
    shard(model, mesh.fsdp, mesh.degrees, precision)
