"""A run whose machine is gone goes on from its mirror, to the last bit."""

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from src.checkpoint.mirror import Mirror
from src.config.tree import read
from src.errors import CheckpointError, UserError
from src.runs.commands.main import main
from tests.checkpoint.options import options
from tests.end_to_end.commands import command
from tests.end_to_end.lives import Shot, contents, live, opened, records, series
from tests.ranks import RankPool
from tests.storage.s3 import S3Server, files, known, served

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with served() as server:
        yield server


def live_there(folder: Path, environment: dict[str, str], shot: Shot | None = None) -> bool | tuple[str, ...]:
    at_once = {"tries": 1, "first_wait_seconds": 0.1}  # no request is tried again before its checkpoint is
    with known(environment), patch.dict(Mirror.__init__.__kwdefaults__, at_once):
        return live(folder, shot)


def test_a_run_whose_folder_is_gone_goes_on(
    text: tuple[str, ...], straight: Callable[[str], Path], ranks: RankPool, s3: S3Server
) -> None:
    argv = (*text, "parallel=fsdp2", "name=mirrored", f"checkpoint.mirror={s3.bucket('gone')}")
    folder = opened(*argv)
    s3.faulty, s3.busy = "PUT .*step_00000006/__0_0.*", 1
    shot = Shot("step", signal.SIGTERM, at=9, rank=1, saved=6)
    assert ranks(2, live_there, folder, s3.environment, shot) == [False, False]
    stopped = max(series(folder))
    assert stopped < 12
    (incident,) = map(json.loads, (folder / "incidents.jsonl").open())
    assert (incident["step"], incident["decision"]) == (6, "mirror")
    assert "s3://gone/" in incident["words"]
    assert max(series(folder, "mirror/failures").values()) == 1
    there = {path.rpartition("/")[2] for path in files("s3").ls(f"gone/{folder.name}")}
    assert {"config.yaml", "plan.json", "data.json", "checkpoints"} <= there

    shutil.rmtree(folder)
    assert opened(*argv) == folder
    assert ranks(2, live_there, folder, s3.environment) == [True, True]
    whole = straight("fsdp2")
    assert list(series(folder)) == list(range(stopped + 1, 13))
    assert series(folder).items() <= series(whole).items()
    assert contents(folder, 12) == contents(whole, 12)
    kept = sorted(path.rpartition("/")[2] for path in files("s3").ls(f"gone/{folder.name}/checkpoints"))
    assert kept == [f"step_{step:08d}" for step in (6, stopped, 12)]  # of both lives
    (copied,) = (line for line in records(folder) if line["step"] == 12 and "mirror/bytes" in line)
    written = [path for path in (folder / "checkpoints/step_00000012").iterdir() if path.name != "COMPLETE.json"]
    assert copied["mirror/bytes"] == sum(path.stat().st_size for path in written)


def test_a_run_at_a_url_is_where_others_begin(
    text: tuple[str, ...], straight: Callable[[str], Path], ranks: RankPool, tmp_path: Path, capsys: Capture
) -> None:
    whole = straight("fsdp2")
    there = f"file://{tmp_path}/mirror"
    mirror = Mirror(whole, options(mirror=there), whole.parent / "cache")
    mirror.wake()
    assert mirror.finish(60.0)
    mirror.close()
    url, argv = f"{there}/{whole.name}", (*text, "parallel=single", "task.steps=14")
    folder = opened(*argv, "name=onward", f"checkpoint.initial={url}")
    assert f"checkpoint.initial={url}: fetches step_00000012, " in capsys.readouterr().err
    assert ranks(1, live, folder) == [True]
    assert list(series(folder)) == [13, 14]
    assert opened(*argv, "name=onward", f"checkpoint.initial={url}") == folder  # whatever lies there by then
    assert read(folder / "config.yaml")["checkpoint"]["initial"] == url
    root = text[-1]
    fork = opened(root, f"from={url}@6", "cluster.gpus=0", "parallel=single")
    initial = Path(read(fork / "config.yaml")["checkpoint"]["initial"])
    assert (fork.name.partition("-from")[0], contents(initial.parents[1], 6)) == ("straight", contents(whole, 6))
    out = opened(root, "task=export", f"run={url}", f"to={tmp_path}/out", "cluster.gpus=0")
    told = read(out / "config.yaml")["task"]
    assert (Path(told["run"]).name, told["step"], out.name.partition("-")[0]) == (whole.name, 12, "export")
    with pytest.raises(CheckpointError, match=r"task\.to=null: .* is no run folder to write into"):
        opened(root, "task=export", f"run={url}")
    with pytest.raises(CheckpointError, match=r"task\.run=.*: no whole checkpoint of step 7 there; its steps: 6, 12"):
        opened(root, "task=export", f"run={url}", "step=7", f"to={tmp_path}/out")
    capsys.readouterr()
    assert main(["checkpoint", url, "--json"]) == 0
    known = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [(each["step"], each["whole"], each["tokens"]) for each in known] == [(6, True, 768), (12, True, 1536)]
    assert main(["checkpoint", there]) == 2
    assert capsys.readouterr().err.endswith(f"with checkpoints; it holds {whole.name}: add one of these\n")
    assert main(["checkpoint", f"{url}/checkpoints/step_00000012", "--full"]) == 0
    file = tmp_path / "mirror" / whole.name / "checkpoints/step_00000012/values.json"
    file.write_bytes(file.read_bytes().replace(b"1", b"2"))
    capsys.readouterr()
    assert main(["checkpoint", url, "--full"]) == 1
    assert "values.json: corrupted, crc32" in capsys.readouterr().out


def test_an_export_goes_to_a_url(
    text: tuple[str, ...], straight: Callable[[str], Path], ranks: RankPool, tmp_path: Path
) -> None:
    whole, place = straight("fsdp2"), tmp_path / "there"
    argv = (text[-1], "task=export", f"run={whole}", f"to=file://{place}", "cluster.gpus=0", "task.check=false")
    folder = opened(*argv)
    assert ranks(1, live, folder) == [True]
    names = {path.name for path in place.iterdir()}
    assert {"config.json", "export.json", "model.safetensors"} <= names
    assert not (folder / "export").exists()
    opened(*argv)  # over an earlier export
    (place / "export.json").unlink()
    with pytest.raises(UserError, match=r"task\.to=file://.*: is there and was not written by an export"):
        opened(*argv)


def test_a_mirror_that_is_not_there_is_told_before_anything_starts(
    text: tuple[str, ...], s3: S3Server, tmp_path: Path
) -> None:
    root = (f"root={tmp_path}",)
    code, said = command(*text, *root, "checkpoint.mirror=s3://nobodys/runs", **s3.environment)
    assert (code, said.count("\n")) == (2, 1)
    assert said.startswith("checkpoint.mirror=s3://nobodys/runs: ")
    code, said = command(*root, "task=bench", "checkpoint.mirror=s3://nobodys/runs")
    assert (code, "this task saves no checkpoints as it goes; leave it out" in said) == (2, True)
    assert list(tmp_path.iterdir()) == []
