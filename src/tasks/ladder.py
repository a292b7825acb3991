"""`experiment=ladder`: one dial, `scale=`, for depth, width, batch, learning rate and tokens of a run.

Models of several scales are the points through which `python -m src.sweeps fit` draws a scaling law. On the launcher
the dial becomes plain config: the keys that it decides, but for what is typed.
"""

from collections.abc import Mapping
from math import exp, log
from typing import Annotated

from pydantic import Field

from src.config.base import Config
from src.config.bounds import Fraction, Layers, Scale, Width
from src.config.build import object_of
from src.config.groups import LADDER, SCALE
from src.config.tree import Tree
from src.errors import ConfigError
from src.models.base import ModelConfig
from src.storage.streams import to_stderr

Flops = Annotated[float, Field(ge=1e6, le=1e30)]

# DeepSeek LLM (arXiv 2401.02954), equation 1: the best batch, in tokens, and learning rate of C floating-point
# operations, fitted there from 1e17 to 2e19 and held at 1e20 to 3e23.
BATCH_COEFFICIENT, BATCH_EXPONENT = 0.2920, 0.3271
RATE_COEFFICIENT, RATE_EXPONENT = 0.3118, -0.1250
VALIDATIONS = 4  # of a run, the last at its end


class Ladder(Config):
    """What one dial decides."""

    scale: Layers
    """Transformer blocks; all else follows from them."""
    width_per_layer: Width
    """Width of the residual stream for each block."""
    head_width: Width
    """Elements of one head; the width is a multiple of it."""
    tokens_per_parameter: Scale
    """Training tokens for each parameter that a token meets."""
    flops: Flops | None
    """Floating-point operations of the whole training, which then decide the tokens; null: tokens_per_parameter does.
    """
    batch_factor: Scale
    """Factor on the batch of DeepSeek LLM's fit, 0.2920 * FLOPs^0.3271 tokens."""
    lr_factor: Scale
    """Factor on the learning rate of the same fit, 0.3118 / FLOPs^0.1250."""
    warmup_ratio: Fraction
    """Share of the steps that warm up."""

    @property
    def width(self) -> int:
        """Of the residual stream: at least one head."""
        return self.head_width * max(1, round(self.scale * self.width_per_layer / self.head_width))

    @property
    def shape(self) -> dict[str, int]:
        """Keys of the model."""
        heads = self.width // self.head_width
        return {"n_layers": self.scale, "dim": self.width, "n_heads": heads, "n_kv_heads": heads}


def scaled(tree: Tree, typed: Mapping[str, str]) -> Tree:
    """The tree with what `scale=` stands for; what was typed wins. ConfigError for a dial that cannot be turned so."""
    found = {key: value for key, value in tree.items() if key not in (LADDER, SCALE)}
    dial = tree.get(LADDER)
    if not isinstance(dial, Mapping) or SCALE not in tree:
        raise ConfigError(f"{SCALE}={tree.get(SCALE)}: is the dial of experiment=ladder; pass that, too")
    ladder = object_of({**dial, SCALE: tree[SCALE]}, LADDER)
    assert isinstance(ladder, Ladder), "the class of conf/experiment/ladder.yaml"
    found["model"] = _overlaid("model", ladder.shape, found, typed)
    try:
        model = object_of(found["model"], "model")
    except ConfigError:
        return found  # told when all is built, with everything else
    task, seq_len = found["task"], found["task"].get("seq_len")
    if not isinstance(model, ModelConfig) or not isinstance(seq_len, int) or seq_len < 1 or "steps" not in task:
        return found
    paced = _pace(ladder, model, seq_len)
    for section, values in paced.items():
        found[section] = _overlaid(section, values, found, typed)
    _tell(ladder, model, found, seq_len)
    return found


def _overlaid(section: str, values: Mapping[str, object], tree: Tree, typed: Mapping[str, str]) -> Tree:
    """Those keys that the section has and that nobody typed."""
    mine = {key: value for key, value in values.items() if key in tree[section] and f"{section}.{key}" not in typed}
    return {**tree[section], **mine}


def _pace(ladder: Ladder, model: ModelConfig, seq_len: int) -> dict[str, dict[str, object]]:
    """Batch, steps, learning rate and warm-up."""
    counts = model.counts(seq_len)
    tokens = ladder.tokens_per_parameter * counts.active
    if ladder.flops is not None:
        tokens = ladder.flops / counts.flops_per_token
    flops = tokens * counts.flops_per_token
    batch_tokens = ladder.batch_factor * BATCH_COEFFICIENT * exp(BATCH_EXPONENT * log(flops))
    # A power of two is what layouts divide.
    sequences = 2 ** max(0, round(log(batch_tokens / seq_len, 2)))
    steps = max(1, round(tokens / (sequences * seq_len)))
    rate = ladder.lr_factor * RATE_COEFFICIENT * exp(RATE_EXPONENT * log(flops))
    task = {"global_batch": sequences, "steps": steps, "validate_every": max(1, steps // VALIDATIONS)}
    return {
        "task": {**task, "log_every": max(1, steps // 100)},
        "optim": {"lr": float(f"{rate:.3g}")},
        "schedule": {"warmup_steps": round(ladder.warmup_ratio * steps)},
    }


def _tell(ladder: Ladder, model: ModelConfig, tree: Tree, seq_len: int) -> None:
    counts, task = model.counts(seq_len), tree["task"]
    tokens = task["steps"] * task["global_batch"] * seq_len
    told = (
        f"ladder: {SCALE}={ladder.scale}: {ladder.scale} layers of {ladder.width}, {counts.active:,} parameters, "
        f"{tokens:,} tokens ({tokens / counts.active:.1f} for each), {tokens * counts.flops_per_token:.3g} FLOPs: "
        f"task.global_batch={task['global_batch']} task.steps={task['steps']} optim.lr={tree['optim']['lr']:g}"
    )
    to_stderr([told])
