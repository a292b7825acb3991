"""Files in the harness's form: read, refused by name, asked with worked examples, and scored as the harness does."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from src.errors import DataError
from src.evaluation import harness
from src.evaluation.chosen import ChosenTasks, problems
from src.evaluation.config import Evaluation
from src.evaluation.local_task import evaluate, questions
from src.evaluation.task_file import TaskFile, local_tasks
from tests.evaluation.tasks import ROWS, Oracle, write_task


def options(**changes: Any) -> Evaluation:
    neutral = {"every": 10, "tasks": ["bits_per_byte"], "samples": None, "fewshot": None, "seeds": 1, "ema": False}
    aside = {"cluster": None, "arguments": [], "wait_seconds": 0.0}
    return Evaluation(**(neutral | aside | changes))


@pytest.mark.parametrize("name", local_tasks())
def test_a_task_that_comes_along_is_whole(name: str) -> None:
    """Every row has a question and an answer, and right answers are not all in one place."""
    task = TaskFile.read(local_tasks()[name])
    assert task.name == name
    assert len(task.rows()) >= 8
    assert all(task.target(row) for row in task.rows())
    if task.kind == "multiple_choice":
        golds = [task.gold(row) for row in task.rows()]
        assert all(len(set(task.choices(row))) == 4 for row in task.rows())
        assert max(map(golds.count, set(golds))) < len(golds) / 2
    scores = evaluate(task, Oracle(), samples=None, fewshot=None, seeds=1)
    assert set(scores) == set(task.metrics)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"process_docs": "f"}, "process_docs='f' is not read here"),
        ({"output_type": "multiple_choices"}, "did you mean multiple_choice?"),
        ({"doc_to_choice": None}, "doc_to_choice is missing"),
        ({"metric_list": [{"metric": "f1"}]}, "metric 'f1': output_type=multiple_choice has acc, acc_norm, acc_bytes"),
        ({"dataset_path": "hellaswag"}, "dataset_path='hellaswag': json"),
        ({"test_split": "validation"}, "test_split names none of dataset_kwargs.data_files: test"),
        ({"dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}}}, "nowhere.jsonl: no such file"),
        ({"repeats": 3}, "repeats=3"),
    ],
)
def test_what_is_not_read_is_refused_by_its_name(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    file = write_task(tmp_path, "multiple_choice", **changes)
    with pytest.raises(DataError, match=r"evaluate\.tasks") as caught:
        TaskFile.read(file)
    assert words in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_template_looks_at_nothing_but_its_row(tmp_path: Path) -> None:
    reach = "{{ q.__class__.__mro__[1].__subclasses__() }}"
    task = TaskFile.read(write_task(tmp_path, "multiple_choice", doc_to_text=reach))
    with pytest.raises(DataError, match="cannot be filled"):
        task.question(task.rows()[0])
    other = TaskFile.read(write_task(tmp_path, "multiple_choice", doc_to_text="{{missing}}"))
    with pytest.raises(DataError, match="missing"):
        other.question(other.rows()[0])


def test_a_right_answer_that_is_no_choice_is_told(tmp_path: Path) -> None:
    task = TaskFile.read(write_task(tmp_path, "multiple_choice", doc_to_target="9"))
    with pytest.raises(DataError, match="is none of"):
        evaluate(task, Oracle(), samples=None, fewshot=0, seeds=1)


def test_worked_examples_are_drawn_and_never_the_question_itself(tmp_path: Path) -> None:
    task = TaskFile.read(write_task(tmp_path, "multiple_choice"))
    first, again, other = (questions(task, None, 2, seed) for seed in (0, 0, 1))
    assert first == again
    assert [each.context for each in first] != [each.context for each in other]
    for row, asked in zip(ROWS["multiple_choice"], first, strict=True):
        *examples, last = asked.context.split("\n\n")
        assert last == f"Q: {row['q']}\nA:"
        assert len(examples) == 2
        assert not any(each.startswith(f"Q: {row['q']}\n") for each in examples)
        answers = {f"Q: {each['q']}\nA: {each['options'][each['right']]}" for each in ROWS["multiple_choice"]}
        assert set(examples) <= answers


def test_seeds_give_a_spread_and_one_mean(tmp_path: Path) -> None:
    task = TaskFile.read(write_task(tmp_path, "multiple_choice"))
    alone = [evaluate(task, Oracle(), samples=None, fewshot=2, seeds=1)["acc"]]
    three = evaluate(task, Oracle(), samples=None, fewshot=2, seeds=3)["acc"]
    assert alone[0].spread is None
    assert three.spread is not None
    assert evaluate(task, Oracle(), samples=3, fewshot=0, seeds=3)["acc"].spread is None  # nothing is drawn


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": []}, "evaluate.every=10 names no task"),
        ({"ema": True}, "evaluate.ema=true: the run keeps no average"),
        ({"arguments": ["parallel=tp2"]}, "evaluate.arguments=parallel=tp2: there is no command"),
        ({"tasks": ["short_texts"], "seeds": 2}, "evaluate.seeds=2: no task has worked examples"),
        ({"tasks": ["bits_per_byte"], "fewshot": 2}, "evaluate.fewshot=2: no task has questions"),
        ({"tasks": ["nowhere.yaml"]}, "nowhere.yaml: cannot be read as a task"),
    ],
)
def test_what_cannot_be_done_is_told_on_the_launcher(changes: dict[str, Any], words: str) -> None:
    (found,) = problems(options(**changes), averaged=False)
    assert words in found
    assert problems(options(tasks=["copy_words", "bits_per_byte"], seeds=2), averaged=False) == []


def test_more_worked_examples_than_there_are_are_refused(tmp_path: Path) -> None:
    """Of seven rows six stand beside each question; no fewer are taken in silence."""
    file = str(write_task(tmp_path, "multiple_choice"))
    assert problems(options(tasks=[file], fewshot=6), averaged=False) == []
    (found,) = problems(options(tasks=[file], fewshot=7), averaged=False)
    assert found == "evaluate.fewshot=7: task 'my_multiple_choice' has 6 worked examples for a question; at most 6"
    write_task(tmp_path, "multiple_choice", num_fewshot=9)
    (found,) = problems(options(tasks=[file]), averaged=False)
    assert found.startswith(f"{file}: num_fewshot=9: task ")


def test_a_name_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "installed", lambda: False)
    (found,) = problems(options(tasks=["english_speling"]), averaged=False)
    assert "did you mean english_spelling?" in found
    assert "pip install lm_eval" in found
    with pytest.raises(ValueError, match="stands there twice"):
        options(tasks=["short_texts", "short_texts"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ROWS)
def test_scores_are_those_of_the_harness(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same file, the same answers, our reading and the library's."""
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    file = write_task(tmp_path, kind)
    ours = evaluate(TaskFile.read(file), Oracle(), samples=None, fewshot=0, seeds=1)
    theirs = harness.evaluate([str(file)], Oracle(), samples=None, fewshot=None, seeds=1)[f"my_{kind}"]
    assert set(ours) == set(theirs)
    for metric, score in ours.items():
        assert score.value == pytest.approx(theirs[metric].value, rel=1e-9), metric
        if theirs[metric].stderr is not None:
            assert score.stderr == pytest.approx(theirs[metric].stderr, rel=1e-9), metric


@pytest.mark.slow
def test_names_of_the_harness_are_its_own() -> None:
    pytest.importorskip("lm_eval")
    (found,) = problems(options(tasks=["hellaswagg"]), averaged=False)
    assert "did you mean hellaswag?" in found


def test_tasks_are_sorted_by_who_answers_for_them(tmp_path: Path) -> None:
    file = write_task(tmp_path, "loglikelihood")
    chosen = ChosenTasks.of(options(tasks=["bits_per_byte", "short_texts", str(file), "hellaswag"]))
    assert [each.name for each in chosen.files] == ["short_texts", "my_loglikelihood"]
    assert (chosen.library, chosen.bits_per_byte) == (("hellaswag",), True)
    assert yaml.safe_load(file.read_text())["task"] == "my_loglikelihood"
