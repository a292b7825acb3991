"""The page of a sweep stands alone and tells what the ledger knows."""

import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from src.runs.lock import Lock
from src.sweeps.chart import Axis, number
from src.sweeps.commands import main
from src.sweeps.curves import ordered
from src.sweeps.importance import importance
from src.sweeps.ledger import Ledger
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
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page(ledger: Ledger) -> tuple[str, Page]:
    assert main(["report", str(ledger.path)]) == 0
    text = (ledger.path / "report.html").read_text()
    return text, Page(text)


def named(found: Page, tag: str, kind: str) -> list[dict[str, str | None]]:
    return [attributes for name, attributes in found.tags if name == tag and attributes.get("class") == kind]


def test_the_page_stands_alone_and_shows_every_point(tmp_path: Path) -> None:
    ledger = grid(tmp_path, ["1e-4", "1e-3"], ["0", "1", "2"])
    points = ledger.points()
    for point in points[:4]:
        finished(point, loss=3.0 + 0.1 * point.number)
    failed(points[4], "DivergedError: loss <nan> & co")
    text, found = page(ledger)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|url\((?!#)|@import|<script src|<link", text)
    assert [each["data-y"] for each in named(found, "svg", "lines")] == ["validation loss", "training loss"]
    assert len(named(found, "g", "curve")) == 4 + 5 + 1  # one failed before a validation; train() writes one then, too
    assert [text.count(f'"state {state}"') for state in ("finished", "diverged", "missing")] == [4, 1, 1]
    assert "best validation loss, point 1: lr 1e-4, seed 0" in text
    assert "Final validation loss against optim.lr" in text
    assert "3.1000" in text
    assert "loss &lt;nan&gt; &amp; co" in text
    assert 'http-equiv="refresh"' not in text


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
    assert "alidation loss" not in text


def test_curves_that_lie_on_each_other_are_one_that_names_both(tmp_path: Path) -> None:
    ledger = grid(tmp_path, ["1e-4"], ["0", "1", "2"])
    first, second, third = ledger.points()
    finished(first, loss=3.0)
    finished(second, loss=3.0)
    finished(third, loss=3.5)
    text, found = page(ledger)
    assert len(named(found, "g", "curve")) == 2 + 2
    assert "<title>seed=0; seed=1</title>" in text
    assert "1 of 3 curves lie exactly on another" in text


def test_the_beginning_is_cut_off_only_where_it_is_high(tmp_path: Path) -> None:
    """A loss that falls by 3 hides the rest; one that falls by a tenth of what it varies later does not."""
    ledger = grid(tmp_path, ["1e-4"], ["0", "1"])
    high, low = ledger.points()
    finished(high, loss=3.0)
    assert "the first fall is cut off" in page(ledger)[0]
    lines = [
        {"attempt": 1, "time": START + step, "step": step, "loss": 3.0 + step % 2, "tokens": step} for step in range(20)
    ]
    for point in (high, low):
        (point.folder / "metrics.jsonl").parent.mkdir(exist_ok=True)
        (point.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "the first fall is cut off" not in page(ledger)[0]


def test_a_row_leads_to_its_folder_log_commit_and_config(tmp_path: Path) -> None:
    ledger = grid(tmp_path, ["1e-4", "1e-3"], ["0"])
    first, second = ledger.points()
    finished(first, loss=3.0)
    (first.folder / "git.json").write_text('{"sha": "0123456789abcdef", "dirty": true}')
    for each in (2, 10):
        (first.folder / f"logs/attempt_{each}").mkdir(parents=True)
        (first.folder / f"logs/attempt_{each}/rank_0.log").touch()
    ledger.add(tree(tmp_path, seed=0, optim={"lr": 1e-3, "beta2": 0.9}), {"optim.lr": "1e-3", "seed": "0"})
    text, found = page(ledger)
    links = [str(attributes["href"]) for tag, attributes in found.tags if tag == "a"]
    assert f"../../{first.folder.name}" in links
    assert f"../../{first.folder.name}/logs/attempt_10/rank_0.log" in links
    assert all((ledger.path / link).exists() or second.folder.name in link or "tiny" in link for link in links)
    assert "<b>0123456789</b><span>git commit" in text
    assert "optim.beta2=0.9" in text
    assert "seed: 0" in text, "which all have alike"


def test_a_page_of_a_sweep_that_runs_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = grid(tmp_path, ["1e-4"], ["0", "1"])
    assert "0 of 2" in page(ledger)[0]
    (first, _) = ledger.points()
    attempt(first.folder, 1, START, None)
    live, naps = [True], list[float]()
    monkeypatch.setattr(Lock, "held", lambda _: live[0])
    assert 'http-equiv="refresh"' in page(ledger)[0]

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        live.clear()
        live.append(len(naps) < 2)

    monkeypatch.setattr(time, "sleep", sleep)
    assert main(["report", str(ledger.path), "--every", "30"]) == 0
    assert naps == [30.0, 30.0]
    assert 'http-equiv="refresh"' not in (ledger.path / "report.html").read_text()


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


@pytest.mark.parametrize(
    ("low", "high", "log", "ticks"),
    [
        (0.0, 1.0, False, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (2.9, 4.2, False, [3.0, 3.25, 3.5, 3.75, 4.0]),
        (1e-4, 1e-2, True, [1e-4, 1e-3, 1e-2]),
        (8e-5, 1.2e-3, True, [1e-4, 2e-4, 5e-4, 1e-3]),
    ],
)
def test_ticks_are_round_and_inside(low: float, high: float, log: bool, ticks: list[float]) -> None:
    assert Axis(low, high, 0, 100, log).ticks() == pytest.approx(ticks)


def test_numbers_and_orders() -> None:
    assert [number(each) for each in (0, 3e-4, 12500, 5.2e6, 1.5e10)] == ["0", "0.0003", "12.5k", "5.2M", "15B"]
    assert ordered(["1e-3", "3e-4", "1e-3"]) == ["3e-4", "1e-3"]
    assert ordered(["fsdp2", "ddp2"]) == ["fsdp2", "ddp2"]
