"""Qwen3 as transformers stores it: names, the order of rotary rows, config.json (model_type qwen3 and qwen3_moe)."""

from collections.abc import Iterator
from typing import Any

from src.models.accounting import Weight
from src.models.qwen3.config import Qwen3Config
from src.models.stored import (
    MATRIX,
    MISSING,
    OUTSIDE,
    WINDOWS,
    ConfigReader,
    Stored,
    by_block,
    experts,
    rope_keys,
    router_bias,
)

ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}

IN_BLOCK = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "moe.router.gate.weight": "mlp.gate.weight",
    **{f"feed_forward.{here}.weight": f"mlp.{there}.weight" for here, there in MATRIX.items()},
}
# A norm over one head has an element for each rotary row of it.
ONE_HEAD = {"attention.q_norm.weight": 1, "attention.k_norm.weight": 1}


def kind(config: Qwen3Config) -> str:
    """The model_type of a config.json."""
    return "qwen3" if config.moe is None else "qwen3_moe"


def stored(config: Qwen3Config) -> Iterator[Stored]:
    """Every tensor of the model; a tied head is the embedding and has no key of its own."""
    heads = {"attention.wq.weight": config.n_heads, "attention.wk.weight": config.n_kv_heads} | ONE_HEAD

    def inside(weight: Weight, block: str, inner: str) -> Stored:
        if weight.experts:
            return experts(weight, block, inner)
        linear = len(weight.shape) == 2 and inner != "moe.router.gate.weight"
        return Stored(weight.name, weight.shape, (f"{block}.{IN_BLOCK[inner]}",), heads=heads.get(inner), linear=linear)

    yield from by_block(config.weights(), inside)
    if config.moe is not None:  # transformers has no such biases
        for layer in range(config.n_layers):
            yield router_bias(f"layers.{layer}", layer, config.moe.num_experts, optional=True)


def skipped(config: Qwen3Config, key: str, _facts: ConfigReader) -> str | None:
    """Why a key of a checkpoint is not read; None: it is unexpected."""
    return "a head that is the embedding" if config.tied and key == OUTSIDE["output.weight"] else None


def read(facts: ConfigReader) -> dict[str, Any]:
    """The keys of Qwen3Config that a config.json says."""
    facts.only("attention_bias", legal=(False,))
    facts.only("hidden_act", legal=("silu",))
    facts.only("use_sliding_window", legal=(False,), needs=WINDOWS)
    routed = facts.get("model_type") == "qwen3_moe"
    facts.seen |= {"sliding_window", "max_window_layers"}  # say nothing without a window
    kinds = facts.values.get("layer_types")
    full = ["full_attention"] * (len(kinds) if isinstance(kinds, list) else 0)
    windows = isinstance(kinds, list) and "sliding_attention" in kinds
    facts.only("layer_types", legal=(None, full), needs=WINDOWS if windows else None)
    theta, _, _ = facts.rope(10000.0, "default")
    dim, heads = facts.whole("hidden_size"), facts.whole("num_attention_heads")
    width = facts.whole("intermediate_size", 1 if routed else MISSING)
    return {
        "dim": dim,
        "n_layers": facts.whole("num_hidden_layers"),
        "n_heads": heads,
        "n_kv_heads": facts.whole_or_null("num_key_value_heads") or heads,
        "head_dim": facts.whole("head_dim", max(dim // heads, 1) if routed else 128),
        "ffn_dim": None if routed else width,
        "vocab_size": facts.whole("vocab_size"),
        "max_seq_len": facts.whole("max_position_embeddings", 32768),
        "rope_theta": theta,
        "norm_eps": facts.number("rms_norm_eps", 1e-6),
        "tie_word_embeddings": facts.only("tie_word_embeddings", legal=(False, True)),
        "moe": _mixture(facts) if routed else None,
    }


def _mixture(facts: ConfigReader) -> dict[str, Any]:
    facts.only("decoder_sparse_step", legal=(1,))
    facts.only("mlp_only_layers", legal=([],))
    count = facts.whole("num_experts", facts.get("num_local_experts", 128))
    facts.only("num_local_experts", legal=(None, count))  # transformers' other name of it
    return {
        "num_experts": count,
        "num_expert_groups": 1,
        "num_limited_groups": 1,
        "top_k": facts.whole("num_experts_per_tok", 8),
        "num_shared_experts": 0,
        "hidden_dim": facts.whole("moe_intermediate_size", 768),
        "score_func": "softmax",
        "group_score": "max",
        "route_norm": facts.only("norm_topk_prob", legal=(False, True)),
        "route_scale": 1.0,
        "score_before_experts": False,
        "load_balance_coeff": None,  # there are no biases to balance with
    }


def write(config: Qwen3Config) -> dict[str, Any]:
    """config.json without what only a run knows (token ids, dtype)."""
    moe, width = config.moe, config.ffn_dim
    more: dict[str, Any] = {
        "layer_types": ["full_attention"] * config.n_layers,
        "max_window_layers": config.n_layers,
    }
    if moe is not None:
        width = moe.top_k * moe.hidden_dim  # of feed forwards that no layer has; released files say this one
        more = {
            "num_experts": moe.num_experts,
            "num_local_experts": moe.num_experts,  # as transformers 5 calls them
            "num_experts_per_tok": moe.top_k,
            "moe_intermediate_size": moe.hidden_dim,
            "norm_topk_prob": moe.route_norm,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
        }
    return {
        "architectures": [ARCHITECTURES[kind(config)]],
        "model_type": kind(config),
        "hidden_size": config.dim,
        "intermediate_size": width,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        **rope_keys(config.rope_theta, None),
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
        **more,
    }


def problems(config: Qwen3Config) -> list[str]:
    """Differences to what transformers has: key, value, what it has instead; empty when there are none."""
    moe, found = config.moe, []
    if config.fixed_block is not None:
        found.append(f"model.fixed_block={config.fixed_block}: transformers' qwen3 attends to all that came before")
    if moe is None:
        return found
    if moe.score_func != "softmax":
        found.append(f"model.moe.score_func={moe.score_func}: transformers' qwen3_moe has softmax")
    if moe.num_limited_groups < moe.num_expert_groups:
        found.append(
            f"model.moe.num_limited_groups={moe.num_limited_groups}: transformers' qwen3_moe chooses among all experts"
        )
    if moe.route_scale != 1.0:
        found.append(f"model.moe.route_scale={moe.route_scale}: transformers' qwen3_moe has 1.0")
    if moe.score_before_experts:
        found.append("model.moe.score_before_experts=true: transformers' qwen3_moe weighs what leaves an expert")
    if moe.force_load_balance:
        found.append("model.moe.force_load_balance=true: transformers' qwen3_moe takes the best experts")
    return found
