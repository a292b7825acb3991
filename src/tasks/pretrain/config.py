"""task=pretrain: train on next tokens, validate, save, and go on from wherever the run folder stands."""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from src.config.base import Config, RankNumbers

if TYPE_CHECKING:
    from src.run import Run


class Pretrain(Config):
    """Train until `steps` optimizer steps are done."""

    needs_corpus: ClassVar[bool] = True

    steps: PositiveInt
    seq_len: PositiveInt
    global_batch: PositiveInt
    micro_batch: PositiveInt | None
    validate_every: NonNegativeInt
    validate_samples: PositiveInt
    log_every: PositiveInt
    nonfinite: Literal["raise", "skip_step"]
    nonfinite_cap: PositiveInt
    gc_every: NonNegativeInt
    deterministic: bool
    sample_prompt: str | None
    sample_tokens: PositiveInt
    sample_temperature: NonNegativeFloat
    rehearse: bool
    rehearse_ranks: RankNumbers | None

    @property
    def skips(self) -> int:
        """How many steps in a row may be dropped for not being finite."""
        return self.nonfinite_cap if self.nonfinite == "skip_step" else 0

    def run(self, run: "Run", folder: Path) -> bool:
        """Collective: a rank's whole life. True when the run is complete; false when a signal stopped it, after
        saving.
        """
        from src.tasks.pretrain.rank import pretrain

        return pretrain(self, run, folder)
