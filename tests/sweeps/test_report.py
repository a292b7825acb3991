"""The page of a sweep stands alone and tells what the ledger knows."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from src.sweeps.chart import Axis, number
from src.sweeps.commands import main
from src.sweeps.report import ordered
from tests.sweeps.points import failed, finished, grid


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


def test_the_page_stands_alone_and_shows_every_point(tmp_path: Path) -> None:
    ledger = grid(tmp_path, ["1e-4", "1e-3"], ["0", "1", "2"])
    points = ledger.points()
    for point in points[:4]:
        finished(point, loss=3.0 + 0.1 * point.number)
    failed(points[4], "DivergedError: loss <nan> & co")
    assert main(["report", str(ledger.path)]) == 0
    text = (ledger.path / "report.html").read_text()
    page = Page(text)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|url\((?!#)|@import|<script|<link", text)
    curves = [attributes for tag, attributes in page.tags if tag == "g" and attributes.get("class") == "curve"]
    assert len(curves) == 5
    assert len([tag for tag, _ in page.tags if tag == "circle"]) == 2 * 4  # finished ones, against two keys
    assert [text.count(f'"state {state}"') for state in ("finished", "diverged", "missing")] == [4, 1, 1]
    assert "3.1000" in text
    assert "loss &lt;nan&gt; &amp; co" in text


def test_a_page_of_a_sweep_that_has_not_begun(tmp_path: Path) -> None:
    ledger = grid(tmp_path, ["1e-4"], ["0", "1"])
    assert main(["report", str(ledger.path)]) == 0
    assert "0 of 2" in (ledger.path / "report.html").read_text()


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
