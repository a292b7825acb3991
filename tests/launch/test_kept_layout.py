"""parallel=auto:N is a sweep over the fastest layouts, and the measured winner becomes an option of conf/parallel."""

import json
from pathlib import Path

import pytest
import yaml

from src.config.composition.requests import asked
from src.config.tree import identity
from src.errors import UserError
from src.launch.as_it_was import completed
from src.launch.kept_layout import check_places, measured_places
from src.launch.start import checked
from src.runs.folder import place

ARGV = ("model=llama3_8b", "compile=blocks", "precision=bf16", "parallel.gpus=8", "cluster=slurm", "task.seq_len=4096",
        "task.global_batch=32", "cluster.gpu_model=H100", "cluster.gpu_memory_gib=80")  # fmt: skip


@pytest.fixture
def conf(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    (tmp_path / "conf" / "parallel").mkdir(parents=True)
    monkeypatch.setattr("src.launch.kept_layout.CONF", tmp_path / "conf")
    return tmp_path / "conf" / "parallel" / "mine.yaml"


def test_the_measured_winner_is_kept(conf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*ARGV, "task=bench", "parallel=auto:3", "parallel.write=mine", f"root={tmp_path}"]
    request = asked(argv, completed)
    assert request.swept
    points = checked(request.trees)
    assert len({identity(tree) for tree, _, _ in points}) == 3, "three layouts"
    assert not conf.exists(), "a prediction is no measurement"
    assert capsys.readouterr().err.count("each is measured") == 1, "one table"
    given = [(*point, each.overrides) for point, each in zip(points, request.points, strict=True)]
    check_places(given)
    folders = [place(run.root, run.name, identity(tree), run.folder) for tree, run, _ in points]
    measured_places(given)
    assert "3 layouts are not measured; once they have ended" in capsys.readouterr().err
    for folder, speed in zip(folders[:2], (9000.0, 9500.0), strict=True):
        folder.mkdir()
        (folder / "bench.json").write_text(json.dumps({"tokens_per_second": speed, "device": "NVIDIA H100"}))
    measured_places(given)
    told = capsys.readouterr().err
    assert "1 layout is not measured" in told
    assert "the fastest is place 2: " in told
    kept = conf.read_text()
    assert kept.startswith("# Measured by task=bench over parallel=auto on 8 x NVIDIA H100, tokens/s of a GPU:\n")
    assert "9,500 measured" in kept
    assert kept.count(" predicted") == 3
    values = yaml.safe_load(kept)
    assert values.pop("defaults") == ["single", "_self_"]
    assert values == {key: getattr(points[1][1].parallel, key) for key in values}
    asked(argv, completed)  # what a measurement wrote may be written again
    conf.write_text("# by hand\n")
    with pytest.raises(UserError, match=r"parallel.write=mine: .*mine.yaml exists; pass another name"):
        asked(argv, completed)


def test_what_measures_nothing_is_refused(conf: Path) -> None:
    request = asked([*ARGV, "parallel=auto:2", "data=synthetic"], completed)
    points = [(*point, each.overrides) for point, each in zip(checked(request.trees), request.points, strict=True)]
    with pytest.raises(UserError, match="parallel=auto:N measures layouts, and this task does not; pass task=bench"):
        check_places(points)
    with pytest.raises(UserError, match=r"parallel.place=99: \d+ layouts fit; at most"):
        asked([*ARGV, "task=bench", "parallel=auto", "parallel.place=99", "parallel.tensor=8"], completed)
    for name in ("a-b", "x" * 300):
        with pytest.raises(UserError, match="up to 60 letters, digits and _ make the name of an option"):
            asked([*ARGV, "task=bench", "parallel=auto", f"parallel.write={name}"], completed)
    (tree,) = asked([*ARGV, "task=bench", "parallel=auto"]).trees
    with pytest.raises(UserError, match=r"parallel=auto is decided by launch.py alone; pass a layout"):
        checked([tree])
    assert not conf.exists()
