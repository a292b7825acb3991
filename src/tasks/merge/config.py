"""task=merge: the mean of the weights of several checkpoints or exports."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, Strict, model_validator

from src.config.base import Config, Place, one_or_more
from src.config.bounds import CountFromZero, Scale, Sequences, Steps, Tokens
from src.tasks.evaluate.config import held_problems
from src.tasks.merge.part import MergePart

if TYPE_CHECKING:
    from pathlib import Path

    from src.data.corpus import Corpus
    from src.run import Run

OneOrMore = Annotated[
    tuple[Place, ...],
    BeforeValidator(one_or_more),
    Strict(strict=False),
]


class Merge(Config):
    """Average the weights of several checkpoints or exports. The mean becomes a checkpoint of the task's own run
    folder, which starts a run, evaluates, writes and is exported as any other; merge.json there has the losses.
    """

    forward_only: ClassVar[bool] = True
    steps: ClassVar[int] = 1
    average_bytes: ClassVar[int] = 4  # of each number of the mean, whatever the weights' dtype

    sources: OneOrMore = Field(alias="runs")
    """Run folders, or hf:<folder> of exports, one for each checkpoint; one run alone serves all steps."""
    source_steps: Annotated[tuple[Steps | None, ...], Strict(strict=False)] | None = Field(alias="steps")
    """Step of each of them; null: the newest complete one."""
    weights: Literal["uniform"] | Annotated[tuple[Scale, ...], Strict(strict=False)]
    """Share of each in the mean, such as [1,2,1], of which only the ratios count; uniform: all alike."""
    samples: CountFromZero | None
    """Held-out sequences on which each of them and the mean are validated; null: all; 0: none."""
    seq_len: Tokens
    """Tokens per sequence; that of the first run, where it is one."""
    micro_batch: Sequences
    """Sequences per rank and forward."""

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        if not self.sources:
            raise ValueError("runs=[] names nothing; pass runs=[<run folder>,<run folder>]")
        steps = self.source_steps
        if steps == ():
            raise ValueError("steps=[] names none; pass steps=[<step>,<step>], or null for the newest")
        if steps is not None and len(steps) != len(self.sources) and len(self.sources) > 1:
            raise ValueError(
                f"steps has {len(steps)} of them for {len(self.sources)} runs; pass a step for each run, or one run "
                "for all steps"
            )
        if self.weights != "uniform" and len(self.weights) != (count := self._count):
            raise ValueError(
                f"weights has {len(self.weights)} of them for {count} checkpoints; pass {count}, or uniform"
            )
        return self

    @property
    def _count(self) -> int:
        return len(self.sources) if len(self.sources) > 1 or self.source_steps is None else len(self.source_steps)

    def parts(self) -> Iterator[MergePart]:
        """All of them, in order."""
        count = self._count
        sources = self.sources if len(self.sources) == count else self.sources * count
        steps = self.source_steps or (None,) * count
        shares = (1.0,) * count if self.weights == "uniform" else self.weights
        for source, step, share in zip(sources, steps, shares, strict=True):
            yield MergePart(source, step, share / sum(shares))

    @property
    def needs_corpus(self) -> bool:
        """Whether there is a validation."""
        return self.samples != 0

    @property
    def global_batch(self) -> int:
        """Sequences of one forward pass: there is no gradient to accumulate."""
        return self.micro_batch

    def corpus_problems(self, corpus: "Corpus") -> list[str]:
        """Why the corpus has not the sequences that are asked for; empty when it has."""
        return held_problems(corpus, "validation", self.seq_len, self.samples, "the held-out text")

    def problems(self, run: "Run") -> list[str]:
        """Too few of them, weights of another shape or model than the first ones, other tokenizers. Runs on the
        launcher.
        """
        from src.tasks.merge.check import unlike

        if self._count < 2:
            return [
                "task.runs and task.steps name one checkpoint, and a mean is of at least 2; pass steps=[<step>,<step>]"
            ]
        return [line for part in self.parts() for line in unlike(part, run, self.sources[0])]

    def computed(self, run: "Run") -> "Run":
        """As it is: the mean is written in the dtype that precision.storage says."""
        return run

    def run(self, run: "Run", folder: "Path") -> bool:
        """Run the task on this rank, from joining the process groups to leaving them. Collective. False when a signal
        came before the mean was written.
        """
        from src.tasks.merge.rank import merge

        return merge(self, run, folder)
