"""A rehearsed rank holds what the real rank holds, and the plan is held to it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from torch.distributed.tensor import DTensor

import launch
from src.distributed.mesh import Mesh
from src.launch.rehearse import Rehearsal, RehearsedBytes, default_ranks, planned, rehearse
from src.models.accounting import Weight
from src.run import Run
from src.train.setup import build_stages
from tests.models.shapes import tiny_llama
from tests.ranks import RankPool
from tests.train.runs import changed, make_run, section


def run_of(layout: str) -> Run:
    return make_run(model=tiny_llama(n_layers=4), parallel=layout)


def held(run: Run) -> int:
    """Parameter bytes of one rank of the gloo world."""
    parts = build_stages(run, Mesh(run.parallel, "cpu")).values()
    parameters = [parameter for part in parts for parameter in part.parameters()]
    local = [each.to_local() if isinstance(each, DTensor) else each for each in parameters]
    return sum(each.nbytes for each in local)


@pytest.mark.parametrize("layout", ["tp2_fsdp2", pytest.param("pp2_fsdp2", marks=pytest.mark.slow)])
def test_a_rehearsed_rank_is_the_real_one(ranks: RankPool, layout: str) -> None:
    run = run_of(layout)
    real = ranks(4, held, run)
    (rehearsed,) = rehearse(run, [3])
    assert rehearsed.built == RehearsedBytes(real[3], real[3], 2 * real[3])
    assert rehearsed.problems == []
    assert rehearsed.layers == (2 if layout == "pp2_fsdp2" else 4)


@pytest.mark.slow
def test_a_rank_of_405b_fits_this_machine() -> None:
    """Stages 0 and 8 of 16: the embedding, 7 and 8 of 126 layers, all cut into 64."""
    run = make_run(model="llama3_405b", parallel="tp8_pp8_fsdp8", precision="bf16")
    (rehearsed,) = rehearse(run, [0])
    width, wide, keys, words = 16384, 53248, 1024, 128256
    matrices = 2 * width * width + 2 * keys * width + 3 * wide * width
    # Norms are cut by FSDP alone, matrices and embedding by both.
    expected = 4 * (15 * (matrices // 64 + 2 * width // 8) + words * width // 64)
    assert rehearsed.stages == (0, 8)
    assert rehearsed.layers == 15
    assert rehearsed.built == rehearsed.planned == RehearsedBytes(expected, expected, 2 * expected)


@pytest.mark.slow
def test_a_rank_of_671b_fits_this_machine() -> None:
    """One of 1,024 ranks. Stages 4 and 12 of 16: eight layers, with 4 of 256 experts cut in two, the rest into 128."""
    run = make_run(model="deepseek_v3_671b", parallel="pp8_fsdp128_ep64", precision="bf16")
    (rehearsed,) = rehearse(run, [512])
    width, heads, queries, latent = 7168, 128, 1536, 512
    expert = 3 * 2048 * width
    attention = queries * width + heads * 192 * queries + heads * 256 * latent + width * heads * 128
    rest = attention + queries + latent + 2 * width + 256 * width + expert  # with norms, router and shared expert
    narrow = 5 * width  # of the 576 rows of wkv_a a rank has 5, and the last ones none
    expected = 4 * 8 * (rest // 128 + narrow + 4 * expert // 2)
    assert rehearsed.stages == (4, 12)
    assert rehearsed.layers == 8
    assert rehearsed.built == rehearsed.planned == RehearsedBytes(expected, expected, 2 * expected)


def test_a_wrong_formula_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Weight.local_elements
    built = planned(run_of("fsdp2"), 0)
    monkeypatch.setattr(Weight, "local_elements", lambda each, grid: right(each, changed(grid, shard=2 * grid.shard)))
    wrong = planned(run_of("fsdp2"), 0)
    problems = Rehearsal(0, (0,), 4, built, wrong, seconds=1.0).problems
    assert [line.split(" bytes of ")[1].split(",")[0] for line in problems] == ["parameters", "gradients", "optimizer"]
    assert "is beyond 1%" in problems[0]


def test_default_ranks_begin_the_first_middle_and_last_stage() -> None:
    assert default_ranks(section("parallel", "tp8_pp8_fsdp8")) == [0, 256, 448]
    assert default_ranks(section("parallel", "pp2_tp2_fsdp2")) == [0, 4]
    assert default_ranks(section("parallel", "fsdp8")) == [0]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.delenv("RANK", raising=False)
    GlobalHydra.instance().clear()
    return ["launch.py", "dry_run=json", "task.rehearse=true", "parallel=fsdp2", "cluster.gpus=0"]


@pytest.mark.parametrize("off", [1.0, 1.02])
def test_the_command_ends_with_1_where_the_plan_is_wrong(
    command: list[str], off: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fine = RehearsedBytes(1000, 1000, 2000)
    built = [Rehearsal(0, (0,), 6, replace(fine, optimizer=int(2000 * off)), fine, seconds=1.0)]
    monkeypatch.setattr("src.launch.rehearse.rehearse", lambda *_: built)
    monkeypatch.setattr("sys.argv", command)
    assert launch.main() == (0 if off == 1 else 1)
    told = capsys.readouterr()
    assert json.loads(told.out)["rehearsal"][0]["built"]["optimizer"] == int(2000 * off)
    assert ("rank 0 holds 2,040 bytes of optimizer, the plan says 2,000: +2.00%" in told.err) == (off > 1)


def test_a_batch_that_nobody_trains_on_is_a_warning(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("src.launch.rehearse.rehearse", lambda *_: [])
    monkeypatch.setattr("sys.argv", [*command, "task.micro_batch=3"])
    assert launch.main() == 0
    (warning,) = json.loads(capsys.readouterr().out)["warnings"]
    assert warning.startswith("task.global_batch=16 is no multiple of task.micro_batch=3 * 2 data ranks")


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("dry_run=false", "task.rehearse=true builds ranks and trains nothing; pass dry_run=true"),
        ("task.rehearse_ranks=[0,2]", "task.rehearse_ranks=[2] are beyond the 2 ranks of parallel; at most 1"),
    ],
)
def test_what_cannot_be_rehearsed_is_refused(
    command: list[str],
    argument: str,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", [*command, argument])
    if argument == "dry_run=false":
        monkeypatch.setattr("sys.argv", [each for each in [*command, argument] if each != "dry_run=json"])
    assert launch.main() == 2
    assert line in capsys.readouterr().err.splitlines()
