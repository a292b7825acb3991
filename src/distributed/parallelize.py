"""The order in which a layout is applied to a plain model. Each line leaves the names of the parameters as they
were.
"""

from src.distributed.compiling import Compile
from src.distributed.mesh import Mesh
from src.distributed.precision import Precision
from src.distributed.recompute import Recompute
from src.distributed.shard import shard
from src.distributed.tensor import split_tensor
from src.models.decoder import Decoder


def parallelize(model: Decoder, mesh: Mesh, precision: Precision, recompute: Recompute, compile: Compile) -> None:
    """In place, on the meta device: cut matrices, choose what to recompute, compile, cut parameters."""
    split_tensor(model, mesh.tensor)
    recompute.apply(model)
    compile.apply(model)
    shard(model, mesh.fsdp, mesh.degrees, precision)
