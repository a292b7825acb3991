"""The shape of a Qwen3, dense or with experts: conf/model/qwen3_*.yaml hold the numbers."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import ValidationInfo, field_validator, model_validator

from src.config.bounds import RopeTheta, Width
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
from src.models.base import GroupedQueryConfig
from src.models.moe.config import WIDTH_MULTIPLE, MixtureOfExperts
from src.models.moe.saved import ends_bytes, mixture_bytes, router_width, selective_bytes, working_elements

if TYPE_CHECKING:
    from src.models.qwen3.model import Qwen3


class Qwen3Config(GroupedQueryConfig):
    """Every number of a Qwen3; `build` makes the module. Every layer has a feed forward, or every layer has experts."""

    family: ClassVar[str] = "qwen3"
    roles: ClassVar[Mapping[str, str]] = {
        "tok_embeddings": "embedding",
        "layers.*.attention_norm": "sequence_parallel",
        "layers.*.attention": "gather_sequence",
        "layers.*.attention.wq": "colwise",
        "layers.*.attention.wk": "colwise",
        "layers.*.attention.wv": "colwise",
        "layers.*.attention.q_norm": "replicated",
        "layers.*.attention.k_norm": "replicated",
        "layers.*.attention.wo": "rowwise",
        "layers.*.ffn_norm": "sequence_parallel",
        "layers.*.feed_forward": "gather_sequence",
        "layers.*.feed_forward.w1": "colwise",
        "layers.*.feed_forward.w3": "colwise",
        "layers.*.feed_forward.w2": "rowwise",
        "layers.*.moe": "moe",
        "layers.*.moe.router.gate": "replicated",
        "norm": "sequence_parallel",
        "output": "vocabulary",
    }

    head_dim: Width
    """Elements of one head; n_heads * head_dim need not be dim."""
    ffn_dim: Width | None
    """Width of every feed forward; null: every layer has experts."""
    rope_theta: RopeTheta
    """Base of the rotary angles."""
    moe: MixtureOfExperts | None
    """Experts of every layer; null: every layer has a feed forward; qwen3_moe_debug has the keys."""

    @field_validator("head_dim")
    @classmethod
    def _pairs(cls, head_dim: int) -> int:
        if head_dim % 2:
            raise ValueError(f"{head_dim} is odd; the rotary embedding turns pairs: {head_dim + 1} would do")
        return head_dim

    @field_validator("moe")
    @classmethod
    def _no_shared_experts(cls, moe: MixtureOfExperts | None, info: ValidationInfo) -> MixtureOfExperts | None:
        if moe is None:
            return None
        if moe.num_shared_experts:
            raise ValueError(
                f"num_shared_experts={moe.num_shared_experts}: a Qwen3 has no experts that all tokens meet; only 0 does"
            )
        layers, dim = info.data.get("n_layers"), info.data.get("dim")
        if layers is not None and (beyond := [layer for layer in moe.unbalanced_layers if layer >= layers]):
            raise ValueError(f"unbalanced_layers={beyond}: layers with experts are 0 to {layers - 1}")
        if dim is not None and dim % WIDTH_MULTIPLE:
            raise ValueError(f"dim={dim} is no multiple of {WIDTH_MULTIPLE}, as grouped matrix products need")
        return moe

    @model_validator(mode="after")
    def _one_kind_of_layer(self) -> "Qwen3Config":
        if (self.ffn_dim is None) == (self.moe is None):
            both = "neither" if self.moe is None else "both"
            raise ValueError(
                f"ffn_dim and moe: {both} given; a dense Qwen3 has moe=null, one with experts ffn_dim=null"
            )
        return self

    def build(self) -> "Qwen3":
        from src.models.qwen3.model import Qwen3

        return Qwen3(self)

    @property
    def head_widths(self) -> tuple[int, int]:
        return self.head_dim, self.head_dim

    @property
    def query_weight(self) -> str:
        return "q_norm"  # behind the matrix

    @property
    def mixture(self) -> MixtureOfExperts | None:
        return self.moe

    def weights(self) -> tuple[Weight, ...]:
        first, last = around_blocks(self.vocab_size, self.dim, tied=self.tied)
        return (first, *(weight for layer in range(self.n_layers) for weight in self._block(f"layers.{layer}")), *last)

    def _block(self, unit: str) -> tuple[Weight, ...]:
        queries, keys = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        columns = {"wq": (queries, self.dim), "wk": (keys, self.dim), "wv": (keys, self.dim)}
        norms = {"attention_norm": self.dim, "attention.q_norm": self.head_dim, "attention.k_norm": self.head_dim}
        attention = (
            *(Weight(f"{unit}.{name}.weight", (size,), unit) for name, size in norms.items()),
            *(Weight(f"{unit}.attention.{name}.weight", shape, unit, tensor_dim=0) for name, shape in columns.items()),
            Weight(f"{unit}.attention.wo.weight", (self.dim, queries), unit, tensor_dim=1),
            Weight(f"{unit}.ffn_norm.weight", (self.dim,), unit),
        )
        if self.moe is not None:
            return (*attention, *self.moe.weights(unit, self.dim))
        assert self.ffn_dim is not None, "a layer has one of the two"
        return (*attention, *swiglu(unit, "feed_forward", self.dim, self.ffn_dim))

    def cut_by_tensor(self) -> dict[str, int]:
        sizes = {"n_heads": self.n_heads, "n_kv_heads": self.n_kv_heads, "vocab_size": self.vocab_size}
        return sizes | ({} if self.ffn_dim is None else {"ffn_dim": self.ffn_dim})

    def saved_by_block(self, cut: Slice) -> SavedActivations:
        queries, keys = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        element, first = cut.element_bytes, self.dim / cut.tensor
        heads = 3 * queries + 3 * keys  # q and k in front of their norms and as they were turned, v, the result
        statistics = STATISTIC_BYTES * (2 * self.n_heads + self.n_kv_heads)  # 1/rms of q and k, log sum exp
        whole = 2 * norm_bytes(self.dim, cut) + element * self.dim + (element * heads + statistics) / cut.tensor
        products = [queries / cut.tensor, keys / cut.tensor, keys / cut.tensor, self.dim]
        kept = element * first + core_bytes(self.n_heads, self.head_dim, cut)
        if self.moe is not None:
            whole += mixture_bytes(self.moe, self.dim, cut)
            once, working = ends_bytes(self.moe), working_elements(self.moe, self.dim, cut)
            kept += product_bytes([*products, router_width(self.moe, cut)], None, cut)
            kept += selective_bytes(self.moe, self.dim, cut)
        else:
            assert self.ffn_dim is not None, "a layer has one of the two"
            hidden = self.ffn_dim / cut.tensor
            whole += element * self.dim + swiglu_bytes(hidden, cut)
            once, working = 0, 3 * hidden  # gradients of w1 x, w3 x and their product
            kept += product_bytes([*products, hidden, hidden], self.dim, cut)
        return SavedActivations(
            whole=int(cut.tokens * whole) + once,
            input=int(cut.tokens * element * first),
            selective=int(cut.tokens * kept),
            working=int(cut.tokens * (working + first + self.dim) * element),
        )
