"""Alerts: what is told, to whom and how often; against a server of our own, with a secret that must not get out."""

import json
import os
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from src.config.groups import CONF
from src.errors import ConfigError
from src.metrics.alerts.config import Alerts
from src.metrics.alerts.send import Alert, alert_of, body, options_of, send, tell, tell_end
from src.metrics.alerts.watcher import AlertSink
from src.metrics.trackers.config import Tracker
from src.runs.folder import attempts
from src.storage.json_lines import Lines
from tests.runs.made import composed, config_text
from tests.sweeps.points import START, attempt, train

SECRET = "T00/B00/x7Qs3cr3t"


def options(**changes: Any) -> Alerts:
    found = yaml.safe_load((CONF / "alert" / "none.yaml").read_text()) | {"webhook": "HOOK"} | changes
    assert found.pop("_target_") == "src.metrics.alerts.config.Alerts"
    return Alerts(**found)


class Server(HTTPServer):
    """Keeps what it was sent; answers with `codes`, then with 200."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.codes: list[int] = []
        self.got: list[dict[str, Any]] = []
        self.arrived = threading.Event()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        code = self.server.codes.pop(0) if self.server.codes else 200
        if code == 200:
            self.server.got.append(json.loads(content))
            self.server.arrived.set()
        self.send_response(code)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with Server() as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("HOOK", f"http://127.0.0.1:{found.server_port}/{SECRET}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield found
        found.shutdown()
        thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "demo-1"
    train(folder, steps=60, loss=3.0)
    return folder


@pytest.mark.parametrize(
    ("ended", "said", "event"),
    [
        ("finished", "", "finished"),
        ("failed", "rank 1: ValueError: bad", "failed"),
        ("killed", "Ctrl-C twice", "failed"),
        ("failed", "rank 0: DivergedError: step 61: loss nan", "diverged"),
    ],
)
def test_an_end_is_told_once(folder: Path, server: Server, ended: str, said: str, event: str) -> None:
    attempt(folder, 1, START, ended, START + 60, said)
    for _ in range(2):  # a rank and its launcher see the same end
        tell_end(folder, options(form="json"))
    (got,) = server.got
    assert (got["event"], got["run"], got["step"], got["attempt"], got["detail"]) == (event, "demo-1", 60, 1, said)
    assert got["text"] == f"demo-1: {event} at step 60" + (f": {said}" if said else "")
    attempt(folder, 2, START + 100, ended, START + 160, said)  # another attempt's is another
    tell_end(folder, options(form="slack"))
    assert server.got[1] == {"text": got["text"]}


def test_stops_are_told_when_they_are_too_many(folder: Path, server: Server) -> None:
    for number, began in enumerate((0, 90_000, 95_000, 100_000), start=1):
        attempt(folder, number, START + began, "stopped", START + began + 60)
        tell_end(folder, options(preemptions=3))
    assert [each["text"] for each in server.got] == ["demo-1: preempted at step 60: stopped 3 times in 24 hours"]


def test_what_nobody_wants_is_not_told(folder: Path, server: Server) -> None:
    attempt(folder, 1, START, "finished", START + 60)
    tell_end(folder, options(events=["failed"]))
    tell_end(folder, options(webhook=None))
    assert server.got == []
    assert not (folder / "alerts.jsonl").exists()


def test_what_does_not_arrive_is_sent_again_and_told_without_the_secret(
    folder: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    waits = list[float]()
    alert, environment = alert_of(folder, "failed", "why"), dict(os.environ)
    server.codes = [500, 429]
    assert send(alert, options(), environment, waits.append) == []
    assert (waits, len(server.got)) == ([1.0, 2.0], 1)
    server.codes = [404] * 3
    assert send(alert, options(retries=2), environment, waits.append) == ["webhook: answered 404"]
    for url, words in (
        (f"http://127.0.0.1:9/{SECRET}", "webhook: URLError"),
        (f"http://bad host/{SECRET}", "webhook: InvalidURL"),
        (f"file:///{SECRET}", "webhook: the URL is neither http nor https"),
        (SECRET, "webhook: ValueError"),
        ("", "webhook: the environment has no HOOK"),
    ):
        assert send(alert, options(retries=0), {"HOOK": url}) == [words]
    server.codes = [403]
    tell(folder, options(retries=0), "stalled", "no step")
    assert [each.get("missed") for each in Lines(folder / "alerts.jsonl").read()] == [None, ["webhook: answered 403"]]
    told = capfd.readouterr()
    assert not [each for each in (*folder.iterdir(),) if SECRET in each.read_text()]
    assert SECRET not in told.out + told.err


def test_a_command_gets_the_facts(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, pathlib\npathlib.Path(sys.argv[1]).write_text(sys.stdin.read())\nsys.exit(int(sys.argv[2]))"
    )
    command = f"{sys.executable} -S {script} '{tmp_path / 'got it'}'"
    alert = Alert("spike", "demo-1", str(folder), 1, 60, "it's $HOME", 1.0)
    assert send(alert, options(webhook=None, command=f"{command} 0"), {}) == []
    assert json.loads((tmp_path / "got it").read_text()) == body(alert, "json")
    assert send(alert, options(webhook=None, command=f"{command} 3", retries=0), {}) == ["command: exit code 3"]
    assert send(alert, options(webhook=None, command="nowhere", retries=0), {}) == ["command: FileNotFoundError"]


def test_a_spike_is_held_against_the_lines_before_it(folder: Path) -> None:
    sink = AlertSink(folder, options(webhook=None))
    for step in range(40):
        assert sink.spike(9.0) is None or step >= 10
        sink.record(step, {"loss": 3.0 + 0.1 * (step % 2)})
    assert sink.spike(3.3) is None
    assert sink.spike(float("nan")) is None
    assert sink.spike(3.4) == "loss 3.4000, 7.0 standard deviations above the mean 3.0500 of 40 lines"
    sink.record(40, {"validation_loss": 9.0})
    assert sink.spike(2.0) is None


def test_a_spike_is_told_once(folder: Path, server: Server) -> None:
    attempt(folder, 1, START, None)
    sink = AlertSink(folder, options(events=["spike"]))
    for step in range(20):
        sink.record(step, {"loss": 3.0 + 0.1 * (step % 2)})
    sink.record(20, {"loss": 9.05})
    sink.record(21, {"loss": 99.0})
    words = "loss 9.0500, 120.0 standard deviations above the mean 3.0500 of 20 lines"
    assert [each["text"] for each in server.got] == [f"demo-1: spike at step 60: step 20: {words}"]


def test_a_stall_is_held_against_the_usual_interval(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("src.metrics.alerts.watcher.time.monotonic", lambda: now)
    sink = AlertSink(folder, options(webhook=None, stall_seconds=60.0, stall_factor=5.0))
    assert sink.stall(1e6) is None
    for step in range(5):
        now = 20.0 * step
        sink.record(step, {"step_seconds": 2.0, "loss": 3.0})
        sink.record(step, {"validation_loss": 3.0})
    assert sink.stall(now + 99.0) is None
    assert sink.stall(now + 101.0) == "no step for 101 s, where 20.0 s are usual"


def test_a_run_that_hangs_is_told_while_it_hangs(folder: Path, server: Server) -> None:
    """By the thread of a log that is fed as rank 0 feeds it; nothing else of the run moves."""
    attempt(folder, 1, START, None)
    watcher = AlertSink(folder, options(stall_seconds=0.001, stall_factor=1.01, events=["stalled"]))
    none = dict.fromkeys(("wandb", "tensorboard", "trackio", "mlflow"))
    log = Tracker(queue_points=10, finish_seconds=5.0, **none).open(folder, {}, [watcher])
    for step in range(3):
        log.record(step, {"loss": 3.0, "step_seconds": 0.01, "data_seconds": 0.0})
    assert server.arrived.wait(60)
    log.finish("failed")
    assert server.got[0]["text"].startswith("demo-1: stalled at step ")
    assert attempts(folder)[0].ended is None


def test_a_url_is_no_name_of_a_variable() -> None:
    with pytest.raises(ValueError, match="a URL holds a secret; export ALERT_URL=https://"):
        options(webhook=f"https://hooks.example.org/{SECRET}")
    assert options().unheard({"HOOK": "x"}) == []
    assert options().unheard({}) == [
        "alert.webhook=HOOK: the environment has no such variable, so nobody hears of this run"
    ]


def test_the_section_of_a_folder_is_read_and_an_older_one_has_none(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(config_text("alert.webhook=HOOK", "alert.events=[failed]"))
    assert options_of(tmp_path) == options(events=["failed"])
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    assert options_of(tmp_path) is None


def test_a_config_without_the_section_is_built_and_is_the_same_run() -> None:
    from src.config.build import build
    from src.config.tree import identity

    tree = {key: value for key, value in composed().items() if key != "alert"}
    assert build(tree)["alert"] == options(webhook=None)
    assert identity(tree) == identity(composed("alert.webhook=HOOK"))
    with pytest.raises(ConfigError, match=r"alert\.events"):
        build(composed("alert.events=[fail]"))
