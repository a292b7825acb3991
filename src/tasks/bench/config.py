"""task=bench: speed and memory of a model in a layout, on random tokens."""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from src.config.base import Config, RankNumbers
from src.config.bounds import Sequences, Steps, Tokens

if TYPE_CHECKING:
    from src.run import Run


BENCH_FILE = "bench.json"  # of a run folder


class Bench(Config):
    """Measure `steps` optimizer steps after `warmup_steps`; the figures go into bench.json of the run folder."""

    needs_corpus: ClassVar[bool] = False

    steps: Steps
    """Optimizer steps that are measured."""
    warmup_steps: Steps
    """Optimizer steps before that, with compilation."""
    seq_len: Tokens
    """Tokens per sequence."""
    global_batch: Sequences
    """Sequences per optimizer step, over all ranks."""
    micro_batch: Sequences | None
    """Sequences per rank and forward; null: up to 4, on a GPU up to 32,768 tokens, as layout and memory let."""
    profile: bool
    """True: also where the time of two steps goes, into bench.json and profile.md, with a trace beside."""
    rehearse: bool
    """True: a dry run builds some ranks of the layout on this CPU and counts what they hold."""
    rehearse_ranks: RankNumbers | None
    """Which ranks, such as [0,511]; null: the first of the first, middle and last pipeline stage."""

    def run(self, run: "Run", folder: Path) -> bool:
        """Run the task on this rank, from joining the process groups to leaving them. Collective."""
        from src.tasks.bench.rank import bench

        return bench(self, run, folder)
