"""What can be asked of a run that is there: text after prompts, and the loss on any data."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from src.config.build import build
from src.config.tree import read
from src.errors import UserError
from tests.end_to_end.commands import command
from tests.end_to_end.lives import WORLDS, live, opened, series, write_text
from tests.ranks import RankPool

PROMPT = "kara, lose"
Straight = Callable[[str], Path]


@pytest.fixture(scope="module")
def measured(text: tuple[str, ...], ranks: RankPool) -> Path:
    """A run with a validation loss at its end."""
    folder = opened(*text, "task.steps=10", "task.validate_every=10", "task.validate_samples=10", "name=measured")
    assert ranks(1, live, folder) == [True]
    return folder


def asked(ranks: RankPool, task: str, run: Path | str, *argv: str, layout: str = "single") -> Path:
    """The folder of a task that reads the weights of `run`, after its life; beside it, unless `argv` has a root."""
    more = (f"root={Path(run).parent}", "cluster.gpus=0", "data.processes=1", f"parallel={layout}")
    folder = opened(f"task={task}", f"run={run}", *more, *argv)
    assert ranks(WORLDS[layout], live, folder) == [True] * WORLDS[layout]
    return folder


def texts(folder: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (folder / "generated.jsonl").read_text().splitlines()]


def scores(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())["scores"]
    return found


def plain(run: Path, step: int) -> Any:
    """The model on one device, with the weights of a checkpoint."""
    model: Any = build(read(run / "config.yaml"))["model"].build().eval()  # type: ignore[attr-defined]
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    dcp.load(weights, checkpoint_id=run / f"checkpoints/step_{step:08d}", no_dist=True)  # type: ignore[attr-defined]
    return model


def read_again(run: Path, step: int, prompt: str, count: int) -> str:
    """The likeliest bytes, by a plain model that reads the whole text for each."""
    model = plain(run, step)
    ids = [256, *prompt.encode()]
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    new = ids[len(prompt) + 1 :]
    new = new[: new.index(257)] if 257 in new else new
    return bytes(number for number in new if number < 256).decode(errors="replace")


@pytest.mark.parametrize("layout", ["single", "tp2", "fsdp2"])
def test_text_is_what_the_weights_find_likeliest(layout: str, straight: Straight, ranks: RankPool) -> None:
    run = straight("single")
    folder = asked(ranks, "generate", run, f"prompt={PROMPT}", "temperature=0", "max_tokens=12", layout=layout)
    assert texts(folder) == [read_again(run, 12, PROMPT, 12)]


def test_weights_rest_in_the_dtype_that_is_asked_for(straight: Straight, ranks: RankPool) -> None:
    """Weights that were saved in float32 are rounded as they are read: the same text as by copies in bfloat16."""
    run, options = straight("single"), (f"prompt={PROMPT}", "temperature=0", "max_tokens=12")
    full = asked(ranks, "generate", run, *options, "precision=bf16_full")
    assert texts(full) == texts(asked(ranks, "generate", run, *options, "precision=bf16", "name=copies"))
    line = f"precision.storage=bfloat16: {run} has saved float32, and an export reads weights as they are; leave"
    with pytest.raises(UserError, match=re.escape(line)):
        opened("task=export", f"run={run}", f"root={run.parent}", "cluster.gpus=0", "precision=bf16_full")


def test_an_earlier_step_writes_something_else(straight: Straight, ranks: RankPool) -> None:
    run = straight("single")
    folder = asked(ranks, "generate", run, f"prompt={PROMPT}", "temperature=0", "max_tokens=12", "step=6")
    assert texts(folder) == [read_again(run, 6, PROMPT, 12)]
    assert texts(folder) != [read_again(run, 12, PROMPT, 12)]


def test_many_prompts_by_chance(straight: Straight, ranks: RankPool, tmp_path: Path) -> None:
    """The same on every layout and in any company; another seed writes something else."""
    run, prompts = straight("single"), [PROMPT, "a", "tumi lo ra", "", "mi"]
    lines, rows = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_text("\n\n".join(prompts[:3]))
    rows.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    options = ("max_tokens=8", "temperature=0.9", "top_k=40", "top_p=0.95")
    single = asked(ranks, "generate", run, f"prompts={rows}", *options)
    assert len(set(texts(single))) == 5
    assert texts(asked(ranks, "generate", run, f"prompts={rows}", *options, layout="tp2")) == texts(single)
    apart = asked(ranks, "generate", run, f"prompts={rows}", *options, "task.batch=1", layout="fsdp2")
    assert texts(apart) == texts(single)
    assert texts(asked(ranks, "generate", run, f"prompts={lines}", *options)) == texts(single)[:3]
    assert texts(asked(ranks, "generate", run, f"prompts={rows}", *options, "seed=5")) != texts(single)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (("prompt=a", "step=7"), "task.step=7: {run} has no complete checkpoint of that step; it has 6, 12"),
        ((), 'task.prompt: pass a text with prompt="...", or a file of them with prompts=<file>; one of the two'),
        (("prompt=a", "prompts=b"), 'task.prompt: pass a text with prompt="...", or a file of them with prompts='),
        (("prompts=nowhere.txt",), "task.prompts=nowhere.txt: cannot be read as text ("),
        (
            ("prompt=a", "task.max_tokens=8191"),
            "task.prompt: 2 tokens and task.max_tokens=8191 are more than model.max",
        ),
        (("prompt=a", "temperature=0", "top_k=3"), "task: top_k=3 does nothing at temperature=0, which takes the"),
        (("prompt=a", "optim.lr=1"), "optim.lr=1: says how to train, and this task trains nothing; leave it out"),
        (("prompt=a", "task.runs=x"), "task.runs: no such key of this option; task=merge has it; did you mean run?"),
        (("prompt=a", "parallel=tp4"), "parallel.tensor=4 does not divide model.n_kv_heads=2 (1 or 2 do)"),
    ],
)
def test_what_cannot_be_written_is_refused(argv: tuple[str, ...], line: str, straight: Straight) -> None:
    run = straight("single")
    with pytest.raises(UserError) as caught:
        opened("task=generate", f"run={run}", f"root={run.parent}", "cluster.gpus=0", *argv)
    assert any(each.startswith(line.format(run=run)) for each in caught.value.problems), caught.value.problems


def test_prompts_that_are_no_prompts(straight: Straight, tmp_path: Path) -> None:
    rows = tmp_path / "prompts.jsonl"
    rows.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(UserError, match="line 2: is no JSON object with a text under prompt"):
        opened("task=generate", f"run={straight('single')}", f"root={straight('single').parent}", f"prompts={rows}")


@pytest.mark.parametrize("layout", ["single", "tp2", "fsdp2"])
def test_loss_is_the_validation_loss_of_training(layout: str, measured: Path, ranks: RankPool) -> None:
    folder = asked(ranks, "evaluate", measured, "samples=10", "task.micro_batch=2", layout=layout)
    (score,) = scores(folder).values()
    assert score["loss"] == pytest.approx(series(measured, "validation_loss")[10], rel=1e-6)
    assert score["perplexity"] == pytest.approx(math.exp(score["loss"]))
    # A byte is a token here; the marks of a document are two more, and predicted too.
    assert score["bits_per_byte"] == pytest.approx(score["loss"] / math.log(2), rel=0.05)
    assert score["bits_per_byte"] > score["loss"] / math.log(2)


def test_a_mixture_is_told_by_source(measured: Path, text: tuple[str, ...], ranks: RankPool, tmp_path: Path) -> None:
    """Nine rows of text to one of the other kind: the sum of both is what all rows give at once."""
    _, file, fraction = write_text(tmp_path, documents=300, words=20)
    mixture = (
        *("data=mixture", "~data.sources.code", "~data.weights.code", "data.weights.words=0.9"),
        *("+data/source@data.sources.words=text", file.replace("data.", "data.sources.words.")),
    )
    folder = asked(ranks, "evaluate", measured, *mixture, fraction, "samples=20")
    found = scores(folder)
    assert list(found) == ["synthetic", "words", "all"]
    assert found["words"]["tokens"] == pytest.approx(9 * found["synthetic"]["tokens"], rel=0.2)
    nats = sum(found[name]["loss"] * found[name]["tokens"] for name in ("words", "synthetic"))
    assert found["all"]["tokens"] == found["words"]["tokens"] + found["synthetic"]["tokens"]
    assert found["all"]["loss"] == pytest.approx(nats / found["all"]["tokens"])
    assert found["synthetic"]["loss"] > found["words"]["loss"] + 0.5


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (("samples=100000",), "task.samples=100000 is more than the "),
        (("data.validation_fraction=0",), "task.split=validation: 0 documents with 0 tokens make no sequence of task."),
        (("split=test",), "task.split: 'test' is not 'validation' or 'train'"),
        (("task.seq_len=9000",), "task.seq_len=9000 is beyond model.max_seq_len=8192; at most 8192 tokens"),
    ],
)
def test_what_cannot_be_read_is_refused(argv: tuple[str, ...], line: str, measured: Path) -> None:
    with pytest.raises(UserError) as caught:
        opened("task=evaluate", f"run={measured}", f"root={measured.parent}", "cluster.gpus=0", *argv)
    assert any(each.startswith(line) for each in caught.value.problems), caught.value.problems


def test_the_commands_as_they_are_typed(measured: Path) -> None:
    code, said = command(
        "task=generate", f"run={measured}", 'prompt=It\'s "ka", (lo)', "cluster.gpus=0", f"root={measured.parent}"
    )
    assert code == 0, said
    assert '\nIt\'s "ka", (lo)' in said
    code, said = command("task=evaluate", f"run={measured}", "split=train", "cluster.gpus=0", f"root={measured.parent}")
    assert code == 0, said
    assert "perplexity" in said
    code, said = command("task=generate", f"run={measured}x", "prompt=a", f"root={measured.parent}")
    assert (code, "Traceback" in said) == (2, False)
    assert f"task.run={measured}x: no run folder" in said
