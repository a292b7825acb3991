"""task=prepare: tokenise the section `data` before a run needs it, on as many machines as there are."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from src.config.base import Config
from src.config.bounds import CountFromZero, Seconds, Tokens

if TYPE_CHECKING:
    from src.run import Run

PREPARE_FILE = "prepare.json"  # of a run folder


class Prepare(Config):
    """Tokenise what is not there yet; several preparers of the same data share the pieces, whoever started them."""

    needs_corpus: ClassVar[bool] = False  # it makes it
    without_model: ClassVar[bool] = True
    forward_only: ClassVar[bool] = True
    steps: ClassVar[int] = 1
    seq_len: ClassVar[int] = 1
    global_batch: ClassVar[int] = 1
    micro_batch: ClassVar[int] = 1

    element: CountFromZero
    """Which of several preparers this is, such as range(16) of a sweep: the elements of one job array."""
    pack_seq_len: Tokens | None
    """Tokens per sequence for which data.packing=best_fit is computed here, too; null: the launcher of a run does it.
    """
    log_seconds: Seconds
    """Seconds between two lines on how far it is."""

    def computed(self, run: "Run") -> "Run":
        """Nothing is computed."""
        return run

    def problems(self, run: "Run") -> list[str]:
        """Known before anything starts."""
        from src.data.tokenizer import source_problems, vocabulary_problems

        found = vocabulary_problems(run.tokenizer, sys.maxsize)  # whether it can be read; no model has to know its ids
        found += [line for _, source in run.data.parts().values() for line in source.problems()]
        found += source_problems(run.tokenizer, run.data)
        if run.parallel.world > 1:
            found.append(
                f"parallel asks for {run.parallel.world} ranks, and task=prepare is one process that starts "
                "data.processes others; pass parallel=single, and -m 'task.element=range(4)' for four of them"
            )
        if self.pack_seq_len is not None and run.data.packing != "best_fit":
            found.append(
                f"task.pack_seq_len={self.pack_seq_len} packs nothing with data.packing={run.data.packing}; pass null"
            )
        return found

    def run(self, run: "Run", folder: Path) -> bool:
        """Tokenise, as one of however many. False when a signal ended it: what is done stays."""
        from src.tasks.prepare.rank import prepare_data

        return prepare_data(self, run, folder)
