"""The page of a sweep stands alone and tells what the ledger knows."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from src.metrics.history import Series
from src.metrics.trackers.addresses import note_address
from src.runs.lock import Lock
from src.sweeps import commands
from src.sweeps.commands import main
from src.sweeps.importance import importance
from src.sweeps.ledger import Ledger
from src.sweeps.report.content import thinned
from src.sweeps.report.looks import DASHES, DISTINCT, Look, looks, ordered
from tests.sweeps.points import START, attempt, failed, finished, grid, tree


class Page(HTMLParser):
    """Every tag with its attributes; an element that is not closed in order is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page(ledger: Ledger) -> tuple[str, Page]:
    assert main(["report", str(ledger.path)]) == 0
    text = (ledger.path / "report.html").read_text()
    return text, Page(text)


def told(text: str) -> dict[str, Any]:
    """What the page's script draws from."""
    (content,) = re.findall(r'<script type="application/json" id="content">(.*?)</script>', text)
    return dict(json.loads(content))


def visible(text: str) -> str:
    """Without plotly.js and the page's own script."""
    return re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)


def test_the_page_stands_alone_and_shows_every_run(tmp_path: Path) -> None:
    ledger = grid(tmp_path, ["1e-4", "1e-3"], ["0", "1", "2"])
    points = ledger.points()
    for point in points[:4]:
        finished(point, loss=3.0 + 0.1 * point.number)
    failed(points[4], "DivergedError: loss <nan> & co\nTraceback: <b>train.py</b>")
    text, found = page(ledger)
    fetched = [(tag, key, value) for tag, attributes in found.tags for key, value in attributes.items()
               if key in ("src", "href", "action", "data") and tag != "a"]  # fmt: skip
    assert fetched == [("link", "href", "data:,")]
    assert not re.search(r"https?://|url\(|@import", visible(text))
    assert "default-src 'none'" in text
    content = told(text)
    titles = [chart["title"] for chart in content["charts"]]
    assert titles == ["Validation loss", "Training loss", "Throughput"]
    assert [len(run["curves"]) for run in content["runs"]] == [3, 3, 3, 3, 3, 0]  # one failed, one never began
    drawn = [attributes.get("data-kind") for tag, attributes in found.tags if attributes.get("class") == "plot"]
    others = ["against", "against", "parallel", "importance", "best", "rates", "times"]
    assert drawn == ["curves"] * 3 + others
    assert [run["loss"] for run in content["runs"]] == [3.1, 3.2, 3.3, 3.4, None, None]
    assert [text.count(f'"state {state}"') for state in ("finished", "diverged", "missing")] == [4, 2, 1]
    assert "best validation loss, run 1: lr=1e-4 seed=0" in text
    assert "<summary>rank 0: DivergedError: loss &lt;nan&gt; &amp; co</summary>" in text
    assert "<pre>Traceback: &lt;b&gt;train.py&lt;/b&gt;</pre>" in text
    assert content["refresh"] is None


def test_losses_are_told_apart(tmp_path: Path) -> None:
    """Runs that do not validate are compared by their training loss, and the page says so."""
    ledger = grid(tmp_path, ["1e-4"], ["0", "1"])
    for point in ledger.points():
        finished(point, loss=3.0 + point.number)
        lines = [json.loads(line) for line in (point.folder / "metrics.jsonl").read_text().splitlines()]
        kept = [line for line in lines if "validation_loss" not in line]
        (point.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    text, _ = page(ledger)
    assert "best training loss" in text
    assert "alidation loss" not in visible(text)
    assert told(text)["loss"] == "training loss"


def test_the_page_knows_where_the_stages_of_a_run_begin(tmp_path: Path) -> None:
    ledger = grid(tmp_path, ["1e-4"], ["0", "1"])
    first, second = ledger.points()
    for point in (first, second):
        finished(point, loss=3.0)
    lines = [json.loads(line) for line in (first.folder / "metrics.jsonl").read_text().splitlines()]
    steps = sorted({line["step"] for line in lines if "loss" in line})
    staged = [line | ({"stage": 1 + (line["step"] > steps[1])} if "loss" in line else {}) for line in lines]
    (first.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in staged))
    assert [run["borders"] for run in told(page(ledger)[0])["runs"]] == [[steps[1]], []]


def test_curves_that_lie_on_each_other_know_it(tmp_path: Path) -> None:
    ledger = grid(tmp_path, ["1e-4"], ["0", "1", "2"])
    first, second, third = ledger.points()
    finished(first, loss=3.0)
    finished(second, loss=3.0)
    finished(third, loss=3.5)
    runs = told(page(ledger)[0])["runs"]
    assert [run["curves"]["Training loss"]["same"] for run in runs] == [[1, 2], [1, 2], []]


def test_a_curve_lies_over_steps_tokens_time_and_flops(tmp_path: Path) -> None:
    ledger = grid(tmp_path, ["1e-4"], ["0", "1"])
    first, _ = ledger.points()
    finished(first, loss=3.0)
    (first.folder / "plan.json").write_text('{"flops_per_token": 1000}')
    clock = told(page(ledger)[0])["runs"][0]["clock"]
    assert [clock[axis]["steps"][-1] for axis in ("seconds", "tokens", "flops")] == [200, 200, 200]
    # 20 s of start, 200 steps of 0.5 s, and 8 s until the validation is done; the clock starts with the first step.
    assert clock["seconds"]["values"][0] == 0.0
    assert clock["seconds"]["values"][-1] == pytest.approx(200 * 0.5 + 8)
    assert clock["tokens"]["values"][-1] == 200 * 8192
    assert clock["flops"]["values"][-1] == pytest.approx(200 * 8192 * 1000, rel=1e-5)


def test_no_spike_is_lost_where_points_are_left_out() -> None:
    values = [1.0] * 5000
    values[3333], values[777] = 9.0, -2.0
    values[4000] = math.nan
    thin = thinned(Series([*range(5000)], values), 400)
    assert len(thin.steps) <= 400
    assert (thin.steps[0], thin.steps[-1]) == (0, 4999)
    assert thin.steps == sorted(thin.steps)
    assert {9.0, -2.0} <= set(thin.values)
    short = Series([1, 2], [1.0, 2.0])
    assert thinned(short, 400) is short


def test_a_folder_of_somebody_else_writes_nothing_into_the_page(tmp_path: Path) -> None:
    """Names, causes, values and addresses are text, wherever they stand."""
    evil = "</script><img src=x onerror=alert(1)>"
    ledger = Ledger.make(tmp_path / "sweeps" / "tiny-0a1b2c3d", ["-m", f"name={evil}"], {})
    for value in (evil, "plain"):
        ledger.add(tree(tmp_path, seed=0, note=value), {"note": value})
    first, second = ledger.points()
    failed(first, evil)
    finished(second, loss=3.0)
    (first.folder / "git.json").write_text(json.dumps({"sha": evil, "dirty": False}))
    note_address(first.folder, evil, "https://user:secret@example.org/a?b=1&c='\"><b>")
    note_address(second.folder, "wandb", "javascript:alert(1)")
    with (second.folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"attempt": 1, "time": START + 200, "step": 200, "loss": evil}) + "\n")
    text, found = page(ledger)
    assert "img" not in {tag for tag, _ in found.tags}
    assert "<img" not in text
    assert "secret" not in text
    links = [str(attributes["href"]) for tag, attributes in found.tags if tag == "a"]
    assert any(link.startswith("https://example.org/") for link in links)
    assert not any(link.startswith("javascript") for link in links)
    assert told(text)["runs"][0]["values"] == {"note": evil}


def test_a_row_leads_to_its_folder_log_commit_and_config(tmp_path: Path) -> None:
    ledger = grid(tmp_path, ["1e-4", "1e-3"], ["0"])
    first, second = ledger.points()
    finished(first, loss=3.0)
    (first.folder / "git.json").write_text('{"sha": "0123456789abcdef", "dirty": true}')
    for each in (2, 10):
        (first.folder / f"logs/attempt_{each}").mkdir(parents=True)
        (first.folder / f"logs/attempt_{each}/rank_0.log").touch()
    note_address(first.folder, "wandb", "https://wandb.ai/me/it/runs/1")
    ledger.add(tree(tmp_path, seed=0, optim={"lr": 1e-3, "beta2": 0.9}), {"optim.lr": "1e-3", "seed": "0"})
    text, found = page(ledger)
    links = [str(attributes["href"]) for tag, attributes in found.tags if tag == "a"]
    assert f"../../{first.folder.name}" in links
    assert f"../../{first.folder.name}/logs/attempt_10/rank_0.log" in links
    links.remove("https://wandb.ai/me/it/runs/1")
    assert all((ledger.path / link).exists() or second.folder.name in link or "tiny" in link for link in links)
    assert "<b>0123456789</b><span>git commit</span>" in text
    assert "<td>0123456789</td>" in text
    assert "optim.beta2=0.9" in text
    assert "<td>optim.beta2</td><td>absent</td><td>absent</td><td>0.9</td>" in text
    assert '<a href="https://wandb.ai/me/it/runs/1">wandb</a>' in text
    assert "seed: 0" in text, "which all have alike"


def test_a_page_of_a_sweep_that_runs_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = grid(tmp_path, ["1e-4"], ["0", "1"])
    assert "0 of 2" in page(ledger)[0]
    (first, _) = ledger.points()
    attempt(first.folder, 1, START, None)
    live, naps = [True], list[float]()
    monkeypatch.setattr(Lock, "held", lambda _: live[0])
    assert told(page(ledger)[0])["refresh"] == 30

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        live.clear()
        live.append(len(naps) < 2)

    monkeypatch.setattr(commands, "time", SimpleNamespace(sleep=sleep))  # not of other threads of this process
    assert main(["report", str(ledger.path), "--every", "30"]) == 0
    assert naps == [30.0, 30.0]
    assert told((ledger.path / "report.html").read_text())["refresh"] is None


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["fit", "--resampled", "5"], "--resampled=5: of fewer than 40 draws"),
        (["report", "--every", "0"], "--every=0: seconds between two pages, at least 1"),
        (["report", "--every", "-3"], "--every=-3: seconds"),
        (["report", "--every", "inf"], "--every=inf: seconds"),
    ],
)
def test_numbers_of_a_command_are_taken_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    """Never raised in silence to the nearest that would do."""
    ledger = grid(tmp_path, ["1e-4"], ["0"])
    command, *rest = words
    assert main([command, str(ledger.path), *rest]) == 2
    assert capsys.readouterr().err.startswith(told)
    assert not (ledger.path / "report.html").exists()


def test_a_key_counts_by_what_changes_with_it() -> None:
    """Of two keys by two seeds: all of it, none, and what chance would give; a number of its own per point in bins."""
    points = [{"lr": lr, "seed": seed} for lr in ("1", "2", "3") for seed in ("0", "1", "2")]
    assert importance(points, [float(point["lr"]) for point in points]) == pytest.approx({"lr": 1.0, "seed": 0.0})
    assert importance(points, [float(point["seed"] == "2") for point in points]) == pytest.approx(
        {"lr": 0.0, "seed": 1.0}
    )
    mixed = importance(points, [2 * float(point["lr"]) + float(point["seed"]) for point in points])
    # Between lr: 3 * (4 + 0 + 4) = 24 of 30; by chance 2 of 6 free ones have 2 * (30 - 24) / 6 = 2.
    assert mixed["lr"] == pytest.approx(22 / 30)
    assert mixed["seed"] == pytest.approx(max(0.0, (6 - 2 * 24 / 6) / 30))
    drawn = [{"lr": str(number / 16)} for number in range(16)]
    assert importance(drawn, [float(number) for number in range(16)])["lr"] == pytest.approx(0.927, abs=0.01)
    assert importance(drawn, [1.0] * 16) == {"lr": 0.0}
    assert importance(points[:3], [1.0, 2.0, 3.0]) == {}


def test_runs_look_by_their_values() -> None:
    """Numbers from cold to warm, words in distinct colours, the second key in dashes; without a key by their place."""
    runs = [{"lr": lr, "kind": kind} for lr in ("1e-4", "1e-2", "1e-3") for kind in ("a", "b")]
    found = looks(runs, ["lr", "kind"])
    assert [each.dash for each in found] == [DASHES[0], DASHES[1]] * 3
    assert [found[0].colour, found[2].colour] == ["#6b4fc3", "#b5b827"]
    assert looks(runs, ["kind", "lr"])[:2] == [Look(DISTINCT[0], DASHES[0]), Look(DISTINCT[1], DASHES[0])]
    many = looks([{"kind": f"k{number}"} for number in range(20)], ["kind"])
    assert len(set(many)) == 20
    assert looks(runs[:2], []) == [Look(DISTINCT[0], DASHES[0]), Look(DISTINCT[1], DASHES[0])]


def test_values_are_ordered() -> None:
    assert ordered(["1e-3", "3e-4", "1e-3"]) == ["3e-4", "1e-3"]
    assert ordered(["fsdp2", "ddp2"]) == ["fsdp2", "ddp2"]
