"""A rank's words on a terminal and in its log."""

import ast
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from src.cluster.rank_log import Screen
from tests.end_to_end.lives import HOME

RANK = """
import os, sys
from pathlib import Path
from src.cluster.rank_log import keep_log, only_log
keep_log(Path(sys.argv[1]), terminal=True)
print("drawn" if sys.stdout.isatty() else "plain")
print("half", end="")
only_log()
os.write(1, b"end\\n")
"""


def test_a_progress_line_leaves_one_line_in_the_log() -> None:
    here, there = os.openpty()
    log = io.StringIO()
    screen = Screen(there, log)
    assert screen.isatty()
    console = Console(file=screen, width=80)  # type: ignore[arg-type]
    with Progress(console=console, auto_refresh=False) as progress:
        task = progress.add_task("steps", total=3)
        for step in range(3):
            progress.update(task, advance=1)
            progress.refresh()
            console.print(f"[bold red]step {step}[/bold red] loss 5.5")
    screen.close_screen()
    lines = log.getvalue().splitlines()
    assert lines[:3] == [f"step {step} loss 5.5" for step in range(3)]
    assert lines[3].startswith("steps")
    assert "100%" in lines[3]
    assert len(lines) == 4
    shown = os.read(here, 100_000)
    assert b"\x1b[" in shown, "the terminal gets the drawing"


def test_a_closed_terminal_does_not_end_the_run() -> None:
    here, there = os.openpty()
    log = io.StringIO()
    screen = Screen(there, log)
    os.close(here)
    for number in range(3):
        print(f"line {number}", file=screen, flush=True)  # type: ignore[call-overload]
    assert log.getvalue() == "line 0\nline 1\nline 2\n"
    assert not screen.isatty()


@pytest.mark.parametrize("terminal", [True, False])
def test_rank_0_knows_whether_it_may_draw(tmp_path: Path, terminal: bool) -> None:
    here, there = os.openpty() if terminal else os.pipe()
    log = tmp_path / "rank_0.log"
    subprocess.run([sys.executable, "-c", RANK, str(log)], stdout=there, check=True)
    word = "drawn" if terminal else "plain"
    assert log.read_text() == f"{word}\nhalf\nend\n"
    assert os.read(here, 1000).decode().split() == [word, "half"]
    os.close(there)
    os.close(here)


def test_no_terminal_of_ours_takes_text_for_markup() -> None:
    """Brackets of a path, a value or an error lose words, or fail; a colour is a Text with a style."""
    made = []
    for file in (HOME / "launch.py", *(HOME / "src").rglob("*.py")):
        text = file.read_text()
        if (name := re.search(r"from rich\.console import (?:Console as )?(\w+)", text)) is not None:
            calls = (each for each in ast.walk(ast.parse(text)) if isinstance(each, ast.Call))
            made += [(file, each) for each in calls if ast.unparse(each.func) == name[1] != "Group"]
    assert len(made) > 5
    for file, call in made:
        assert any(key.arg == "markup" and ast.unparse(key.value) == "False" for key in call.keywords), (
            file,
            call.lineno,
        )
