"""The last projection and its cross entropy, a chunk of rows at a time: whole logits never exist.

Logits of 8192 tokens over 128256 words are 2 GiB in bf16 and 4 GiB in fp32, several times over with their gradient.
Here each chunk's logits become loss and gradient at once in the forward pass, so nothing is kept and nothing computed
twice.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.models.accounting import HEAD_CHUNK_ROWS, head_chunk_rows

IGNORED = -100  # the label of a position that does not count


class Vocabulary(Protocol):
    """Reductions over a row of logits that is sharded by vocabulary; `offset` is the first word of this shard."""

    offset: int

    def logsumexp(self, x: Tensor) -> Tensor: ...
    def sum(self, x: Tensor) -> Tensor: ...


class WholeVocabulary:
    """Every word is here."""

    offset = 0

    def logsumexp(self, x: Tensor) -> Tensor:
        return x

    def sum(self, x: Tensor) -> Tensor:
        return x


def statistics(logits: Tensor, labels: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """Of each row (rows, words): log sum exp of the words held here, and the label's logit or 0 if held elsewhere;
    fp32.
    """
    word = labels - offset
    held = (word >= 0) & (word < logits.shape[-1])
    target = logits.gather(-1, (word * held).unsqueeze(-1)).squeeze(-1).float()
    return torch.logsumexp(logits.float(), dim=-1), target * held


def gradient_(logits: Tensor, labels: Tensor, normalizer: Tensor, offset: int, z_loss: float) -> Tensor:
    """d(summed cross entropy) / d(logits): softmax minus one-hot, 0 in ignored rows; (rows, words), written in the
    place of the logits: a chunk is 1 GiB, there where memory is fullest. With `z_loss` * normalizer^2 added to each
    row's loss, softmax counts 1 + 2 z_loss * normalizer times.
    """
    words = torch.arange(logits.shape[-1], device=logits.device)
    hit = words == (labels - offset).unsqueeze(-1)
    probability = (logits.float() - normalizer.unsqueeze(-1)).exp()
    if z_loss:
        probability = probability * (1.0 + 2.0 * z_loss * normalizer).unsqueeze(-1)
    return logits.copy_((probability - hit.float()) * (labels != IGNORED).unsqueeze(-1))


def scale_(tensor: Tensor, factor: Tensor) -> Tensor:
    """tensor (rows, columns) * factor (0-dim, fp32), in place, rounded once: on a GPU torch would first round the
    factor to a tensor's bf16, 1 / tokens by up to 0.2 %.
    """
    if tensor.dtype == factor.dtype or not tensor.is_cuda:
        return tensor.mul_(factor)
    for rows in tensor.split(HEAD_CHUNK_ROWS):  # their fp32 copies, a chunk at a time
        rows.copy_(rows.float() * factor)
    return tensor


class Output(nn.Linear):
    """(batch, length, dim) -> logits (batch, length, vocabulary); with labels (batch, length), the summed cross
    entropy, fp32 scalar.

    Labels (parts, batch, length) ask for a sum of each part, (parts), of hidden states (parts * batch, length, dim).
    """

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__(dim, vocab_size, bias=False)
        self.rows = head_chunk_rows(vocab_size)
        self.vocabulary: Vocabulary = WholeVocabulary()
        self.statistics: Callable[..., tuple[Tensor, Tensor]] = statistics
        self.gradient_: Callable[..., Tensor] = gradient_
        self.scale_: Callable[[Tensor, Tensor], Tensor] = scale_
        # One kernel for statistics and gradient_, where a GPU holds every word; see src/models/kernels/cross_entropy.py
        self.losses_: Callable[..., Tensor] | None = None
        self.by_row = False  # a loss for each sequence of a batch, without gradients, instead of their sum
        self.z_loss = 0.0  # weight of normalizer^2 (PaLM, arXiv 2204.02311, section 5) in gradients, not in the loss

    def take_kernels(self) -> None:
        """On a CUDA device, where Triton is: one kernel for loss and gradient, one for the scale."""
        from src.models.kernels.cross_entropy import losses_, scale_

        self.losses_, self.scale_ = losses_, scale_

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            return super().forward(hidden)
        return self.cross_entropy(hidden, self.weight, labels)

    def cross_entropy(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """The sum over all rows whose label is not -100; `weight` holds the words from `vocabulary.offset` on."""
        if self.by_row:
            pairs = zip(hidden.split(1), labels.split(1), strict=True)
            return torch.stack([self._summed(part, weight, each) for part, each in pairs])
        if labels.ndim == 2:
            return self._summed(hidden, weight, labels)
        parts = zip(hidden.chunk(len(labels)), labels, strict=True)
        return torch.stack([self._summed(part, weight, each) for part, each in parts])

    def _summed(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        learns = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
        forward: Callable[..., tuple[Tensor, Tensor]] = _LinearCrossEntropy.apply
        loss, grad_weight = forward(hidden.flatten(0, -2), weight.detach(), labels.flatten(), self, learns)
        carry: Callable[..., Tensor] = _Carry.apply
        return loss + carry(weight, grad_weight, self.scale_) if learns else loss

    def chunk(self, logits: Tensor, labels: Tensor, learns: bool) -> Tensor:
        """The summed loss of these rows (rows, words); with `learns` logits become their gradient."""
        if self.losses_ is not None and isinstance(self.vocabulary, WholeVocabulary):
            return self.losses_(logits, labels, IGNORED, self.z_loss, learns=learns).sum()
        normalizer, target = self.statistics(logits, labels, self.vocabulary.offset)
        normalizer, target = self.vocabulary.logsumexp(normalizer), self.vocabulary.sum(target)
        if learns:
            self.gradient_(logits, labels, normalizer, self.vocabulary.offset, self.z_loss)
        return ((normalizer - target) * (labels != IGNORED)).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    """hidden (rows, dim), weight (words, dim), labels (rows) -> scalar; with `learns` also the gradient of the weight.

    Both gradients are ready after the forward; that of the weight goes its own way, `_Carry`, so that a pipeline may
    ask for one now and for the other later, and each is scaled once, where it lies.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, output: Output, learns: bool
    ) -> tuple[Tensor, Tensor | None]:
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if learns else None
        grad_weight = torch.zeros_like(weight) if learns else None
        for start in range(0, len(hidden), output.rows):
            rows = slice(start, start + output.rows)
            logits = F.linear(hidden[rows], weight)
            loss += output.chunk(logits, labels[rows], learns)
            if grad_hidden is not None and grad_weight is not None:
                torch.mm(logits, weight, out=grad_hidden[rows])
                grad_weight.addmm_(logits.T, hidden[rows])
        if grad_hidden is not None and grad_weight is not None:
            ctx.save_for_backward(grad_hidden)
            ctx.scale_ = output.scale_
            ctx.mark_non_differentiable(grad_weight)
            ctx.set_materialize_grads(False)  # no zeros as large as the head for an output that has no gradient
        return loss, grad_weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grad_hidden,) = ctx.saved_tensors
        return ctx.scale_(grad_hidden, grads[0]), None, None, None, None


class _Carry(torch.autograd.Function):
    """0, whose gradient with respect to the weight is the one given."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, grad_weight: Tensor, scale_: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(grad_weight)
        ctx.scale_ = scale_
        return torch.zeros((), dtype=torch.float32, device=weight.device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad_weight,) = ctx.saved_tensors
        return ctx.scale_(grad_weight, grads[0]), None, None
