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
from src.models.moe.moe import MoE, balance
from src.models.mtp.module import Ahead, MultiTokenPredictor, PredictionModule, look_ahead
from src.models.parametrization.init import Constant, Initializer, Normal
from src.models.rope import rotary_table


class Decoder(nn.Module):
    """tokens (batch, length) -> logits (batch, length, vocabulary), or the summed cross entropy of `labels`.

    A part of a pipeline has some of its modules set to None: without `tok_embeddings` the input is a hidden state,
    without `output` so is the result. `positions` (batch, length) restart at documents; `mask` comes from
    `attention_mask`. `ahead` is for training with multi-token prediction, and comes from `look_ahead`: hidden states
    between parts are then followed by the embeddings of the tokens ahead, ((1 + depths) * batch, length, dim), which so
    reach the last part with an exact gradient.
    """

    config: ModelConfig
    rotary: Tensor  # (max_seq_len, rotated width / 2, 2) fp32: cosines and sines
    tok_embeddings: nn.Embedding | None
    layers: nn.ModuleDict  # keys are global layer numbers
    mtp: MultiTokenPredictor | None  # where `output` is, if the model has it
    norm: nn.RMSNorm | None
    output: Output | None
    by_starts = False  # `attention_mask` may say where documents start, instead of which key each query sees

    def __init__(
        self,
        config: ModelConfig,
        blocks: Iterable[nn.Module],
        rotary_width: int,
        mtp: MultiTokenPredictor | None = None,
    ) -> None:
        """`rotary_width`: elements of a head that turn with the position; `mtp`: multi-token prediction."""
        super().__init__()
        self.config = config
        # Not nn.Embedding(...): its own start would import torch._dynamo, 1.6 s of every rank's start.
        self.tok_embeddings = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.dim), freeze=False)
        self.layers = nn.ModuleDict({str(layer): block for layer, block in enumerate(blocks)})
        self.mtp = mtp
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
                block = self.config.block_number(name)
                assert block is not None, f"{name} is of a block"
                plan[name] = Normal(0.02 / (2 * self.depth(block)) ** 0.5)
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
        if self.mtp is not None:
            self.mtp.reset_buffers()

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
        found = (getattr(block, "moe", None) for block in self.blocks())
        return [moe for moe in found if isinstance(moe, MoE)]

    def look_ahead(self, tokens: Tensor, labels: Tensor) -> Ahead | None:
        """The argument `ahead` of `forward` for whole rows; None in validation, and without multi-token prediction."""
        depths = self.config.prediction_depths
        return look_ahead(tokens, labels, depths) if depths and self.training else None

    def step_sums(self) -> list[Tensor]:
        """What this rank added up since the last `post_optimizer_step`, which resets it: tokens of each expert, and the
        loss of multi-token prediction.
        """
        counts = [moe.tokens_per_expert for moe in self.mixtures()]
        return counts if self.mtp is None else [*counts, self.mtp.nats]

    def before_step(self, step: float, steps: float) -> None:
        """Set what follows a schedule besides the learning rate; `step` is counted from 0, of `steps`."""
        if self.mtp is not None:
            self.mtp.before_step(step, steps)

    def set_router_z_loss(self, weight: Tensor) -> None:
        """0-dim: what the sum over tokens of each router's squared log sum exp counts in the next backward passes."""
        for moe in self.mixtures():
            moe.router.z_loss = weight

    def post_optimizer_step(self, summed: Callable[[Tensor], Tensor], applied: Tensor) -> None:
        """Collective, once per optimizer step: move the biases that balance experts.

        `summed` adds a tensor over all ranks that hold these layers and other tokens, in place; `applied` (scalar) is
        0 where the step was skipped and must leave no trace.
        """
        balance(self.mixtures(), summed, applied)
        if self.mtp is not None:
            self.mtp.nats.zero_()

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Mask | None = None,
        ahead: Ahead | None = None,
    ) -> Tensor:
        hidden = self._enter(tokens, ahead)
        rotary = self.rotary if positions is None else self.rotary[positions]
        # Behind the hidden states, if asked to look ahead: one embedding for each depth.
        parts = (hidden,) if ahead is None else hidden.chunk(1 + self.config.prediction_depths)
        hidden, embeddings = parts[0], parts[1:]
        for layer in self.layers.values():
            hidden, counts = layer(hidden, rotary, mask)
            # Counted here, where nothing runs a second time for the backward; not in validation, nor in sampling.
            if self.training and counts is not None:
                layer.get_buffer("moe.tokens_per_expert").add_(counts)
        if self.output is None:
            hidden = hidden if self.norm is None else self.norm(hidden)
            return torch.cat([hidden, *embeddings]) if embeddings else hidden
        if ahead is None or self.mtp is None or labels is None:
            result: Tensor = self.output(hidden if self.norm is None else self.norm(hidden), labels=labels)
            return result
        # In this order, and the head once: FSDP gathers norm and head together, for one call of each.
        further = self.mtp(hidden, embeddings, rotary, mask)
        hidden = hidden if self.norm is None else self.norm(hidden)
        together = torch.cat([labels, ahead.labels]).unflatten(0, (1 + len(further), -1))
        return self.mtp.added(self.output(torch.cat([hidden, *further]), labels=together))

    def _enter(self, tokens: Tensor, ahead: Ahead | None) -> Tensor:
        """Embeddings, or the hidden state that another part of a pipeline sent."""
        if self.tok_embeddings is None:
            return tokens
        embedded: Tensor = self.tok_embeddings(tokens if ahead is None else torch.cat([tokens, ahead.tokens]))
        return embedded

    def compile_regions(self, *, experts_apart: bool) -> list[tuple[nn.Module, str]]:
        """What a compiler may make one graph of: a module and the name of its method.

        `experts_apart`: routed experts cannot be traced together with what surrounds them.
        """
        found: list[tuple[nn.Module, str]] = []
        for block in self.blocks():
            moe = getattr(block, "moe", None)
            if moe is None or not experts_apart:
                found.append((block, "forward"))
                continue
            found += [(block, "attend"), (moe.router, "forward"), (moe.experts, "forward")]
            found += [(moe.shared_experts, "forward")] if moe.shared_experts is not None else []
        return found

    def numbered_blocks(self) -> dict[int, nn.Module]:
        """The transformer blocks of this part by their number in the model; those of multi-token prediction follow the
        last layer.
        """
        found = {int(layer): block for layer, block in self.layers.items()}
        return found | {self.config.n_layers + depth: module.block for depth, module in enumerate(self._predictions())}

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks of this part, first to last."""
        return list(self.numbered_blocks().values())

    def gathered_apart(self) -> list[nn.Module]:
        """The modules between embedding and head whose weights are gathered together, first to last."""
        return [*self.layers.values(), *self._predictions()]

    def _predictions(self) -> list[PredictionModule]:
        return [] if self.mtp is None else [module for module in self.mtp if isinstance(module, PredictionModule)]
