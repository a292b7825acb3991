"""From config.json to a model section and back, and the key table of any family. Pure: no file, no torch."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from src.errors import CheckpointError
from src.models.base import ModelConfig
from src.models.deepseek_v3 import hugging_face as deepseek_v3
from src.models.llama3 import hugging_face as llama3
from src.models.stored import Facts, Stored

# model_type of a config.json -> the class of ours.
CLASSES = {
    "llama": "src.models.llama3.config.Llama3Config",
    "deepseek_v2": "src.models.deepseek_v3.config.DeepseekV3Config",
    "deepseek_v3": "src.models.deepseek_v3.config.DeepseekV3Config",
}
FAMILIES: Mapping[str, ModuleType] = {"llama3": llama3, "deepseek_v3": deepseek_v3}


def section(values: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """The keys of a config's section `model` that a config.json says, with its `_target_`; and keys that were not read.

    CheckpointError with everything that cannot be represented.
    """
    facts = Facts(values, where)
    kind = facts.get("model_type")
    if kind not in CLASSES:
        raise CheckpointError(f"{where}: model_type={kind} is not known; there are {', '.join(CLASSES)}")
    target = CLASSES[kind]
    keys = FAMILIES[target.split(".")[2]].read(facts)
    facts.check()
    return {"_target_": target, **keys}, facts.unread()


def config_json(config: ModelConfig) -> dict[str, Any]:
    """What transformers builds the same model from; CheckpointError where it has no such model."""
    if found := export_problems(config):
        raise CheckpointError(found)
    written: dict[str, Any] = FAMILIES[config.family].write(config)
    return written


def export_problems(config: ModelConfig) -> list[str]:
    """Why transformers has no such model: key, value, what it has instead."""
    found: list[str] = FAMILIES[config.family].problems(config)
    return found


def stored(config: ModelConfig) -> tuple[Stored, ...]:
    """Every tensor of the model by its keys there."""
    return tuple(FAMILIES[config.family].stored(config))


def skipped(config: ModelConfig, key: str, values: Mapping[str, Any]) -> str | None:
    """Why a key of a checkpoint with this config.json need not be read; None: it is unexpected."""
    reason: str | None = FAMILIES[config.family].skipped(config, key, Facts(values, "config.json"))
    return reason
