"""Multi-token prediction of DeepSeek-V3 (arXiv 2412.19437, section 2.2, equations 21 to 25), for training alone.

Depth k makes of each position's state of depth k - 1 and the embedding of the token k ahead a new state, from which the
model's own head predicts the token k + 1 ahead. Depth 0 is what the last layer puts out, before the final norm: a norm
belongs to each depth's head. Embedding and head are the model's; no copy of them exists, in no layout.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.models.attention.cores import Mask
from src.models.cross_entropy import IGNORED
from src.models.mtp.config import MultiTokenPrediction


class Ahead(NamedTuple):
    """What the depths read and predict: both (depths * batch, length) int64, the first depth's rows first."""

    tokens: Tensor
    labels: Tensor


def look_ahead(tokens: Tensor, labels: Tensor, depths: int) -> Ahead:
    """Of tokens and labels (batch, length), before any layout cuts a sequence.

    Depth k reads the token k ahead and predicts the label k ahead. A position counts where its own label and all up to
    that one do: what is ignored stays ignored, and where labels stop at the border of a document so do targets.
    """
    read, predicted = [tokens], [labels]
    for _ in range(depths):
        read.append(F.pad(read[-1][:, 1:], (0, 1)))  # whoever reads what is not there has no target
        further = F.pad(predicted[-1][:, 1:], (0, 1), value=IGNORED)
        predicted.append(torch.where(labels == IGNORED, IGNORED, further))
    return Ahead(torch.cat(read[1:]), torch.cat(predicted[1:]))


class PredictionModule(nn.Module):
    """One depth: M [RMSNorm(embedding); RMSNorm(state)] through a block. The order of the two is that of released
    weights; the paper's equation 21 has the state first.
    """

    def __init__(self, dim: int, norm_eps: float, block: nn.Module) -> None:
        """`block`: as `src.models.decoder` describes it."""
        super().__init__()
        self.embedding_norm = nn.RMSNorm(dim, eps=norm_eps)
        self.hidden_norm = nn.RMSNorm(dim, eps=norm_eps)
        self.projection = nn.Linear(2 * dim, dim, bias=False)
        self.block = block
        self.norm = nn.RMSNorm(dim, eps=norm_eps)  # of the head, at this depth

    def forward(
        self, hidden: Tensor, embedding: Tensor, rotary: Tensor, mask: Mask | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """State of the depth before and embedding of the token ahead, (batch, length, dim) each -> the new state, what
        the head reads, and how many tokens each expert got.
        """
        joined = torch.cat([self.embedding_norm(embedding), self.hidden_norm(hidden)], dim=-1)
        hidden, counts = self.block(self.projection(joined), rotary, mask)
        return hidden, self.norm(hidden), counts


class MultiTokenPredictor(nn.ModuleList):
    """All depths in their order, the weight of their loss now, and what they lost so far."""

    weight: Tensor  # () fp32: on the device, for a step may be a CUDA graph
    nats: Tensor  # () fp32: mean over depths of the summed cross entropy of this rank, since the last optimizer step

    def __init__(self, config: MultiTokenPrediction, modules: Iterable[PredictionModule]) -> None:
        super().__init__(modules)
        self.config = config
        self.register_buffer("weight", torch.empty(()), persistent=False)
        self.register_buffer("nats", torch.empty(()), persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """To their first values, and to the dtype that a cast of the whole model does not respect."""
        self.weight = torch.full_like(self.weight, self.config.weight, dtype=torch.float32)
        self.nats = torch.zeros_like(self.nats, dtype=torch.float32)

    def before_step(self, step: float, steps: float) -> None:
        """Set the weight of the optimizer step with this number, counted from 0, of `steps`."""
        self.weight.fill_(self.config.weight_at(step, steps))

    def forward(self, hidden: Tensor, embeddings: Sequence[Tensor], rotary: Tensor, mask: Mask | None) -> list[Tensor]:
        """What the head reads at each depth, (batch, length, dim) each; `hidden`: of the last layer; `embeddings`: of
        the tokens 1, 2, ... ahead.
        """
        found = []
        for module, embedding in zip(self, embeddings, strict=True):
            hidden, normed, counts = module(hidden, embedding, rotary, mask)
            if self.training and counts is not None:
                module.get_buffer("block.moe.tokens_per_expert").add_(counts)
            found.append(normed)
        return found

    def added(self, losses: Tensor) -> Tensor:
        """Summed cross entropies (1 + depths), the main one first -> the main one, whose gradient is that of itself and
        of the weighted mean of the others.

        Whoever reports a loss reports the main one; `nats` has the others.
        """
        others = losses[1:].mean()
        self.nats += others.detach()
        weighted = self.weight * others
        return losses[0] + (weighted - weighted.detach())
