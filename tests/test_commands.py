"""Every command that a page shows is composed, checked and planned, in this process; tutorials are run as a whole."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from src.config.composition.requests import asked
from src.launch.as_it_was import completed
from src.launch.origins import recipe_lines, unwanted_lines
from src.launch.start import checked
from src.planning.plan import Plan
from src.run import Run

HOME = Path(__file__).parents[1]
PAGES = [HOME / "README.md", HOME / "benchmarks/README.md", *sorted((HOME / "docs").glob("*.md"))]
# What a reader puts in a placeholder's place: a run, a folder, weights, a site.
PLACEHOLDER = re.compile(r"<|\.\.\.|hf:|my/|run=runs|runs=|from=|--help|interval\(")


def commands(page: Path) -> list[str]:
    """Words behind `python launch.py` in the code blocks of a page, and in the second line of an experiment."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [re.split(r"\s#\s", line)[0] for line in lines if line.startswith("python launch.py")]
    return [line.removeprefix("python launch.py").strip() for line in found if not PLACEHOLDER.search(line)]


SHOWN = list(dict.fromkeys(each for page in PAGES for each in commands(page)))


def planned(*words: str) -> list[tuple[Run, Plan]]:
    GlobalHydra.instance().clear()
    return [(run, plan) for _, run, plan in checked(asked(words, completed).trees)]


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["launch.py"])


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stands for the bucket of the pages' data: a dry run lists its files and reads none."""
    store = tmp_path_factory.mktemp("bucket")
    for name in ("shards/first.bin", "text/en/first.jsonl"):
        (store / name).parent.mkdir(parents=True)
        (store / name).write_bytes(bytes(64))
    return store


@pytest.mark.parametrize("command", SHOWN)
def test_a_command_of_a_page_is_right(command: str, tmp_path: Path, bucket: Path) -> None:
    there = command.replace("data.files=s3://bucket", f"data.files=file://{bucket}")
    words = shlex.split(there.replace("data.files=docs", f"data.files={HOME / 'docs'}"))
    here = (
        []
        if "cluster=slurm" in words or any(each.startswith("cluster.gpus") for each in words)
        else ["cluster.gpus=1024"]
    )
    for run, plan in planned(*words, *here, "dry_run=true"):
        assert run.dry_run
        assert plan.world >= 1
    assert list(tmp_path.iterdir()) == []


def test_commands_are_found() -> None:
    assert len(SHOWN) >= 20
    assert "model=llama3_8b parallel=tp2_fsdp4" in SHOWN


def test_the_headline_command_does_what_its_user_means() -> None:
    """Llama 3 8B on 8 GPUs of 80 GB: the batch and the length of its paper, in bf16, compiled; and it fits."""
    GlobalHydra.instance().clear()
    (point,) = asked(["model=llama3_8b", "parallel=tp2_fsdp4", "cluster.gpus=8", "cluster.gpu_memory_gib=79"]).points
    ((tree, run, plan),) = checked([point.tree])
    assert (plan.tokens_per_step, plan.tokens // 10**12, plan.world) == (4_194_304, 14, 8)
    assert (run.precision.compute, run.compile.blocks, run.parallel.reshard) == ("bfloat16", True, "never")
    assert plan.fits
    assert plan.recompute.mode != "auto"
    (line,) = recipe_lines(tree, point.origins, run)
    assert line.startswith("recipe llama3_8b: ")
    for said in ("precision=bf16", "task.seq_len=8192", "optim.lr=0.0003", "parallel.reshard=never"):
        assert said in line.split()


def test_a_learning_rate_of_another_optimizer_and_a_missing_gpu_are_told() -> None:
    GlobalHydra.instance().clear()
    words = ["model=qwen3_0_6b", "optim=lion", "cluster.gpus=0", "dry_run=true"]
    (point,) = asked(words).points
    ((tree, run, _),) = checked([point.tree])
    assert [line.partition(":")[0] for line in recipe_lines(tree, point.origins, run)] == ["recipe qwen3_0_6b"] + [
        "warning"
    ] * 2
    said = recipe_lines(tree, point.origins, run)[1:]
    assert said[0] == "warning: optim.lr=0.0003 is that of recipe qwen3_0_6b, for AdamW; pass one for Lion"
    assert said[1].startswith("warning: recipe qwen3_0_6b is for GPUs, and there is none here")
    GlobalHydra.instance().clear()
    (point,) = asked([*words, "optim.lr=1e-5"]).points
    ((tree, run, _),) = checked([point.tree])
    assert len(recipe_lines(tree, point.origins, run)) == 2


UNWANTED = {"data": "data=stdlib", "precision": "precision=fp32", "compile": "compile=off", "task": "task.seq_len=256"}


@pytest.mark.parametrize("chosen", [[], ["data=stdlib"], ["precision=fp32", "compile=off"], ["task.seq_len=256"]])
def test_what_nobody_wants_is_told_unless_it_was_typed(chosen: list[str]) -> None:
    GlobalHydra.instance().clear()
    (point,) = asked(["model=llama3_1b", "recipe=debug", "cluster.gpus=8", "dry_run=true", *chosen]).points
    ((_, run, plan),) = checked([point.tree])
    said = [line.removeprefix("warning: ") for line in unwanted_lines(point.origins, run, plan)]
    expected = [words for words in UNWANTED.values() if words not in chosen]
    assert [line[: len(words)] for line, words in zip(said, expected, strict=True)] == expected


def test_a_tokenizer_of_few_words_under_a_large_vocabulary_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    planned("model=llama3_8b", "cluster.gpus=8", "dry_run=true")
    assert capsys.readouterr().err == (
        "warning: tokenizer: 258 ids under model.vocab_size=128256: 127,998 rows of the embedding and of the head "
        "stand for no token and cost memory and time; pass tokenizer=bpe tokenizer.vocab_size=128256, which learns so "
        "many from the text, tokenizer=file tokenizer.path=my/tokenizer.json, as a released model's, or "
        "model.vocab_size=null, which follows the tokenizer\n"
    )
    planned("dry_run=true")
    planned("model=llama3_8b", "task=bench", "cluster.gpus=8", "dry_run=true")
    assert capsys.readouterr().err == ""
