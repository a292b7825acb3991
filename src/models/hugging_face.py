"""From config.json to a model section and back, and the key table of any family. Pure: no file, no torch."""

from collections.abc import Mapping
from typing import Any

from src.errors import CheckpointError
from src.models.base import ModelConfig
from src.models.families import HuggingFaceForm, model_types, of_config
from src.models.stored import ConfigReader, Stored

# What this repository would have to learn first, of model_types that are asked for.
NEEDS = {
    "deepseek_v32": "sparse attention by an indexer",
    "gemma2": "sliding windows, soft caps and norms behind each part of a block",
    "gemma3_text": "sliding windows and norms behind each part of a block",
    "glm4_moe": "a rotary embedding of half a head, biases of q, k and v, and sigmoid routing in it",
    "gpt_oss": "sliding windows, attention sinks, biases, clamped SwiGLUs and MXFP4 weights",
    "kimi_linear": "linear attention",
    "llama4_text": "chunked attention, layers without rotary embedding and scaled router inputs",
    "mixtral": "experts in a Llama's blocks",
    "phi3": "fused matrices and longrope",
    "qwen2": "biases of q, k and v",
    "qwen2_moe": "biases of q, k and v, and a gated shared expert",
    "qwen3_next": "linear attention and a gated shared expert",
}


def section(values: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """The keys of a config's section `model` that a config.json says, with its `_target_`; and keys that were not read.

    CheckpointError with everything that cannot be represented.
    """
    facts, known = ConfigReader(values, where), model_types()
    kind = facts.get("model_type")
    if not isinstance(kind, str) or kind not in known:
        needs = f" (it needs {NEEDS[kind]})" if isinstance(kind, str) and kind in NEEDS else ""
        raise CheckpointError(f"{where}: model_type={kind}{needs} is not known; there are {', '.join(known)}")
    form = known[kind].hugging_face()
    assert form is not None, "a model_type is of a family that has one"
    keys = form.read(facts)
    facts.check()
    return {"_target_": known[kind].target, **keys}, facts.unread()


def config_json(config: ModelConfig) -> dict[str, Any]:
    """config.json from which transformers builds the same model. CheckpointError where it has no such model."""
    if found := export_problems(config):
        raise CheckpointError(found)
    return _known(config).write(config)


def export_problems(config: ModelConfig) -> list[str]:
    """Why transformers has no such model: key, value, what it has instead."""
    form = _form(config)
    if form is None:
        return [
            f"model.family={config.family} has no form in Hugging Face checkpoints: nothing can be exported or read; "
            "src/models/families.py lists those that have one"
        ]
    return form.problems(config)


def stored(config: ModelConfig) -> tuple[Stored, ...]:
    """Every tensor of the model by its keys there; CheckpointError where the family has no form there."""
    return tuple(_known(config).stored(config))


def skipped(config: ModelConfig, key: str, values: Mapping[str, Any]) -> str | None:
    """Why a key of a checkpoint with this config.json need not be read; None: it is unexpected."""
    return _known(config).skipped(config, key, ConfigReader(values, "config.json"))


def _form(config: ModelConfig) -> HuggingFaceForm | None:
    family = of_config(config)
    return None if family is None else family.hugging_face()


def _known(config: ModelConfig) -> HuggingFaceForm:
    if (form := _form(config)) is None:
        raise CheckpointError(export_problems(config))
    return form
