"""Presets of datasets on the hub: each reads a small local copy of its dataset's layout as it is there."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from src.config.build import build
from src.config.groups import CONF
from src.data.config import Hub
from src.errors import DataError
from tests.data.corpora import texts_of
from tests.test_conf import composed

TEXTS = [f"page {number} of the web" for number in range(12)]


def card(root: Path, configs: dict[str, str]) -> None:
    """README.md with the configurations of a dataset, as its authors wrote them."""
    lines = [
        line for name, path in configs.items() for line in (f"- config_name: {name}", "  data_files:", *_files(path))
    ]
    (root / "README.md").write_text("\n".join(["---", "configs:", *lines, "---", "# A dataset", ""]))


def _files(path: str) -> list[str]:
    return ["  - split: train", f"    path: {path}"]


def parquet(path: Path, **columns: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def fineweb_edu(root: Path) -> None:
    def rows(texts: list[str]) -> dict[str, list[Any]]:
        count = len(texts)
        return {
            "text": texts,
            "id": [f"<urn:uuid:{number}>" for number in range(count)],
            "dump": ["CC-MAIN-2024-10"] * count,
            "url": ["https://example.org"] * count,
            "language_score": [0.98] * count,
            "token_count": [6] * count,
            "int_score": [3] * count,
        }

    for shard in range(2):
        parquet(root / f"sample/10BT/{shard:03d}_00000.parquet", **rows(TEXTS[6 * shard : 6 * shard + 6]))
    parquet(root / "sample/100BT/000_00000.parquet", **rows(["of a larger sample"]))
    parquet(root / "data/CC-MAIN-2024-10/train-00000-of-00001.parquet", **rows(["of a dump"]))
    names = {"default": "data/*/*", "sample-10BT": "sample/10BT/*", "sample-100BT": "sample/100BT/*"}
    card(root, names | {"CC-MAIN-2024-10": "data/CC-MAIN-2024-10/*"})


def dclm(root: Path) -> None:
    place = root / "filtered/fasttext_openhermes_reddit_eli5/processed_data"
    for shard in range(2):
        texts = TEXTS[6 * shard : 6 * shard + 6]
        parquet(
            place / f"global-shard_{shard + 1:02d}_of_10/local-shard_0_of_10/shard_00000000_processed.parquet",
            bff_contained_ngram_count_before_dedupe=[0] * len(texts),
            language_id_whole_page_fasttext=[{"en": 0.9}] * len(texts),
            metadata=[{"WARC-Type": "response", "Content-Length": "12"}] * len(texts),
            text=texts,
            url=["https://example.org"] * len(texts),
        )
    (root / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")


def climbmix(root: Path) -> None:
    root.mkdir(parents=True)
    for shard in range(2):
        lines = [json.dumps({"text": text}) for text in TEXTS[6 * shard : 6 * shard + 6]]
        (root / f"part_{shard}.jsonl").write_text("\n".join(lines) + "\n")


def the_stack(root: Path) -> None:
    for shard, language in enumerate(("ada", "python")):
        texts = TEXTS[6 * shard : 6 * shard + 6]
        parquet(
            root / f"data/{language}/data-00000-of-00001.parquet",
            hexsha=["0"] * len(texts),
            size=[len(text) for text in texts],
            ext=["py"] * len(texts),
            lang=[language] * len(texts),
            max_stars_repo_licenses=[["MIT"]] * len(texts),
            content=texts,
        )


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "fineweb_edu": fineweb_edu,
    "dclm": dclm,
    "climbmix": climbmix,
    "the_stack": the_stack,
}


def preset(name: str, root: Path, *more: str) -> Hub:
    tree = composed(f"data={name}", f"data.path={root}", *more)
    data = build(tree)["data"]
    assert isinstance(data, Hub)
    return data


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_preset_reads_its_datasets_form(name: str, tmp_path: Path) -> None:
    LAYOUTS[name](tmp_path / name)
    data = preset(name, tmp_path / name)
    assert texts_of(data) == TEXTS
    assert data.max_documents == 1_000_000
    assert data.validation_fraction == 0.001


def test_other_parts_of_a_dataset_are_named_by_its_configuration_or_folder(tmp_path: Path) -> None:
    fineweb_edu(tmp_path / "edu")
    assert texts_of(preset("fineweb_edu", tmp_path / "edu", "data.name=sample-100BT")) == ["of a larger sample"]
    assert texts_of(preset("fineweb_edu", tmp_path / "edu", "data.name=CC-MAIN-2024-10")) == ["of a dump"]
    the_stack(tmp_path / "stack")
    python = preset("the_stack", tmp_path / "stack", "data.data_dir=data/python")
    assert texts_of(python) == TEXTS[6:]
    assert python.fingerprint(tmp_path) != preset("the_stack", tmp_path / "stack").fingerprint(tmp_path)
    with pytest.raises(DataError, match=r"data\.data_dir=data/cobol .*cannot be opened"):
        texts_of(preset("the_stack", tmp_path / "stack", "data.data_dir=data/cobol"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_preset_says_whose_data_they_are(name: str) -> None:
    """Hub id, licence, amount and paper stand in the file; the commit is the user's to pin."""
    text = (CONF / f"data/{name}.yaml").read_text()
    assert "icence" in text
    assert "illion" in text
    assert "arXiv" in text
    assert "\nrevision: main # " in text
