"""Bytes that a block of a DeepSeek-V3 keeps for its backward: see `Saved`.

Over tensor ranks the stream is cut by sequence, and heads and features are; the latents, and what a norm makes for the
matrices behind it, are on every rank.
"""

from typing import TYPE_CHECKING

from src.models.accounting import Saved, Slice

if TYPE_CHECKING:
    from src.models.deepseek_v3.config import DeepseekV3Config

INDEX_BYTES = 8
STATISTIC_BYTES = 4


def saved_by_block(config: "DeepseekV3Config", cut: Slice) -> Saved:
    """The mean over dense blocks and those with experts, right when times n_layers; `working`: the larger one's."""
    dense, experts = config.n_dense_layers, config.n_layers - config.n_dense_layers
    attention = _attention(config, cut)
    first = cut.element_bytes * config.dim / cut.tensor  # the block's input
    once = STATISTIC_BYTES * config.moe.n_experts * experts // config.n_layers  # where each expert's rows end

    def mean(of_dense: float, of_experts: float) -> int:
        return int(cut.tokens * (first + (dense * of_dense + experts * of_experts) / config.n_layers))

    working = max(dense and _dense_working(config, cut), experts and _experts_working(config, cut))
    return Saved(
        whole=mean(attention + _dense(config, cut), attention + _experts(config, cut)) + once,
        input=mean(0, 0),
        selective=mean(_selective(config, cut, dense=True), _selective(config, cut, dense=False)),
        working=int(cut.tokens * (working + 2 * config.dim) * cut.element_bytes),
    )


def _attention(config: "DeepseekV3Config", cut: Slice) -> float:
    """Bytes of a token: norm, latents and what the norms make of them, rotated q and k, v, the result."""
    heads, rank = config.n_heads, config.q_lora_rank or 0
    # v is a part of wkv_b's result and keeps it alive; the latent is a part of wkv_a's.
    latents = 2 * config.kv_lora_rank + config.qk_rope_head_dim + 2 * rank
    wide = 2 * config.qk_head_dim + (config.qk_nope_head_dim + config.v_head_dim) + config.v_head_dim
    # In fp32: one log sum exp for a head, and 1/rms for each norm.
    statistics = (heads + 1) / cut.tensor + (2 if rank else 1)
    return cut.element_bytes * (config.dim + latents + heads * wide / cut.tensor) + STATISTIC_BYTES * statistics


def _swiglu(width: float, cut: Slice) -> float:
    """w1 x, w3 x and their product; eager autograd also keeps silu(w1 x), which a compiler computes again."""
    return cut.element_bytes * (3 if cut.compiled else 4) * width


def _stream(config: "DeepseekV3Config", cut: Slice) -> float:
    """The second norm's input, and 1/rms."""
    return (cut.element_bytes * config.dim + STATISTIC_BYTES) / cut.tensor


def _dense(config: "DeepseekV3Config", cut: Slice) -> float:
    """Bytes of a token: the stream, the norm of it, and the feed forward."""
    norm = cut.element_bytes * config.dim
    return _stream(config, cut) + norm + _swiglu(config.ffn_dim / cut.tensor, cut)


def _experts(config: "DeepseekV3Config", cut: Slice) -> float:
    """Bytes of a token: the stream, the norm of it, the routing, the rows of all its experts, the shared experts."""
    moe = config.moe
    norm = cut.element_bytes * config.dim
    # Where tensor ranks divide the tokens the shared experts put them together again.
    shared = _swiglu(moe.shared_dim / cut.tensor, cut) + (norm if moe.n_shared and cut.mixtures > 1 else 0)
    return _stream(config, cut) + shared + (norm + _routed(config, cut)) / cut.mixtures


def _routed(config: "DeepseekV3Config", cut: Slice) -> float:
    """Bytes of a token that a mixture sees: the routing, and the rows of all its experts."""
    moe, hidden = config.moe, config.moe.hidden_dim / cut.expert_tensor
    normalising = moe.top_k + 1 if moe.normalise else 0
    router = 4 * (moe.n_experts + normalising)
    # Which experts, their order and its inverse; the weight at each place. Rows that travelled were put in order again.
    indices = moe.top_k * ((5 if cut.expert > 1 else 3) * INDEX_BYTES + 4)
    # Beside what a SwiGLU keeps: what the weight multiplies.
    rows = moe.top_k * (cut.element_bytes * config.dim + _swiglu(hidden, cut))
    if not cut.compiled:
        rows += moe.top_k * cut.element_bytes * (config.dim if moe.score_before_experts else hidden)
    return router + indices + rows


def _dense_working(config: "DeepseekV3Config", cut: Slice) -> float:
    """Elements of a token: gradients of w1 x, w3 x and their product."""
    return 3 * config.ffn_dim / cut.tensor


def _experts_working(config: "DeepseekV3Config", cut: Slice) -> float:
    """The same for every expert of a token, and the gradients of what enters and leaves them, also on its way."""
    moe, ends = config.moe, 4 if cut.expert > 1 else 2
    routed = moe.top_k * (3 * moe.hidden_dim / cut.expert_tensor + ends * config.dim)
    return routed / cut.mixtures + 3 * moe.shared_dim / cut.tensor


def _selective(config: "DeepseekV3Config", cut: Slice, *, dense: bool) -> float:
    """Bytes of a token: every second plain matrix product from the first on, those of routed experts, attention's
    result, what was routed.
    """
    moe, tensor, mixtures = config.moe, cut.tensor, cut.mixtures
    queries, keys = config.n_heads * config.qk_head_dim, config.n_heads * (config.qk_nope_head_dim + config.v_head_dim)
    widths = [queries / tensor] if config.q_lora_rank is None else [config.q_lora_rank, queries / tensor]
    widths += [config.kv_lora_rank + config.qk_rope_head_dim, keys / tensor, config.dim]
    if dense:
        widths += [config.ffn_dim / tensor, config.ffn_dim / tensor, config.dim]
    else:
        widths += [2 * moe.n_experts / mixtures]  # in fp32
        widths += [moe.shared_dim / tensor, moe.shared_dim / tensor, config.dim] if moe.n_shared else []
    # A compiler drops what the backward does not read: results of w2, the scores of what was chosen.
    kept = widths[:-1:2] if cut.compiled else widths[::2]
    hidden = moe.hidden_dim / cut.expert_tensor
    rows = 0 if dense else moe.top_k * (2 * hidden + (0 if cut.compiled else config.dim)) / mixtures
    routed = 0 if dense else moe.top_k * (INDEX_BYTES + (0 if cut.compiled else 4)) / mixtures
    if cut.expert > 1 and not dense:
        # What travels is kept, with its order, and so are the stream and its norm in front of it.
        rows += config.dim * (1 / tensor + (1 + moe.top_k) / mixtures)
        routed += moe.top_k * (4 * INDEX_BYTES + 4) / mixtures
    core = (cut.element_bytes * config.n_heads * config.v_head_dim + STATISTIC_BYTES * config.n_heads) / tensor
    return cut.element_bytes * (sum(kept) + rows) + core + routed
