"""What SLURM is asked for, and what a site's facts may not say; without a SLURM."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from src.cluster.slurm import client
from src.cluster.slurm.batch_script import ON_NODE
from src.cluster.slurm.client import NodeFacts
from src.cluster.slurm.config import Slurm
from src.cluster.slurm.resources import Resources, problems
from src.cluster.slurm.scheduler import SlurmScheduler
from src.cluster.submission import Prepared
from src.errors import PlanError, UserError
from src.runs.submissions import submissions
from src.storage.json_lines import Lines

CONF = Path(__file__).parents[2] / "conf/cluster"
TWO_NODES = {"nodes": 2, "ranks_per_node": 8, "world": 16}
PART_OF_ONE = {"nodes": 1, "ranks_per_node": 2, "world": 2}


def site(preset: str = "slurm", **changed: Any) -> Slurm:
    facts = yaml.safe_load((CONF / "slurm.yaml").read_text()) | {"partition": "h100"}
    facts |= yaml.safe_load((CONF / f"{preset}.yaml").read_text()) | {"partition": "h100"} | changed
    return Slurm(**{key: value for key, value in facts.items() if key not in ("_target_", "defaults")})


def flags(text: str) -> dict[str, str]:
    """Of one script."""
    lines = (line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH"))
    return {key: value for key, _, value in (line.partition("=") for line in lines)}


def test_the_resources_are_the_plans(tmp_path: Path) -> None:
    given = flags(site(memory_gib_per_gpu=12.5, exclude="n3").script([(tmp_path / "run", TWO_NODES)]))
    derived = {"nodes": "2", "ntasks-per-node": "8", "gpus-per-node": "8", "cpus-per-task": "12", "mem": "102400M"}
    said = {"partition": "h100", "exclude": "n3", "time": "1440", "signal": "USR2@600", "requeue": ""}
    where = {"job-name": "run", "output": f"{tmp_path}/run/logs/slurm/%j_0_log.out", "open-mode": "append"}
    assert given == derived | said | where


@pytest.mark.parametrize(
    ("answer", "known", "startable", "told"),
    [
        ("requeue n2", "(null)", True, ["requeue JOB", "update JobId=JOB ExcNodeList=n2"]),
        ("requeue n2", "n[3-5],n9", True, ["requeue JOB", "update JobId=JOB ExcNodeList=n[3-5],n9,n2"]),
        ("requeue n2", "n1", False, ["requeue JOB"]),
        ("requeue n2", "old1,old2", True, ["requeue JOB", "update JobId=JOB ExcNodeList=n2"]),
        ("requeue", "n9", True, ["requeue JOB"]),
        ("stop", "n9", True, []),
    ],
)
@pytest.mark.parametrize("job", ["7", "7_1"])
def test_the_batch_script_does_what_the_verdict_says(
    tmp_path: Path, job: str, answer: str, known: str, startable: bool, told: list[str]
) -> None:
    """Its last part, with stand-ins for the verdict, scontrol and sbatch; a bad node joins those that are left out,
    unless SLURM says that the job could then not start; those of earlier failures are then let in again. What is
    requeued is an element of an array, not the array, whose id the last element has.
    """
    for name, does in {
        "judge": f'echo "{answer}"',
        "scontrol": f'[ $1 = show ] && echo "  ReqNodeList=(null) ExcNodeList={known}" || echo "$@" >> {tmp_path}/told',
        "sbatch": f'echo "$@" >> {tmp_path}/tested; case "$2" in *old*) exit 1;; esac; exit {1 - startable}',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    script = site(python=str(tmp_path / "judge")).script([(tmp_path / "run", PART_OF_ONE)])
    last = "false\n" + script.partition("# teardown\n")[2]
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    array, _, index = job.partition("_")
    environment |= {"SLURM_ARRAY_JOB_ID": array, "SLURM_ARRAY_TASK_ID": index} if index else {}
    done = subprocess.run(["bash", "-c", last, "the script"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    lines = (tmp_path / "told").read_text().splitlines() if (tmp_path / "told").exists() else []
    assert lines == [line.replace("JOB", job) for line in told]
    assert done.stderr == (
        "" if startable else "node n2 is not left out: without n1,n2 too few nodes are left for this job\n"
    )
    if answer == "requeue n2":
        tried = [f"{known},n2".removeprefix("(null),"), *(["n2"] if not startable or "old" in known else [])]
        said = "".join(f"--test-only --exclude={out} the script\n" for out in tried)
        assert (tmp_path / "tested").read_text() == said


def test_a_signal_to_all_of_the_job_leaves_the_script_to_its_end(tmp_path: Path) -> None:
    """scancel --signal=USR2 --full: the shell gets it, too, while srun runs, and keeps srun's own exit code."""
    lines = site().script([(tmp_path, PART_OF_ONE)]).splitlines()
    assert lines[lines.index("# setup") + 1] == "trap : USR2"
    script = f"trap : USR2\n(kill -USR2 $$; exit 3)\necho $? > {tmp_path}/code"
    assert subprocess.run(["bash", "-c", script]).returncode == 0
    assert (tmp_path / "code").read_text() == "3\n"


def test_points_of_one_shape_are_one_array(tmp_path: Path) -> None:
    runs = [(tmp_path / name, shape) for name, shape in zip("abc", (TWO_NODES, PART_OF_ONE, TWO_NODES), strict=True)]
    text = site(array_parallelism=5).script(runs)
    array, single = text.split("#!/bin/bash")[1:]
    assert flags(array)["array"] == "0-1%2"
    assert f"folders=({tmp_path}/a {tmp_path}/c)" in array
    assert (flags(array)["nodes"], flags(single)["nodes"], flags(single)["ntasks-per-node"]) == ("2", "1", "2")
    assert "array" not in flags(single)


def test_a_sites_own_flags_are_verbatim(tmp_path: Path) -> None:
    own = {"gpus-per-node": None, "gres": "gpu:h100:8", "exclusive": True, "mail-type": "END", "wckey": "a"}
    given = flags(site(sbatch=own, requeues=0).script([(tmp_path, TWO_NODES)]))
    assert "gpus-per-node" not in given
    assert "no-requeue" in given
    assert {"gres": "gpu:h100:8", "exclusive": "", "mail-type": "END", "wckey": "a"}.items() <= given.items()


def test_a_container_is_a_matter_of_flags(tmp_path: Path) -> None:
    srun = {"container-image": "a.sqsh", "container-mounts": "/d:/d", "no-container-mount-home": True}
    lines = site("slurm_container", srun=srun).script([(tmp_path, TWO_NODES)]).splitlines()
    ours = "--container-image=a.sqsh --container-mounts=/d:/d --no-container-mount-home"
    (ranks,) = (line for line in lines if line.startswith("srun "))
    assert f"--cpus-per-task=12 {ours} python3 {ON_NODE} -u -m submitit.core._submit" in ranks
    assert 'snapshot="${folders[$point]}/code/${codes[$point]}"' in lines
    assert any(
        f"srun --overlap --nodes=1 --ntasks=1 {ours} python3 -m src.cluster.diagnosis.verdict" in line for line in lines
    )


def test_an_interpreter_is_one_word_of_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    lines = site(python="~/my envs/a;b/bin/python").script([(tmp_path, TWO_NODES)]).splitlines()
    used = [line for line in lines if "/my envs/" in line]
    assert len(used) == 2, "the ranks and the verdict"
    assert all("'/home/me/my envs/a;b/bin/python' -" in line for line in used)


def test_zero_is_a_value_of_a_flag(tmp_path: Path) -> None:
    assert (
        flags(site(sbatch={"nice": 0, "gpus-per-node": False}).script([(tmp_path, TWO_NODES)])).items()
        >= {"nice": "0"}.items()
    )


class Asked:
    """Stands for subprocess.run: SLURM's answers by command; remembers the scripts that were only tested."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refuses: str = "", silent: bool = False) -> None:
        self.refuses, self.silent, self.tested = refuses, silent, list[str]()
        monkeypatch.setattr(client, "available", lambda: True)
        monkeypatch.setattr("subprocess.run", self)

    def __call__(self, command: Sequence[str], **options: Any) -> "subprocess.CompletedProcess[str]":
        if self.silent:
            return subprocess.CompletedProcess(
                command, 1, "", "slurm_load_partitions: Unable to contact slurm controller"
            )
        if command[0] == "sinfo":
            answer = (
                "n1|96|2000000|gpu:8|10-00:00:00\nn2|96|2000000|gpu:8|10-00:00:00\n"
                if "--Node" in command
                else "h100\n"
            )
            return subprocess.CompletedProcess(command, 0, answer, "")
        if command[1] in ("--help", "--version"):
            return subprocess.CompletedProcess(command, 0, "slurm-wlm 22.05.8", "")
        assert command == ["sbatch", "--test-only"]
        self.tested.append(options["input"])
        return subprocess.CompletedProcess(command, 1 if self.refuses else 0, "", self.refuses)


def test_slurm_is_asked_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The partition and its limits by sinfo, all else by sbatch, one script a shape; also for a dry run."""
    points = [(tmp_path / name, shape) for name, shape in zip("abc", (TWO_NODES, PART_OF_ONE, TWO_NODES), strict=True)]
    asked = Asked(monkeypatch)
    site().check(points, dry=True)
    assert [flags(text)["ntasks-per-node"] for text in asked.tested] == ["8", "2"]
    with pytest.raises(PlanError, match="h10: no such partition; did you mean h100"):
        site(partition="h10").check(points, dry=True)
    asked.refuses = "allocation failure: Invalid account or account/partition combination specified"
    with pytest.raises(PlanError) as refused:
        site(account="gold").check(points, dry=False)
    assert refused.value.problems == (f"cluster=slurm: sbatch would refuse: {asked.refuses}",)
    asked.refuses = "allocation failure: Requested nodes are busy"  # which the queue is for
    site().check(points, dry=False)
    assert list(tmp_path.iterdir()) == []


def test_a_slurm_that_does_not_answer_keeps_no_dry_run_from_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Asked(monkeypatch, silent=True)
    site().check([(tmp_path, TWO_NODES)], dry=True)
    assert "warning: SLURM does not answer, so nobody has asked it: slurm_load" in capsys.readouterr().err
    with pytest.raises(PlanError, match="SLURM does not answer: slurm_load"):
        site().check([(tmp_path, TWO_NODES)], dry=False)
    monkeypatch.setattr(client, "available", lambda: False)
    site().check([(tmp_path, TWO_NODES)], dry=True)
    with pytest.raises(PlanError, match="no sbatch on this machine"):
        site().check([(tmp_path, TWO_NODES)], dry=False)


class Held:
    """A run folder, as far as a submission needs one."""

    code = "0a1b2c3d"

    def __init__(self, path: Path) -> None:
        self.path, self.closed = path, False
        path.mkdir()

    def close(self) -> None:
        self.closed = True


def test_a_job_that_sbatch_refuses_keeps_no_other_from_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of three shapes is refused, and one point's earlier job lives: the others are queued and recorded."""
    worlds = {
        name: {"nodes": 1, "ranks_per_node": count, "world": count}
        for name, count in zip("abcd", (1, 2, 2, 4), strict=True)
    }
    held = [Held(tmp_path / name) for name in worlds]
    Lines(tmp_path / "a/slurm.jsonl").append({"job": "3", "submitted": 1.0, "log": "x"})
    monkeypatch.setattr(client, "states", lambda _: {"3": "PENDING"})

    def send(_: Slurm, place: Path, parameters: dict[str, Any], jobs: Sequence[Any]) -> list[Any]:
        if parameters["ntasks_per_node"] == 2:
            raise PlanError("sbatch refused: no")
        return [
            SimpleNamespace(job_id=f"9_{number}", paths=SimpleNamespace(stdout=place)) for number, _ in enumerate(jobs)
        ]

    monkeypatch.setattr(Slurm, "_send", send)
    points = [Prepared(each, plan) for each, plan in zip(held, worlds.values(), strict=True)]  # type: ignore[arg-type]
    found = site().submit_many(points)
    assert [str(each) if isinstance(each, UserError) else each.job for each in found] == [
        f"{tmp_path}/a: job 3 is queued or running it; wait for it, or scancel 3",
        *["sbatch refused: no"] * 2,
        "9_0",
    ]
    assert [each.closed for each in held] == [False, False, False, True]
    assert [len(submissions(each.path)) for each in held] == [1, 0, 0, 1]


def test_a_run_that_shares_its_node_is_cancelled_by_itself(tmp_path: Path) -> None:
    """Not with scancel, which would end its neighbours, too."""
    run = tmp_path / "a run"
    run.mkdir()
    Lines(run / "slurm.jsonl").append({"job": "3", "submitted": 1.0, "log": "x", "packed": True})
    assert Slurm.scheduler.cancel_command(run, "3") == f"touch '{run}/cancel'"
    assert Slurm.scheduler.cancel_command(tmp_path, "3") == "scancel 3"


def test_setup_comes_before_the_path_to_the_frozen_code(tmp_path: Path) -> None:
    lines = site("slurm_modules").script([(tmp_path, TWO_NODES)]).splitlines()
    order = [lines.index(line) for line in ("export OMP_NUM_THREADS=12", "module load cuda", "export PYTHONSAFEPATH=1")]
    assert order == sorted(order)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"sbatch": {"nodes": 3}}, "nodes follows from parallel and cluster; leave it out"),
        ({"sbatch": {"signal": "USR1@9"}}, "signal is cluster.grace_seconds; leave it out"),
        ({"minutes": 10}, "grace_seconds=600 is no part of minutes=10; at most 599 seconds"),
        ({"grace_seconds": 70000}, "less than or equal to 65535"),
        ({"sbatch": {"ntasks_per_node": 3}}, "ntasks_per_node follows from parallel and cluster; leave it out"),
        ({"sbatch": {"comment\n#SBATCH --nodes": 3}}, "is no flag; it has letters, digits and - only"),
        ({"sbatch": {"comment": "a\n#SBATCH --nodes=9"}}, "holds a line break or another control character"),
        ({"srun": {"container-image": "a\x1b"}}, "holds a line break or another control character"),
        ({"python": "python3\nrm"}, "holds a line break or another control character"),
    ],
)
def test_facts_that_contradict_each_other(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        site(**changed)


def test_several_kinds_of_nodes() -> None:
    """A layout must find enough nodes that can hold it, not enough nodes."""
    there = [NodeFacts(f"n{number}", 96, 1000 * 1024, 8 if number < 2 else 4, 600) for number in range(6)]
    asked = [Resources.of(site(minutes=60), shape) for shape in (TWO_NODES, PART_OF_ONE)]
    assert problems(site(minutes=60), asked, "h100", there, ["h100"]) == []
    four = Resources.of(site(), TWO_NODES | {"nodes": 4})
    (line,) = problems(site(minutes=60), [four], "h100", there, ["h100"])
    assert line == "parallel asks for 4 nodes of 8 GPUs: h100 has 2; choose a layout of at most 16 ranks"
    (line,) = problems(site(minutes=601), [asked[0]], "h100", there, ["h100"])
    assert line == "cluster.minutes=601: partition h100 allows at most 600"
    (line,) = problems(site(), asked, None, [], ["a100", "h100"])
    assert line == "cluster.partition=null: this SLURM has no default partition; there are: a100, h100"


def test_an_element_of_an_array_goes_by_its_own_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert SlurmScheduler().own_job() == "7"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert SlurmScheduler().own_job() == "7_1"


@pytest.mark.parametrize(
    ("version", "parameters", "help_text", "requeue", "waits"),
    [
        ("slurm 25.11.1", "bf_interval=30,enable_expedited_requeue", "  --wait-for-children", "expedite", True),
        ("slurm 26.05.0", "enable_expedited_requeue", "", "expedite", False),
        ("slurm 25.11.1", "bf_interval=30", "  --wait-for-children", "", True),  # the site has not allowed it
        ("slurm-wlm 22.05.8", "enable_expedited_requeue", "  --wait=sec", "", False),
    ],
)
def test_what_a_newer_slurm_offers_is_taken_where_it_is(
    version: str,
    parameters: str,
    help_text: str,
    requeue: str,
    waits: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = f"Configuration data\nSchedulerParameters     = {parameters}\nSchedulerTimeSlice      = 30 sec"
    for name, says in {"sbatch": version, "scontrol": config, "srun": help_text}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\ncat << 'END'\n{says}\nEND\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    lines = site().script([(tmp_path / "run", TWO_NODES)])
    assert flags(lines)["requeue"] == requeue
    (ranks,) = (line for line in lines.splitlines() if line.startswith("srun "))
    assert ("--wait-for-children" in ranks) == waits
    off = site(srun={"wait-for-children": None}, requeues=0).script([(tmp_path / "run", TWO_NODES)])
    assert "--wait-for-children" not in off
    assert "no-requeue" in flags(off)
    monkeypatch.setenv("PATH", "/nowhere")
    assert not client.expedites()
    assert not client.waits_for_children()


def test_slurms_commands_are_asked_once_for_all_shapes_of_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run, and then what is submitted: nothing that a SLURM can do changes in between."""
    for name, says in {
        "sbatch": "slurm 25.11.1",
        "scontrol": "SchedulerParameters = bf_interval=30",
        "srun": "",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\necho {name} >> {tmp_path}/asked\necho {says}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    where, run = site(), tmp_path / "run"
    assert where.script([(run, TWO_NODES), (run, PART_OF_ONE)]).count("#!/bin/bash") == 2
    assert where.script([(run, TWO_NODES | {"nodes": 3, "world": 24})]).count("#!/bin/bash") == 1
    assert sorted((tmp_path / "asked").read_text().split()) == ["sbatch", "scontrol", "srun"]
    assert where == site(), "what it has asked makes it no other site: points of one site are submitted together"


GOES_ON, ENDING = ("RUNNING", "SIGNALING"), ("COMPLETING", "PREEMPTED", "CANCELLED", "PENDING")


@pytest.mark.parametrize(("state", "ending"), [(each, each in ENDING) for each in (*GOES_ON, *ENDING)])
def test_a_job_that_is_told_of_a_signal_is_not_ended_by_slurm(
    state: str, ending: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "states", lambda jobs: dict.fromkeys(jobs, state))
    assert SlurmScheduler().is_ending("7") == ending
    assert SlurmScheduler().states(["7"])["7"].live == (state not in ("PREEMPTED", "CANCELLED"))


@pytest.mark.parametrize(("nodes", "excluded"), [(4, "n9,n2"), (3, "n9")])
def test_nodes_that_were_slow_are_left_out_of_the_next_submission(
    nodes: int, excluded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where two others than n9, the site's own, remain; of a run that nobody measured nothing is known."""
    sinfo = "\n".join(f"n{each}|96|1000000|gpu:8|infinite" for each in [*range(1, nodes), 9])
    for name, says in {"sinfo": sinfo, "scontrol": "n9", "sbatch": "", "srun": ""}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\ncat << 'END'\n{says}\nEND\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    run = tmp_path / "run"
    run.mkdir()
    assert flags(site(exclude="n9").script([(run, TWO_NODES)]))["exclude"] == "n9"
    Lines(run / "slow_nodes.jsonl").append({"node": "n2", "words": "rank 3 on n2: a product is 20 % below its twins"})
    assert flags(site(exclude="n9").script([(run, TWO_NODES)]))["exclude"] == excluded
    assert ("n2 found slow and not left out" in capsys.readouterr().err) == (excluded == "n9")
