"""A run on files at a URL trains on what it would train on here."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.config.tree import read
from src.data.corpus import read_recipe
from src.errors import UserError
from tests.data.written_elsewhere import llm_c, megatron
from tests.end_to_end.lives import TINY, live, opened, series
from tests.storage.s3 import S3Server, files, served

Capture = pytest.CaptureFixture[str]
SHORT = (*TINY, "task.steps=2", "parallel=single", "checkpoint.every=null")
TOKENS = ("data=tokens", "data.validation_fraction=0.1")


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with served() as server:
        yield server


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of llm.c's and a pair of Megatron's."""
    folder, chance = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    documents = [[256, *map(int, chance.integers(97, 123, 40)), 257] for _ in range(60)]
    for number in range(2):
        llm_c(
            folder / f"part_{number}.bin",
            [token for each in documents[20 * number : 20 * number + 20] for token in each],
        )
    megatron(folder / "text_document", documents[40:])
    (folder / "notes.jsonl").write_text('{"text": "a row is no id"}\n' * 200)
    return folder


def sent(folder: Path, url: str) -> str:
    for path in folder.iterdir():
        files("s3").put_file(str(path), f"{url.removeprefix('s3://')}/shards/{path.name}")
    return f"{url}/shards"


def test_shards_at_a_url_give_the_losses_of_the_same_shards_here(
    ranks: Any, s3: S3Server, shards: Path, tmp_path: Path, capsys: Capture
) -> None:
    url, root = sent(shards, s3.bucket("train")), f"root={tmp_path}/runs"
    argv = (*SHORT, *TOKENS, root)
    here = opened(*argv, f"data.files={shards}/*.bin", "name=here")
    s3.faulty, s3.busy = "GET .*part_1.bin", 1
    there = opened(*argv, f"data.files={url}/*.bin", "name=there")
    assert s3.busy == 0
    size = sum(
        (shards / name).stat().st_size
        for name in ("part_0.bin", "part_1.bin", "text_document.bin", "text_document.idx")
    )
    assert f"data.files={url}/*.bin: fetches 4 of 4 files, {size:,} bytes" in capsys.readouterr().err
    assert read(there / "config.yaml")["data"]["files"] == f"{url}/*.bin"
    assert read_recipe(there)["fingerprint"] == read_recipe(here)["fingerprint"]
    assert ranks(1, live, here) == ranks(1, live, there) == [True]
    assert len(series(there)) == 2
    assert series(there) == series(here)
    folder = opened(*argv, f"data.files={url}", f"data.validation_files={url}/text_document", "name=folder")
    assert "fetches" not in capsys.readouterr().err  # each file came once
    assert {name for name, *_ in read_recipe(folder)["parts"]} == {"tokens"}
    assert opened(*argv, f"data.files={url}/*.bin", "name=there") == there


def test_text_and_mixtures_come_from_urls(s3: S3Server, shards: Path, tmp_path: Path, capsys: Capture) -> None:
    url, root = sent(shards, s3.bucket("text")), f"root={tmp_path}/runs"
    text = opened(*SHORT, root, "data=text", f"data.files={url}/*.jsonl", "data.validation_fraction=0.0")
    same = opened(*SHORT, root, "data=text", f"data.files={shards}/*.jsonl", "data.validation_fraction=0.0")
    assert read_recipe(text) == read_recipe(same)  # one corpus in the cache
    mixture = ("data=mixture", "+data/source@data.sources.mine=tokens", "+data.weights.mine=1")
    capsys.readouterr()
    opened(*SHORT, root, *mixture, f"data.sources.mine.files={url}/part_*.bin")
    assert f"data.sources.mine.files={url}/part_*.bin: fetches 2 of 2 files" in capsys.readouterr().err


def test_a_dry_run_lists_and_what_is_wrong_is_one_error(
    s3: S3Server, shards: Path, tmp_path: Path, capsys: Capture
) -> None:
    from hydra.core.global_hydra import GlobalHydra

    from src.config.composition.requests import asked
    from src.launch.start import checked
    from src.tasks.source import completed

    url, root = sent(shards, s3.bucket("dry")), f"root={tmp_path}/runs"

    def look(*argv: str) -> None:
        GlobalHydra.instance().clear()
        checked(asked([root, "cluster.gpus=0", *argv], completed).trees)

    look(*SHORT, *TOKENS, f"data.files={url}/part_*.bin", "dry_run=true")
    assert "a start fetches 2 of 2 files" in capsys.readouterr().err
    look(*SHORT, "data=hub", f"data.path={url}", "dry_run=true")
    assert f"data.path={url}: a start fetches 5 of 5 files" in capsys.readouterr().err
    look("experiment=own_text", f"data.files={url}/*.jsonl", "dry_run=true")
    assert "text: 1 file, 0.01 MB" in capsys.readouterr().err
    for wrong, rule in {
        f"{url}/*.npy": "matches no file there",
        "s3://nobodys/*.bin": "there is no bucket nobodys",
        "s4://x/*.bin": "fsspec knows no s4://",
        "s3://me:secret@b/*.bin": "holds a password",
    }.items():
        with pytest.raises(UserError, match=rule) as caught:
            look(*SHORT, *TOKENS, f"data.files={wrong}")
        assert len(caught.value.problems) == 1
        assert caught.value.problems[0].startswith("data.files")
    assert not (tmp_path / "runs").exists()
