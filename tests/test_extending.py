"""The worked examples of docs/extending.md do what the page says, in this process."""

import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from src.data.prepare import prepare
from src.data.tokenizer import Bytes
from tests.data.corpora import KEYS

PAGE = (Path(__file__).parents[1] / "docs/extending.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(python|yaml)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def example(word: str, folder: Path) -> Any:
    """The module that the block with this word makes."""
    (code,) = (text for language, text in BLOCKS if language == "python" and word in text)
    file = folder / "extending.py"
    file.write_text(code)
    spec = spec_from_file_location("extending", file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_block_is_tested() -> None:
    assert [language for language, _ in BLOCKS] == ["python", "python", "yaml"]


def test_a_metric(tmp_path: Path) -> None:
    metric = example("PERPLEXITY", tmp_path).PERPLEXITY
    now = SimpleNamespace(loss=torch.tensor(1.5), network=SimpleNamespace(mesh=SimpleNamespace(loss_copies=2)))
    shares = [metric.measure(now), metric.measure(now)]  # of two ranks that have the same loss
    assert metric.of_sum(torch.stack(shares).sum(), ranks=2).item() == pytest.approx(4.4817, abs=1e-4)


def test_a_data_source(tmp_path: Path) -> None:
    file = tmp_path / "poems.txt"
    file.write_text("one line\nanother line\na third\n")
    lines = example("class Lines", tmp_path).Lines(path=str(file), **KEYS | {"validation_fraction": 0.0})
    assert [*lines.texts(lines.pieces()[0])] == ["one line", "another line", "a third"]
    corpus = prepare(lines, Bytes(), tmp_path / "cache", progress=False)
    assert (corpus.documents("train"), lines.problems()) == (3, [])
    assert type(lines)(path="/nowhere", **KEYS).problems() == ["data.path=/nowhere: no such file"]
    option = yaml.safe_load(next(text for language, text in BLOCKS if language == "yaml"))
    assert set(option) - {"defaults", "_target_"} == set(type(lines).model_fields) - KEYS.keys()
