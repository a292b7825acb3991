"""The page of a sweep in a real browser: it draws, answers the pointer, fits a telephone, and has no error to tell."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs.browser import browser
from src.sweeps.commands import main
from tests.chromium import Browser, running
from tests.debian import install
from tests.sweeps.points import START, attempt, failed, finished, grid, train

EVIL = "<img src=x onerror=console.error('run')></script>"
DRAWN = "[...document.querySelectorAll('.plot')].every((each) => each.querySelector('.main-svg'))"
MIDDLE = "(({left, right, top, bottom}) => [(left + right) / 2, (top + bottom) / 2])"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """On a laptop without Chromium these tests are skipped; in CI it is installed."""
    if browser() is None and "CI" in os.environ and os.geteuid() == 0:
        install("chromium", recommended=False)
    if (program := browser()) is None:
        reason = "no chromium here; apt-get install chromium"
        if "CI" in os.environ:
            pytest.fail(reason)
        pytest.skip(reason)
    with running(program, tmp_path_factory.mktemp("chromium")) as started:
        yield started


def report(root: Path) -> Path:
    """Four runs that finished, two of them with the same numbers, one that failed, and one that never began."""
    ledger = grid(root, ["1e-4", "1e-3", "1e-2"], ["0", "1"])
    points = ledger.points()
    for point in points[:4]:
        finished(point, loss=3.0 if point.number < 3 else 3.0 + 0.1 * point.number)
    failed(points[4], f"ValueError: {EVIL}\nTraceback: {EVIL}")
    (points[0].folder / "plan.json").write_text(json.dumps({"flops_per_token": 1000}))
    assert main(["report", str(ledger.path)]) == 0
    return ledger.path / "report.html"


@pytest.mark.slow
def test_a_browser_shows_the_page(chromium: Browser, tmp_path: Path) -> None:
    tab = chromium.tab()
    tab.size(1400, 1500)
    tab.open(report(tmp_path).as_uri(), "document.querySelector('.plot .point')")
    validation = "document.querySelector('.plot[data-title=\"Validation loss\"]')"

    def middle(of: str) -> tuple[float, float]:
        x, y = tab.eval(f"{MIDDLE}({of}.getBoundingClientRect())")
        return x, y

    tab.move(*middle(f"{validation}.querySelector('.point')"))
    tab.wait("document.querySelector('.hovertext')")
    told = tab.eval("document.querySelector('.hovertext').textContent")
    assert "lr=1e-4 seed=1" in told  # the upper one of two that coincide
    assert "Validation loss 3" in told
    assert "step 200exactly as run 1" in told

    assert tab.eval(f"{validation}.data.length") == 5
    tab.click(*middle("[...document.querySelectorAll('.entry')].find((each) => each.textContent === '1e-4')"))
    tab.wait(f"{validation}.data.length === 3")
    assert tab.eval("document.querySelectorAll('tr.hidden').length") == 2
    tab.click(
        *middle("[...document.querySelectorAll('#controls button')].find((each) => each.textContent === 'tokens')")
    )
    tab.wait(f"{validation}.layout.xaxis.title.text === 'tokens'")
    assert tab.eval(f"{validation}.data[0].x[0]") == 200 * 8192
    tab.click(*middle(f"{validation}.parentNode.querySelector('button')"))
    tab.wait(f"{validation}.layout.yaxis.type === 'log'")

    tab.size(400, 9000, dark=True)
    tab.wait(DRAWN)
    assert tab.eval("document.documentElement.scrollWidth") == 400
    assert tab.eval("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 28)"
    assert tab.eval(f"{validation}.data.length") == 3, "what was chosen stays"
    assert tab.eval("document.querySelectorAll('img').length") == 0
    assert tab.errors == []
    tab.eval("console.error('an error')")
    assert tab.errors == ["an error"]


def test_a_choice_outlives_the_page_that_is_read_again(chromium: Browser, tmp_path: Path) -> None:
    """As a page does whose runs live."""
    ledger = grid(tmp_path, ["1e-4", "1e-3"], ["0"])
    for point in ledger.points():
        train(point.folder, steps=100, loss=3.0)
        attempt(point.folder, 1, START, None)
    assert main(["report", str(ledger.path)]) == 0
    tab = chromium.tab()
    tab.size(1000, 900)
    page, shown = (ledger.path / "report.html").as_uri(), "document.querySelector('.plot')?.data?.length"
    tab.open(page, f"{shown} === 2")
    tab.eval("document.querySelector('.entry').click()")
    tab.wait(f"{shown} === 1")
    tab.eval("window.old = true")
    tab.call("Page.reload")
    tab.wait(f"!window.old && {shown} === 1")
    assert tab.errors == []
