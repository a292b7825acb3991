"""DeepSeek-V3 and V2 as transformers stores them: names, one key for each expert, config.json."""

from collections.abc import Iterator
from dataclasses import replace
from math import isclose, log
from typing import Any

from src.models.accounting import Weight
from src.models.deepseek_v3.config import DeepseekV3Config, Yarn
from src.models.stored import MATRIX, MISSING, WINDOWS, ConfigReader, Stored, by_block, experts, rope_keys, router_bias

# Of what is written; kimi_k2 is read too, a DeepSeek-V3 by another name.
MODEL_TYPES = {"sigmoid": "deepseek_v3", "softmax": "deepseek_v2"}
ARCHITECTURES = {"deepseek_v3": "DeepseekV3ForCausalLM", "deepseek_v2": "DeepseekV2ForCausalLM"}
# transformers and the released code give the two norms inside of attention this eps, whatever rms_norm_eps says.
LATENT_NORM_EPS = 1e-6

IN_BLOCK = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wq_a.weight": "self_attn.q_a_proj.weight",
    "attention.q_norm.weight": "self_attn.q_a_layernorm.weight",
    "attention.wq_b.weight": "self_attn.q_b_proj.weight",
    "attention.wkv_a.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.kv_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attention.wkv_b.weight": "self_attn.kv_b_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "moe.router.gate.weight": "mlp.gate.weight",
    **{f"feed_forward.{here}.weight": f"mlp.{there}.weight" for here, there in MATRIX.items()},
    **{f"moe.shared_experts.{here}.weight": f"mlp.shared_experts.{there}.weight" for here, there in MATRIX.items()},
}
# A module of multi-token prediction is a layer more there.
IN_MODULE = {
    "embedding_norm.weight": "enorm.weight",
    "hidden_norm.weight": "hnorm.weight",
    "projection.weight": "eh_proj.weight",
    "norm.weight": "shared_head.norm.weight",
}
# It has the embedding and the head of the model once more, by these names in the layer.
SHARED = {"tok_embeddings.weight": "embed_tokens.weight", "output.weight": "shared_head.head.weight"}
# Matrices that are never float8 there.
WIDE = ("moe.router.gate.weight", "projection.weight")


def stored(config: DeepseekV3Config) -> Iterator[Stored]:
    """Every tensor of the model: the parameters, and the biases of the routers."""
    depths = range(config.mtp.depths)
    further = [f"model.layers.{config.n_layers + depth}" for depth in depths]
    for each in by_block(config.weights(), _inside, {f"mtp.{depth}": further[depth] for depth in depths}):
        copy = SHARED.get(each.name)
        yield each if copy is None else replace(each, copies=tuple(f"{layer}.{copy}" for layer in further))
    # A router with sigmoid scores always has them there, one with softmax scores never.
    absent = config.moe.score_func == "softmax"
    layers = {f"layers.{layer}": layer for layer in range(config.n_dense_layers, config.n_layers)}
    for unit, layer in (layers | {f"mtp.{depth}.block": config.n_layers + depth for depth in depths}).items():
        yield router_bias(unit, layer, config.moe.num_experts, optional=absent)


def _inside(weight: Weight, block: str, inner: str) -> Stored:
    inner = inner.removeprefix("block.")  # of multi-token prediction, which is a layer there
    if weight.experts:
        return experts(weight, block, inner)
    linear = len(weight.shape) == 2 and inner not in WIDE
    return Stored(weight.name, weight.shape, (f"{block}.{(IN_BLOCK | IN_MODULE)[inner]}",), linear=linear)


def skipped(_config: DeepseekV3Config, key: str, facts: ConfigReader) -> str | None:
    """Why a key of a checkpoint is not read; None: it is unexpected."""
    if key.endswith(".rotary_emb.inv_freq"):
        return "rotary frequencies, which are computed"
    parts = key.split(".")
    named = facts.get("num_mtp_layers", 0)  # as transformers calls them
    first, count = facts.whole("num_hidden_layers"), facts.whole("num_nextn_predict_layers", named, least=0)
    if parts[:2] == ["model", "layers"] and parts[2].isdecimal() and first <= int(parts[2]) < first + count:
        return f"multi-token prediction; model.mtp.depths={count} reads it"
    return None


def read(facts: ConfigReader) -> dict[str, Any]:
    """The keys of DeepseekV3Config that a config.json says.

    An absent number of the shape is missing: transformers would put that of its favourite release in its place.
    """
    third = facts.get("model_type") != "deepseek_v2"
    heads = facts.whole("num_attention_heads")
    _refuse(facts)
    theta, kind, numbers = facts.rope(10000.0, "default", "yarn")
    length, eps = facts.whole("max_position_embeddings", 4096 if third else 2048), facts.number("rms_norm_eps", 1e-6)
    return {
        "dim": facts.whole("hidden_size"),
        "n_layers": facts.whole("num_hidden_layers"),
        "n_heads": heads,
        "vocab_size": facts.whole("vocab_size"),
        "max_seq_len": length,
        "ffn_dim": facts.whole("intermediate_size"),
        "n_dense_layers": facts.whole("first_k_dense_replace", least=0),
        "q_lora_rank": facts.whole_or_null("q_lora_rank"),
        "kv_lora_rank": facts.whole("kv_lora_rank"),
        "qk_nope_head_dim": facts.whole("qk_nope_head_dim"),
        "qk_rope_head_dim": facts.whole("qk_rope_head_dim"),
        "v_head_dim": facts.whole("v_head_dim"),
        "rope_theta": theta,
        "rope_scaling": _yarn(facts, numbers, length) if kind == "yarn" else None,
        "norm_eps": eps,
        "latent_norm_eps": None if eps == LATENT_NORM_EPS else LATENT_NORM_EPS,
        "mtp": {"depths": 0},  # whatever there is: a run asks for it
        "moe": _mixture(facts, third=third),
    }


def _refuse(facts: ConfigReader) -> None:
    facts.only("attention_bias", legal=(False,))
    facts.only("mlp_bias", legal=(False,))
    facts.only("hidden_act", legal=("silu",))
    facts.only("tie_word_embeddings", legal=(False,))
    facts.only("rope_interleave", legal=(True,))
    facts.only("moe_layer_freq", legal=(1,))
    facts.only("sliding_window", legal=(None,), needs=WINDOWS)
    heads = facts.values.get("num_attention_heads", facts.values.get("num_key_value_heads"))
    facts.only("num_key_value_heads", legal=(None, heads))  # all heads share one latent vector
    facts.get("head_dim", None)  # transformers overwrites it with qk_rope_head_dim
    facts.get("qk_head_dim", None)


def _yarn(facts: ConfigReader, numbers: ConfigReader, length: int) -> dict[str, Any]:
    """As transformers computes it: mscale and mscale_all_dim shape the rotated part's factor, the second all scores."""
    original = facts.original_length(numbers, length)
    # A null factor is the ratio of the two lengths; an absent one is a fault.
    factor = numbers.number("factor", length / original if "factor" in numbers.values else MISSING)
    mscale, all_dim = numbers.number("mscale", 0.0), numbers.number("mscale_all_dim", 0.0)
    implied = _magnitude(factor, mscale) / _magnitude(factor, all_dim) if mscale and all_dim else _magnitude(factor)
    numbers.only("truncate", legal=(True,))
    return {
        "factor": factor,
        "original": original,
        "beta_fast": numbers.number("beta_fast", 32.0),
        "beta_slow": numbers.number("beta_slow", 1.0),
        "mscale": all_dim,
        "attention_factor": numbers.number("attention_factor", implied),
    }


def _magnitude(factor: float, mscale: float = 1.0) -> float:
    """YaRN's 0.1 mscale ln(factor) + 1."""
    return 0.1 * mscale * log(factor) + 1.0 if factor > 1 else 1.0


def _mixture(facts: ConfigReader, *, third: bool) -> dict[str, Any]:
    score = facts.only("scoring_func", legal=("sigmoid" if third else "softmax",))
    if third:
        facts.only("topk_method", legal=("noaux_tc",))
        grouped, groups, kept = True, facts.whole("n_group", 8), facts.whole("topk_group", 4)
    else:
        grouped = facts.only("topk_method", legal=("greedy", "group_limited_greedy")) != "greedy"
        groups, kept = (facts.whole("n_group"), facts.whole("topk_group")) if grouped else (1, 1)
        facts.seen |= {"n_group", "topk_group"}
    return {
        "num_experts": _experts(facts),
        "num_expert_groups": groups,
        "num_limited_groups": kept,
        "top_k": facts.whole("num_experts_per_tok"),
        "num_shared_experts": facts.whole("n_shared_experts"),
        "hidden_dim": facts.whole("moe_intermediate_size"),
        "score_func": score,
        "group_score": "top2sum" if third else "max",
        "route_norm": facts.only("norm_topk_prob", legal=(True, False) if third else (False,)),
        "route_scale": facts.number("routed_scaling_factor", 2.5 if third else 1.0),
        "score_before_experts": False,
        **({} if third else {"load_balance_coeff": None}),  # V2 has no biases to balance with
    }


def _experts(facts: ConfigReader) -> int:
    """transformers knows the number of experts by other names as well."""
    count = facts.whole("n_routed_experts")
    for key in ("num_experts", "num_local_experts"):
        facts.only(key, legal=(None, count))
    return count


def write(config: DeepseekV3Config) -> dict[str, Any]:
    """config.json without what only a run knows (token ids, dtype)."""
    moe, yarn = config.moe, config.rope_scaling
    kind = MODEL_TYPES[moe.score_func]
    plain = moe.num_limited_groups == moe.num_expert_groups
    if kind == "deepseek_v3":
        routing: dict[str, Any] = {
            "topk_method": "noaux_tc",
            "num_nextn_predict_layers": config.mtp.depths,
            "rope_interleave": True,
        }
    else:
        routing = {"topk_method": "greedy" if plain else "group_limited_greedy", "mlp_bias": False}
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "moe_intermediate_size": moe.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "first_k_dense_replace": config.n_dense_layers,
        "moe_layer_freq": 1,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_heads,
        "q_lora_rank": config.q_lora_rank,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_nope_head_dim": config.qk_nope_head_dim,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "v_head_dim": config.v_head_dim,
        "qk_head_dim": config.qk_head_dim,
        "head_dim": config.qk_rope_head_dim,  # as transformers repeats it
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.num_shared_experts,
        "num_experts_per_tok": moe.top_k,
        "n_group": 1 if plain else moe.num_expert_groups,
        "topk_group": 1 if plain else moe.num_limited_groups,
        "scoring_func": moe.score_func,
        "norm_topk_prob": moe.route_norm,
        "routed_scaling_factor": moe.route_scale,
        **routing,
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        **rope_keys(config.rope_theta, None if yarn is None else _yarn_keys(yarn)),
        "tie_word_embeddings": False,
        "attention_bias": False,
        "output_router_logits": False,
        "pretraining_tp": 1,
    }


def _yarn_keys(yarn: Yarn) -> dict[str, Any]:
    """Without keys that say what their absence says, so that a release's own block comes back."""
    scores = {"mscale": yarn.mscale, "mscale_all_dim": yarn.mscale} if yarn.mscale else {}
    implied = 1.0 if yarn.mscale else _magnitude(yarn.factor)
    turned = {} if isclose(yarn.attention_factor, implied) else {"attention_factor": yarn.attention_factor}
    return {
        "type": "yarn",
        "rope_type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        **scores,
        **turned,
    }


def problems(config: DeepseekV3Config) -> list[str]:
    """Differences to what transformers has: key, value, what it has instead; empty when there are none."""
    moe, kind, found = config.moe, MODEL_TYPES[config.moe.score_func], []
    if config.fixed_block is not None:
        found.append(f"model.fixed_block={config.fixed_block}: transformers' {kind} attends to all that came before")
    inner = config.inner_norm_eps
    if inner != LATENT_NORM_EPS:
        found.append(f"model.latent_norm_eps={inner}: transformers' {kind} has {LATENT_NORM_EPS} in its inner norms")
    if config.dim % config.n_heads and kind == "deepseek_v2":
        found.append(f"model.n_heads={config.n_heads} does not divide model.dim={config.dim}, as transformers asks")
    if moe.score_before_experts:
        found.append(f"model.moe.score_before_experts=true: transformers' {kind} weighs what leaves an expert")
    if moe.num_shared_experts == 0:
        found.append(f"model.moe.num_shared_experts=0: transformers' {kind} has at least one shared expert")
    if moe.force_load_balance:
        found.append(f"model.moe.force_load_balance=true: transformers' {kind} takes the best experts")
    if moe.score_func == "softmax" and moe.route_norm:
        found.append(
            "model.moe.route_norm=true with model.moe.score_func=softmax: transformers' deepseek_v2 never does"
        )
    if config.mtp.depths and kind == "deepseek_v2":
        found.append(f"model.mtp.depths={config.mtp.depths}: transformers' deepseek_v2 has no multi-token prediction")
    wanted = "top2sum" if moe.score_func == "sigmoid" else "max"
    if moe.num_limited_groups < moe.num_expert_groups and moe.group_score != wanted:
        found.append(f"model.moe.group_score={moe.group_score}: transformers' {kind} has {wanted}")
    return found
