"""Datasets in the hub's layout, from a folder and without a network."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from src.data.config import Hub
from src.data.hub import HubSource
from src.errors import DataError
from tests.data.corpora import KEYS, corpus, stream, texts_of

TEXTS = [f"story number {number} of the hub" for number in range(90)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three parquet shards of a split `train`, one of `validation`, under a configuration named in the card."""
    root = tmp_path / "stories"
    (root / "en").mkdir(parents=True)
    for shard in range(3):
        part = pa.table({"text": TEXTS[30 * shard : 30 * shard + 30], "id": range(30)})
        pq.write_table(part, root / f"en/train-{shard:05d}-of-00003.parquet")
    pq.write_table(pa.table({"text": ["held"], "id": [0]}), root / "en/validation-00000-of-00001.parquet")
    files = "".join(f"  - split: {split}\n    path: en/{split}-*\n" for split in ("train", "validation"))
    (root / "README.md").write_text(f"---\nconfigs:\n- config_name: en\n  data_files:\n{files}---\n# Stories\n")
    return root


def source(folder: Path, **changes: object) -> HubSource:
    keys = {
        "name": "en",
        "data_dir": None,
        "split": "train",
        "revision": None,
        "field": "text",
        "max_documents": None,
        "bad_rows": "refuse",
    }
    return HubSource.model_validate({"path": str(folder), **keys, **changes})


def test_all_shards_of_the_split_are_read_in_order(folder: Path) -> None:
    assert texts_of(source(folder)) == TEXTS
    assert len(source(folder).pieces()) == 3
    assert texts_of(source(folder, split="validation")) == ["held"]


@pytest.mark.parametrize("wanted", [1, 7, 30])
def test_no_more_documents_than_asked(folder: Path, wanted: int) -> None:
    assert texts_of(source(folder, max_documents=wanted)) == TEXTS[:wanted]


def test_a_large_share_is_taken_evenly_from_the_shards(folder: Path) -> None:
    assert [span.stop for piece in source(folder, max_documents=25_001).pieces() for span in piece.spans] == [
        8334,
        8334,
        8333,
    ]


def test_it_becomes_shards_like_any_other_source(folder: Path, tmp_path: Path) -> None:
    data = Hub.model_validate({**KEYS, **source(folder).model_dump()})
    made = corpus(data, tmp_path / "cache")
    (part,) = made.parts
    for split in ("train", "validation"):
        assert part.shards.read(split, 0, made.tokens(split)).tolist() == stream(TEXTS, split, 0.1)
    assert corpus(data, tmp_path / "cache").preparation.cached
    (folder / "en/train-00001-of-00003.parquet").write_bytes((folder / "en/train-00000-of-00003.parquet").read_bytes())
    assert not corpus(data, tmp_path / "cache").preparation.cached


def test_what_cannot_be_opened_or_has_no_such_field_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.path=.*/nowhere .*: cannot be opened"):
        source(tmp_path / "nowhere").pieces()
    with pytest.raises(DataError, match=r"data\.split=test: cannot be opened"):
        source(folder, split="test").pieces()
    with pytest.raises(DataError, match=r"\(train\), shard 0, row 0: no field 'body' .* has 'id', 'text'"):
        texts_of(source(folder, field="body"))


def test_rows_are_skipped_until_there_are_enough_good_ones(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    rows = [None if number % 4 == 1 else f"row {number}" for number in range(12)]
    pq.write_table(pa.table({"text": rows}), tmp_path / "hub/train.parquet")
    good = [row for row in rows if row is not None]
    for most in (None, 4, 30):
        chosen = source(tmp_path / "hub", name=None, max_documents=most, bad_rows="skip")
        assert texts_of(chosen) == good[:most]
    told = corpus(Hub.model_validate({**KEYS, **chosen.model_dump()}), tmp_path / "cache").preparation
    assert told.skipped_rows == 3
    assert told.skipped_places[0].endswith(
        "(train), shard 0, row 1: field 'text' (data.field) holds NoneType, not text"
    )
    with pytest.raises(DataError, match=r"shard 0, row 1: .*; bad_rows=skip leaves such rows out"):
        texts_of(source(tmp_path / "hub", name=None))
