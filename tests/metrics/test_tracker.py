"""One log, many trackers: none of them may stop or stall training."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from src.metrics.history import read
from src.metrics.trackers.background import Side
from src.metrics.trackers.config import Log, Tracker
from src.storage.json_lines import Lines

CONF = Path(__file__).parents[2] / "conf" / "tracker"


def section(name: str, **changes: Any) -> Tracker:
    """The file's fields with its parents' under them and the nested targets left out."""

    def fields(name: str) -> dict[str, Any]:
        own = yaml.safe_load((CONF / f"{name}.yaml").read_text())
        parents = [fields(parent) for parent in own.pop("defaults", []) if parent != "_self_"]
        for section in own.values():
            if isinstance(section, dict):
                section.pop("_target_")
        own.pop("_target_", None)
        return {key: value for each in (*parents, own) for key, value in each.items()}

    return Tracker.model_validate(fields(name) | changes)


class Sink:
    """Takes everything; `fault` names a method that raises, or one that hangs until released."""

    name = "sink"

    def __init__(self, raises: str = "", hangs: str = "") -> None:
        self.raises, self.hangs = raises, hangs
        self.release = threading.Event()
        self.taken: list[tuple[Any, ...]] = []

    def _call(self, method: str, *arguments: Any) -> None:
        if method == self.hangs:
            self.release.wait(5)
        if method == self.raises:
            raise ConnectionError("no route")
        self.taken.append((method, *arguments))

    def open(self) -> None:
        self._call("open")

    def record(self, step: int, values: Mapping[str, float]) -> None:
        self._call("record", step, dict(values))

    def image(self, step: int, name: str, path: Path) -> None:
        self._call("image", step, name, path)

    def finish(self, succeeded: bool, /) -> None:
        self._call("finish", succeeded)


@pytest.fixture
def hanging() -> Iterator[Sink]:
    sink = Sink(hangs="record")
    yield sink
    sink.release.set()


def test_records_and_attempts(tmp_path: Path) -> None:
    sink = Sink()
    for attempt in (1, 2):
        log = Log(tmp_path, [Side(sink, 10)], finish_seconds=10)
        assert log.attempt == attempt
        log.record(10 * attempt, {"loss": 4.0, "tokens": 640})
        log.image(10, "curve", tmp_path / "loss.png")
        log.finish("done" if attempt == 2 else "failed")
    lines = [{k: v for k, v in one.items() if k != "time"} for one in Lines(tmp_path / "metrics.jsonl").read()]
    assert lines[:4] == [
        {"attempt": 1, "event": "start"},
        {"attempt": 1, "step": 10, "loss": 4.0, "tokens": 640.0},
        {"attempt": 1, "event": "image", "step": 10, "name": "curve", "path": str(tmp_path / "loss.png")},
        {"attempt": 1, "event": "finish", "status": "failed", "lost": {"sink": 0}},
    ]
    assert [one["attempt"] for one in lines[4:]] == [2, 2, 2, 2]
    assert sink.taken[1] == ("record", 10, {"attempt": 1, "loss": 4.0, "tokens": 640.0})
    assert [call for call in sink.taken if call[0] == "finish"] == [("finish", False), ("finish", True)]


def test_attempt_after_a_kill_that_tore_the_last_line(tmp_path: Path) -> None:
    Log(tmp_path).record(1, {"loss": 5.0})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"attempt": 1, "st')
    second = Log(tmp_path)
    second.record(2, {"loss": 4.0})
    assert second.attempt == 2
    assert read(tmp_path).series["loss"].steps == [1, 2]


@pytest.mark.parametrize(("raises", "lost"), [("record", 3), ("open", 3), ("finish", 0)])
def test_a_tracker_that_raises_warns_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, raises: str, lost: int
) -> None:
    log = Log(tmp_path, [Side(Sink(raises=raises), 10)], finish_seconds=10)
    for step in range(3):
        log.record(step, {"loss": 1.0})
    log.finish("done")
    told = [record.message for record in caplog.records if "failed to" in record.message]
    assert told == [
        f"tracker sink failed to {raises}: ConnectionError: no route; training goes on, lost points are counted"
    ]
    assert Lines(tmp_path / "metrics.jsonl").last()["lost"] == {"sink": lost}  # type: ignore[index]
    assert len(read(tmp_path).series["loss"].steps) == 3


def test_a_tracker_that_hangs_costs_points_but_no_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, hanging: Sink
) -> None:
    log = Log(tmp_path, [Side(hanging, 5)], finish_seconds=0.2)
    began = time.monotonic()
    for step in range(12):
        log.record(step, {"loss": 1.0})
    log.finish("stopped")
    assert time.monotonic() - began < 5  # the sink holds each point for 5 s
    assert hanging.taken == [("open",)]
    lost = Lines(tmp_path / "metrics.jsonl").last()["lost"]["sink"]  # type: ignore[index]
    assert lost == 12
    assert len(read(tmp_path).series["loss"].steps) == 12
    messages = [record.message for record in caplog.records]
    assert sum("does not keep up" in message for message in messages) == 1
    assert messages[-1] == f"tracker sink lost {lost} points; metrics.jsonl has them all"


def test_a_full_disk_warns_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = Log(tmp_path / "absent")
    for step in range(3):
        log.record(step, {"loss": 1.0})
    log.finish("done")
    assert sum("cannot be written" in record.message for record in caplog.records) == 1


def test_last_attempt_wins(tmp_path: Path) -> None:
    """Killed at 50 with a checkpoint at 20: the second attempt's 30 and 40 replace the first's 30, 40 and 50."""
    first = Log(tmp_path)
    for step in (10, 20, 30, 40, 50):
        first.record(step, {"loss": 100.0 + step})
    first.record(20, {"validation_loss": 7.0})
    second = Log(tmp_path)
    for step in (30, 40):
        second.record(step, {"loss": 200.0 + step})
    history = read(tmp_path)
    assert history.series["loss"].steps == [10, 20, 30, 40]
    assert history.series["loss"].values == [110.0, 120.0, 230.0, 240.0]
    assert history.series["validation_loss"].values == [7.0]
    assert (history.attempts, history.points_replaced) == (2, 3)


def test_every_file_of_the_group_builds_and_opens_nothing(tmp_path: Path) -> None:
    chosen = {file.stem: section(file.stem) for file in CONF.glob("*.yaml")}
    fields = ("wandb", "tensorboard", "trackio", "mlflow")
    trackers = {name: {each for each in fields if getattr(one, each) is not None} for name, one in chosen.items()}
    alone = {each: {each} for each in fields}
    assert trackers == {"jsonl": set(), "all": {"wandb", "tensorboard"}} | alone


def test_a_missing_package_is_told_by_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("weights_and_biases", "tensorboard"):
        monkeypatch.setattr(f"src.metrics.trackers.{module}.find_spec", lambda _: None)
    for name, package in (("wandb", "wandb"), ("tensorboard", "tensorboard")):
        with pytest.raises(ValidationError, match=f"pip install {package}"):
            section(name)
    section("jsonl")


def test_tensorboard_hides_replayed_steps(tmp_path: Path) -> None:
    from matplotlib.image import imsave
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    imsave(tmp_path / "a.png", [[[0.0, 0.5, 1.0]] * 4] * 4)
    for attempt, steps in ((1, (10, 20, 30)), (2, (20, 30, 40))):
        log = section("tensorboard").open(tmp_path, {})
        for step in steps:
            log.record(step, {"loss": 100.0 * attempt + step})
        log.image(steps[-1], "curve", tmp_path / "a.png")
        log.finish("done")
        assert Lines(tmp_path / "metrics.jsonl").last()["lost"] == {"tensorboard": 0}  # type: ignore[index]
        if attempt == 1:
            time.sleep(1.1)  # tensorboard orders its files by whole seconds
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(one.step, one.value) for one in events.Scalars("loss")] == [(10, 110), (20, 220), (30, 230), (40, 240)]
    assert [one.value for one in events.Scalars("attempt")] == [1, 2, 2, 2]
    assert [one.step for one in events.Images("curve")] == [40]


WANDB_RUN = """
import sys
from pathlib import Path
from tests.metrics.test_tracker import section
folder, step = Path(sys.argv[1]), int(sys.argv[2])
log = section("wandb", finish_seconds=60.0).open(folder, {"seed": 3, "model": {"dim": 8}})
for one in (step, step + 1):
    log.record(one, {"loss": 1.0 / one})
log.finish("done")
"""


def wandb_records(path: Path) -> list[Any]:
    """The records of an offline run: LevelDB's log format, blocks of 32 KiB, after a file header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    content, offset, parts, records = path.read_bytes(), 7, b"", []
    while offset + 7 <= len(content):
        left = 32768 - offset % 32768
        if left < 7:  # no room for a header: padding
            offset += left
            continue
        size, kind = int.from_bytes(content[offset + 4 : offset + 6], "little"), content[offset + 6]
        parts += content[offset + 7 : offset + 7 + size]
        offset += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(parts)
            records.append(record)
            parts = b""
    return records


def test_wandb_offline_keeps_one_run_over_two_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "debug-1234abcd"
    folder.mkdir()
    monkeypatch.setenv("WANDB_MODE", "offline")
    for step, job in ((5, "71"), (6, "72")):  # the second attempt replays step 6
        with (folder / "attempts.jsonl").open("a") as file:
            file.write(f'{{"number": {step}, "started": "2026-01-01T00:00:00+00:00", "job": "{job}"}}\n')
        subprocess.run([sys.executable, "-c", WANDB_RUN, str(folder), str(step)], check=True, timeout=120)
        assert Lines(folder / "metrics.jsonl").last()["lost"] == {"wandb": 0}  # type: ignore[index]
    minted = (folder / "wandb_id.txt").read_text()
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{minted}.wandb"] * 2
    seen, told = [], []
    for file in files:
        records = wandb_records(file)
        (run,) = {record.run.run_id for record in records if record.HasField("run")}
        assert run == minted
        assert {record.run.display_name for record in records if record.HasField("run")} == {"debug-1234abcd"}
        metrics = {
            record.metric.glob_name: record.metric.step_metric for record in records if record.HasField("metric")
        }
        assert metrics["*"] == "step"
        for record in records:
            if record.HasField("history"):
                values = {item.nested_key[0] if item.nested_key else item.key: item.value_json
                          for item in record.history.item}  # fmt: skip
                seen.append((values["step"], values["attempt"], values["loss"]))
        updates = {one.key: one.value_json for record in records for one in record.config.update}
        told.append(updates["jobs"])
    assert told == ['["71"]', '["71","72"]']
    assert seen == [("5", "1", "0.2"), ("6", "1", str(1 / 6)), ("6", "2", str(1 / 6)), ("7", "2", str(1 / 7))]


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({}, "no key is configured"),
        ({"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_HTTP_TIMEOUT": "1"}, "127.0.0.1:9"),
    ],
    ids=["no key", "no network"],
)
def test_wandb_goes_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], why: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-c", WANDB_RUN, str(tmp_path), "1"]
    output = subprocess.run(command, check=True, timeout=120, capture_output=True, text=True).stderr
    assert why in output
    assert "logging offline" in output
    assert Lines(tmp_path / "metrics.jsonl").last()["lost"] == {"wandb": 0}  # type: ignore[index]
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1
