"""task=evaluate: loss and perplexity of a checkpoint on a text."""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from src.config.base import Config, Place
from src.config.bounds import Count, Sequences, Steps, Tokens

if TYPE_CHECKING:
    from src.data.corpus import Corpus
    from src.run import Run


class Evaluate(Config):
    """Compute the validation loss of training over `split` in any layout, by source and in all; each sequence is
    read once.
    """

    needs_corpus: ClassVar[bool] = True
    forward_only: ClassVar[bool] = True
    steps: ClassVar[int] = 1

    source: Place = Field(alias="run")
    """Run folder, or hf:<folder or hub id>, whose model and tokenizer read."""
    step: Steps | None
    """Step of its checkpoint; null: the newest complete one."""
    ema: bool
    """True: the moving average of the weights that a run with task.ema_decay keeps; false: its weights."""
    split: Literal["validation", "train"]
    """Documents to read; validation: those held out; train: all others, which is all with data.validation_fraction=0.
    """
    samples: Count | None
    """Sequences of all sources together; null: all, of a mixture until its first source would repeat."""
    seq_len: Tokens
    """Tokens per sequence; that of the run, where run= names one."""
    micro_batch: Sequences
    """Sequences per rank and forward."""

    @property
    def global_batch(self) -> int:
        """Sequences of one forward pass: there is no gradient to accumulate."""
        return self.micro_batch

    def corpus_problems(self, corpus: "Corpus") -> list[str]:
        """Why the corpus has not the sequences that are asked for; empty when it has."""
        return held_problems(corpus, self.split, self.seq_len, self.samples, f"task.split={self.split}")

    def computed(self, run: "Run") -> "Run":
        """Weights in the dtype of the products."""
        return run.resting_in_compute_dtype()

    def run(self, run: "Run", folder: Path) -> bool:
        """Run the task on this rank, from joining the process groups to leaving them. Collective."""
        from src.tasks.evaluate.rank import evaluate

        return evaluate(self, run, folder)


def held_problems(corpus: "Corpus", split: str, seq_len: int, samples: int | None, named: str) -> list[str]:
    """Why a split of the corpus has not so many sequences (None: at least one); empty when it has. `named`: the split,
    for people.
    """
    held = corpus.windows(split, seq_len)
    if held == 0:
        share = "raise" if split == "validation" else "lower"
        return [
            f"{named}: {corpus.documents(split)} documents with {corpus.tokens(split)} "
            f"tokens make no sequence of task.seq_len={seq_len} in every source; {share} "
            "data.validation_fraction, or pass a smaller task.seq_len"
        ]
    if samples is not None and samples > held:
        return [
            f"task.samples={samples} is more than the {held} sequences of {named} at "
            f"task.seq_len={seq_len}; pass task.samples={held} or less, or null for all"
        ]
    return []
