"""What every model is to the rooms above: the contract between families and layouts, and nothing of either."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from src.models.attention import block_mask
from src.models.base import ModelConfig
from src.models.cross_entropy import Output
from src.models.init import Initializer

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class Decoder(nn.Module):
    """tokens (batch, length) -> logits (batch, length, vocabulary), or the summed cross entropy of `labels`.

    A part of a pipeline has some of its modules set to None: without `tok_embeddings` the input is a hidden state,
    without `output` so is the result. `positions` (batch, length) restart at documents; `mask` comes from
    `attention_mask`.
    """

    # How tensor parallelism may cut each module: src/distributed/tensor/tensor_parallel.py gives the words meaning.
    roles: ClassVar[Mapping[str, str]]

    config: ModelConfig
    rotary: Tensor  # (max_seq_len, rotated width / 2, 2) fp32
    tok_embeddings: nn.Embedding | None
    layers: nn.ModuleDict  # keys are global layer numbers
    norm: nn.RMSNorm | None
    output: Output | None

    @abstractmethod
    def tie_weights(self) -> None:
        """Make the head the embedding again, after anything that made new parameters of them."""

    @abstractmethod
    def reset_buffers(self) -> None:
        """Compute what is not a weight; again after the model left the meta device."""

    @abstractmethod
    def initializers(self) -> dict[str, Initializer]:
        """How each parameter starts, by name."""

    def attention_mask(self, documents: Tensor | None, batch: int, length: int) -> "BlockMask | None":
        """The mask argument of `forward` for one batch; None where the kernel is causal by itself."""
        if self.config.attention == "sdpa":
            return None
        return block_mask(self.config.mask, documents, self.config.fixed_block, batch, length, self.rotary.device)

    def counters(self) -> list[Tensor]:
        """What this rank counted since the last `after_step`, which adds it up over ranks and counts anew."""
        return []

    def after_step(self, summed: Callable[[Tensor], Tensor], applied: Tensor) -> None:
        """Collective, once per optimizer step: what a model changes by itself, such as biases that balance experts.

        `summed` adds a tensor over all ranks that hold these layers and other tokens, in place; `applied` (scalar) is
        0 where the step was skipped and must leave no trace.
        """

    @abstractmethod
    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        positions: Tensor | None = None,
        mask: "BlockMask | None" = None,
    ) -> Tensor: ...

    def graphs(self, *, experts_apart: bool) -> list[tuple[nn.Module, str]]:
        """What a compiler may make one graph of: a module and the name of its method.

        `experts_apart`: routed experts cannot be traced together with what surrounds them.
        """
        return [(block, "forward") for block in self.blocks()]

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks of this part, first to last."""
        return list(self.layers.values())
