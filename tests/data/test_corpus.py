"""What a corpus can give, and every reason why it cannot feed a run, before any rank starts."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from src.data.config import Data, Mixture
from src.data.corpus import Corpus, check
from tests.data.corpora import KEYS, corpus, mixture, synthetic, text


def problems(made: Corpus, data: Data, **changes: Any) -> list[str]:
    keys = {"seq_len": 32, "global_batch": 4, "steps": 10, "validation_samples": 4}
    return check(made, data, **{**keys, **changes})


def test_a_corpus_that_fits_has_no_problem(tmp_path: Path) -> None:
    assert problems(corpus(synthetic(), tmp_path), synthetic()) == []


def test_every_problem_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a short text")
    data = text(tmp_path / "a.txt", document_masks=True, validation_fraction=0.0)
    made = corpus(data, tmp_path / "cache")
    seq_len, validation = problems(made, data)
    assert "14 training tokens fill no sample of task.seq_len=32: use task.seq_len=13 or less" in seq_len
    assert problems(made, data, seq_len=13, global_batch=1, validation_samples=0) == []
    assert "data.validation_fraction=0.0 holds out 0 documents of 1, not one window" in validation


@pytest.mark.parametrize(("letters", "train"), [(61, 1), (62, 1), (63, 2), (64, 2), (94, 2), (95, 3)])
def test_a_window_takes_one_token_more_than_it_predicts(tmp_path: Path, letters: int, train: int) -> None:
    """Two marks and the letters: 64 tokens hold one window of 32 and its 33rd token, 65 hold two."""
    (tmp_path / "a.txt").write_text("x" * letters)
    made = corpus(text(tmp_path / "a.txt", validation_fraction=0.0), tmp_path / "cache")
    assert made.tokens("train") == letters + 2
    assert made.windows("train", 32) == train


def test_one_global_batch_must_be_there(tmp_path: Path) -> None:
    made = corpus(synthetic(), tmp_path)
    windows = made.windows("train", 32)
    assert windows == (made.tokens("train") - 1) // 32
    assert problems(made, synthetic(), global_batch=windows) == []
    (problem,) = problems(made, synthetic(), global_batch=windows + 1)
    assert f"use task.global_batch={windows} or less" in problem


def test_more_held_out_samples_than_there_are_are_refused_with_their_number(tmp_path: Path) -> None:
    made = corpus(synthetic(), tmp_path)
    held = made.windows("validation", 32)
    assert held == -(-(made.tokens("validation") - 1) // 32)
    assert problems(made, synthetic(), validation_samples=held) == []
    (problem,) = problems(made, synthetic(), validation_samples=held + 1)
    assert f"task.validate_samples={held + 1} is more than the {held} held-out samples" in problem
    assert f"use task.validate_samples={held} or less" in problem


def test_more_epochs_than_allowed_are_refused_with_the_steps_that_fit(tmp_path: Path) -> None:
    data = synthetic(max_epochs=1.5)
    made = corpus(data, tmp_path)
    (problem,) = problems(made, data, steps=100_000)
    allowed = int(1.5 * made.windows("train", 32) / 4)
    assert f"allows {allowed} steps" in problem
    assert problems(made, data, steps=allowed) == []
    assert problems(made, data, steps=allowed + 1) != []
    assert problems(made, synthetic(), steps=100_000) == []


def test_each_source_of_a_mixture_has_its_own_epochs(tmp_path: Path) -> None:
    data = mixture({"a": 0.9, "b": 0.1}, max_epochs=1)
    made = corpus(data, tmp_path)
    steps = made.windows("train", 32) // 4
    assert problems(made, data, steps=steps) == []
    (problem,) = problems(made, data, steps=steps + 2)
    assert problem.startswith("a: ")


def test_an_end_of_document_is_needed_to_tell_documents_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = corpus(synthetic(), tmp_path)
    monkeypatch.setattr(type(made.tokenizer), "eos_id", None)
    assert problems(made, synthetic()) == []
    assert "need a tokenizer with an end of document" in problems(made, synthetic(mask_document_starts=True))[0]


@pytest.mark.parametrize(
    ("weights", "reason"),
    [({"a": 1.0}, "give each source one weight"), ({"a": 1.0, "b": 0.0}, "greater than or equal")],
)
def test_a_mixture_needs_one_weight_for_each_source(weights: dict[str, float], reason: str) -> None:
    sources = {"a": synthetic(), "b": synthetic()}
    with pytest.raises(ValidationError, match=reason):
        Mixture.model_validate({**KEYS, "sources": sources, "weights": weights})
