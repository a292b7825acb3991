"""model=auto: the model of `checkpoint.initial=hf:...`, read from its config.json before anything else is checked."""

from typing import Any, Literal

from pydantic import PositiveInt

from src.config.base import Config


class Auto(Config):
    """What a config.json does not say. The launcher puts the model that it does say in this one's place."""

    max_seq_len: PositiveInt | None
    attention: Literal["sdpa", "flex"]
    mask: Literal["causal", "block_causal"]
    fixed_block: PositiveInt | None
    moe: dict[str, Any]
