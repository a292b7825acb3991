"""Evaluation while training: the tasks of `evaluate`, on the weights that train or their average, between two steps."""

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

from src.data.batches import Batches
from src.data.corpus import Corpus
from src.distributed.collectives import any_rank
from src.distributed.model_stages import ModelStages
from src.evaluation import harness
from src.evaluation.chosen import ChosenTasks
from src.evaluation.config import BITS_PER_BYTE, Evaluation
from src.evaluation.local_task import evaluate
from src.evaluation.score import Share, TaskScore, bits
from src.hugging_face.origin import Origin, ends_of
from src.tasks.evaluate.language_model import LanguageModel
from src.train.average import WeightAverage
from src.train.report import Report
from src.train.validate import StoppedError, row_sums

Scores = Mapping[str, Mapping[str, TaskScore]]  # by task and metric
Stopped = Callable[[], bool]


@dataclass
class LiveEvaluation:
    """Scores of a network that is there, without a copy of its weights."""

    options: Evaluation
    network: ModelStages
    batches: Batches
    corpus: Corpus
    rows: int  # of a micro-batch
    length: int  # tokens of a sequence
    origin: Origin | None  # of the weights that the run began from

    def __post_init__(self) -> None:
        self._tasks = ChosenTasks.of(self.options)

    @property
    def names(self) -> list[str]:
        """Of the tasks, as their numbers begin."""
        ours = [each.name for each in self._tasks.files]
        return [*([BITS_PER_BYTE] if self._tasks.bits_per_byte else []), *ours, *self._tasks.library]

    def scores(self, stopped: Stopped) -> tuple[Scores, dict[str, float]]:
        """Collective. All scores, and the seconds of each task. StoppedError where `stopped` came true."""
        found: dict[str, Mapping[str, TaskScore]] = {}
        seconds: dict[str, float] = {}
        model = LanguageModel(
            self.network,
            self.corpus.tokenizer,
            length=self.length,
            rows=self.rows,
            ends=ends_of(self.corpus.tokenizer, self.origin),
            stopped=stopped,
        )
        told = self.options
        began = time.perf_counter()
        if self._tasks.bits_per_byte:
            found[BITS_PER_BYTE] = self._bits_per_byte(stopped)
            seconds[BITS_PER_BYTE], began = time.perf_counter() - began, time.perf_counter()
        for task in self._tasks.files:
            found[task.name] = evaluate(task, model, samples=told.samples, fewshot=told.fewshot, seeds=told.seeds)
            seconds[task.name], began = time.perf_counter() - began, time.perf_counter()
        for name in self._tasks.library:
            found |= harness.evaluate([name], model, samples=told.samples, fewshot=told.fewshot, seeds=told.seeds)
            seconds[name], began = time.perf_counter() - began, time.perf_counter()
        return found, seconds

    def _bits_per_byte(self, stopped: Stopped) -> dict[str, TaskScore]:
        """Of the held-out rows of each source, then "all" where there are several; a token counts as its mean bytes."""
        found: dict[str, list[Share]] = {}
        for number, part in enumerate(self.corpus.parts):
            rows = self.batches.fixed("validation", self.options.samples, source=number)
            nats, tokens = row_sums(self.network, rows, stopped)
            bytes_per_token = part.shards.text_bytes("validation") / max(part.shards.tokens("validation"), 1)
            # What fills the last batches has no label.
            found[part.name] = [
                (lost, count * bytes_per_token) for lost, count in zip(nats, tokens, strict=True) if count
            ]
        if len(found) > 1:
            found["all"] = [part for parts in found.values() for part in parts]
        return {name: bits([parts]) for name, parts in found.items() if sum(weight for _, weight in parts) > 0}


@dataclass
class TrainingEvaluator:
    """What the training loop asks between two steps; see `Evaluator` of src/train/loop.py."""

    live: LiveEvaluation
    average: WeightAverage | None
    report: Report
    steps: int  # of the whole run

    def __post_init__(self) -> None:
        self.newest: tuple[int, Scores] | None = None

    def due(self, step: int) -> bool:
        return self.live.options.due(step, self.steps)

    def owed(self, step: int) -> bool:
        """Collective."""
        if not self.due(step):
            return False
        return any_rank(self.report.lacks_scores(self.live.names, step), self.live.network.device)

    def __call__(self, step: int, stopped: Stopped) -> bool:
        """Collective. False where a stop cut it short: nothing is told then, and the next life makes it good."""
        if not self.owed(step):
            return True
        average = self.average if self.live.options.ema else None
        try:
            with nullcontext() if average is None else average.in_place():
                scores, seconds = self.live.scores(stopped)
        except StoppedError:
            return False
        self.newest = step, scores
        spent = {f"evaluate/{name}/seconds": each for name, each in seconds.items()}
        self.report.measure(step, numbers(scores) | spent)
        for line in lines(scores):
            self.report.say(f"step {step}  {line}")
        return True

    def aside(self) -> None:
        """Nothing: all of it happens between two steps."""

    def conclude(self) -> None:
        """The last word of a run that has come to its end."""
        if self.newest is not None:
            for line in lines(self.newest[1]):
                self.report.say(f"score after step {self.newest[0]}: {line}")


def numbers(scores: Scores) -> dict[str, float]:
    """As metrics.jsonl has them."""
    found: dict[str, float] = {}
    for task, by_metric in scores.items():
        for metric, score in by_metric.items():
            more = {"": score.value, "_stderr": score.stderr, "_spread": score.spread}
            found |= {f"evaluate/{task}/{metric}{end}": value for end, value in more.items() if value is not None}
    return found


def lines(scores: Scores) -> list[str]:
    """One for each task, for a person."""
    return [
        f"{task}: " + "  ".join(f"{metric} {score.text}" for metric, score in by_metric.items())
        for task, by_metric in scores.items()
    ]
