"""What is chosen by the amount of text, without a run."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from src.config.build import build
from src.config.composition.requests import asked
from src.data.prepare import prepare
from src.errors import DataError, UserError
from src.launch.start import checked
from src.tasks.fitted import BYTES_PER_TOKEN, SIZES, fitted, preset_for, with_vocabulary
from src.tasks.source import completed

BPE = {"_target_": "src.data.tokenizer.Bpe", "vocab_size": 1000, "sample_bytes": 1}


def own(monkeypatch: pytest.MonkeyPatch, *words: str) -> dict[str, Any]:
    """The tree of experiment=own_text, completed."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    (tree,) = asked(["experiment=own_text", "cluster.gpus=0", *words], completed).trees
    return tree


def written(folder: Path, texts: list[str]) -> Path:
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text)
    return folder


def test_three_documents_train_and_validate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [" ".join(f"word{number * each % 97}" for each in range(300)) for number in (3, 5, 7)]
    tree = own(monkeypatch, f"data.files={written(tmp_path / 'my', texts)}", f"root={tmp_path / 'runs'}")
    ((_, run, plan),) = checked([tree])
    corpus = prepare(run.data, run.tokenizer, run.cache, progress=False)
    assert run.model.vocab_size % 128 == 0
    assert run.tokenizer.vocabulary() <= run.model.vocab_size
    assert corpus.preparation.documents == 3, "though each lies in two parts"
    assert corpus.windows("train", run.task.seq_len) >= run.task.global_batch
    assert run.task.global_batch.bit_count() == 1, "a power of two, which passes divide"
    assert corpus.windows("validation", run.task.seq_len) >= tree["task"]["validate_samples"] >= 1
    assert plan.steps == run.task.steps >= 100


def test_what_is_typed_wins_and_all_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = f"data.files={written(tmp_path / 'my', ['some text ' * 2000])}"
    tree = own(monkeypatch, files, "model.n_layers=2", "task.steps=7", "task.seq_len=64", "tokenizer.vocab_size=300")
    assert (tree["model"]["n_layers"], tree["model"]["vocab_size"], tree["task"]["steps"]) == (2, 384, 7)
    assert (tree["task"]["seq_len"], tree["tokenizer"]["vocab_size"]) == (64, 300)
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "text: 1 file, 0.02 MB, about 13,333 tokens"
    assert told[1] == "  model: 2 layers of 256, a tokenizer of 300 ids"
    assert told[2].startswith("  task.steps=7 task.seq_len=64 task.global_batch=16: about 0.5 passes")
    assert told[3] == "model.vocab_size=384: the tokenizer's 300 ids, rounded up to 128"
    build(tree)


def test_the_size_of_the_model_follows_the_text() -> None:
    millions = dict(SIZES)
    assert [preset_for(size) for size in (0, 10**6, 3 * 10**8)] == ["llama3_debug"] * 3
    assert [preset_for(round(each * 1e9)) for each in (0.4, 1.1, 2.2, 7)] == sorted(millions, key=millions.__getitem__)
    assert preset_for(round(60e6 * 5 * BYTES_PER_TOKEN)) == "llama3_60m"


def test_a_large_text_takes_the_recipe_of_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "large.txt").open("wb") as file:
        file.truncate(2_400_000_000)  # holes, which take no disk
    tree = own(monkeypatch, f"data.files={tmp_path / 'large.txt'}", "optim.lr=1e-4")
    assert (tree["model"]["dim"], tree["model"]["n_layers"], tree["tokenizer"]["vocab_size"]) == (768, 14, 16384)
    task, lr = tree["task"], tree["optim"]["lr"]
    assert (task["seq_len"], task["global_batch"], task["validate_samples"], lr) == (2048, 256, 64, 1e-4)
    assert 3.9 < task["steps"] * 2048 * 256 / (2.4e9 / BYTES_PER_TOKEN) < 4.1


def test_a_parquet_file_counts_as_the_text_that_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"{number} " + "a word and another " * 50 for number in range(500)]
    table = pa.table({"text": texts, "url": ["https://example.org/" * 20] * 500})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    assert (tmp_path / "a.parquet").stat().st_size < 50_000
    own(monkeypatch, f"data.files={tmp_path / 'a.parquet'}")
    assert capsys.readouterr().err.startswith("text: 1 file, 0.48 MB, about ")


def test_files_that_are_not_there_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="matches no file"):
        fitted(
            {
                "data": {"_target_": "src.data.config.Text", "files": "no/*.txt", "validation_fraction": 0.1},
                "task": {"steps": None, "seq_len": 8, "global_batch": 1},
            },
            {},
        )
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(UserError, match="or the amount of text of data=text"):
        asked(["model=auto"], completed)


def test_a_vocabulary_follows_any_tokenizer_and_leaves_a_wrong_one_to_others() -> None:
    model = {"vocab_size": None}
    assert with_vocabulary({"model": model, "tokenizer": BPE})["model"] == {"vocab_size": 1024}
    for wrong in ({}, BPE | {"vocab_size": "x"}, {"_target_": "src.data.tokenizer.Nothing"}):
        assert with_vocabulary({"model": model, "tokenizer": wrong})["model"] is model
    untouched = {"model": {"vocab_size": 5}, "tokenizer": BPE}
    assert with_vocabulary(untouched) is untouched
