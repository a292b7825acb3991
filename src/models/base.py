"""What every model family offers to the rooms above, before a single tensor exists."""

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from pydantic import PositiveInt, ValidationInfo, field_validator

from src.config.base import Config
from src.models.accounting import Counts, Grid, Saved, Slice, Weight, count

if TYPE_CHECKING:
    from src.models.decoder import Decoder
    from src.models.moe.config import MixtureOfExperts


class Layout(Grid, Protocol):
    """All degrees that a model may refuse; `src.distributed.parallel_dims.Degrees` is one."""

    @property
    def context(self) -> int: ...
    @property
    def pipeline(self) -> int: ...


def pass_multiple(layout: Layout) -> int:
    """Tokens that a layout can cut evenly: two pieces for each context rank, and each of them for the tensor ranks."""
    return 2 * layout.context * layout.tensor


class ModelConfig(Config):
    """Shape of a network. Everything but `build` is arithmetic: no torch, no allocation, microseconds for any size."""

    family: ClassVar[str]

    dim: PositiveInt
    n_layers: PositiveInt
    n_heads: PositiveInt
    vocab_size: PositiveInt
    max_seq_len: PositiveInt
    attention: Literal["sdpa", "flex"]  # the kernel: torch's causal one, or FlexAttention, which takes masks
    mask: Literal["causal", "block_causal"]
    fixed_block: PositiveInt | None  # tokens

    @field_validator("mask")
    @classmethod
    def _mask_of_backend(cls, mask: str, info: ValidationInfo) -> str:
        if info.data.get("attention") == "sdpa" and mask != "causal":
            raise ValueError(f"{mask} is beyond attention=sdpa, which is causal only; attention=flex does it")
        return mask

    @field_validator("fixed_block")
    @classmethod
    def _block_of_backend(cls, fixed_block: int | None, info: ValidationInfo) -> int | None:
        if info.data.get("attention") == "sdpa" and fixed_block is not None:
            raise ValueError(f"{fixed_block} is beyond attention=sdpa, which has no blocks; attention=flex does it")
        return fixed_block

    @abstractmethod
    def build(self) -> "Decoder":
        """The single-device module; call it under `torch.device("meta")` to allocate nothing."""

    @abstractmethod
    def weights(self) -> tuple[Weight, ...]:
        """Every parameter of the built module, by its name there."""

    @property
    @abstractmethod
    def head_widths(self) -> tuple[int, int]:
        """Elements of a head's query and key, and of its value."""

    @property
    def kv_heads(self) -> int:
        """Heads of the keys and values that a core is given."""
        return self.n_heads

    def attention_width(self) -> int:
        """Sum over layers of n_heads * (width of a query + width of a value): flops per token and position pair / 2."""
        return self.n_layers * self.n_heads * sum(self.head_widths)

    @property
    def within_documents(self) -> bool:
        """Whether attention stops at the borders of documents."""
        return self.mask == "block_causal"

    @abstractmethod
    def saved_by_block(self, cut: Slice) -> Saved:
        """What one block keeps for its backward on one rank."""

    @abstractmethod
    def problems(self, layout: Layout) -> list[str]:
        """Why this family cannot run in this layout: key, value, rule, nearest legal value."""

    def warnings(self) -> list[str]:
        """What a reader of this run's figures must know."""
        return []

    @property
    def mixture(self) -> "MixtureOfExperts | None":
        """The experts among which tokens choose; None where all weights meet all tokens."""
        return None

    @property
    def routed(self) -> bool:
        """Whether some weights meet some tokens only."""
        return any(weight.active < 1 for weight in self.weights())

    def counts(self, seq_len: int) -> Counts:
        """Parameters and flops per token of the whole model, before any cut."""
        return count(self.weights(), self.attention_width(), seq_len)


def divisors(value: int, asked: int) -> str:
    """In words, what divides `value`: all of them when they are few, the four nearest to `asked` otherwise."""
    all_of_them = [candidate for candidate in range(1, value + 1) if value % candidate == 0]
    nearest = all_of_them if len(all_of_them) <= 8 else sorted(all_of_them, key=lambda one: abs(one - asked))[:4]
    words = [str(one) for one in sorted(nearest)]
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1]))) + (" do" if len(words) > 1 else " does")
