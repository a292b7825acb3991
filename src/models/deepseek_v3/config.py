"""The shape of a DeepSeek-V3, or of a V2: conf/model/deepseek_v3_*.yaml hold the numbers."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import log, sqrt
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, ValidationInfo, field_validator

from src.config.base import Config
from src.config.bounds import CountFromZero, NormEpsilon, RopeTheta, Scale, Tokens, Width
from src.models.accounting import (
    STATISTIC_BYTES,
    SavedActivations,
    Slice,
    Weight,
    around_blocks,
    core_bytes,
    norm_bytes,
    product_bytes,
    swiglu,
    swiglu_bytes,
)
from src.models.base import ModelConfig
from src.models.moe.config import MixtureOfExperts, aligned
from src.models.moe.saved import ends_bytes, mixture_bytes, router_width, selective_bytes, working_elements
from src.models.mtp.config import MultiTokenPrediction

if TYPE_CHECKING:
    from src.models.deepseek_v3.model import DeepseekV3


class Yarn(Config):
    """YaRN's stretch of the context: see src/models/rope.py."""

    factor: float = Field(ge=1)
    """By how much the context is stretched."""
    original: Tokens
    """Tokens of the context before that."""
    beta_fast: Scale
    """Turns in `original` tokens; pairs with more stay as they are."""
    beta_slow: Scale
    """Turns in `original` tokens; pairs with fewer are slowed by factor; those between are blended."""
    mscale: Annotated[float, Field(ge=0, le=1e6)]
    """Of (0.1 mscale ln(factor) + 1)^2, the factor on attention scores; 0: none."""
    attention_factor: Scale
    """Factor on the rotated part of queries and keys; 1: none."""

    @field_validator("beta_slow")
    @classmethod
    def _below_fast(cls, beta_slow: float, info: ValidationInfo) -> float:
        beta_fast = info.data.get("beta_fast")
        if beta_fast is not None and beta_slow > beta_fast:
            raise ValueError(f"{beta_slow} is more than beta_fast={beta_fast}; at most {beta_fast}")
        return beta_slow

    @property
    def sharpening(self) -> float:
        """YaRN's factor on attention scores, besides 1 / sqrt(width)."""
        return (0.1 * self.mscale * log(self.factor) + 1.0) ** 2


# How tensor parallelism cuts the modules of a block.
BLOCK_ROLES: Mapping[str, str] = {
    "attention_norm": "sequence_parallel",
    "attention": "gather_sequence_local",
    "attention.wq": "colwise_local",
    "attention.wq_a": "replicated",
    "attention.q_norm": "replicated",
    "attention.wq_b": "colwise_local",
    "attention.wkv_a": "replicated",
    "attention.kv_norm": "replicated",
    "attention.wkv_b": "colwise_local",
    "attention.wo": "rowwise_local",
    "ffn_norm": "sequence_parallel",
    "feed_forward": "gather_sequence_local",
    "feed_forward.w1": "colwise_local",
    "feed_forward.w3": "colwise_local",
    "feed_forward.w2": "rowwise_local",
    "moe": "moe",
    "moe.router.gate": "replicated",
    "moe.shared_experts": "shared_experts",
    "moe.shared_experts.w1": "colwise_local",
    "moe.shared_experts.w3": "colwise_local",
    "moe.shared_experts.w2": "shared_experts_rowwise",
}


class DeepseekV3Config(ModelConfig):
    """Every number of a DeepSeek-V3; `build` makes the module."""

    family: ClassVar[str] = "deepseek_v3"
    roles: ClassVar[Mapping[str, str]] = {
        "tok_embeddings": "embedding",
        **{f"layers.*.{name}": role for name, role in BLOCK_ROLES.items()},
        "mtp.*.embedding_norm": "sequence_parallel_local",
        "mtp.*.hidden_norm": "sequence_parallel_local",
        "mtp.*.projection": "replicated",
        **{f"mtp.*.block.{name}": role for name, role in BLOCK_ROLES.items() if not name.startswith("feed_forward")},
        "mtp.*.norm": "sequence_parallel",
        "norm": "sequence_parallel",
        "output": "vocabulary",
    }

    ffn_dim: Width
    """Width of the feed forward of the dense layers."""
    n_dense_layers: CountFromZero
    """First layers, which have no experts; 0: none."""
    q_lora_rank: Width | None
    """Width between the two matrices that make queries; null: one matrix."""
    kv_lora_rank: Width
    """Width of the vector that keys and values of all heads come from."""
    qk_nope_head_dim: Width
    """Elements of a query or key without position."""
    qk_rope_head_dim: Width
    """Elements of a query or key that turn with position."""
    v_head_dim: Width
    """Elements of a value."""
    rope_theta: RopeTheta
    """Base of the rotary angles."""
    rope_scaling: Yarn | None
    """Stretch of the context by YaRN, which released weights need at every length; null: none."""
    latent_norm_eps: NormEpsilon | None
    """Added under the root of the two norms inside of attention; null: norm_eps."""
    mtp: MultiTokenPrediction
    """Multi-token prediction, for training alone; its blocks have experts, and are numbered from n_layers on."""
    moe: MixtureOfExperts
    """Router and experts of the other layers."""

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
        first, end, mtp = (info.data.get(key) for key in ("n_dense_layers", "n_layers", "mtp"))
        if first is not None and end is not None and mtp is not None:
            end += mtp.depths
            wrong = [layer for layer in moe.unbalanced_layers if not first <= layer < end]
            if wrong:
                raise ValueError(f"unbalanced_layers={wrong}: layers with experts are {first} to {end - 1}")
        return moe

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key: a part without position, then a part that turns."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def inner_norm_eps(self) -> float:
        """Added under the root of the norms of latent vectors."""
        return self.norm_eps if self.latent_norm_eps is None else self.latent_norm_eps

    @property
    def softmax_scale(self) -> float:
        """Factor on attention scores before the softmax."""
        sharpening = 1.0 if self.rope_scaling is None else self.rope_scaling.sharpening
        return sharpening / sqrt(self.qk_head_dim)

    def build(self) -> "DeepseekV3":
        from src.models.deepseek_v3.model import DeepseekV3

        return DeepseekV3(self)

    def weights(self) -> tuple[Weight, ...]:
        embedding, (norm, head) = around_blocks(self.vocab_size, self.dim, tied=False)
        return (
            embedding,
            *(weight for layer in range(self.n_layers) for weight in self._block(f"layers.{layer}", layer)),
            *(weight for depth in range(self.mtp.depths) for weight in self._prediction(depth)),
            norm,
            replace(head, multiplications=1 + self.mtp.depths),
        )

    def _prediction(self, depth: int) -> Iterator[Weight]:
        unit = f"mtp.{depth}"
        yield from self.mtp.weights(unit, self.dim)
        for weight in self._block(f"{unit}.block", self.n_layers + depth):
            yield replace(weight, unit=unit)

    def _block(self, unit: str, layer: int) -> tuple[Weight, ...]:
        norms = tuple(Weight(f"{unit}.{name}.weight", (self.dim,), unit) for name in ("attention_norm", "ffn_norm"))
        if layer < self.n_dense_layers:
            return (*norms, *self._attention(unit), *swiglu(unit, "feed_forward", self.dim, self.ffn_dim))
        return (*norms, *self._attention(unit), *self.moe.weights(unit, self.dim))

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

    @property
    def head_widths(self) -> tuple[int, int]:
        return self.qk_head_dim, self.v_head_dim

    @property
    def mixture(self) -> MixtureOfExperts:
        return self.moe

    @property
    def prediction_depths(self) -> int:
        return self.mtp.depths

    @property
    def query_weight(self) -> str:
        return "wq" if self.q_lora_rank is None else "wq_b"

    def logit_rows(self) -> dict[str, tuple[tuple[int, float], ...]]:
        """The turning part of the key is all heads': that of the query has the whole factor."""
        return {
            self.query_weight: ((self.qk_nope_head_dim, 0.5), (self.qk_rope_head_dim, 1.0)),
            "wkv_b": ((self.qk_nope_head_dim, 0.5), (self.v_head_dim, 0.0)),
        }

    def cut_by_tensor(self) -> dict[str, int]:
        sizes = {"n_heads": self.n_heads, "vocab_size": self.vocab_size, "ffn_dim": self.ffn_dim}
        return sizes | (
            {"moe.num_shared_experts * model.moe.hidden_dim": self.moe.shared_dim}
            if self.moe.num_shared_experts
            else {}
        )

    def saved_by_block(self, cut: Slice) -> SavedActivations:
        """The mean over dense blocks and those with experts, right when times their number; `working`: the larger
        one's.
        """
        blocks, moe = self.n_layers + self.mtp.depths, self.moe
        dense, experts = self.n_dense_layers, blocks - self.n_dense_layers
        element, attention = cut.element_bytes, self._attention_bytes(cut) + norm_bytes(self.dim, cut)
        first = element * self.dim / cut.tensor  # the block's input
        once = ends_bytes(moe) * experts // blocks

        def mean(of_dense: float, of_experts: float) -> int:
            return int(cut.tokens * (first + (dense * of_dense + experts * of_experts) / blocks))

        feed_forward = element * self.dim + swiglu_bytes(self.ffn_dim / cut.tensor, cut)
        working = max(
            dense and 3 * self.ffn_dim / cut.tensor,  # gradients of w1 x, w3 x and their product
            experts and working_elements(moe, self.dim, cut),
        )
        return SavedActivations(
            whole=mean(attention + feed_forward, attention + mixture_bytes(moe, self.dim, cut)) + once,
            input=mean(0, 0),
            selective=mean(self._selective(cut, dense=True), self._selective(cut, dense=False)),
            working=int(cut.tokens * (working + 2 * self.dim) * element),
        )

    def _attention_bytes(self, cut: Slice) -> float:
        """Of a token: norm, latents and what the norms make of them, rotated q and k, v, the result."""
        heads, rank = self.n_heads, self.q_lora_rank or 0
        # v is a part of wkv_b's result and keeps it alive; the latent is a part of wkv_a's.
        latents = 2 * self.kv_lora_rank + self.qk_rope_head_dim + 2 * rank
        wide = 2 * self.qk_head_dim + (self.qk_nope_head_dim + self.v_head_dim) + self.v_head_dim
        # One log sum exp for a head, and 1/rms for each norm.
        statistics = (heads + 1) / cut.tensor + (2 if rank else 1)
        return cut.element_bytes * (self.dim + latents + heads * wide / cut.tensor) + STATISTIC_BYTES * statistics

    def _selective(self, cut: Slice, *, dense: bool) -> float:
        """Of a token: every second plain matrix product, those of routed experts, attention's result, the routing."""
        moe, tensor = self.moe, cut.tensor
        queries, keys = self.n_heads * self.qk_head_dim, self.n_heads * (self.qk_nope_head_dim + self.v_head_dim)
        widths = [queries / tensor] if self.q_lora_rank is None else [self.q_lora_rank, queries / tensor]
        widths += [self.kv_lora_rank + self.qk_rope_head_dim, keys / tensor, self.dim]
        last: float | None = self.dim
        if dense:
            widths += [self.ffn_dim / tensor, self.ffn_dim / tensor]
        else:
            widths += [router_width(moe, cut)]
            widths += [moe.shared_dim / tensor, moe.shared_dim / tensor] if moe.num_shared_experts else []
            last = self.dim if moe.num_shared_experts else None
        core = core_bytes(self.n_heads, self.v_head_dim, cut)
        return product_bytes(widths, last, cut) + core + (0 if dense else selective_bytes(moe, self.dim, cut))
