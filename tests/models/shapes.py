"""Small model configs that tests share; the released shapes are conf/model's."""

from typing import Any

from src.models.llama3.config import Llama3Config, RopeScaling

TINY: dict[str, Any] = {
    "dim": 64,
    "n_layers": 3,
    "n_heads": 8,
    "n_kv_heads": 4,
    "head_dim": None,
    "ffn_dim_multiplier": None,
    "multiple_of": 32,
    "vocab_size": 96,
    "max_seq_len": 128,
    "rope_theta": 500000.0,
    "rope_scaling": None,
    "norm_eps": 1e-5,
    "tied_embeddings": False,
    "depth_init": True,
    "attention": "sdpa",
    "mask": "causal",
    "fixed_block": None,
}


def tiny_llama(**changes: Any) -> Llama3Config:
    """A Llama 3 of 0.2 M parameters."""
    return Llama3Config(**(TINY | changes))


SCALED = RopeScaling(factor=4.0, low=1.0, high=4.0, original=32)
