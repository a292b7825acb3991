"""Llama 3 as transformers stores it: names, the order of rotary rows, config.json (model_type llama, and mistral).

A Mistral without a window is a Llama by another name. Only as such does transformers take heads that do not divide dim.
"""

from collections.abc import Iterator
from typing import Any

from src.models.accounting import Weight
from src.models.llama3.config import Llama3Config
from src.models.stored import OUTSIDE, WINDOWS, ConfigReader, Stored, by_block, rope_keys

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}

IN_BLOCK = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}


def stored(config: Llama3Config) -> Iterator[Stored]:
    """Every tensor of the model; a tied head is the embedding and has no key of its own."""
    heads = {"attention.wq.weight": config.n_heads, "attention.wk.weight": config.n_kv_heads}

    def inside(weight: Weight, block: str, inner: str) -> Stored:
        keys, linear = (f"{block}.{IN_BLOCK[inner]}",), len(weight.shape) == 2
        return Stored(weight.name, weight.shape, keys, heads=heads.get(inner), linear=linear)

    return by_block(config.weights(), inside)


def skipped(config: Llama3Config, key: str, _facts: ConfigReader) -> str | None:
    """Why a key of a checkpoint is not read; None: it is unexpected."""
    if key.endswith(".rotary_emb.inv_freq"):
        return "rotary frequencies, which are computed"
    return "a head that is the embedding" if config.tie_word_embeddings and key == OUTSIDE["output.weight"] else None


def read(facts: ConfigReader) -> dict[str, Any]:
    """The keys of Llama3Config that a config.json says."""
    mistral = facts.get("model_type") == "mistral"
    for key in ("attention_bias", "mlp_bias"):
        facts.only(key, legal=(False,))
    facts.only("hidden_act", legal=("silu",))
    # transformers gives a Mistral without the key a window of 4096 tokens; a Llama has none.
    facts.only("sliding_window", legal=(None,), absent=4096 if mistral else None, needs=WINDOWS)
    theta, kind, numbers = facts.rope(10000.0, "default", "llama3")
    dim, heads = facts.whole("hidden_size"), facts.whole("num_attention_heads")
    length = facts.whole("max_position_embeddings", 131072 if mistral else 2048)
    width = facts.whole("head_dim", max(dim // heads, 1))
    scaling = None
    if kind == "llama3":
        scaling = {
            "factor": numbers.number("factor"),
            "low": numbers.number("low_freq_factor"),
            "high": numbers.number("high_freq_factor"),
            "original": facts.original_length(numbers, length),
        }
    return {
        "dim": dim,
        "n_layers": facts.whole("num_hidden_layers"),
        "n_heads": heads,
        "n_kv_heads": facts.whole("num_key_value_heads", _kv_heads(facts, heads) if mistral else heads),
        "head_dim": None if width * heads == dim else width,
        **_feed_forward(dim, facts.whole("intermediate_size")),
        "vocab_size": facts.whole("vocab_size"),
        "max_seq_len": length,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_eps": facts.number("rms_norm_eps", 1e-6),
        "tie_word_embeddings": facts.only("tie_word_embeddings", legal=(False, True)),
        "depth_init": True,
    }


def _kv_heads(facts: ConfigReader, heads: int) -> int:
    """Of a Mistral: null means all heads, and an absent key the 8 of its first release."""
    return heads if "num_key_value_heads" in facts.values else 8


def _feed_forward(dim: int, width: int) -> dict[str, Any]:
    """The keys that come out as `width`: two thirds of 4 dim, scaled to at most `width`, rounded up to one of it."""
    before = int(2 * (4 * dim) / 3)
    return {"multiple_of": width, "ffn_dim_multiplier": None if before <= width else width / before}


def kind(config: Llama3Config) -> str:
    """The model_type of a config.json."""
    return "mistral" if config.dim % config.n_heads else "llama"


def write(config: Llama3Config) -> dict[str, Any]:
    """config.json without what only a run knows (token ids, dtype)."""
    scaling, name = config.rope_scaling, kind(config)
    stretch = None
    if scaling is not None:
        stretch = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high,
            "original_max_position_embeddings": scaling.original,
        }
    only = (
        {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
        if name == "llama"
        else {"sliding_window": None}
    )
    return {
        "architectures": [ARCHITECTURES[name]],
        "model_type": name,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        **rope_keys(config.rope_theta, stretch),
        "tie_word_embeddings": config.tie_word_embeddings,
        **only,
    }


def problems(config: Llama3Config) -> list[str]:
    """Differences to what transformers has: key, value, what it has instead; empty when there are none."""
    found = []
    if config.fixed_block is not None:
        found.append(f"model.fixed_block={config.fixed_block}: transformers' llama attends to all that came before")
    return found
