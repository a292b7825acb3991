"""task=pretrain: train on next tokens, validate, save, and go on from wherever the run folder stands."""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from src.config.base import Config, RankNumbers
from src.config.bounds import Count, Sequences, Steps, StepsOrNever, Temperature, Tokens

if TYPE_CHECKING:
    from src.run import Run


class Pretrain(Config):
    """Train until `steps` optimizer steps are done."""

    needs_corpus: ClassVar[bool] = True

    steps: Steps
    seq_len: Tokens
    global_batch: Sequences
    micro_batch: Sequences | None
    validate_every: StepsOrNever
    validate_samples: Count
    log_every: Steps
    nonfinite: Literal["raise", "skip_step"]
    nonfinite_cap: Steps
    gc_every: StepsOrNever
    deterministic: bool
    sample_prompt: str | None
    sample_tokens: Tokens
    sample_temperature: Temperature
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
