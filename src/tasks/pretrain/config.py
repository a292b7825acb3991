"""task=pretrain: train on next tokens, validate, save, and go on from wherever the run folder stands."""

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field, Strict, model_validator

from src.config.base import Config, RankNumbers
from src.config.bounds import (
    Beta,
    Count,
    Deviations,
    Fraction,
    Scale,
    Sequences,
    Steps,
    StepsOrNever,
    Temperature,
    Tokens,
    Window,
)
from src.config.stages import CHANGES, may_differ, restarts_schedule

if TYPE_CHECKING:
    from src.run import Run

# Of a difference as large as a number, this share is that number's last bit in bfloat16: with less nothing ever moves.
SLOWEST_BFLOAT16_EMA = 1.0 - 2.0**-7


class StageChanges(Config):
    """A part of a run: where it ends; all other keys are what changes with it, by dotted keys or whole sections."""

    model_config = ConfigDict(extra="allow")

    until: Steps | None
    """Optimizer step of the run after which the stage ends; null: task.steps, of the last stage."""

    @model_validator(mode="after")
    def _it_changes_what_may_change(self) -> "StageChanges":
        for key in self.model_extra or {}:
            if not may_differ(key):
                raise ValueError(f"{key} is nothing that a stage changes; it changes {', '.join(CHANGES)}")
        return self


class Pretrain(Config):
    """Train until `steps` optimizer steps are done."""

    needs_corpus: ClassVar[bool] = True

    steps: Steps
    """Optimizer steps of the whole run."""
    seq_len: Tokens
    """Tokens per sequence."""
    global_batch: Sequences
    """Sequences per optimizer step, over all ranks."""
    micro_batch: Sequences | None
    """Sequences per rank and forward; null: up to 4, on a GPU up to 32,768 tokens, as layout and memory let."""
    stages: Annotated[tuple[StageChanges, ...], Field(min_length=2), Strict(strict=False)] | None
    """Stages that follow each other, {until, ...what changes}: docs/stages.md; null: one."""
    validate_every: StepsOrNever
    """Optimizer steps between two validations; 0: none."""
    validate_samples: Count
    """Held-out sequences of a validation; the same every time."""
    log_every: Steps
    """Optimizer steps between two lines of metrics."""
    ema_decay: Beta | None
    """Decay in each step of a moving average of the weights, which is validated and saved too; null: none is kept."""
    ema_dtype: Literal["float32", "bfloat16"]
    """Dtype of that average; bfloat16: 2 instead of 4 bytes per parameter, for a decay that it can follow."""
    ema_offload: bool
    """True: it rests in the host's memory, and each step waits until the weights are copied there."""
    qk_clip: Scale | None
    """Largest attention logit of a head, above which its queries and keys are scaled down after a step; null: any."""
    spike_score: Deviations | None
    """Deviations above the median of steps before it from which a loss or gradient norm is a spike; null: none is."""
    spike_window: Window
    """How many steps before it a step is compared with."""
    on_spike: Literal["note", "skip_batch", "rewind"]
    """What follows a spike; note: a line of incidents.jsonl; skip_batch: also, no update; rewind: also, the newest
    checkpoint before it, and no update by its samples when they come again."""
    layer_norms: bool
    """True: steps that are logged also say the norms of each layer's gradients, updates and hidden states."""
    z_loss: Fraction
    """Weight of the squared log normaliser of each label's logits in gradients; the loss shown has none; 0: none."""
    router_z_loss: Fraction
    """The same of each token's router logits in each layer with experts; 0: none."""
    nonfinite: Literal["raise", "skip_step"]
    """When a loss or gradient norm is not finite; raise: the run fails; skip_step: weights stay as they are."""
    nonfinite_cap: Steps
    """Skipped steps in a row before skip_step raises after all."""
    gc_every: StepsOrNever
    """Optimizer steps between two garbage collections; 0: leave it to Python."""
    deterministic: bool
    """True: only deterministic kernels."""
    sample_prompt: str | None
    """Text to continue at the end of the run; null: no sample."""
    sample_tokens: Tokens
    """Tokens of the sample, if any; model.max_seq_len ends it."""
    sample_temperature: Temperature
    """Temperature of the sample; 0: always the likeliest token."""
    rehearse: bool
    """True: a dry run builds some ranks of the layout on this CPU and counts what they hold."""
    rehearse_ranks: RankNumbers | None
    """Which ranks, such as [0,511]; null: the first of the first, middle and last pipeline stage."""

    @model_validator(mode="after")
    def _the_average_moves(self) -> "Pretrain":
        if self.ema_decay is not None and self.ema_dtype == "bfloat16" and self.ema_decay > SLOWEST_BFLOAT16_EMA:
            raise ValueError(
                f"ema_decay={self.ema_decay} hardly moves an average in ema_dtype=bfloat16; at most "
                f"{SLOWEST_BFLOAT16_EMA}, or ema_dtype=float32"
            )
        return self

    @model_validator(mode="after")
    def _stages_follow_each_other(self) -> "Pretrain":
        ends = [each.until for each in self.stages or ()]
        if ends and (None in ends[:-1] or ends[-1] is not None):
            raise ValueError("stages: each ends with until=<optimizer step>, and the last, until=null, with task.steps")
        steps = [0, *(end for end in ends if end is not None), self.steps]
        if ends and any(end <= begun for begun, end in pairwise(steps)):
            raise ValueError(f"stages end after steps {', '.join(map(str, steps[1:]))}, each of which must be higher")
        return self

    @property
    def schedule_begins(self) -> tuple[bool, ...]:
        """Of each stage, whether it names its schedule, which then begins with it; empty without stages."""
        named = (restarts_schedule(each.model_extra or {}) for each in (self.stages or ())[1:])
        return (True, *named) if self.stages else ()

    @property
    def skips(self) -> int:
        """Steps in a row that may be skipped for a non-finite loss or gradient; 0 with nonfinite=raise."""
        return self.nonfinite_cap if self.nonfinite == "skip_step" else 0

    def run(self, run: "Run", folder: Path) -> bool:
        """Run the task on this rank, from joining the process groups to leaving them. Collective. True when the run
        is complete; false when a signal stopped it, after a save.
        """
        from src.tasks.pretrain.rank import pretrain

        return pretrain(self, run, folder)
