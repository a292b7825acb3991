"""The model families: one line each. Whoever asks which families there are, or for a family's form in Hugging Face
checkpoints, asks here. No torch.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, Protocol, cast

from src.config.base import Config
from src.config.bounds import Tokens
from src.models.base import ModelConfig
from src.models.stored import ConfigReader, Stored


class HuggingFaceForm(Protocol):
    """Interface of a family's hugging_face.py: its models as transformers stores them. `config` is of that family."""

    def stored(self, config: Any) -> Iterator[Stored]:
        """Every tensor of the model and its keys in a checkpoint."""

    def skipped(self, config: Any, key: str, facts: ConfigReader) -> str | None:
        """Why a key of a checkpoint is not read; None: it is unexpected."""

    def read(self, facts: ConfigReader) -> dict[str, Any]:
        """The keys of the config class that a config.json says."""

    def write(self, config: Any) -> dict[str, Any]:
        """config.json without what only a run knows (token ids, dtype)."""

    def problems(self, config: Any) -> list[str]:
        """Why transformers has no such model: key, value, what it has instead."""


@dataclass(frozen=True)
class Family:
    """A folder src/models/<name> with config.py and model.py, and with hugging_face.py if there are `model_types`."""

    name: str
    config: str  # class in config.py
    model_types: tuple[str, ...]  # of config.json; none: transformers has no such models

    @property
    def target(self) -> str:
        """The `_target_` of a config's section `model`."""
        return f"src.models.{self.name}.config.{self.config}"

    def hugging_face(self) -> HuggingFaceForm | None:
        """Its form in Hugging Face checkpoints, if it has one."""
        if not self.model_types:
            return None
        return cast("HuggingFaceForm", import_module(f"src.models.{self.name}.hugging_face"))


FAMILIES = (
    Family("llama3", "Llama3Config", ("llama", "mistral")),
    Family("deepseek_v3", "DeepseekV3Config", ("deepseek_v2", "deepseek_v3", "kimi_k2")),
    Family("qwen3", "Qwen3Config", ("qwen3", "qwen3_moe")),
)


def of_config(config: ModelConfig) -> Family | None:
    """The family of a model; None for one that has no line here, such as a model of somebody's own package."""
    return next((family for family in FAMILIES if family.name == config.family), None)


def model_types() -> Mapping[str, Family]:
    """Every model_type of a config.json that is read, and the family that reads it."""
    return {model_type: family for family in FAMILIES for model_type in family.model_types}


class Auto(Config):
    """model=auto: what a config.json does not say of the model of `checkpoint.initial=hf:...`.

    The launcher puts the model that it does say in this one's place, before anything else is checked.
    """

    max_seq_len: Tokens | None
    """Tokens of the longest sequence that task.seq_len may ask for; null: as config.json says."""
    attention: Literal["sdpa", "flex"]
    """Kernel of attention; sdpa: torch's causal one; flex: FlexAttention, which takes any mask."""
    mask: Literal["causal", "block_causal"]
    """What a token attends to; causal: all before it; block_causal: of these its document's (flex)."""
    fixed_block: Tokens | None
    """Tokens of a block; attention stays inside of one (flex); null: no such limit."""
    mtp: dict[str, Any]
    """Multi-token prediction of a DeepSeek-V3; its released modules are read where depths asks for them."""
    moe: dict[str, Any]
    """Of a model with experts; one of type deepseek_v2 is not balanced, since it has no biases."""
