"""The decoder that every family is: embedding, blocks, norm, head; and the contract between families and layouts.

A family brings its blocks, its rotary frequencies and how its parameters start. A block is (hidden, rotary, mask) ->
(hidden, tokens that each expert got, or None where there are none); its `attention` holds its attention core as `core`,
its experts, if any, are `moe`, and then its `attend` is all that comes before tokens part.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from src.models.attention.cores import Mask, block_mask
from src.models.attention.flash_attention import document_starts
from src.models.base import ModelConfig
from src.models.cross_entropy import Output
from src.models.init import Constant, Initializer, Normal
from src.models.moe.moe import MoE, balance
from src.models.rope import rotary_table


class Decoder(nn.Module):
    """tokens (batch, length) -> logits (batch, length, vocabulary), or the summed cross entropy of `labels`.

    A part of a pipeline has some of its modules set to None: without `tok_embeddings` the input is a hidden state,
    without `output` so is the result. `positions` (batch, length) restart at documents; `mask` comes from
    `attention_mask`.
    """

    config: ModelConfig
    rotary: Tensor  # (max_seq_len, rotated width / 2, 2) fp32: cosines and sines
    tok_embeddings: nn.Embedding | None
    layers: nn.ModuleDict  # keys are global layer numbers
    norm: nn.RMSNorm | None
    output: Output | None
    by_starts = False  # `attention_mask` may say where documents start, instead of which key each query sees

    def __init__(self, config: ModelConfig, blocks: Iterable[nn.Module], rotary_width: int) -> None:
        """`rotary_width`: elements of a head that turn with the position."""
        super().__init__()
        self.config = config
        # Not nn.Embedding(...): its own start would import torch._dynamo, 1.6 s of every rank's start.
        self.tok_embeddings = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.dim), freeze=False)
        self.layers = nn.ModuleDict({str(layer): block for layer, block in enumerate(blocks)})
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.output = Output(config.dim, config.vocab_size)
        self.register_buffer("rotary", torch.empty(config.max_seq_len, rotary_width // 2, 2), persistent=False)
        self.reset_buffers()
        self.tie_weights()

    @abstractmethod
    def frequencies(self) -> Tensor:
        """(rotated width / 2) fp32, radians per token: of each pair of the rotary embedding."""

    @property
    def rotary_factor(self) -> float:
        """What cosines and sines are multiplied with."""
        return 1.0

    def depth(self, layer: int) -> int:
        """What the variance of matrices that write into the residual stream is divided by, and 2; 1 for the first."""
        return layer + 1

    def initializers(self) -> dict[str, Initializer]:
        """How each parameter starts, by name: std 0.02; less where a matrix writes into the residual stream, or routes.

        By the names that the families share; one with matrices of other names overrides it.
        """
        plan: dict[str, Initializer] = {}
        for name, _ in self.named_parameters():
            matrix = name.removesuffix(".weight").rsplit(".", 1)[-1]
            if name == "output.weight" or (name == "tok_embeddings.weight" and self.config.tied):
                # A shared matrix starts as a head: as an embedding (std 1) its logits would have std dim^0.5.
                plan[name] = Normal(self.config.dim**-0.5, cut=3.0)
            elif name == "tok_embeddings.weight":
                plan[name] = Normal(1.0)
            elif "norm" in matrix:
                plan[name] = Constant(1.0)
            elif matrix in ("wo", "w2", "w3", "gate"):
                plan[name] = Normal(0.02 / (2 * self.depth(int(name.split(".")[1]))) ** 0.5)
            else:
                plan[name] = Normal(0.02)
        return plan

    def tie_weights(self) -> None:
        """Make the head the embedding again, after anything that made new parameters of them."""
        if self.config.tied:
            assert self.output is not None, "tied weights live on one stage"
            assert self.tok_embeddings is not None, "tied weights live on one stage"
            self.output.weight = self.tok_embeddings.weight

    def reset_buffers(self) -> None:
        """Compute what is not a weight; again after the model left the meta device."""
        with torch.device(self.rotary.device):
            self.rotary = rotary_table(self.frequencies(), self.config.max_seq_len) * self.rotary_factor
        for moe in self.mixtures():
            moe.reset_buffers()

    def attention_mask(self, documents: Tensor | None, batch: int, length: int) -> Mask | None:
        """The mask argument of `forward` for one batch; None where the kernel is causal by itself.

        `documents`: (batch, length), where the loader put them: on the CPU they can be counted without a wait.
        """
        if self.config.attention == "sdpa":
            return None
        device = self.rotary.device
        if self.by_starts and documents is not None and documents.is_cpu:
            starts = document_starts(documents)
            if starts is not None:
                return starts.to(device, non_blocking=True)
        documents = None if documents is None else documents.to(device, non_blocking=True)
        return block_mask(self.config.mask, documents, self.config.fixed_block, batch, length, device)

    def mixtures(self) -> list[MoE]:
        """The mixtures of experts of this part, first to last."""
        found = (getattr(block, "moe", None) for block in self.layers.values())
        return [moe for moe in found if isinstance(moe, MoE)]

    def expert_counts(self) -> list[Tensor]:
        """Tokens of each expert on this rank since the last `post_optimizer_step`, which sums them over ranks and
        resets them.
        """
        return [moe.tokens_per_expert for moe in self.mixtures()]

    def post_optimizer_step(self, summed: Callable[[Tensor], Tensor], applied: Tensor) -> None:
        """Collective, once per optimizer step: move the biases that balance experts.

        `summed` adds a tensor over all ranks that hold these layers and other tokens, in place; `applied` (scalar) is
        0 where the step was skipped and must leave no trace.
        """
        balance(self.mixtures(), summed, applied)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Mask | None = None,
    ) -> Tensor:
        hidden = tokens if self.tok_embeddings is None else self.tok_embeddings(tokens)
        rotary = self.rotary if positions is None else self.rotary[positions]
        for layer in self.layers.values():
            hidden, counts = layer(hidden, rotary, mask)
            # Counted here, where nothing runs a second time for the backward; not in validation, nor in sampling.
            if self.training and counts is not None:
                layer.get_buffer("moe.tokens_per_expert").add_(counts)
        hidden = hidden if self.norm is None else self.norm(hidden)
        return hidden if self.output is None else self.output(hidden, labels=labels)

    def compile_regions(self, *, experts_apart: bool) -> list[tuple[nn.Module, str]]:
        """What a compiler may make one graph of: a module and the name of its method.

        `experts_apart`: routed experts cannot be traced together with what surrounds them.
        """
        found: list[tuple[nn.Module, str]] = []
        for block in self.layers.values():
            moe = getattr(block, "moe", None)
            if moe is None or not experts_apart:
                found.append((block, "forward"))
                continue
            found += [(block, "attend"), (moe.router, "forward"), (moe.experts, "forward")]
            found += [(moe.shared_experts, "forward")] if moe.shared_experts is not None else []
        return found

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks of this part, first to last."""
        return list(self.layers.values())
