"""checkpoint.every=auto: steps by Daly's formula, decided before the run has an identity, or a refusal that helps."""

import json
from pathlib import Path

import pytest

from src.config.composition.requests import asked
from src.config.tree import Tree, identity
from src.errors import UserError
from src.launch.as_it_was import completed
from src.launch.auto_cadence import nearest, saved_in_time
from src.launch.start import checked
from src.planning.plan import plan
from src.planning.time.failures import best_interval
from src.run import Run
from tests.end_to_end.lives import TINY, live, opened
from tests.ranks import RankPool

H100 = ("cluster=slurm", "cluster.gpu_model=H100", "cluster.gpu_memory_gib=80", "data=synthetic")
LARGE = ("model=llama3_70b", "parallel=tp8_fsdp8", "task.steps=100000", *H100)
KNOWN = ("checkpoint.every=auto", "cluster.mtbf_hours_per_gpu=6400")


def meant(*argv: str) -> Tree:
    return asked(list(argv), completed).trees[0]


def test_it_is_the_best_of_the_plan_and_no_part_of_the_identity(capsys: pytest.CaptureFixture[str]) -> None:
    """64 GPUs with 6,400 hours each: a failure every 100 hours."""
    tree = meant(*LARGE, *KNOWN)
    told = capsys.readouterr().err
    every = tree["checkpoint"]["every"]
    ((_, _, planned),) = checked([tree])
    assert planned.time is not None
    assert planned.time.failures is not None
    assert every == planned.time.failures.checkpoint_every
    assert planned.time.failures.own_goodput == planned.time.failures.goodput
    best = best_interval(planned.time.failures.save_seconds, 100 * 3600.0) / planned.time.step.seconds
    assert every == pytest.approx(best, abs=0.5)
    assert f"checkpoint.every=auto: {every:,} steps" in told
    assert "a failure every 100 h" in told
    assert "(planned)" in told
    assert identity(tree) == identity(meant(*LARGE)) == identity(meant(*LARGE, "checkpoint.every=auto",
                                                                       "cluster.mtbf_hours_per_gpu=64"))  # fmt: skip


def test_rarer_saves_are_a_worse_share(capsys: pytest.CaptureFixture[str]) -> None:
    (seldom,) = (found for _, _, found in checked([meant(*LARGE, KNOWN[1], "checkpoint.every=50000")]))
    assert seldom.time is not None
    assert seldom.time.failures is not None
    assert seldom.time.failures.own_goodput is not None
    assert seldom.time.failures.own_goodput < seldom.time.failures.goodput < 1.0
    assert "checkpoint.every=auto" not in capsys.readouterr().err


def test_what_the_run_has_measured_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Saves that stop training four times as long are made half as often."""
    argv = (*LARGE, *KNOWN, f"folder={tmp_path}")
    plain = meant(*argv)["checkpoint"]["every"]
    ((_, _, planned),) = checked([meant(*argv)])
    assert planned.time is not None
    assert planned.time.failures is not None
    stall = 4 * planned.time.failures.save_seconds
    lines = [{"step": 1, "startup/total_seconds": 90.0}, *({"step": 2, "checkpoint/stall_seconds": stall},) * 3]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tree = meant(*argv)
    assert tree["checkpoint"]["every"] == pytest.approx(2 * plain, abs=1)
    assert "(measured)" in capsys.readouterr().err
    ((_, _, found),) = checked([tree])
    assert found.time is not None
    assert found.time.failures is not None
    assert (found.time.failures.save_seconds, found.time.failures.restart_seconds) == (stall, 90.0)
    assert found.time.failures.measured
    assert found.time.failures.checkpoint_every == tree["checkpoint"]["every"]


def test_it_ends_with_the_run_and_divides_what_is_kept() -> None:
    assert meant(*LARGE, *KNOWN, "task.steps=3")["checkpoint"]["every"] == 3
    assert 1000 % meant(*LARGE, *KNOWN, "checkpoint.keep_every=1000")["checkpoint"]["every"] == 0
    assert [nearest(every, 60) for every in (1, 7, 11, 59, 900)] == [1, 6, 12, 60, 60]
    assert nearest(7, None) == 7
    assert nearest(5, 2**31 - 1) == 1


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (LARGE, "how often a GPU fails is not known; pass cluster.mtbf_hours_per_gpu, such as"),
        (("cluster.gpus=0", KNOWN[1]), r"how long a step takes is not known; pass cluster.gpu_model \(A100, B200, "),
        ((*H100, KNOWN[1], "fault_tolerance=torchft"), "steps of replica groups have no predicted time; pass steps"),
    ],
)
def test_what_is_not_known_is_asked_for(argv: tuple[str, ...], told: str) -> None:
    with pytest.raises(UserError, match=f"checkpoint.every=auto: {told}"):
        meant(*argv, "checkpoint.every=auto")


def test_what_takes_no_steps_saves_none() -> None:
    (tree,) = asked([*H100, *KNOWN, "task=evaluate", "run=x"]).trees
    with pytest.raises(UserError, match=r"this task takes no steps to save; pass checkpoint.every=null"):
        saved_in_time(tree)


def test_other_problems_are_told_as_ever() -> None:
    tree = meant(*LARGE, *KNOWN, "task.global_batch=7")
    with pytest.raises(UserError) as caught:
        checked([tree])
    assert all("task.global_batch=7" in line for line in caught.value.problems)


def test_elsewhere_it_is_refused() -> None:
    from src.config.build import build

    (tree,) = asked([*LARGE, *KNOWN]).trees
    with pytest.raises(UserError, match=r"checkpoint.every=auto is decided by launch.py alone; pass steps"):
        plan(Run.from_sections(build(tree)))


def test_a_run_says_how_fast_it_was_beside_its_plan(tmp_path: Path, ranks: RankPool) -> None:
    """On this CPU, beside the time of an H100."""
    argv = (*TINY, "data=synthetic", "data.documents=100", f"root={tmp_path}", "cluster.gpu_model=H100")
    folder = opened(*argv, "task.steps=3", "checkpoint.every=null")
    assert ranks(1, live, folder) == [True]
    planned = json.loads((folder / "plan.json").read_text())["time"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rates = [line for line in lines if "tokens_per_second" in line]
    assert len(rates) == 3
    for line in rates:
        expected = line["tokens_per_second"] / planned["tokens_per_second"]
        assert line["throughput/predicted_ratio"] == pytest.approx(expected)
