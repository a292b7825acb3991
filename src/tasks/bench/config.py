"""task=bench: speed and memory of a model in a layout, on random tokens."""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from src.config.base import Config, RankNumbers
from src.config.bounds import Sequences, Steps, Tokens

if TYPE_CHECKING:
    from src.run import Run


class Bench(Config):
    """Measure `steps` optimizer steps after `warmup_steps`; the figures go into bench.json of the run folder."""

    needs_corpus: ClassVar[bool] = False

    steps: Steps
    warmup_steps: Steps
    seq_len: Tokens
    global_batch: Sequences
    micro_batch: Sequences | None
    profile: bool
    rehearse: bool
    rehearse_ranks: RankNumbers | None

    def run(self, run: "Run", folder: Path) -> bool:
        """Collective: a rank's whole life."""
        from src.tasks.bench.rank import bench

        return bench(self, run, folder)
