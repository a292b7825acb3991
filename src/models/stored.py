"""Names and shapes of a family's tensors in a Hugging Face checkpoint, and how its config.json is read. No torch, no
file.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
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
        *("seq_aux", "ep_size", "num_nextn_predict_layers", "num_mtp_layers", "id2label", "label2id", "return_dict"),
        *(
            "is_decoder",
            "is_encoder_decoder",
            "output_hidden_states",
            "output_attentions",
            "chunk_size_feed_forward",
            "problem_type",
        ),
    }
)
MOST = 2**31 - 1  # of a whole number


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
    copies: tuple[str, ...] = ()  # keys that have the same content once more: written, and not read

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


def by_block(
    weights: Iterable[Weight],
    inside: Callable[[Weight, str, str], Stored],
    places: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Stored]:
    """In the model's order; `inside` gets a weight of a block, the block's name there, and the weight's name in it.

    `places`: names there of what is no block here, such as {"mtp.0": "model.layers.61"}.
    """
    for weight in weights:
        if weight.name in OUTSIDE:
            yield Stored(weight.name, weight.shape, (OUTSIDE[weight.name],))
        else:
            kind, number, inner = weight.name.split(".", 2)
            yield inside(weight, places.get(f"{kind}.{number}", f"model.layers.{number}"), inner)


# Of a SwiGLU, dense or of an expert.
MATRIX = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def experts(weight: Weight, block: str, inner: str) -> Stored:
    """A matrix of all routed experts of a block, `inner` its name there: one key for each expert."""
    matrix = MATRIX[inner.rpartition(".")[2]]
    keys = tuple(f"{block}.mlp.experts.{expert}.{matrix}.weight" for expert in range(weight.shape[0]))
    return Stored(weight.name, weight.shape, keys, stacked=True, linear=True)


def router_bias(block: str, layer: int, num_experts: int, *, optional: bool) -> Stored:
    """The biases by which a router balances its experts, by DeepSeek-V3's name; `block`: its name here, `layer`: its
    number there; `optional`: transformers has none.
    """
    key = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
    return Stored(f"{block}.moe.expert_bias", (num_experts,), (key,), optional=optional, precise=True)


def rotary_row(row: int, rows: int, heads: int) -> int:
    """Row in a checkpoint of native row `row` of a rotary matrix with `rows` rows in `heads` heads."""
    width = rows // heads
    head, place = divmod(row, width)
    return head * width + place % 2 * (width // 2) + place // 2


# What a config.json with a sliding window needs.
WINDOWS = "attention to no more than the last tokens of a window, which no attention here has"


@dataclass
class ConfigReader:
    """A config.json, or an object inside of one, while it is read.

    `problems` collects all that this repository cannot represent, in one line each; what nobody asked for is `unread`.
    """

    values: Mapping[str, Any]
    where: str
    problems: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    inner: dict[str, "ConfigReader"] = field(default_factory=dict)

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

    def whole(self, key: str, default: Any = MISSING, *, least: int = 1) -> int:
        """A whole number of at least `least`; 1 stands in for one that is reported."""
        value = self.get(key, default)
        if isinstance(value, int) and not isinstance(value, bool) and least <= value <= MOST:
            return value
        if value is not None:
            self.problems.append(f"{self.where}: {key}={_shown(value)} is not a whole number from {least} to {MOST}")
        return 1

    def whole_or_null(self, key: str) -> int | None:
        """A whole number or null, which must be there: absent it would mean what another library makes of it."""
        if key not in self.values:
            self.problems.append(f"{self.where}: {key} is missing")
        self.seen.add(key)
        return None if self.values.get(key) is None else self.whole(key)

    def number(self, key: str, default: Any = MISSING) -> float:
        """A finite one; 1.0 stands in for one that is reported."""
        value = self.get(key, default)
        if isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300:
            return float(value)
        if value is not None:
            self.problems.append(f"{self.where}: {key}={_shown(value)} is not a number")
        return 1.0

    def only(self, key: str, *, legal: tuple[Any, ...], absent: Any = MISSING, needs: str | None = None) -> Any:
        """One of the values that can be represented; a missing key means `absent`, or the first. `needs`: what any
        other value asks for that is not here.
        """
        there = key in self.values or absent is MISSING
        value = self.get(key, legal[0]) if there else self.get(key, absent)
        for each in legal:
            if value == each and isinstance(value, bool) == isinstance(each, bool):
                return each
        words = " or ".join(json.dumps(each) for each in legal)
        meant = _shown(value) if there else f"{_shown(value)} (as it is absent)"
        wanted = "" if needs is None else f"; it needs {needs}"
        self.problems.append(f"{self.where}: {key}={meant} has no form here, only {key}={words}{wanted}")
        return legal[0]

    def object(self, key: str) -> "ConfigReader":
        """The object behind a key; empty where there is none."""
        value = self.get(key, {})
        if not isinstance(value, Mapping):
            self.problems.append(f"{self.where}: {key}={_shown(value)} is not an object")
            value = {}
        self.inner[key] = ConfigReader(value, f"{self.where}: {key}", self.problems)
        return self.inner[key]

    def rope(self, theta: float, *kinds: str) -> tuple[float, str, "ConfigReader"]:
        """Base, type (one of `kinds`) and numbers of the rotary embedding, in the old or the new form of the file."""
        numbers, old = self.object("rope_parameters"), self.object("rope_scaling")
        if numbers.values and old.values and _rope_facts(numbers.values) != _rope_facts(old.values):
            self.problems.append(f"{self.where}: rope_parameters and rope_scaling contradict each other")
        if old.values and not numbers.values:
            numbers = old
        old.seen |= old.values.keys() if numbers is not old else set()  # the same facts
        base = numbers.number("rope_theta", self.get("rope_theta", theta))
        kind = str(numbers.get("rope_type", numbers.get("type", "default")))
        numbers.seen.add("type")
        if any(isinstance(value, Mapping) for value in numbers.values.values()):
            kind = "of each kind of layer"
        if kind not in kinds:
            self.problems.append(
                f"{self.where}: rope_type={kind} has no form here, only rope_type={' or '.join(kinds)}"
            )
        for each in (self, numbers):
            each.only("partial_rotary_factor", legal=(1.0,))
        return base, kind, numbers

    def original_length(self, numbers: "ConfigReader", longest: int) -> int:
        """Tokens of the context before a stretch: transformers takes the key outside of the rope's first."""
        outside = self.get("original_max_position_embeddings", None)
        inside = numbers.whole("original_max_position_embeddings", longest if outside is None else outside)
        if outside is not None and outside != inside:
            self.problems.append(
                f"{self.where}: original_max_position_embeddings={_shown(outside)}, and its rope says {inside}"
            )
        return inside

    def check(self) -> None:
        """CheckpointError with all problems."""
        if self.problems:
            raise CheckpointError(dict.fromkeys(self.problems))

    def unread(self) -> list[str]:
        """Keys that nobody asked for and that are not known to change nothing; those of inner objects by their path."""
        inside = (f"{key}.{name}" for key, reader in self.inner.items() for name in reader.unread())
        return sorted({*(set(self.values) - self.seen - NEUTRAL), *inside})


def rope_keys(theta: float, stretch: Mapping[str, Any] | None) -> dict[str, Any]:
    """The rotary embedding in a config.json: as transformers 5 writes it, and for older readers, vLLM among them."""
    now = {"rope_type": "default"} if stretch is None else dict(stretch)
    return {
        "rope_parameters": {"rope_theta": theta, **now},
        "rope_theta": theta,
        "rope_scaling": None if stretch is None else dict(stretch),
    }


def _rope_facts(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without the base, which either form may have elsewhere, and with the newer name of the type."""
    facts = {key: value for key, value in values.items() if key not in ("rope_theta", "type") and value is not None}
    return {"rope_type": values.get("type", "default")} | facts


def _shown(value: Any, most: int = 60) -> str:
    """As JSON, on one line and not too long."""
    text = json.dumps(value)
    return text if len(text) <= most else f"{text[:most]}..."
