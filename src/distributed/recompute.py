"""Activation checkpointing (arXiv 1604.06174): trade a second forward of a block for the memory of its activations."""

from collections import Counter
from functools import cache, partial
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from src.config.base import Config
from src.config.bounds import Fraction, Layers

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.checkpoint import SelectiveCheckpointContext

    from src.models.decoder import Decoder

Mode = Literal["none", "full", "every", "selective", "budget", "auto"]

# Their outputs are kept by mode=selective: dear to compute or to communicate, small to keep. Names that one torch or
# another does not have are passed over.
KEPT = (
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
    "aten._scaled_dot_product_attention_math",
    "aten._scaled_dot_product_fused_attention_overrideable",
    "flash_attention_4.forward",
    "flash_attention_4.varlen_forward",
    "context_parallel.attention",  # of a cut sequence: src/distributed/context/ring_attention.py
    "aten._grouped_mm",
    "aten._scaled_grouped_mm",
    "_c10d_functional.reduce_scatter_tensor",
    "_c10d_functional.all_to_all_single",
    "aten.topk",
    "aten.max",  # the largest value of a tensor is its float8 scale
)
KEPT_HIGHER_ORDER = ("flex_attention", "inductor_compiled_code")
# One kernel by several names; of all of them together every second output is kept, the first one too.
MATMULS = ("aten.mm", "aten.linear", "aten._scaled_mm", "router.product")


class Recompute(Config):
    """Activation checkpointing: activations of a block that are kept for the backward pass; the rest is computed
    again.
    """

    mode: Mode
    """Activations of a block that its backward pass has; none: keep all; full: keep its input only; every: full in
    every n-th block; selective: keep attention, communication and every second matmul; budget: the compiler chooses;
    auto: the plan takes the cheapest that fits.
    """
    every: Layers | None
    """Blocks of which one is computed again, with mode=every; null: in every other mode."""
    budget: Fraction | None
    """Share of the activations that may be kept, with mode=budget; needs compile=blocks; null: in every other mode."""

    @model_validator(mode="after")
    def _numbers_belong_to_modes(self) -> "Recompute":
        for key, preset in (("every", "every2"), ("budget", "budget")):
            value = getattr(self, key)
            if self.mode == key and value is None:
                raise ValueError(f"mode={key} needs the number recompute.{key}; recompute={preset} has one")
            if self.mode != key and value is not None:
                raise ValueError(f"{key}={value} does nothing to mode={self.mode}; set it to null or choose mode={key}")
        return self

    def __str__(self) -> str:
        number = self.every if self.mode == "every" else self.budget
        return self.mode if number is None else f"{self.mode} {number:g}"

    def apply_within(self, model: "Decoder", *, experts_apart: bool = False) -> None:
        """Before compiling: what an operator decides is for the compiler to see, in both passes.

        `experts_apart`: as in `Compile.apply`. Tokens that have travelled are kept.
        """
        assert self.mode != "auto", "the plan chooses: src.planning.recompute_choice"
        if self.mode == "selective":
            for owner, method in model.compile_regions(experts_apart=experts_apart):
                _repeat(owner, method, context_fn=_selective)

    def apply_around(self, model: "Decoder") -> None:
        """After compiling: whole blocks are repeated by running their graphs again.

        Inside of a graph torch 2.13 would keep the mesh of its DTensors among the tensors, and fail. A budget is kept
        by the compiler: see `Compile.apply`.
        """
        if self.mode not in ("full", "every"):
            return
        for number, block in model.numbered_blocks().items():
            # By the block's number in the whole model: each part of a pipeline and each rebuild wraps the same blocks.
            if self.every is None or (number + 1) % self.every == 0:
                _repeat(block, "forward")


def _repeat(owner: "nn.Module", method: str, **how: Any) -> None:
    """Run it again for the backward. `how`: what torch's `checkpoint` is told besides."""
    from torch.utils.checkpoint import checkpoint

    bound = getattr(owner, method)
    # Function and module apart: torch 2.11 guards a graph by the module of a bound method alone, and would run the
    # graph of one method for another.
    function, first = (bound.__func__, (bound.__self__,)) if isinstance(bound, MethodType) else (bound, ())
    # early_stop=False: the whole block runs again, so a compiled block has one graph for both passes.
    repeated = partial(checkpoint, function, *first, use_reentrant=False, preserve_rng_state=True, early_stop=False)
    setattr(owner, method, partial(repeated, **how))


def _selective() -> Any:
    """The two contexts of one forward of one block, or of a part of it; each counts its own matmuls."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    kept, matmuls = _operators()
    counts: Counter[bool] = Counter()

    def policy(context: "SelectiveCheckpointContext", operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = operator in kept
        if operator in matmuls:
            counts[context.is_recompute] += 1
            keep = counts[context.is_recompute] % 2 == 1
        # Sizes that a rank reads from the device, such as those of an all-to-all, must not be waited for twice.
        keep = keep or _copies_to_host(operator, args, kwargs)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _copies_to_host(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    import torch

    if operator is not torch.ops.aten._to_copy.default or kwargs.get("device") is None:
        return False
    return bool(args[0].device.type == "cuda") and torch.device(kwargs["device"]).type == "cpu"


@cache
def _operators() -> tuple[frozenset[Any], frozenset[Any]]:
    """KEPT and MATMULS as this torch's operators, every overload of each."""
    import torch

    def overloads(names: tuple[str, ...]) -> frozenset[Any]:
        packets = (getattr(getattr(torch.ops, name.split(".")[0]), name.split(".")[1], None) for name in names)
        return frozenset(
            getattr(packet, overload) for packet in packets if packet is not None for overload in packet.overloads()
        )

    higher = (getattr(torch.ops.higher_order, name, None) for name in KEPT_HIGHER_ORDER)
    return overloads(KEPT) | {operator for operator in higher if operator is not None}, overloads(MATMULS)
