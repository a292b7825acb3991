"""Scores and their standard errors, against numpy and against many samples."""

import math
import random

import numpy as np
import pytest

from src.evaluation.score import TaskScore, bits, mean_score, perplexity


def test_the_mean_of_documents_and_its_error() -> None:
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    found = mean_score([values])
    assert found.value == pytest.approx(0.6)
    assert found.spread is None
    assert found.stderr == pytest.approx(np.std(values, ddof=1) / math.sqrt(5))


def test_several_drawings_are_one_score_with_their_spread() -> None:
    drawings = [[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]
    found = mean_score(drawings)
    assert found.value == pytest.approx(0.625)
    assert found.spread == pytest.approx(np.std([0.75, 0.5], ddof=1))
    assert found.stderr == pytest.approx(np.std([0.5, 0.0, 1.0, 1.0], ddof=1) / 2)


def test_the_error_of_bits_per_byte_is_that_of_many_corpora() -> None:
    """400 corpora of 50 documents each: their scores vary as the standard error of one says, to a quarter."""
    chance = random.Random(1)

    def corpus() -> TaskScore:
        sizes = [chance.randrange(20, 200) for _ in range(50)]
        return bits([[(size * chance.gauss(1.5, 0.4), float(size)) for size in sizes]])

    found = [corpus() for _ in range(400)]
    observed = float(np.std([each.value for each in found], ddof=1))
    told = float(np.mean([each.stderr for each in found if each.stderr is not None]))
    assert told == pytest.approx(observed, rel=0.25)
    assert float(np.mean([each.value for each in found])) == pytest.approx(1.5 / math.log(2), rel=0.02)


def test_perplexity_is_the_exponential_and_ends_in_infinity() -> None:
    found = perplexity([[(2.0, 1.0), (4.0, 1.0)]])
    assert found.value == pytest.approx(math.exp(3.0))
    assert found.stderr == pytest.approx(math.exp(3.0) * 1.0)  # of 2 and 4: deviation sqrt(2), over sqrt(2)
    assert perplexity([[(1e6, 1.0)]]) == TaskScore(math.inf, None)


def test_a_person_sees_the_error() -> None:
    assert TaskScore(0.41234, 0.0312, 0.01).text == "0.412 ± 0.031 (spread 0.010)"
    assert TaskScore(2.0, None).text == "2.000"
