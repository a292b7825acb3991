"""Names and shapes of a family's tensors in a Hugging Face checkpoint, and how its config.json is read. No torch, no
file.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from src.errors import CheckpointError
from src.models.accounting import Weight

MISSING = object()

# Keys of a config.json that change no logit: how it was written, served, initialised or trained.
NEUTRAL = frozenset(
    {
        *("architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache", "auto_map"),
        *("_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "attention_dropout"),
        *("pretraining_tp", "quantization_config", "output_router_logits", "router_aux_loss_coef", "aux_loss_alpha"),
        *("seq_aux", "ep_size", "num_nextn_predict_layers", "id2label", "label2id", "return_dict", "is_decoder"),
    }
)


@dataclass(frozen=True)
class Stored:
    """One native tensor (parameter or persistent buffer) and its keys there."""

    name: str
    shape: tuple[int, ...]  # native
    # One, of the same shape; or `stacked`: one for each index of dimension 0, in order, of the shape without it.
    keys: tuple[str, ...]
    stacked: bool = False
    # Rows are rotary: row 2i + j of a head here is row j * half + i of that head there.
    heads: int | None = None
    optional: bool = False  # may be absent there: zeros
    linear: bool = False  # may be float8 there, with one scale for each block of 128 x 128
    precise: bool = False  # float32 whatever the weights are

    @property
    def key_shape(self) -> tuple[int, ...]:
        """Shape of the tensor behind each key."""
        return self.shape[1:] if self.stacked else self.shape


# What transformers calls the tensors outside of the blocks, whatever the family.
OUTSIDE = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def by_block(weights: Iterable[Weight], inside: Callable[[Weight, str, str], Stored]) -> Iterator[Stored]:
    """In the model's order; `inside` gets a weight of a block, the block's name there, and the weight's name in it."""
    for weight in weights:
        if weight.name in OUTSIDE:
            yield Stored(weight.name, weight.shape, (OUTSIDE[weight.name],))
        else:
            _, layer, inner = weight.name.split(".", 2)
            yield inside(weight, f"model.layers.{layer}", inner)


# Of a SwiGLU, dense or of an expert.
MATRIX = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def experts(weight: Weight, block: str, inner: str) -> Stored:
    """A matrix of all routed experts of a block, `inner` its name there: one key for each expert."""
    matrix = MATRIX[inner.rpartition(".")[2]]
    keys = tuple(f"{block}.mlp.experts.{expert}.{matrix}.weight" for expert in range(weight.shape[0]))
    return Stored(weight.name, weight.shape, keys, stacked=True, linear=True)


def router_bias(layer: int, num_experts: int, *, optional: bool) -> Stored:
    """The biases by which a router balances its experts, by DeepSeek-V3's name; `optional`: transformers has none."""
    key = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
    return Stored(f"layers.{layer}.moe.expert_bias", (num_experts,), (key,), optional=optional, precise=True)


def rotary_row(row: int, rows: int, heads: int) -> int:
    """Row in a checkpoint of native row `row` of a rotary matrix with `rows` rows in `heads` heads."""
    width = rows // heads
    head, place = divmod(row, width)
    return head * width + place % 2 * (width // 2) + place // 2


@dataclass
class ConfigReader:
    """A config.json while it is read; `problems` collects all that this repository cannot represent."""

    values: Mapping[str, Any]
    where: str
    problems: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)

    def get(self, key: str, default: Any = MISSING) -> Any:
        """A null counts as absent."""
        self.seen.add(key)
        value = self.values.get(key)
        if value is not None:
            return value
        if default is MISSING:
            self.problems.append(f"{self.where}: {key} is missing")
            return None
        return default

    def whole(self, key: str, default: Any = MISSING) -> int:
        """A whole number; 1 stands in for one that is reported."""
        value = self.get(key, default)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if value is not None:
            self.problems.append(f"{self.where}: {key}={value!r} is not a whole number")
        return 1

    def number(self, key: str, default: Any = MISSING) -> float:
        """1.0 stands in for one that is reported."""
        value = self.get(key, default)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if value is not None:
            self.problems.append(f"{self.where}: {key}={value!r} is not a number")
        return 1.0

    def only(self, key: str, *, legal: tuple[Any, ...]) -> Any:
        """One of the values that can be represented; a missing key means the first."""
        value = self.get(key, legal[0])
        if value not in legal:
            words = " or ".join(json.dumps(each) for each in legal)
            self.problems.append(f"{self.where}: {key}={json.dumps(value)} has no form here, only {key}={words}")
        return value

    def rope(self, theta: float, *kinds: str) -> tuple[float, str, "ConfigReader"]:
        """Base, type (one of `kinds`) and numbers of the rotary embedding, in the old or the new form of the file."""
        given, scaling = self.get("rope_parameters", {}), self.get("rope_scaling", {})
        numbers = ConfigReader({**scaling, **given}, f"{self.where}: rope_scaling", self.problems)
        base = numbers.number("rope_theta", self.get("rope_theta", theta))
        kind = str(numbers.get("rope_type", numbers.get("type", "default")))
        if any(isinstance(value, Mapping) for value in numbers.values.values()):
            kind = "of each kind of layer"
        if kind not in kinds:
            self.problems.append(
                f"{self.where}: rope_type={kind} has no form here, only rope_type={' or '.join(kinds)}"
            )
        return base, kind, numbers

    def check(self) -> None:
        """CheckpointError with all problems."""
        if self.problems:
            raise CheckpointError(dict.fromkeys(self.problems))

    def unread(self) -> list[str]:
        """Keys that nobody asked for and that are not known to change nothing."""
        return sorted(set(self.values) - self.seen - NEUTRAL)
