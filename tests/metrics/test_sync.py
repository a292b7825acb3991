"""What offline attempts logged reaches the server once, through a stand-in for wandb."""

import json
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml

from src.metrics.trackers.addresses import addresses
from src.metrics.trackers.sync import main, offline

STARTS = {1: 100.0, 2: 200.0, 3: 300.0}


class Server:
    """Takes what `wandb.init` would send; `down`: nobody answers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.points: list[dict[str, Any]] = []
        self.begun: list[dict[str, Any]] = []
        self.down = False
        monkeypatch.setattr(wandb, "login", self.login)
        monkeypatch.setattr(wandb, "init", self.init)

    url = "https://wandb.example/me/p/runs/1"

    def login(self, **_: object) -> bool:
        if self.down:
            raise wandb.Error("no route")
        return True

    def init(self, **options: Any) -> "Server":
        self.begun.append(options)
        return self

    def define_metric(self, *_: object, **__: object) -> None: ...

    def log(self, point: dict[str, Any]) -> None:
        self.points.append(point)

    def finish(self, exit_code: int) -> None:
        assert exit_code == 0


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    return Server(monkeypatch)


def run(folder: Path, offline_at: list[float]) -> Path:
    """Three attempts of two steps each; trackers were opened offline at these times."""
    folder.mkdir()
    wandb_section = {"project": "p", "entity": None, "group": "sweep-1", "tags": ["a"], "notes": None}
    section = {"_target_": "x", **wandb_section, "mode": "offline", "init_seconds": 5.0}
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": 0, "tracker": {"wandb": section}}))
    for attempt, time in STARTS.items():
        log(folder, {"attempt": attempt, "time": time, "event": "start"})
        for step in (attempt, attempt + 1):
            log(folder, {"attempt": attempt, "time": time + step, "step": step, "loss": 1.0 / step})
    (folder / "wandb_offline.jsonl").write_text("".join(json.dumps({"time": time}) + "\n" for time in offline_at))
    return folder


def log(folder: Path, line: dict[str, Any]) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def sent(server: Server) -> list[tuple[int, int]]:
    return [(point["attempt"], point["step"]) for point in server.points]


def test_offline_attempts_are_sent_once_into_the_runs_own_run(tmp_path: Path, server: Server) -> None:
    folder = run(tmp_path / "a", [100.5, 301.0])
    assert main([str(folder)]) == 0
    assert sent(server) == [(1, 1), (1, 2), (3, 3), (3, 4)]
    assert server.points[1] == {"step": 2, "attempt": 1, "loss": 0.5}
    (begun,) = server.begun
    assert (begun["mode"], begun["resume"], begun["group"], begun["project"]) == ("online", "allow", "sweep-1", "p")
    assert begun["id"] == (folder / "wandb_id.txt").read_text()
    assert main([str(folder)]) == 0
    assert len(server.points) == 4
    log(folder, {"attempt": 3, "time": 310.0, "step": 5, "loss": 0.1})
    assert main([str(folder)]) == 0
    assert sent(server)[4:] == [(3, 5)]
    assert {each["id"] for each in server.begun} == {begun["id"]}
    assert addresses(folder) == {"wandb": server.url}
    assert len((folder / "trackers.jsonl").read_text().splitlines()) == 1


def test_layers_with_experts_are_shown_in_groups(tmp_path: Path, server: Server) -> None:
    folder = run(tmp_path / "a", [100.5])
    values = {"experts/dead": 3.0, "experts/layer_07/dead": 1.0, "experts/layer_08/entropy": 0.5}
    log(folder, {"attempt": 1, "time": 110.0, "step": 9, **values})
    assert main([str(folder)]) == 0
    assert server.points[-1] == {
        "step": 9,
        "attempt": 1,
        "experts/dead": 3.0,
        "experts_of_layers_00-07/dead/layer_07": 1.0,
        "experts_of_layers_08-15/entropy/layer_08": 0.5,
    }


def test_a_silent_server_loses_nothing(tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(tmp_path / "a", [200.5])
    server.down = True
    assert main([str(folder)]) == 2
    assert "nothing sent, wandb says: no route" in capsys.readouterr().err
    server.down = False
    assert main([str(folder)]) == 0
    assert sent(server) == [(2, 2), (2, 3)]


def test_a_sweep_sends_each_of_its_runs(tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [run(tmp_path / "a", [100.5]), run(tmp_path / "b", []), tmp_path / "never_started"]
    sweep = tmp_path / "sweeps"
    sweep.mkdir()
    for folder in folders:
        with (sweep / "ledger.jsonl").open("a") as file:
            file.write(json.dumps({"event": "point", "folder": str(folder)}) + "\n")
    assert main([str(sweep)]) == 0
    assert sent(server) == [(1, 1), (1, 2)]
    assert capsys.readouterr().out == f"{folders[0]}: 2 points sent\n{folders[1]}: nothing to send\n"
    assert main([str(tmp_path)]) == 2


def test_an_attempt_that_really_was_offline_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real wandb, offline, as a run uses it."""
    from tests.metrics.test_tracker import section

    monkeypatch.setenv("WANDB_MODE", "offline")
    log = section("wandb").open(tmp_path, {})
    log.record(1, {"loss": 2.0})
    log.finish("done")
    assert [line["step"] for _, line in offline(tmp_path)] == [1]
