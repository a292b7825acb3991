"""A task of a file, asked of a model: questions with their worked examples, and what the answers are worth."""

import random
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from src.evaluation.score import Share, TaskScore, bits, mean_score, perplexity
from src.evaluation.task_file import Row, TaskFile

Pair = tuple[str, str]  # what is read, and what follows it


class Answers(Protocol):
    """A language model. Every method is collective, with equal arguments on all ranks, and answers in their order."""

    def log_likelihoods(self, pairs: Sequence[Pair]) -> list[float]:
        """Nats (negative) of what follows, after what is read."""

    def greedy(self, pairs: Sequence[Pair]) -> list[bool]:
        """Whether the likeliest token is always that of what follows."""

    def whole(self, texts: Sequence[str]) -> list[float]:
        """Nats (negative) of whole texts, each token once, after the mark that begins a document."""

    def written(self, prompts: Sequence[str], until: Sequence[str], most: int) -> list[str]:
        """The likeliest continuation of at most `most` tokens, up to the first of `until`."""


@dataclass(frozen=True)
class AskedRow:
    """A document as a model is asked about it."""

    row: Row
    context: str


def evaluate(
    task: TaskFile, model: Answers, *, samples: int | None, fewshot: int | None, seeds: int
) -> dict[str, TaskScore]:
    """Scores by metric, over the first `samples` documents. Collective.

    `fewshot`: None: as many examples as the task says. Without examples all drawings are one.
    """
    shots = task.fewshot if fewshot is None else fewshot
    if task.kind == "loglikelihood_rolling":
        shots = 0
    drawn = [
        _SCORED[task.kind](task, model, questions(task, samples, shots, seed)) for seed in range(seeds if shots else 1)
    ]
    return {metric: _AGGREGATES[metric]([each[metric] for each in drawn]) for metric in task.metrics}


def questions(task: TaskFile, samples: int | None, shots: int, seed: int) -> list[AskedRow]:
    """The documents, each after `shots` worked examples: drawing number `seed`, the same on every rank."""
    rows = task.rows()[:samples]
    if not shots:
        return [AskedRow(row, task.description + task.question(row)) for row in rows]
    pool, same = task.examples()
    return [
        AskedRow(
            row,
            task.description + _worked(task, pool, number if same else None, shots, seed, number) + task.question(row),
        )
        for number, row in enumerate(rows)
    ]


def _worked(task: TaskFile, pool: Sequence[Row], own: int | None, shots: int, seed: int, number: int) -> str:
    """Examples with their answers; never the document itself, number `own` of the pool."""
    others = [index for index in range(len(pool)) if index != own]
    chosen = random.Random(f"{seed}/{number}").sample(others, shots)
    worked = (f"{task.question(pool[each])}{task.target_delimiter}{task.target(pool[each])}" for each in chosen)
    return "".join(f"{each}{task.delimiter}" for each in worked)


def _chosen(task: TaskFile, model: Answers, asked: Sequence[AskedRow]) -> dict[str, list[float]]:
    """Of several continuations the likeliest: as they are, per letter, per byte of UTF-8."""
    choices = [task.choices(each.row) for each in asked]
    pairs = [
        (each.context, task.target_delimiter + choice)
        for each, many in zip(asked, choices, strict=True)
        for choice in many
    ]
    nats = iter(model.log_likelihoods(pairs))
    found: dict[str, list[float]] = {"acc": [], "acc_norm": [], "acc_bytes": []}
    for each, many in zip(asked, choices, strict=True):
        likely, gold = [next(nats) for _ in many], task.gold(each.row)
        for metric, lengths in (
            ("acc", [1] * len(many)),
            ("acc_norm", list(map(len, many))),
            ("acc_bytes", [len(choice.encode()) for choice in many]),
        ):
            worth = [one / max(length, 1) for one, length in zip(likely, lengths, strict=True)]
            found[metric].append(float(worth.index(max(worth)) == gold))
    return found


def _continued(task: TaskFile, model: Answers, asked: Sequence[AskedRow]) -> dict[str, list[float] | list[Share]]:
    pairs = [(each.context, task.target(each.row)) for each in asked]  # its own beginning is part of a target
    found: dict[str, list[float] | list[Share]] = {
        "perplexity": [(-nats, 1.0) for nats in model.log_likelihoods(pairs)]
    }
    if "acc" in task.metrics:
        found["acc"] = [float(each) for each in model.greedy(pairs)]
    return found


def _read(task: TaskFile, model: Answers, asked: Sequence[AskedRow]) -> dict[str, list[Share]]:
    texts = [task.target(each.row) for each in asked]
    nats = [-each for each in model.whole(texts)]
    sizes: dict[str, Callable[[str], int]] = {
        "word_perplexity": lambda text: len(re.split(r"\s+", text)),
        "byte_perplexity": lambda text: len(text.encode()),
        "bits_per_byte": lambda text: len(text.encode()),
    }
    return {
        metric: [(each, float(size(text))) for each, text in zip(nats, texts, strict=True)]
        for metric, size in sizes.items()
    }


def _written(task: TaskFile, model: Answers, asked: Sequence[AskedRow]) -> dict[str, list[float]]:
    texts = model.written([each.context for each in asked], task.until, task.most_written)
    wanted = [task.target(each.row) for each in asked]
    same = (_bare(text, task) == _bare(want, task) for text, want in zip(texts, wanted, strict=True))
    return {"exact_match": [float(each) for each in same]}


def _bare(text: str, task: TaskFile) -> str:
    """Without what the metric ignores."""
    text = text.lower() if "case" in task.ignores else text
    return text.translate(str.maketrans("", "", string.punctuation)) if "punctuation" in task.ignores else text


_SCORED: Mapping[str, Callable[[TaskFile, Answers, Sequence[AskedRow]], Mapping[str, Sequence[Any]]]] = {
    "multiple_choice": _chosen,
    "loglikelihood": _continued,
    "loglikelihood_rolling": _read,
    "generate_until": _written,
}
_AGGREGATES: Mapping[str, Callable[[Sequence[Any]], TaskScore]] = {
    **dict.fromkeys(("acc", "acc_norm", "acc_bytes", "exact_match"), mean_score),
    **dict.fromkeys(("perplexity", "word_perplexity", "byte_perplexity"), perplexity),
    "bits_per_byte": bits,
}
