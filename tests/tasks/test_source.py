"""What `run=` stands for: an earlier run's sections, under what was typed; and everything that it cannot name."""

import json
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra

from src.config import tree as trees
from src.config.composition.requests import asked
from src.config.tree import Tree
from src.data.tokenizer import File, vocabulary_problems
from src.hugging_face.push import push
from src.tasks.inherit import find
from src.tasks.source import completed
from tests.checkpoint.options import problems
from tests.hugging_face.foreign import saved


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A run folder that tells of itself, with two checkpoints by their markers."""
    folder = tmp_path / "runs/earlier-12345678"
    (tree,) = composed("model=llama3_8b", "model.rope_theta=7.0", "seed=5", "precision=bf16", "tokenizer=bpe")
    folder.mkdir(parents=True)
    trees.write(folder / "config.yaml", tree)
    for step in (10, 200):
        checkpoint = folder / f"checkpoints/step_{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "COMPLETE.json").write_text("{}")
    return folder


def composed(*argv: str) -> list[Tree]:
    GlobalHydra.instance().clear()
    return asked(list(argv), completed).trees


def test_the_sections_of_the_earlier_run_hold(earlier: Path) -> None:
    (tree,) = composed("task=export", f"run={earlier}", f"root={earlier.parent}")
    before = trees.read(earlier / "config.yaml")
    for section in ("model", "tokenizer", "data", "precision", "seed"):
        assert tree[section] == before[section], section
    assert tree["task"]["run"] == str(earlier)
    assert tree["task"]["step"] == 200, "the newest, so that a later start reads the same"
    assert tree["name"] == "export-earlier-12345678"
    assert tree["parallel"]["shard"] == 1


def test_what_is_typed_wins(earlier: Path) -> None:
    typed = ("model.rope_theta=9.0", "precision=fp32", "seed=1", "step=10", "name=mine", "parallel=tp2")
    (tree,) = composed("task=export", f"task.run={earlier}", f"root={earlier.parent}", *typed)
    assert (tree["model"]["rope_theta"], tree["model"]["dim"]) == (9.0, 4096)
    assert tree["precision"]["compute"] == "float32"
    assert (tree["seed"], tree["task"]["step"], tree["name"], tree["parallel"]["tensor"]) == (1, 10, "mine", 2)


def test_steps_can_be_swept(earlier: Path) -> None:
    points = composed("-m", "task=export", f"run={earlier}", f"root={earlier.parent}", "step=10,200")
    assert [point["task"]["step"] for point in points] == [10, 200]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("step=11",), "has no complete checkpoint of that step; it has 10, 200"),
        (("task.step=10", "step=10"), "step=10: task.step is given too; they are one key"),
    ],
)
def test_what_it_cannot_name_is_refused(earlier: Path, argv: tuple[str, ...], said: str) -> None:
    (told,) = problems(composed, "task=export", f"run={earlier}", f"root={earlier.parent}", *argv)
    assert said in told


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("runs/earlier-1234567", "; did you mean {runs}/earlier-12345678?"),
        ("runs/earlier", "; did you mean {runs}/earlier-12345678?"),
        ("elsewhere/earlier-12345678", "; did you mean {runs}/earlier-12345678?"),
        ("runs/other", "; there are: {runs}/earlier-12345678"),
        ("export", "; it is in Hugging Face layout: pass run=hf:{home}/export"),
    ],
)
def test_a_folder_that_is_no_run_names_the_one_that_was_meant(earlier: Path, typed: str, said: str) -> None:
    """A misspelt name, one without its hash, another folder than the root, nothing like it, weights of another kind."""
    home = earlier.parent.parent
    (earlier.parent / "earlier-12345679").mkdir()  # no run
    (home / "export").mkdir()
    (home / "export/config.json").write_text("{}")
    folder = home / typed
    said = said.format(runs=earlier.parent, home=home)
    (told,) = problems(composed, "task=generate", f"run={folder}", f"root={earlier.parent}")
    assert told == f"task.run={folder}: no run folder, it has no config.yaml{said}"


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    assert problems(find, tmp_path, None) == (f"task.run={tmp_path}: has no complete checkpoint",)


def test_weights_from_elsewhere_bring_their_model(tmp_path: Path) -> None:
    saved("deepseek-v3", tmp_path / "theirs")
    (tmp_path / "theirs/tokenizer.json").write_text("{}")
    (tree,) = composed("task=export", f"run=hf:{tmp_path / 'theirs'}", f"to={tmp_path / 'out'}")
    assert tree["model"]["moe"]["num_experts"] == 12
    assert tree["model"]["moe"]["load_balance_coeff"] == 1e-3
    assert tree["tokenizer"]["path"] == str(tmp_path / "theirs")
    assert tree["checkpoint"]["initial"] == f"hf:{tmp_path / 'theirs'}"
    assert tree["name"] == "export-theirs"
    (told,) = problems(composed, "task=export", f"run=hf:{tmp_path / 'theirs'}", "step=3")
    assert "has no steps; leave it out" in told


def test_model_auto_takes_the_tokenizer_along(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    start = ("model=auto", f"checkpoint.initial=hf:{tmp_path}")
    (bare,) = composed(*start)
    (told,) = vocabulary_problems(File(path=bare["tokenizer"]["path"], bos=None, eos=None), 512)
    assert told.startswith(f"tokenizer.path={tmp_path}: needs tokenizer.json"), "released weights read no bytes"
    (tmp_path / "tokenizer.json").write_text("{}")
    (tree,) = composed(*start, "model.max_seq_len=64", "model.attention=flex")
    assert tree["tokenizer"] == {"_target_": "src.data.tokenizer.File", "path": str(tmp_path), "bos": None, "eos": None}
    assert (tree["model"]["max_seq_len"], tree["model"]["attention"], tree["model"]["dim"]) == (64, "flex", 64)
    (other,) = composed(*start, "tokenizer=bytes")
    assert other["tokenizer"]["_target_"].endswith(".Bytes")


class Hub:
    """What `push` asks of huggingface_hub."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, repository: str, **options: Any) -> None:
        self.asked.append((repository, options))

    def upload_folder(self, **options: Any) -> Any:
        self.asked.append(("upload", options))
        if options["repo_id"] == "me/full":
            raise RuntimeError("no room")
        return type("Sent", (), {"commit_url": "https://some.where/commit"})


def test_nothing_is_sent_until_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    (tmp_path / "config.json").write_text(json.dumps({}))
    assert push(tmp_path, "me/x", send=False).startswith("would send to me/x (pass task.send=true to do it):")
    assert hub.asked == []
    assert push(tmp_path, "me/x", send=True).startswith("sent to https://some.where/commit:")
    assert hub.asked[0] == ("me/x", {"private": True, "exist_ok": True})
    assert hub.asked[1][1]["folder_path"] == tmp_path
    assert problems(push, tmp_path, "me/full", send=True) == (
        "task.push=me/full: was not sent (RuntimeError: no room)",
    )
