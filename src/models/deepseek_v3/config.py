"""The shape of a DeepSeek-V3, or of a V2: conf/model/deepseek_v3_*.yaml hold the numbers."""

from math import log, sqrt
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationInfo, field_validator

from src.config.base import Config
from src.models.accounting import Saved, Slice, Weight
from src.models.base import Layout, ModelConfig, divisors
from src.models.deepseek_v3.saved import saved_by_block
from src.models.moe.config import MixtureOfExperts, aligned

if TYPE_CHECKING:
    from src.models.deepseek_v3.model import DeepseekV3


class Yarn(Config):
    """YaRN's stretch of the context: see src/models/rope.py."""

    factor: float = Field(ge=1)
    original: PositiveInt
    beta_fast: PositiveFloat
    beta_slow: PositiveFloat
    mscale: PositiveFloat

    @field_validator("beta_slow")
    @classmethod
    def _below_fast(cls, beta_slow: float, info: ValidationInfo) -> float:
        beta_fast = info.data.get("beta_fast")
        if beta_fast is not None and beta_slow >= beta_fast:
            raise ValueError(f"{beta_slow} must be smaller than beta_fast={beta_fast}")
        return beta_slow

    @property
    def sharpening(self) -> float:
        """What attention scores are multiplied with, besides 1 / sqrt(width)."""
        return (0.1 * self.mscale * log(self.factor) + 1.0) ** 2


class DeepseekV3Config(ModelConfig):
    """Every number of a DeepSeek-V3; `build` makes the module."""

    family: ClassVar[str] = "deepseek_v3"

    ffn_dim: PositiveInt
    n_dense_layers: NonNegativeInt
    q_lora_rank: PositiveInt | None
    kv_lora_rank: PositiveInt
    qk_nope_head_dim: PositiveInt
    qk_rope_head_dim: PositiveInt
    v_head_dim: PositiveInt
    rope_theta: PositiveFloat
    rope_scaling: Yarn | None
    norm_eps: PositiveFloat
    moe: MixtureOfExperts

    @field_validator("dim")
    @classmethod
    def _rows_are_aligned(cls, dim: int) -> int:
        return aligned(dim)

    @field_validator("n_dense_layers")
    @classmethod
    def _dense_layers_exist(cls, n_dense_layers: int, info: ValidationInfo) -> int:
        n_layers = info.data.get("n_layers")
        if n_layers is not None and n_dense_layers > n_layers:
            raise ValueError(f"{n_dense_layers} is more than n_layers={n_layers}; at most {n_layers}")
        return n_dense_layers

    @field_validator("qk_rope_head_dim")
    @classmethod
    def _pairs(cls, qk_rope_head_dim: int) -> int:
        if qk_rope_head_dim % 2:
            raise ValueError(
                f"{qk_rope_head_dim} is odd; the rotary embedding turns pairs: {qk_rope_head_dim + 1} would do"
            )
        return qk_rope_head_dim

    @field_validator("moe")
    @classmethod
    def _unbalanced_layers_have_experts(cls, moe: MixtureOfExperts, info: ValidationInfo) -> MixtureOfExperts:
        first, end = info.data.get("n_dense_layers"), info.data.get("n_layers")
        if first is not None and end is not None:
            wrong = [layer for layer in moe.unbalanced_layers if not first <= layer < end]
            if wrong:
                raise ValueError(f"unbalanced_layers={wrong}: layers with experts are {first} to {end - 1}")
        return moe

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key: a part without position, then a part that turns."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """Of the attention scores."""
        sharpening = 1.0 if self.rope_scaling is None else self.rope_scaling.sharpening
        return sharpening / sqrt(self.qk_head_dim)

    def build(self) -> "DeepseekV3":
        from src.models.deepseek_v3.model import DeepseekV3

        return DeepseekV3(self)

    def weights(self) -> tuple[Weight, ...]:
        embedding = Weight(
            "tok_embeddings.weight",
            (self.vocab_size, self.dim),
            unit="embedding",
            tensor_dim=0,
            embedding=True,
            multiplications=0,
        )
        blocks = tuple(weight for layer in range(self.n_layers) for weight in self._block(layer))
        head = Weight("output.weight", (self.vocab_size, self.dim), unit="head", tensor_dim=0)
        return (embedding, *blocks, Weight("norm.weight", (self.dim,), unit="head"), head)

    def _block(self, layer: int) -> tuple[Weight, ...]:
        unit = f"layers.{layer}"
        norms = tuple(Weight(f"{unit}.{name}.weight", (self.dim,), unit) for name in ("attention_norm", "ffn_norm"))
        if layer < self.n_dense_layers:
            return (*norms, *self._attention(unit), *self._swiglu(unit, "feed_forward", self.ffn_dim))
        return (*norms, *self._attention(unit), *self._experts(unit))

    def _attention(self, unit: str) -> tuple[Weight, ...]:
        queries, keys = self.n_heads * self.qk_head_dim, self.n_heads * (self.qk_nope_head_dim + self.v_head_dim)
        latent, rank = self.kv_lora_rank, self.q_lora_rank
        whole = {"wkv_a": (latent + self.qk_rope_head_dim, self.dim), "kv_norm": (latent,)}
        columns = {"wkv_b": (keys, latent)}
        if rank is None:
            columns["wq"] = (queries, self.dim)
        else:
            whole |= {"wq_a": (rank, self.dim), "q_norm": (rank,)}
            columns["wq_b"] = (queries, rank)
        result = (self.dim, self.n_heads * self.v_head_dim)
        return (
            *(Weight(f"{unit}.attention.{name}.weight", shape, unit) for name, shape in whole.items()),
            *(Weight(f"{unit}.attention.{name}.weight", shape, unit, tensor_dim=0) for name, shape in columns.items()),
            Weight(f"{unit}.attention.wo.weight", result, unit, tensor_dim=1),
        )

    def _swiglu(self, unit: str, name: str, hidden: int) -> tuple[Weight, ...]:
        return (
            Weight(f"{unit}.{name}.w1.weight", (hidden, self.dim), unit, tensor_dim=0),
            Weight(f"{unit}.{name}.w2.weight", (self.dim, hidden), unit, tensor_dim=1),
            Weight(f"{unit}.{name}.w3.weight", (hidden, self.dim), unit, tensor_dim=0),
        )

    def _experts(self, unit: str) -> tuple[Weight, ...]:
        moe = self.moe
        share = moe.top_k / moe.n_experts
        up, down = (moe.n_experts, moe.hidden_dim, self.dim), (moe.n_experts, self.dim, moe.hidden_dim)
        shared = self._swiglu(unit, "moe.shared_experts", moe.shared_dim) if moe.n_shared else ()
        return (
            Weight(f"{unit}.moe.router.gate.weight", (moe.n_experts, self.dim), unit),
            Weight(f"{unit}.moe.experts.w1", up, unit, tensor_dim=1, active=share, experts=True),
            Weight(f"{unit}.moe.experts.w2", down, unit, tensor_dim=2, active=share, experts=True),
            Weight(f"{unit}.moe.experts.w3", up, unit, tensor_dim=1, active=share, experts=True),
            *shared,
        )

    @property
    def head_widths(self) -> tuple[int, int]:
        return self.qk_head_dim, self.v_head_dim

    @property
    def mixture(self) -> MixtureOfExperts:
        return self.moe

    def saved_by_block(self, cut: Slice) -> Saved:
        return saved_by_block(self, cut)

    def warnings(self) -> list[str]:
        if not self.moe.forced_balance:
            return []
        return [
            "model.moe.forced_balance=true: experts in turn, not the best ones; its figures are of no real training"
        ]

    def problems(self, layout: Layout) -> list[str]:
        cut = {"n_heads": self.n_heads, "vocab_size": self.vocab_size, "ffn_dim": self.ffn_dim}
        cut |= {"moe.n_shared * model.moe.hidden_dim": self.moe.shared_dim} if self.moe.n_shared else {}
        indivisible = [
            f"parallel.tensor={layout.tensor} does not divide model.{key}={size} ({divisors(size, layout.tensor)})"
            for key, size in cut.items()
            if size % layout.tensor
        ]
        return [*indivisible, *self.moe.problems(layout, self.dim)]
