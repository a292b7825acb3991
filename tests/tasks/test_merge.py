"""What `runs=`, `steps=` and `weights=` of task=merge stand for, and what has no mean."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from src.config import tree as trees
from src.config.build import Top, build
from src.config.composition.requests import asked
from src.config.tree import Tree
from src.models.hugging_face import config_json
from src.planning.memory import estimate
from src.planning.plan import load_of
from src.tasks.merge.config import Merge
from src.tasks.merge.mean import RunningMean
from src.tasks.source import completed
from tests.checkpoint.options import problems
from tests.models.shapes import tiny_llama
from tests.train.runs import make_run, section


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A root with two runs that tell of themselves, with two checkpoints each by their markers."""
    root = tmp_path / "runs"
    for name in ("one", "two"):
        folder = root / name
        folder.mkdir(parents=True)
        (tree,) = composed("model=llama3_debug", "model.rope_theta=7.0", "seed=5", "task.seq_len=64")
        trees.write(folder / "config.yaml", tree)
        for step in (10, 200):
            checkpoint = folder / f"checkpoints/step_{step:08d}"
            checkpoint.mkdir(parents=True)
            facts: dict[str, Any] = {"step": step, "torch": "2", "facts": {}, "files": {}}
            (checkpoint / "COMPLETE.json").write_text(json.dumps(facts))
    return root


def composed(*argv: str) -> list[Tree]:
    GlobalHydra.instance().clear()
    return asked(list(argv), completed).trees


def task_of(root: Path, *argv: str) -> Merge:
    (tree,) = composed("task=merge", f"root={root}", *argv)
    task = only(tree, "task")
    assert isinstance(task, Merge)
    return task


def only(tree: Tree, section: str) -> Any:
    """The object of one section."""
    return build({key: tree[key] for key in (*Top.model_fields, section)}, sections=(section,))[section]


def test_one_run_serves_all_steps(runs: Path) -> None:
    (tree,) = composed("task=merge", f"root={runs}", f"runs={runs}/one", "steps=[10,200]", "weights=[1,3]")
    assert tree["task"]["runs"] == [str(runs / "one")] * 2
    assert (tree["task"]["steps"], tree["task"]["seq_len"]) == ([10, 200], 64)
    assert (tree["model"]["rope_theta"], tree["seed"], tree["name"]) == (7.0, 5, "merge-one")
    task = task_of(runs, f"runs={runs}/one", "steps=[10,200]", "weights=[1,3]")
    assert [(part.step, part.weight) for part in task.parts()] == [(10, 0.25), (200, 0.75)]


def test_several_runs_have_a_step_each_or_their_newest(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs.parent)
    newest = task_of(runs, "runs=[runs/one,runs/two]")
    assert [(part.name, part.weight) for part in newest.parts()] == [
        (f"{runs}/one@200", 0.5),
        (f"{runs}/two@200", 0.5),
    ]
    assert [part.step for part in task_of(runs, "runs=[runs/one,runs/two]", "steps=[200,10]").parts()] == [200, 10]
    assert [part.step for part in task_of(runs, "runs=[runs/one,runs/two]", "steps=10").parts()] == [10, 10]


def test_exports_are_folders_of_this_machine(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/config.json").write_text(json.dumps(config_json(tiny_llama())))
    (tmp_path / "theirs/tokenizer.json").write_text("{}")
    there = f"hf:{tmp_path / 'theirs'}"
    (tree,) = composed("task=merge", f"root={runs}", f"runs=[{there},{there}]")
    assert (tree["model"]["dim"], tree["task"]["steps"]) == (64, [None, None])
    assert tree["checkpoint"]["initial"] is None
    (told,) = problems(composed, "task=merge", f"runs=[{there},hf:me/model]")
    assert told == "task.runs=hf:me/model: is no folder here; download it, and pass hf:<folder>"
    (told,) = problems(composed, "task=merge", f"runs=[{there},{there}]", "steps=[3,null]")
    assert told == f"task.steps=3: {there} has no steps; pass null in its place"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            ("steps=[10,200,10]",),
            "task: steps has 3 of them for 2 runs; pass a step for each run, or one run for all steps",
        ),
        (("weights=[1]",), "task: weights has 1 of them for 2 checkpoints; pass 2, or uniform"),
        (("weights=[1,0]",), "task.weights"),
        (("runs=[]",), "task: runs=[] names nothing"),
        (("steps=[]",), "task: steps=[] names none; pass steps=[<step>,<step>], or null for the newest"),
        (("steps=[10,11]",), "task.steps=11: {runs}/two has no complete checkpoint of that step; it has 10, 200"),
        (("runs=[runs/one,runs/tow]",), "task.runs={runs}/tow: no run folder, it has no config.yaml; did you mean"),
        (("optim.lr=1",), "optim.lr=1: says how to train, and this task trains nothing; leave it out"),
    ],
)
def test_what_names_no_mean_is_refused(
    argv: tuple[str, ...], said: str, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs.parent)
    words = [f"runs=[{runs}/one,{runs}/two]"] if not any(each.startswith("runs=") for each in argv) else []
    told = problems(task_of, runs, *words, *argv)
    assert any(each.startswith(said.format(runs=runs)) for each in told), told


def test_only_weights_of_one_model_and_tokenizer_are_averaged(runs: Path) -> None:
    for name, tokenizer in (("one", None), ("two", "bpe-2048-abc")):
        facts = {"fingerprint": name, "tokenizer": tokenizer, "parts": []}
        (runs / name / "data.json").write_text(json.dumps(facts))
    tree = trees.read(runs / "two/config.yaml")
    tree["model"] |= {"norm_eps": 1e-3, "max_seq_len": 64}
    trees.write(runs / "two/config.yaml", tree)
    task = task_of(runs, f"runs=[{runs}/one,{runs}/two]")
    trusted = section("checkpoint", "every_500").model_copy(update={"trusted": True})
    run = make_run(model=only(trees.read(runs / "one/config.yaml"), "model"), checkpoint=trusted)
    alone = task_of(runs, f"runs={runs}/one").problems(run)
    assert alone == [
        "task.runs and task.steps name one checkpoint, and a mean is of at least 2; pass steps=[<step>,<step>]"
    ]
    assert task.problems(run) == [
        f"task.runs={runs}/two@200: model.norm_eps is 0.001 there and 1e-05 here; only weights of one model have a "
        "mean",
        f"task.runs={runs}/two@200: its tokenizer is bpe-2048-abc and that of {runs}/one is bytes; only weights that "
        "read the same tokens have a mean",
    ]


def test_the_plan_holds_the_mean_beside_the_weights(runs: Path) -> None:
    task = task_of(runs, f"runs=[{runs}/one,{runs}/two]")
    memory = estimate(load_of(replace(make_run(), task=task)))
    assert memory.average == memory.parameters == 4 * sum(each.elements for each in make_run().model.weights())
    assert memory.optimizer == 0


class Held:
    """What a mean asks of a network."""

    def __init__(self) -> None:
        self.weight, self.written = torch.zeros(64, dtype=torch.bfloat16), 0

    def tensors(self) -> dict[str, Any]:
        return {"w": self.weight, "count": torch.zeros(2, dtype=torch.int64)}

    def weights_written(self) -> None:
        self.written += 1


def test_a_mean_of_many_in_bfloat16_is_rounded_once() -> None:
    """Fifty sets in one more tensor; float64 is what it should be."""
    network: Any = Held()
    mean, sets = RunningMean(network), torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    shares = torch.arange(1, 51, dtype=torch.float64)
    for each, share in zip(sets, shares.tolist(), strict=True):
        network.weight.copy_(each)
        mean.add(share)
    mean.put()
    expected = (sets.double() * shares.unsqueeze(1)).sum(0) / shares.sum()
    torch.testing.assert_close(network.weight.double(), expected, rtol=2.0**-8, atol=1e-6)
    assert network.written == 1
