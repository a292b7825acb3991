"""precision=auto: what is chosen is legal, worth its numbers, said in words and written into the run's config."""

from dataclasses import replace
from pathlib import Path

import pytest

from src.config.build import build
from src.config.composition.requests import asked
from src.config.presets import section_of
from src.config.tree import Tree, write
from src.errors import UserError
from src.launch.as_it_was import completed
from src.launch.start import checked
from src.planning.layout_search import best
from src.planning.memory import GIB
from src.planning.precision_choice import MARGIN, checks, narrowest
from src.run import Run
from tests.planning.test_layout_search import question, space
from tests.planning.test_time_step import site
from tests.train.runs import make_run

BATCH = ("task.seq_len=8192", "task.micro_batch=1", "task.global_batch=16")
EIGHT = ("task=bench", "compile=blocks", "cluster=slurm", "cluster.gpu_memory_gib=80", *BATCH)
GIVEN = (*EIGHT, "model=llama3_8b", "parallel=fsdp8", "recompute=selective", "precision=auto")


def found(*argv: str) -> Tree:
    (tree,) = asked([*argv], completed).trees
    return tree


def test_float8_is_taken_where_it_pays(capsys: pytest.CaptureFixture[str]) -> None:
    """A layout that is given. The config has the option as if it had been typed, so the same run is found again."""
    tree = found(*GIVEN, "cluster.gpu_model=H100")
    told = capsys.readouterr().err
    assert tree["precision"] == section_of("precision", "fp8_gather")
    assert "precision=auto: fp8_gather, " in told
    assert all(f" s with {name}" in told for name in ("bf16", "fp8"))
    assert checked([tree])[0][2].time is not None
    (point,) = asked([*GIVEN, "cluster.gpu_model=H100"], completed).points
    assert str(point.origins.of("precision.float8.all_gather")) == "precision=auto"


def test_it_stays_wide_where_float8_is_not_there_or_wins_little(capsys: pytest.CaptureFixture[str]) -> None:
    tree = found(*GIVEN, "cluster.gpu_model=A100", "precision.reduce=bfloat16")
    assert tree["precision"] == section_of("precision", "bf16") | {"reduce": "bfloat16"}, "what is given stays"
    told = capsys.readouterr().err
    assert "precision=auto: fp8 cannot be: precision.float8: cluster.gpu_model=A100 has no float8 products" in told
    small = (*EIGHT, "model=llama3_20m", "precision=auto", "cluster.gpu_model=H200", "task.seq_len=512")
    assert found(*small)["precision"] == section_of("precision", "bf16")
    told = capsys.readouterr().err
    assert "fp8_gather cannot be: precision.float8.all_gather=true gathers nothing" in told
    with pytest.raises(UserError, match=r"precision.float8: cluster.gpu_model=A100 has no float8 products"):
        checked([found(*GIVEN, "cluster.gpu_model=A100", "precision=fp8")])


def test_layout_and_precision_are_chosen_together(capsys: pytest.CaptureFixture[str]) -> None:
    """The best of all is the best of each precision by itself."""
    run = make_run({"seq_len": 8192, "micro_batch": 1, "global_batch": 32}, site(gpu_model="H100"), model="llama3_8b",
                   precision="bf16", compile="blocks")  # fmt: skip
    options = {name: make_run({}, precision=name).precision for name in ("bf16", "fp8", "fp8_gather")}
    assert narrowest(options) == [options["fp8_gather"]]
    asked_for, room, problems = question("llama3_8b", 32), int(80 * GIB), checks(run, None)
    alone = {}
    for place, (name, precision) in enumerate(options.items()):
        load = asked_for.load.changed(precision=precision)
        (first,) = best(replace(asked_for, load=load), space(16, 32), room, 1, problems=problems)
        alone[name] = first.step.seconds * (1.0 + MARGIN * (place > 0))
    (together,) = best(asked_for, space(16, 32, precisions=options), room, 1, problems=problems)
    assert together.precision == min(alone, key=lambda name: alone[name])
    assert together.load.precision == options[together.precision]
    open_too = ("parallel=auto", "parallel.gpus=8", "precision=auto", "cluster.gpu_model=H100")
    tree = found(*EIGHT, "model=llama3_8b", *open_too)
    assert tree["precision"]["float8"] is not None
    told = capsys.readouterr().err
    assert " precision=fp8" in told
    assert " s with bf16" in told


def test_what_cannot_be_decided_is_refused() -> None:
    for more, said in (
        (("cluster=local", "cluster.gpus=0", "cluster.gpu_model=null"), "the device is not known; pass cluster.gpu_mo"),
        (("fault_tolerance=torchft",), "steps of replica groups have no predicted time"),
        (("precision.among=[]",), "precision.among: names no option; there are bf16, "),
        (("precision.among=[bf16,fp9]",), "no such option of precision; did you mean fp8"),
        (("precision.among=[fp8,fp8]",), "names an option twice"),
        (("precision.among=[fp8]", "precision.compute=float32"), "fp8 cannot be: .*compute=float32 with float8"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            found(*GIVEN, "cluster.gpu_model=H100", *more)
    (tree,) = asked([*GIVEN, "cluster.gpu_model=H100"]).trees
    with pytest.raises(UserError, match=r"precision=auto is decided by launch.py alone"):
        checked([tree])


def test_a_run_goes_on_with_what_was_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same command in its folder, where another device would choose otherwise."""
    argv = (*GIVEN, f"folder={tmp_path}")
    tree = found(*argv, "cluster.gpu_model=H100")
    write(tmp_path / "config.yaml", tree)
    assert found(*argv, "cluster.gpu_model=A100")["precision"] == tree["precision"]
    assert f"precision=auto: as {tmp_path} was begun" in capsys.readouterr().err
    assert Run.from_sections(build(tree)).precision.float8 is not None
