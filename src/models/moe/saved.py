"""Activation memory of a mixture of experts: bytes of one token on one rank kept for the backward pass."""

from src.models.accounting import STATISTIC_BYTES, Slice, swiglu_bytes
from src.models.moe.config import MixtureOfExperts

INDEX_BYTES = 8


def mixture_bytes(moe: MixtureOfExperts, dim: int, cut: Slice) -> float:
    """What the norm in front makes, the routing, the rows of all experts of a token, and the shared experts."""
    norm = cut.element_bytes * dim
    # Where tensor ranks divide the tokens the shared experts put them together again.
    shared = swiglu_bytes(moe.shared_dim / cut.tensor, cut) + (
        norm if moe.num_shared_experts and cut.mixtures > 1 else 0
    )
    return shared + (norm + _routed(moe, dim, cut)) / cut.mixtures


def ends_bytes(moe: MixtureOfExperts) -> int:
    """Bytes of the offsets at which experts' rows end: once for all tokens."""
    return STATISTIC_BYTES * moe.num_experts


def _routed(moe: MixtureOfExperts, dim: int, cut: Slice) -> float:
    """Of a token that a mixture sees: the routing, and the rows of all its experts."""
    hidden = moe.hidden_dim / cut.expert_tensor
    normalising = moe.top_k + 1 if moe.route_norm else 0
    router = 4 * (moe.num_experts + normalising)
    # Which experts, their order and its inverse; the weight at each place. Rows that travelled were put in order again.
    indices = moe.top_k * ((5 if cut.expert > 1 else 3) * INDEX_BYTES + 4)
    # Beside what a SwiGLU keeps: what the weight multiplies.
    rows = moe.top_k * (cut.element_bytes * dim + swiglu_bytes(hidden, cut))
    if not cut.compiled:
        rows += moe.top_k * cut.element_bytes * (dim if moe.score_before_experts else hidden)
    return router + indices + rows


def working_elements(moe: MixtureOfExperts, dim: int, cut: Slice) -> float:
    """Gradients of w1 x, w3 x and their product of every expert of a token, and of what enters and leaves them, also on
    its way.
    """
    ends = 4 if cut.expert > 1 else 2
    routed = moe.top_k * (3 * moe.hidden_dim / cut.expert_tensor + ends * dim)
    return routed / cut.mixtures + 3 * moe.shared_dim / cut.tensor


def router_width(moe: MixtureOfExperts, cut: Slice) -> float:
    """The router's logits, which are fp32, in elements of the compute dtype."""
    return 4 / cut.element_bytes * moe.num_experts / cut.mixtures


def selective_bytes(moe: MixtureOfExperts, dim: int, cut: Slice) -> float:
    """What selective recompute keeps: products of routed experts and the choice; where tokens travel, what travels."""
    hidden, compiled = moe.hidden_dim / cut.expert_tensor, cut.compiled
    rows = moe.top_k * (2 * hidden + (0 if compiled else dim)) / cut.mixtures
    routed = moe.top_k * (INDEX_BYTES + (0 if compiled else 4)) / cut.mixtures
    if cut.expert > 1:  # with its order, and the stream and its norm in front of it
        rows += dim * (1 / cut.tensor + (1 + moe.top_k) / cut.mixtures)
        routed += moe.top_k * (4 * INDEX_BYTES + 4) / cut.mixtures
    return cut.element_bytes * rows + routed
