"""The shape of a Llama 3: conf/model/llama3_*.yaml hold the numbers."""

from collections.abc import Mapping
from math import ceil
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, ValidationInfo, field_validator

from src.config.base import Config
from src.config.bounds import RopeTheta, Scale, Tokens, Width
from src.models.accounting import SavedActivations, Slice, Weight, around_blocks
from src.models.base import GroupedQueryConfig

if TYPE_CHECKING:
    from src.models.llama3.model import Llama3


class RopeScaling(Config):
    """Llama 3.1's stretch of slow rotary frequencies; wavelengths are compared with original/high and original/low."""

    factor: float = Field(ge=1)
    """How much longer the wavelengths of slow pairs become."""
    low: Scale
    """Turns in `original` tokens; pairs with fewer are slowed by factor."""
    high: Scale
    """Turns in `original` tokens; pairs with more stay as they are; those between are blended."""
    original: Tokens
    """Tokens of the context that the frequencies were made for."""

    @field_validator("high")
    @classmethod
    def _above_low(cls, high: float, info: ValidationInfo) -> float:
        low = info.data.get("low")
        if low is not None and high <= low:
            raise ValueError(f"{high} must be larger than low={low}")
        return high


class Llama3Config(GroupedQueryConfig):
    """Every number of a Llama 3; `build` makes the module."""

    family: ClassVar[str] = "llama3"
    roles: ClassVar[Mapping[str, str]] = {
        "tok_embeddings": "embedding",
        "layers.*.attention_norm": "sequence_parallel",
        "layers.*.attention": "gather_sequence",
        "layers.*.attention.wq": "colwise",
        "layers.*.attention.wk": "colwise",
        "layers.*.attention.wv": "colwise",
        "layers.*.attention.wo": "rowwise",
        "layers.*.ffn_norm": "sequence_parallel",
        "layers.*.feed_forward": "gather_sequence",
        "layers.*.feed_forward.w1": "colwise",
        "layers.*.feed_forward.w3": "colwise",
        "layers.*.feed_forward.w2": "rowwise",
        "norm": "sequence_parallel",
        "output": "vocabulary",
    }

    head_dim: Width | None
    """Elements of one head; null: dim / n_heads."""
    ffn_dim_multiplier: Scale | None
    """Factor on 8/3 dim, the feed-forward width before rounding; null: 1."""
    multiple_of: Width
    """Multiple that the feed-forward width is rounded up to."""
    rope_theta: RopeTheta
    """Base of the rotary angles."""
    rope_scaling: RopeScaling | None
    """Stretch of Llama 3.1 and later, {factor, low, high, original}; null: none."""
    depth_init: bool
    """True: deeper blocks start smaller; false: all alike."""

    @field_validator("head_dim")
    @classmethod
    def _even_head(cls, head_dim: int | None, info: ValidationInfo) -> int | None:
        dim, n_heads = info.data.get("dim"), info.data.get("n_heads")
        if head_dim is not None:
            if head_dim % 2:
                raise ValueError(f"{head_dim} is odd; the rotary embedding turns pairs: {head_dim + 1} would do")
        elif dim is not None and n_heads is not None and dim % (2 * n_heads):
            raise ValueError(f"null means dim // n_heads, but dim={dim} is not an even multiple of n_heads={n_heads}")
        return head_dim

    @property
    def head_width(self) -> int:
        """Elements of one head."""
        return self.dim // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def ffn_dim(self) -> int:
        """Two thirds of 4 dim, times the multiplier, rounded up to `multiple_of`; doubles, each step truncated."""
        width = int(2 * (4 * self.dim) / 3)
        if self.ffn_dim_multiplier is not None:
            width = int(self.ffn_dim_multiplier * width)
        return self.multiple_of * ceil(width / self.multiple_of)

    def build(self) -> "Llama3":
        from src.models.llama3.model import Llama3

        return Llama3(self)

    def weights(self) -> tuple[Weight, ...]:
        first, last = around_blocks(self.vocab_size, self.dim, tied=self.tied)
        return (first, *(weight for layer in range(self.n_layers) for weight in self._block(layer)), *last)

    def _block(self, layer: int) -> tuple[Weight, ...]:
        unit = f"layers.{layer}"
        queries, keys = self.n_heads * self.head_width, self.n_kv_heads * self.head_width
        columns = {
            "attention.wq": (queries, self.dim),
            "attention.wk": (keys, self.dim),
            "attention.wv": (keys, self.dim),
            "feed_forward.w1": (self.ffn_dim, self.dim),
            "feed_forward.w3": (self.ffn_dim, self.dim),
        }
        rows = {"attention.wo": (self.dim, queries), "feed_forward.w2": (self.dim, self.ffn_dim)}
        return (
            *(Weight(f"{unit}.{name}.weight", shape, unit, tensor_dim=0) for name, shape in columns.items()),
            *(Weight(f"{unit}.{name}.weight", shape, unit, tensor_dim=1) for name, shape in rows.items()),
            *(Weight(f"{unit}.{name}.weight", (self.dim,), unit) for name in ("attention_norm", "ffn_norm")),
        )

    def logit_rows(self) -> dict[str, tuple[tuple[int, float], ...]]:
        """Keys that several heads of queries share stay as they are."""
        if self.n_kv_heads < self.n_heads:
            return {"wq": ((self.head_width, 1.0),)}
        return {"wq": ((self.head_width, 0.5),), "wk": ((self.head_width, 0.5),)}

    @property
    def head_widths(self) -> tuple[int, int]:
        return self.head_width, self.head_width

    def saved_by_block(self, cut: Slice) -> SavedActivations:
        """Between blocks the sequence is cut by `tensor`; the inputs of column-wise linears are whole."""
        queries, keys = self.n_heads * self.head_width, self.n_kv_heads * self.head_width
        streams = 2 * self.dim / cut.tensor  # inputs of the two norms
        gathered = 2 * self.dim  # outputs of the two norms: inputs of wq wk wv and of w1 w3
        attention = (2 * queries + 2 * keys) / cut.tensor  # rotated q and k, v, and the result, which is wo's input
        # w1 x, w3 x and their product (w2's input); eager autograd also keeps silu(w1 x), which a compiler recomputes.
        feed_forward = (3 if cut.compiled else 4) * self.ffn_dim / cut.tensor
        # In fp32: one log sum exp for a head, and 1/rms for each norm.
        statistics_bytes = 4 * (self.n_heads + 2) / cut.tensor
        elements = streams + gathered + attention + feed_forward
        if cut.float8_inputs:  # outputs of the norms and w2's input; wo's input stays wide for attention's backward
            narrow = gathered + self.ffn_dim / cut.tensor
            elements += narrow / cut.element_bytes - narrow
        # At its widest: gradients of w1 x, w3 x and their product, of the stream, and of the gathered norm output.
        working = 3 * self.ffn_dim / cut.tensor + self.dim / cut.tensor + self.dim
        return SavedActivations(
            whole=int(cut.tokens * (elements * cut.element_bytes + statistics_bytes)),
            input=int(cut.tokens * self.dim / cut.tensor * cut.element_bytes),
            selective=int(cut.tokens * self._selective(cut)),
            working=int(cut.tokens * working * cut.element_bytes),
        )

    def _selective(self, cut: Slice) -> float:
        """Bytes of a token: the input; of the matmuls in order wq wv w1 w2; attention's result and log sum exp."""
        queries, keys = self.n_heads * self.head_width, self.n_kv_heads * self.head_width
        elements = (self.dim + queries + keys + self.ffn_dim + queries) / cut.tensor
        scattered = self.dim / cut.tensor if cut.tensor > 1 else 0  # the sum over tensor ranks behind wo
        elements += scattered
        if (
            not cut.compiled
        ):  # a compiler drops what the backward does not read: w2's result and the sum over ranks of it
            elements += self.dim + scattered
        return elements * cut.element_bytes + 4 * self.n_heads / cut.tensor

    def cut_by_tensor(self) -> dict[str, int]:
        sizes = {"n_heads": self.n_heads, "n_kv_heads": self.n_kv_heads, "vocab_size": self.vocab_size}
        return sizes | {"ffn_dim": self.ffn_dim}
