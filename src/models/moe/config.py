"""Config of a mixture of experts (model.moe): experts, router, load balancing. moe.py builds the module."""

from typing import Annotated, Literal

from pydantic import Strict, ValidationInfo, field_validator

from src.config.base import Config
from src.config.bounds import CountFromZero, LearningRate, Scale, Width
from src.errors import divisors
from src.models.accounting import RankGrid, Weight, swiglu

# The grouped matrix product reads 16 bytes at a time: 8 numbers of bf16.
WIDTH_MULTIPLE = 8


class MixtureOfExperts(Config):
    """A router, many small SwiGLUs of which each token meets a few, and one SwiGLU that all tokens meet."""

    num_experts: Width
    """Routed experts of a layer."""
    num_expert_groups: Width
    """Groups of neighbouring experts; 1: no groups."""
    num_limited_groups: Width
    """Groups with the best score, from which alone a token's experts are taken."""
    top_k: Width
    """Routed experts of one token."""
    num_shared_experts: CountFromZero
    """Width, in experts, of the SwiGLU that all tokens meet; 0: none."""
    hidden_dim: Width
    """Width of one expert."""
    score_func: Literal["softmax", "sigmoid"]
    """Of the router's logits; softmax: over all experts (V2, Qwen3); sigmoid: of each (V3)."""
    group_score: Literal["top2sum", "max"]
    """Score of a group; top2sum: its two best experts added up (V3); max: its best (V2)."""
    route_norm: bool
    """True: a token's weights add up to route_scale (norm_topk_prob)."""
    route_scale: Scale
    """Factor on the results of routed experts."""
    score_before_experts: bool
    """True: weights multiply what enters an expert; false: what leaves it."""
    load_balance_coeff: LearningRate | None
    """Step of the biases that keep loads equal (arXiv 2408.15664); null: no balancing."""
    unbalanced_layers: Annotated[tuple[CountFromZero, ...], Strict(strict=False)]
    """Numbers of layers whose biases stay as they are."""
    force_load_balance: bool
    """True: experts in turn instead of the best ones; for benchmarks, label them so."""

    @field_validator("num_expert_groups")
    @classmethod
    def _groups_are_equal(cls, num_expert_groups: int, info: ValidationInfo) -> int:
        num_experts = info.data.get("num_experts")
        if num_experts is not None and num_experts % num_expert_groups:
            legal = divisors(num_experts, num_expert_groups)
            raise ValueError(f"{num_expert_groups} does not divide num_experts={num_experts} ({legal})")
        return num_expert_groups

    @field_validator("num_limited_groups")
    @classmethod
    def _keeps_what_there_is(cls, num_limited_groups: int, info: ValidationInfo) -> int:
        num_expert_groups = info.data.get("num_expert_groups")
        if num_expert_groups is not None and num_limited_groups > num_expert_groups:
            groups = num_expert_groups
            raise ValueError(f"{num_limited_groups} is more than num_expert_groups={groups}; at most {groups}")
        return num_limited_groups

    @field_validator("top_k")
    @classmethod
    def _enough_to_choose_from(cls, top_k: int, info: ValidationInfo) -> int:
        num_experts, groups, kept = (
            info.data.get(key) for key in ("num_experts", "num_expert_groups", "num_limited_groups")
        )
        if num_experts and groups and kept and top_k > (left := num_experts // groups * kept):
            raise ValueError(f"{top_k} is more than the {left} experts of num_limited_groups={kept}; at most {left}")
        return top_k

    @field_validator("hidden_dim")
    @classmethod
    def _rows_are_aligned(cls, hidden_dim: int) -> int:
        return aligned(hidden_dim)

    @field_validator("group_score")
    @classmethod
    def _two_in_a_group(cls, group_score: str, info: ValidationInfo) -> str:
        num_experts, groups = info.data.get("num_experts"), info.data.get("num_expert_groups")
        if group_score == "top2sum" and num_experts and groups and groups > 1 and num_experts // groups < 2:
            raise ValueError(
                f"top2sum needs two experts in each of num_expert_groups={groups}; group_score=max does with one"
            )
        return group_score

    def weights(self, unit: str, dim: int) -> tuple[Weight, ...]:
        """Parameters of the mixture in block `unit`, between vectors of `dim` features."""
        share = self.top_k / self.num_experts
        up, down = (self.num_experts, self.hidden_dim, dim), (self.num_experts, dim, self.hidden_dim)
        return (
            Weight(f"{unit}.moe.router.gate.weight", (self.num_experts, dim), unit),
            Weight(f"{unit}.moe.experts.w1", up, unit, tensor_dim=1, active=share, experts=True),
            Weight(f"{unit}.moe.experts.w2", down, unit, tensor_dim=2, active=share, experts=True),
            Weight(f"{unit}.moe.experts.w3", up, unit, tensor_dim=1, active=share, experts=True),
            *(swiglu(unit, "moe.shared_experts", dim, self.shared_dim) if self.num_shared_experts else ()),
        )

    def warnings(self) -> list[str]:
        """Remarks that belong beside this run's figures."""
        if not self.force_load_balance:
            return []
        return [
            "model.moe.force_load_balance=true: experts in turn, not the best ones; its figures are of no real training"
        ]

    def problems(self, grid: RankGrid, dim: int) -> list[str]:
        """Why experts between vectors of `dim` features cannot lie on these ranks."""
        found = []
        if self.num_experts % grid.expert:
            legal = divisors(self.num_experts, grid.expert)
            found.append(
                f"parallel.expert={grid.expert} does not divide model.moe.num_experts={self.num_experts} ({legal})"
            )
        width, remainder = divmod(self.hidden_dim, grid.expert_tensor)
        if remainder or width % WIDTH_MULTIPLE:
            legal = divisors(self.hidden_dim // WIDTH_MULTIPLE, grid.expert_tensor)
            found.append(
                f"parallel.expert_tensor={grid.expert_tensor} cuts model.moe.hidden_dim={self.hidden_dim} into parts "
                f"that are no multiples of {WIDTH_MULTIPLE} ({legal})"
            )
        if not found and grid.cuts_inside(self.num_experts) and (width % grid.expert_shard or dim % grid.expert_shard):
            found.append(
                f"parallel.shard * context * tensor / (expert * expert_tensor) is {grid.expert_shard}: FSDP cannot "
                f"deal {self.num_experts // grid.expert} experts out to as many ranks, nor cut {width} x {dim} "
                "features so often; pass another parallel.expert, or more ranks as parallel.replicate"
            )
        return found

    @property
    def shared_dim(self) -> int:
        """Width of the SwiGLU that every token meets; 0: there is none."""
        return self.num_shared_experts * self.hidden_dim


def aligned(width: int) -> int:
    """`width` itself, or ValueError where a grouped matrix product cannot read rows of it."""
    if width % WIDTH_MULTIPLE:
        lower = width // WIDTH_MULTIPLE * WIDTH_MULTIPLE
        words = f"{lower} or {lower + WIDTH_MULTIPLE}" if lower else f"{WIDTH_MULTIPLE}"
        raise ValueError(
            f"{width} is no multiple of {WIDTH_MULTIPLE}, as grouped matrix products need ({words} would do)"
        )
    return width
