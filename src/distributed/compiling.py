"""torch.compile, one block at a time: all blocks share one graph, so warm-up does not grow with depth."""

from typing import TYPE_CHECKING, Literal

from src.config.base import Config

if TYPE_CHECKING:
    from src.models.decoder import Decoder


class Compile(Config):
    """`blocks`: each transformer block as one graph. `loss`: the two kernels of the chunked cross entropy."""

    blocks: bool
    loss: bool
    mode: Literal["default", "max-autotune-no-cudagraphs"]

    def apply(self, model: "Decoder") -> None:
        """Before FSDP, whose hooks stay outside the graphs; names of parameters do not change."""
        import torch

        if self.blocks:
            for block in model.blocks():
                # The bound method, not the module: hooks run eagerly and no `_orig_mod.` enters a checkpoint.
                block.forward = torch.compile(block.forward, mode=self.mode, fullgraph=True)
        if self.loss and model.output is not None:
            model.output.statistics = torch.compile(model.output.statistics, fullgraph=True)
            model.output.gradient = torch.compile(model.output.gradient, fullgraph=True)


def compile_seconds() -> float:
    """What this process has spent in torch.compile so far, forward and backward graphs."""
    from torch._dynamo.utils import compilation_time_metrics

    spent = {name: sum(seconds) for name, seconds in compilation_time_metrics.items()}
    outermost = ("_compile.compile_inner", "compile_fx.<locals>.bw_compiler")
    return sum(spent.get(name, 0.0) for name in outermost)
