"""Activation checkpointing (arXiv 1604.06174): trade a second forward of a block for the memory of its activations."""

from functools import partial
from typing import TYPE_CHECKING, Literal

from src.config.base import Config

if TYPE_CHECKING:
    from src.models.decoder import Decoder


class Recompute(Config):
    """none: keep everything. full: keep each block's input and compute the block again in the backward pass."""

    mode: Literal["none", "full"]

    def apply(self, model: "Decoder") -> None:
        """Before compiling, so that the compiler sees both passes; names of parameters do not change."""
        if self.mode == "none":
            return
        from torch.utils.checkpoint import checkpoint

        for block in model.blocks():
            # early_stop=False: the whole block runs again, so a compiled block has one graph for both passes.
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, early_stop=False)
