"""`ModelConfig`, the interface of a model family: shape, parameters, memory and legality without allocating a
tensor.
"""

from abc import abstractmethod
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from pydantic import ValidationInfo, field_validator

from src.config.base import Config
from src.config.bounds import Layers, NormEpsilon, Tokens, Vocabulary, Width
from src.errors import divisors, some
from src.models.accounting import Counts, RankGrid, SavedActivations, Slice, Weight, count

if TYPE_CHECKING:
    from src.models.decoder import Decoder
    from src.models.moe.config import MixtureOfExperts


class Layout(RankGrid, Protocol):
    """Degrees of parallelism that a model may refuse; `src.distributed.parallel_dims.ParallelDims` is one."""

    @property
    def context(self) -> int: ...
    @property
    def pipeline(self) -> int: ...


def pass_multiple(layout: Layout) -> int:
    """Tokens that a layout can cut evenly: two pieces for each context rank, and each of them for the tensor ranks."""
    pieces = 2 * layout.context if layout.context > 1 else 1
    return pieces * layout.tensor


class ModelConfig(Config):
    """Shape of a network. Everything but `build` is arithmetic: no torch, no allocation, microseconds for any size."""

    family: ClassVar[str]

    # How tensor parallelism may cut each module of the built model; * stands for a layer's number.
    # src/distributed/tensor/tensor_parallel.py gives the words meaning.
    roles: ClassVar[Mapping[str, str]]

    dim: Width
    """Width of the residual stream."""
    n_layers: Layers
    """Transformer blocks."""
    n_heads: Width
    """Query heads."""
    vocab_size: Vocabulary
    """Tokens of the vocabulary."""
    norm_eps: NormEpsilon
    """Added to the mean square under RMSNorm's root."""
    max_seq_len: Tokens
    """Tokens of the longest sequence that task.seq_len may ask for."""
    attention: Literal["sdpa", "flex"]
    """Kernel of attention; sdpa: torch's causal one; flex: FlexAttention, which takes any mask."""
    mask: Literal["causal", "block_causal"]
    """What a token attends to; causal: all before it; block_causal: of these its document's (flex)."""
    fixed_block: Tokens | None
    """Tokens of a block; attention stays inside of one (flex); null: no such limit."""

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

    def heads(self) -> dict[str, tuple[int, int]]:
        """Of each matrix of attention that heads cut, by name: how many, and whether its rows (0) or columns (1)."""
        found = {}
        for weight in self.weights():
            words = weight.name.split(".")
            if "attention" in words and weight.tensor_dim is not None:
                keys = {"wk", "wv"} & {*words}
                found[weight.name] = (self.kv_heads if keys else self.n_heads, weight.tensor_dim)
        return found

    @property
    def query_weight(self) -> str:
        """Name, in the attention, of the weight that the size of queries follows."""
        return "wq"

    def logit_rows(self) -> dict[str, tuple[tuple[int, float], ...]]:
        """What to scale for a head's attention logits to have a factor: by the weight's name in the attention, how many
        rows of each head are to have which power of it. Empty: logits do not follow weights, or nobody wrote it down.
        """
        return {}

    def attention_width(self) -> int:
        """Sum over blocks of n_heads * (width of a query + width of a value): flops per token and position pair / 2."""
        return (self.n_layers + self.prediction_depths) * self.n_heads * sum(self.head_widths)

    @property
    def prediction_depths(self) -> int:
        """Modules of multi-token prediction, each with a block; their weights are `mtp.0...` and live with `output`."""
        return 0

    def block_number(self, weight: str) -> int | None:
        """Of the block that a weight belongs to, as `Decoder.numbered_blocks` counts them; None: to none."""
        kind, number, *_ = weight.split(".")
        offsets = {"layers": 0, "mtp": self.n_layers}
        return int(number) + offsets[kind] if kind in offsets else None

    @property
    def within_documents(self) -> bool:
        """Whether attention stops at the borders of documents."""
        return self.mask == "block_causal"

    @abstractmethod
    def saved_by_block(self, cut: Slice) -> SavedActivations:
        """Bytes of activations that one block saves for its backward pass on one rank."""

    @abstractmethod
    def cut_by_tensor(self) -> dict[str, int]:
        """Sizes that `parallel.tensor` must divide, by key of the section `model`."""

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return False

    def problems(self, layout: Layout) -> list[str]:
        """Why this model cannot run in this layout: key, value, rule, nearest legal value."""
        found = self.problems_of_shape(layout)
        if layout.tensor > 1 and (without := self.without_role()):
            found.append(
                f"parallel.tensor={layout.tensor} finds no role for {some(without)}: {type(self).__name__}.roles must "
                "say how each module is cut; pass parallel.tensor=1"
            )
        return found

    def problems_of_shape(self, layout: Layout) -> list[str]:
        """Those of sizes alone, which a search asks of thousands of layouts."""
        found = [
            f"parallel.tensor={layout.tensor} does not divide model.{key}={size} ({divisors(size, layout.tensor)})"
            for key, size in self.cut_by_tensor().items()
            if size % layout.tensor
        ]
        if self.mixture is not None:
            found += self.mixture.problems(layout, self.dim)
        else:
            found += [
                f"parallel.{axis}={degree}: this {self.family} has no routed experts; pass parallel.{axis}=1"
                for axis in ("expert", "expert_tensor")
                if (degree := getattr(layout, axis)) > 1
            ]
        if self.tied and layout.pipeline > 1:
            found.append(
                f"parallel.pipeline={layout.pipeline} would part model.tie_word_embeddings=true over two stages; "
                "pass parallel.pipeline=1"
            )
        return found

    def without_role(self) -> list[str]:
        """Modules with a weight that no role tells how to cut; routed experts need none, they have their own grid."""
        modules = dict.fromkeys(weight.name.rpartition(".")[0] for weight in self.weights() if not weight.experts)
        return [module for module in modules if not any(fnmatchcase(module, pattern) for pattern in self.roles)]

    def warnings(self) -> list[str]:
        """Remarks that belong beside this run's figures."""
        return [] if self.mixture is None else self.mixture.warnings()

    @property
    def mixture(self) -> "MixtureOfExperts | None":
        """The experts among which tokens choose; None where all weights meet all tokens."""
        return None

    @property
    def routed(self) -> bool:
        """Whether the model has routed experts: also where every token meets all of them (top_k = their number)."""
        return any(weight.experts for weight in self.weights())

    def counts(self, seq_len: int) -> Counts:
        """Parameters and flops per token of the whole model, before any cut."""
        return count(self.weights(), self.attention_width(), seq_len)


class GroupedQueryConfig(ModelConfig):
    """A family whose query heads share key and value heads (arXiv 2305.13245), and whose head may be the embedding."""

    n_kv_heads: Width
    """Key and value heads; each serves n_heads / n_kv_heads query heads."""
    tie_word_embeddings: bool
    """True: the output matrix is the embedding."""

    @field_validator("n_kv_heads")
    @classmethod
    def _heads_share(cls, n_kv_heads: int, info: ValidationInfo) -> int:
        n_heads = info.data.get("n_heads")
        if n_heads is not None and n_heads % n_kv_heads:
            raise ValueError(f"{n_kv_heads} does not divide n_heads={n_heads} ({divisors(n_heads, n_kv_heads)})")
        return n_kv_heads

    @property
    def tied(self) -> bool:
        return self.tie_word_embeddings

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads
