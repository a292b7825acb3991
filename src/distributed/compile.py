"""Regional torch.compile, one block at a time: blocks share one graph, so compile time does not grow with depth."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from src.config.base import Config

if TYPE_CHECKING:
    from src.models.decoder import Decoder

Compiler = Callable[..., Any]  # a torch.compile backend: (graph, example inputs) -> callable


class Compile(Config):
    """Regions that torch.compile compiles: each transformer block, and the kernels of the chunked cross entropy."""

    blocks: bool
    """True: compile each transformer block; equal blocks share one compilation."""
    loss: bool
    """True: compile the output projection and the loss."""
    graph: bool
    """True: one CUDA graph replays the whole step of one GPU, so that small models do not wait for Python."""
    mode: Literal["default", "max-autotune-no-cudagraphs"]
    """Mode of torch.compile; max-autotune-no-cudagraphs: compiles longer, for faster kernels."""

    def apply(
        self,
        model: "Decoder",
        *,
        budget: float | None = None,
        round_each_step: bool = False,
        pipeline_products: bool = False,
        experts_apart: bool = False,
    ) -> None:
        """Before FSDP, whose hooks stay outside the graphs; names of parameters do not change.

        `budget`: share of a block's activations that may be kept for its backward; None: what the compiler likes best.
        `round_each_step`: fused kernels round to the compute dtype wherever eager ones do, so float8 scales agree.
        `pipeline_products`: a matrix of tensor parallelism multiplies the parts of its input as they come, and sends
        the parts of its result as they are ready; the group must share memory: see
        src/distributed/tensor/symmetric_memory.py.
        `experts_apart`: between router and experts tokens travel, eagerly, by sizes read on the way.
        """
        import torch

        from src.distributed.expert.expert_parallel import AllToAllTokenDispatcher

        if self.blocks:
            options = torch._inductor.list_mode_options(self.mode) | {
                "emulate_precision_casts": round_each_step,
                "_micro_pipeline_tp": pipeline_products,
            }
            how = {"options": options} if budget is None else {"backend": within_budget(_inductor(options), budget)}
            exchanges = [module for module in model.modules() if isinstance(module, AllToAllTokenDispatcher)]
            between = [(dispatcher, method) for dispatcher in exchanges for method in dispatcher.compile_regions]
            for owner, method in model.compile_regions(experts_apart=experts_apart) + between:
                # The bound method, not the module: hooks run eagerly and no `_orig_mod.` enters a checkpoint.
                setattr(owner, method, torch.compile(getattr(owner, method), fullgraph=True, **how))
        if self.loss and model.output is not None:
            model.output.statistics = torch.compile(model.output.statistics, fullgraph=True)
            model.output.gradient_ = torch.compile(model.output.gradient_, fullgraph=True)
            if torch.cuda.is_available():
                model.output.take_kernels()


def _inductor(options: dict[str, Any]) -> Compiler:
    from torch._inductor.compile_fx import compile_fx

    def compile_graph(graph: Any, inputs: Any) -> Any:
        return compile_fx(graph, inputs, config_patches=options)

    return compile_graph


def within_budget(compiler: Compiler, budget: float) -> Compiler:
    """The same compiler, but it keeps no more between forward and backward; no other compilation is touched."""
    import torch._functorch.config as functorch

    def compile_graph(graph: Any, inputs: Any) -> Any:
        with functorch.patch(activation_memory_budget=budget):
            return compiler(graph, inputs)

    return compile_graph


def compile_seconds() -> float:
    """What this process has spent in torch.compile so far, forward and backward graphs."""
    from torch._dynamo.utils import compilation_time_metrics

    spent = {name: sum(seconds) for name, seconds in compilation_time_metrics.items()}
    outermost = ("_compile.compile_inner", "compile_fx.<locals>.bw_compiler")
    return sum(spent.get(name, 0.0) for name in outermost)


def forget_compilations() -> None:
    """Drop all that this process has compiled, and the seconds of it: what comes has other shapes, and torch compiles
    one function for few of them.
    """
    if "torch._dynamo" not in sys.modules:  # seconds to import, where nothing was compiled
        return
    import torch
    from torch._dynamo.utils import compilation_time_metrics

    torch.compiler.reset()
    compilation_time_metrics.clear()
