"""Trackio and MLflow as they are, on this machine: one run for a run folder for ever, and no wait of a step."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from src.metrics.trackers.addresses import addresses
from src.metrics.trackers.trackio import run_name
from src.storage.json_lines import Lines
from src.sweeps.grid import in_group
from tests.metrics.test_tracker import CONF, section

HOME = Path(__file__).parents[2]
ATTEMPT = """
import json, sys
from pathlib import Path
from tests.metrics.test_tracker import section
name, folder, step, lr, options = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), sys.argv[5]
chosen = section(name)
chosen = section(name, finish_seconds=60.0, **{name: {**getattr(chosen, name).model_dump(), **json.loads(options)}})
log = chosen.open(folder, {"optim": {"lr": lr, "betas": [0.9, 0.95]}, "seed": None})
for one in (step, step + 1):
    log.record(one, {"loss": 1.0 / one, "data/a+b/share": 0.5})
log.image(step + 1, "experts/load", folder / "a.png")
log.finish("done" if step == 6 else "failed")
"""


def attempts(name: str, folder: Path, **options: Any) -> None:
    """Two processes; the second one replays step 6 with another learning rate."""
    from matplotlib.image import imsave

    folder.mkdir()
    imsave(folder / "a.png", [[[0.0, 0.5, 1.0]] * 4] * 4)
    for step, lr, job in ((5, 0.1, "71"), (6, 0.2, "72")):
        with (folder / "attempts.jsonl").open("a") as file:
            file.write(f'{{"number": {step}, "started": "2026-01-01T00:00:00+00:00", "job": "{job}"}}\n')
        words = [name, str(folder), str(step), str(lr), json.dumps(options)]
        subprocess.run([sys.executable, "-c", ATTEMPT, *words], check=True, timeout=120, cwd=HOME)
        assert Lines(folder / "metrics.jsonl").last()["lost"] == {name: 0}  # type: ignore[index]


POINTS = [(5, 1, 1 / 5), (6, 1, 1 / 6), (6, 2, 1 / 6), (7, 2, 1 / 7)]  # step, attempt, loss

READ_TRACKIO = """
import json, sys
import trackio
from trackio.sqlite_storage import SQLiteStorage
(run,) = trackio.Api().runs(sys.argv[1])
print(json.dumps([run.name, run.config, SQLiteStorage.get_logs(sys.argv[1], run.name, run_id=run.id)], default=str))
"""


def test_trackio_keeps_one_run_over_two_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    folder = tmp_path / "demo-1234abcd"
    attempts("trackio", folder, project="p", group="sweep-1")
    output = subprocess.run(
        [sys.executable, "-c", READ_TRACKIO, "p"], check=True, timeout=120, capture_output=True, text=True
    ).stdout
    name, config, logs = json.loads(output.splitlines()[-1])
    assert name == run_name(folder)
    assert name.startswith("demo-1234abcd-")
    assert (config["_Group"], config["run_folder"]) == ("sweep-1", str(folder))
    points = [(log["step"], log["attempt"], log["loss"]) for log in logs if "loss" in log]
    assert sorted(points) == POINTS
    assert [log["step"] for log in logs if "experts/load" in log] == [6, 7]
    assert len(list((tmp_path / "trackio" / "media").rglob("*.png"))) == 2


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A tracking server of MLflow's own, with a database and pictures below a folder of the test; 20 CPU seconds."""
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    places = [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "artifacts"),
    ]
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, *places], cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.mark.slow
def test_mlflow_keeps_one_run_over_two_attempts(tmp_path: Path, server: str) -> None:
    from mlflow import MlflowClient

    folder = tmp_path / "demo-1234abcd"
    attempts("mlflow", folder, uri=server, experiment="e", group="sweep-1")
    client = MlflowClient(tracking_uri=server)
    (run,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert run.info.run_id == (folder / "mlflow_id.txt").read_text()
    assert (run.info.run_name, run.info.status) == ("demo-1234abcd", "FINISHED")
    assert run.data.params == {"optim.lr": "0.1", "optim.betas": "[0.9, 0.95]", "seed": "null"}
    told = {"optim.lr": "0.2", "jobs": "71, 72", "group": "sweep-1", "run_folder": str(folder)}
    assert {key: run.data.tags[key] for key in told} == told
    losses = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "loss")]
    numbers = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "attempt")]
    assert sorted(losses) == [(step, loss) for step, _, loss in POINTS]
    assert sorted(numbers) == [(step, attempt) for step, attempt, _ in POINTS]
    assert run.data.metrics["data/a_b/share"] == 0.5
    pictures = [each.path for each in client.list_artifacts(run.info.run_id, "images") if each.path.endswith(".png")]
    assert [each.split("+")[:3] for each in sorted(pictures)] == [
        ["images/experts~load", "step", "6"],
        ["images/experts~load", "step", "7"],
    ]
    assert addresses(folder)["mlflow"].endswith(f"/runs/{run.info.run_id}")


@pytest.mark.slow
def test_a_deleted_run_is_begun_anew(tmp_path: Path, server: str) -> None:
    from mlflow import MlflowClient

    client, options = MlflowClient(tracking_uri=server), section("mlflow").mlflow
    assert options is not None
    options = options.model_copy(update={"uri": server, "experiment": "deleted"})
    found = []
    for known in ("0" * 32, None):  # of a server that is no more, then a deleted one
        if known is not None:
            (tmp_path / "mlflow_id.txt").write_text(known)
        sink = options.sink(tmp_path, {})
        sink.open()
        found.append((tmp_path / "mlflow_id.txt").read_text())
        client.delete_run(found[-1])
    assert len({*found, "0" * 32}) == 3


@pytest.mark.slow
def test_mlflow_without_a_server_is_a_database_beside_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    folder = tmp_path / "root" / "a"
    folder.parent.mkdir()
    attempts("mlflow", folder)
    client = MlflowClient(tracking_uri=f"sqlite:///{folder.parent}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("pretraining").experiment_id])
    assert len(client.get_metric_history(run.info.run_id, "loss")) == 4
    assert len(list((folder.parent / "mlartifacts").rglob("*.png"))) == 2


MUTE = """
import sys
from pathlib import Path
from tests.metrics.test_tracker import section
options = {**section("mlflow").mlflow.model_dump(), "uri": sys.argv[2]}
log = section("mlflow", finish_seconds=0.2, mlflow=options).open(Path(sys.argv[1]), {})
for step in range(50):
    log.record(step, {"loss": 1.0})
log.finish("done")
"""


def test_a_server_that_never_answers_costs_points_and_no_step(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:  # takes connections, and says nothing
        uri = f"http://127.0.0.1:{mute.getsockname()[1]}"
        subprocess.run([sys.executable, "-c", MUTE, str(tmp_path), uri], check=True, timeout=100, cwd=HOME)
    lines = list(Lines(tmp_path / "metrics.jsonl").read())
    assert lines[-1]["lost"] == {"mlflow": 50}
    assert len([line for line in lines if "loss" in line]) == 50


@pytest.mark.parametrize(
    ("uri", "rule"),
    [
        ("localhost:5000", "no address of MLflow; write http://"),
        ("sqlite:///mlflow.db", "write a whole path, sqlite:////"),
        ("https://me:secret@host", "MLFLOW_TRACKING_USERNAME"),
    ],
)
def test_an_address_is_checked_before_anything_starts(uri: str, rule: str) -> None:
    options = section("mlflow").mlflow
    assert options is not None
    with pytest.raises(ValidationError, match=rule):
        type(options).model_validate(options.model_dump() | {"uri": uri})


def test_a_missing_package_is_told_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, package in (("trackio", "trackio"), ("mlflow", "mlflow-skinny")):
        monkeypatch.setattr(f"src.metrics.trackers.{module}.find_spec", lambda _: None)
        with pytest.raises(ValidationError, match=f"pip install {package}"):
            section(module)


def test_a_sweep_is_the_group_of_its_runs() -> None:
    sections = {"queue_points": 3, "wandb": None, "trackio": {"group": None}, "mlflow": {"group": "own"}}
    (found,) = in_group([{"tracker": sections}], "lr-1")
    assert found["tracker"] == sections | {"trackio": {"group": "lr-1"}, "mlflow": {"group": "own"}}
    assert {file.stem for file in CONF.glob("*.yaml")} >= {"trackio", "mlflow"}
