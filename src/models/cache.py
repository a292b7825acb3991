"""Keys and values of the text so far, so that one more token costs one token's work.

A model is not told: while `attending` lasts, its attention cores remember what they are given. That is the expanded
keys and values of every head, for latent attention too, where the narrow vectors would be up to 70 times smaller: like
this a core sees what it sees in training, to the bit of its inputs, under any cut of the heads, and no step expands all
earlier tokens again. Text for a person to read, not a server's memory, is what this is for.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.models.attention.cores import CausalAttention, FlexAttention
from src.models.base import ModelConfig


class Cache:
    """Key-value cache state of a batch of left-padded rows: column c holds position c - padding[row].

    `filled` columns are in every attention core; a forward pass adds the next ones. Once fixed, each pass adds the one
    column that a tensor names and looks at all of them through a mask: what a CUDA graph can do again and again.
    """

    def __init__(self, config: ModelConfig, padding: Sequence[int], columns: int, device: torch.device) -> None:
        self.padding = torch.tensor(padding, device=device).unsqueeze(1)  # (batch, 1)
        self.fixed_block, self.columns, self.filled = config.fixed_block, columns, 0
        # Made once: of a step of one token they would be a tenth of the kernels.
        every = torch.arange(columns, device=device)
        self._positions = (every - self.padding).clamp(0, config.max_seq_len - 1)  # (batch, columns)
        self._text = None if not any(padding) else (every >= self.padding).view(-1, 1, 1, columns)
        self.column: Tensor | None = None  # (1), on the device: the next one, once fixed
        self._masked: tuple[Tensor, Tensor] | None = None

    def fix(self) -> None:
        """From here on each pass is one token of every row."""
        self.column = torch.full((1,), self.filled, device=self.padding.device)

    def add(self, length: int) -> None:
        """The last pass brought these columns."""
        if self.column is None:
            self.filled += length
        else:
            self.column += length

    def positions(self, length: int) -> Tensor:
        """(batch, length): of the next columns. Padding on either side gets one that exists: nobody looks at it."""
        if self.column is not None:
            return self._positions.index_select(1, self.column)
        return self._positions[:, self.filled : self.filled + length]

    def mask(self, length: int) -> Tensor | None:
        """(batch, 1, length, filled + length), true where the next columns (queries) see a column (key); None: all do.
        Once fixed, (batch, 1, 1, columns).

        Padding sees itself: a softmax over nothing would be no number, and spread.
        """
        if self.column is not None:
            return self._fixed_mask(self.column)
        if length == 1 and self.fixed_block is None and self.filled:  # a token after the prompts sees all of its text
            return None if self._text is None else self._text[..., : self.filled + 1]
        keys = torch.arange(self.filled + length, device=self.padding.device)
        queries = keys[self.filled :].unsqueeze(1)
        seen = (keys <= queries) & (keys >= self.padding.unsqueeze(1))  # (batch, length, keys)
        if self.fixed_block is not None:
            block = (keys - self.padding) // self.fixed_block  # (batch, keys)
            seen = seen & (block[:, self.filled :].unsqueeze(2) == block.unsqueeze(1))
        return (seen | (keys == queries)).unsqueeze(1)

    def _fixed_mask(self, column: Tensor) -> Tensor:
        keys = torch.arange(self.columns, device=self.padding.device)
        seen = (keys <= column) & (keys >= self.padding)  # (batch, columns)
        if self.fixed_block is not None:
            block = (keys - self.padding) // self.fixed_block
            seen = seen & (block == (column - self.padding) // self.fixed_block)
        return seen.view(-1, 1, 1, self.columns)

    def bias(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """`mask` as what attention adds: 0 or minus infinity. Made for the first layer of a pass, two kernels less for
        each of the others.
        """
        if self._masked is None or self._masked[0] is not mask:
            self._masked = mask, torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))
        return self._masked[1]


class CachedAttention(nn.Module):
    """Attention core with a key-value cache: queries attend to keys and values of all passes, as far as the mask
    allows.

    q, k, v: of the next columns, as src/models/attention/cores.py has them; what a pass wrote beyond `cache.filled`,
    the next one writes over.
    """

    def __init__(self, cache: Cache) -> None:
        super().__init__()
        self.cache = cache
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
        keys, values = self._room(k, v)
        length = k.shape[2]
        if self.cache.column is not None:
            assert mask is not None, "a cache of fixed size has columns to come"
            keys.index_copy_(2, self.cache.column, k)
            values.index_copy_(2, self.cache.column, v)
            mask = self.cache.bias(mask, q.dtype)
        else:
            first = self.cache.filled
            keys.narrow(2, first, length).copy_(k)
            values.narrow(2, first, length).copy_(v)
            keys, values = keys.narrow(2, 0, first + length), values.narrow(2, 0, first + length)
        if length > 1 or q.shape[1] == k.shape[1]:
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale, enable_gqa=True)
        # A kernel would copy all keys for each query head: those of a group read them as rows of one head.
        grouped = q.unflatten(1, (k.shape[1], -1)).squeeze(3)  # (batch, kv heads, heads of a group, width)
        result = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
        return result.flatten(1, 2).unsqueeze(2)

    def _room(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, kv heads, columns, width) each, made when the first pass shows how many heads are here."""
        if self.keys is None or self.values is None:
            columns = self.cache.columns
            self.keys = k.new_zeros((*k.shape[:2], columns, k.shape[3]))
            self.values = v.new_zeros((*v.shape[:2], columns, v.shape[3]))
        return self.keys, self.values


@contextmanager
def attending(model: nn.Module, cache: Cache) -> Iterator[None]:
    """Within, every attention core of `model` is a CachedAttention of its own; afterwards it is the old one again."""
    places = [
        (parent, name, core)
        for parent in model.modules()
        for name, core in parent.named_children()
        if isinstance(core, CausalAttention | FlexAttention)
    ]
    for parent, name, _ in places:
        setattr(parent, name, CachedAttention(cache))
    try:
        yield
    finally:
        for parent, name, core in places:
            setattr(parent, name, core)
