"""A branch of the hub is read at one commit: by all workers and later runs of a cache, and by a run that has begun."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest

from src.data.config import Data, Hub, Mixture
from src.data.corpus import Corpus, reopen
from src.data.hub import HubSource
from src.data.prepare import prepare
from src.data.tokenizer import Bytes
from src.errors import DataError
from tests.data.corpora import KEYS, stream

FIRST, SECOND = "a" * 40, "b" * 40
NAME = "us/stories"


@dataclass
class StandIn:
    """The hub's client: a dataset whose branch moves, with a folder for each commit."""

    folders: dict[str, Path]
    branch: str = FIRST  # where `main` is
    asked: list[str | None] = field(default_factory=list)  # revisions whose commit somebody wanted to know
    opened: set[str | None] = field(default_factory=set)  # revisions that were read

    def dataset_info(self, _: object, path: str, *, revision: str | None, timeout: float) -> Any:
        self.asked.append(revision)
        if path != NAME or revision not in (None, "main"):
            raise ConnectionError("no such revision")
        return SimpleNamespace(sha=self.branch)

    def load_dataset(self, path: str, name: str | None, *, revision: str | None, **options: Any) -> Any:
        self.opened.add(revision)
        commit = revision if revision in self.folders else self.branch
        return LOAD(str(self.folders[commit]), name, **options)


LOAD = datasets.load_dataset


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    folders = {}
    for commit in (FIRST, SECOND):
        folders[commit] = tmp_path / commit
        folders[commit].mkdir()
        for shard in range(2):
            lines = [f'{{"text": "{text}"}}\n' for text in texts(commit)[20 * shard : 20 * shard + 20]]
            (folders[commit] / f"part_{shard}.jsonl").write_text("".join(lines))
    made = StandIn(folders)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *args, **keys: made.dataset_info(*args, **keys))
    monkeypatch.setattr(datasets, "load_dataset", made.load_dataset)
    return made


def texts(commit: str) -> list[str]:
    return [f"story {number} of {commit[0]}" for number in range(40)]


def named(revision: str | None = "main") -> dict[str, Any]:
    facts = {"name": None, "data_dir": None, "split": "train", "field": "text"}
    return {"path": NAME, "revision": revision, "max_documents": None, "bad_rows": "refuse", **facts}


def prepared(cache: Path, data: Data, commits: dict[str, str] | None = None) -> Corpus:
    return prepare(data, Bytes(), cache, progress=False, commits=commits)


def of_hub(revision: str | None = "main") -> Hub:
    return Hub.model_validate({**KEYS, **named(revision)})


def assert_reads(corpus: Corpus, commit: str) -> None:
    (part,) = corpus.parts
    assert part.shards.read("train", 0, corpus.tokens("train")).tolist() == stream(texts(commit), "train", 0.1)


@pytest.mark.parametrize("revision", ["main", None])
def test_a_branch_is_read_at_the_commit_of_the_first_time(revision: str | None, hub: StandIn, tmp_path: Path) -> None:
    corpus = prepared(tmp_path / "cache", of_hub(revision))
    assert_reads(corpus, FIRST)
    assert hub.opened == {FIRST}, "no worker reads the branch itself"
    assert corpus.recipe()["commits"] == {"hub": FIRST}
    line = f"data: hub: main of us/stories is commit {FIRST} here; data.revision= reads another"
    assert line in corpus.preparation.lines()
    hub.branch = SECOND
    again = prepared(tmp_path / "cache", of_hub(revision))
    assert again.preparation.cached
    assert again.recipe() == corpus.recipe()
    assert len(hub.asked) == 1, "nor is a network needed any more"
    assert_reads(prepared(tmp_path / "other", of_hub(revision)), SECOND)


def test_a_run_that_has_begun_goes_on_with_its_commit(hub: StandIn, tmp_path: Path) -> None:
    """Where its cache was cleaned, or is another, and the branch has moved."""
    recipe = prepared(tmp_path / "cache", of_hub()).recipe()
    assert reopen(recipe, tmp_path / "cache").recipe() == recipe
    hub.branch = SECOND
    again = prepared(tmp_path / "other", of_hub(), recipe["commits"])
    assert_reads(again, FIRST)
    assert again.fingerprint == recipe["fingerprint"]
    assert len(hub.asked) == 1


def test_a_run_of_a_version_that_kept_no_commit_goes_on_as_it_was(hub: StandIn, tmp_path: Path) -> None:
    corpus = prepared(tmp_path / "cache", of_hub(), {})
    assert_reads(corpus, FIRST)
    assert (hub.opened, hub.asked) == ({"main"}, [])
    assert "commits" not in corpus.recipe()
    assert any("its commit was not kept by the version that read it" in line for line in corpus.preparation.lines())


def test_a_commit_of_the_command_line_asks_nobody(hub: StandIn, tmp_path: Path) -> None:
    corpus = prepared(tmp_path / "cache", of_hub(SECOND))
    assert_reads(corpus, SECOND)
    assert hub.asked == []
    assert corpus.recipe()["commits"] == {"hub": SECOND}
    assert corpus.preparation.notes == ()
    hub.branch = SECOND
    assert prepared(tmp_path / "cache", of_hub()).preparation.cached, "the branch is there already, by its commit"


def test_each_source_of_a_mixture_has_its_commit(hub: StandIn, tmp_path: Path) -> None:
    sources = {"old": HubSource.model_validate(named(FIRST)), "new": HubSource.model_validate(named("main"))}
    hub.branch = SECOND
    data = Mixture.model_validate({**KEYS, "sources": sources, "weights": {"old": 1.0, "new": 1.0}})
    corpus = prepared(tmp_path / "cache", data)
    assert corpus.recipe()["commits"] == {"new": SECOND, "old": FIRST}
    assert [line.split()[1] for line in corpus.preparation.notes] == ["new:"]


def test_a_hub_that_does_not_say_is_named_with_the_way_out(hub: StandIn, tmp_path: Path) -> None:
    words = (
        r"data\.path=us/stories data\.revision=gone: cannot be opened: .* ConnectionError: .*data\.revision=<commit>"
    )
    with pytest.raises(DataError, match=words):
        prepared(tmp_path / "cache", of_hub("gone"))
    assert not list((tmp_path / "cache").rglob("*.claim"))
