"""Jobs that wait for other jobs, with stand-ins for squeue and sbatch."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from src.cluster.slurm import later
from src.errors import PlanError
from src.launch.later import started_later
from src.runs.records import SUBMISSIONS_FILE
from src.storage.json_lines import Lines
from tests.cluster.test_slurm import PART_OF_ONE, flags, site


def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: Mapping[str, str]) -> Path:
    """squeue knows these jobs, sbatch takes anything; returns the file of what it was given."""
    shown = "".join(f"echo '{job}|{job}|{state}'\n" for job, state in jobs.items())
    given = tmp_path / "given"
    for name, does in {"squeue": shown, "sbatch": f"cat > {given}\necho '77;cluster'\n"}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return given


def handed(folder: Path, *jobs: str) -> Path:
    folder.mkdir(parents=True)
    for job in jobs:
        Lines(folder / SUBMISSIONS_FILE).append({"job": job, "submitted": 0.0, "log": ""})
    return folder


def test_a_job_waits_for_those_that_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(tmp_path, monkeypatch, {"5": "COMPLETED", "6_1": "RUNNING", "7": "PENDING"})
    handed(tmp_path / "runs/prepare-a", "3", "6_1")
    handed(tmp_path / "runs/prepare-b", "7")
    handed(tmp_path / "runs/other", "8")
    after = ("5", str(tmp_path / "runs/prepare-*"))
    given = flags(site(after=after).script([(tmp_path / "run", PART_OF_ONE)]))
    assert given["dependency"] == "afterok:6_1:7"
    assert given["kill-on-invalid-dep"] == "yes"
    done = flags(site(after=("5",)).script([(tmp_path / "run", PART_OF_ONE)]))
    assert "dependency" not in done


def test_what_is_no_job_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(tmp_path, monkeypatch, {})
    handed(tmp_path / "runs/never")
    with pytest.raises(PlanError, match="is no job, and no run folder there was handed to SLURM") as caught:
        later.jobs_before((str(tmp_path / "runs/*"), "nobody"))
    assert len(caught.value.problems) == 2
    with pytest.raises(ValidationError, match="both say what to wait for"):
        site(after=("5",), sbatch={"dependency": "singleton"})


def test_where_slurm_is_silent_all_of_them_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert later.waiting(("5", "6_2"))["dependency"] == "afterok:5:6_2"
    assert later.waiting(None) == {}


def test_a_command_whose_data_are_being_prepared_is_typed_again_behind_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = machine(tmp_path, monkeypatch, {"6": "RUNNING"})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "launch.py"), "x"])
    where = site(after=("6",), account="us", setup=("module load cuda",), python=str(tmp_path / "python"))
    run = SimpleNamespace(task=SimpleNamespace(needs_corpus=True), cluster=where, root=Path("runs"))
    told = started_later([run], ["data=text", "data.files=a b/*.txt"])  # type: ignore[list-item]
    why = "when 6 ended well, since samples are of all shards"
    assert told == f"job 77 starts this command {why}; log: {tmp_path}/runs/later/77.log"
    asked = flags(given.read_text())
    assert asked | {"dependency": "afterok:6", "account": "us", "ntasks": "1", "partition": "h100"} == asked
    assert "gpus-per-node" not in asked
    (tmp_path / "python").write_text(f'#!/bin/bash\nprintf "%s\\n" "$PWD" "$@" > {tmp_path}/typed\n')
    (tmp_path / "python").chmod(0o755)
    script = given.read_text().replace("module load cuda", "true")
    assert script != given.read_text()
    assert subprocess.run(["bash", "-c", script], check=False).returncode == 0
    typed = (tmp_path / "typed").read_text().splitlines()
    assert typed == [str(tmp_path), str(tmp_path / "launch.py"), "data=text", "data.files=a b/*.txt"]


def test_what_reads_no_data_or_waits_for_nothing_goes_on_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = machine(tmp_path, monkeypatch, {"5": "COMPLETED", "6": "RUNNING"})
    for needs, after in ((False, ("6",)), (True, ("5",)), (True, None)):
        run = SimpleNamespace(task=SimpleNamespace(needs_corpus=needs), cluster=site(after=after), root=tmp_path)
        assert started_later([run], []) is None  # type: ignore[list-item]
    assert not given.exists()
