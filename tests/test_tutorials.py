"""Every tutorial works as it is typed.

Its commands run in order in a copy of the repository, and print what the page shows.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

HOME = Path(__file__).parents[1]
PAGES = sorted((HOME / "docs" / "tutorials").glob("*.md"))
BLOCK = re.compile(r"^```(sh|text)\n(.*?)^```", re.MULTILINE | re.DOTALL)
HEREDOC = re.compile(r"<<'(\w+)'")
CTRL_C = re.compile(r"# press Ctrl-C after step (\d+)$")
PATIENCE_SECONDS = 240


def typed(block: str) -> Iterator[str]:
    """The commands of a block: a line each, or up to the end of its here-document or continuation."""
    lines = iter(block.splitlines())
    for line in lines:
        command = line
        while command.endswith("\\"):
            command += "\n" + next(lines)
        if document := HEREDOC.search(command):
            for more in lines:
                command += "\n" + more
                if more == document[1]:
                    break
        yield command


def executed(command: str, home: Path) -> tuple[int, str]:
    """Exit code and all that it printed; Ctrl-C is pressed where the command's comment says so."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        ["bash", "-c", command],
        cwd=home,
        env={key: value for key, value in environment.items() if key != "RUNS"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    pressed = CTRL_C.search(command)
    printed = []
    assert process.stdout is not None
    for line in process.stdout:
        printed.append(line)
        if pressed and line.startswith(f"step {pressed[1]}/"):
            os.killpg(process.pid, signal.SIGINT)
    return process.wait(timeout=PATIENCE_SECONDS), "".join(printed)


def copied(home: Path) -> Path:
    """The files that git knows or would add, and the environment of this test as one that make has just installed."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=HOME, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (HOME / name).is_file():
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # of another test, gone meanwhile
                shutil.copy2(HOME / name, home / name)
    environment = home / ".venv"
    environment.mkdir()
    for part in Path(sys.prefix).iterdir():
        if part.name != "installed":
            (environment / part.name).symlink_to(part)
    (environment / "installed").touch()  # now, and so newer than requirements.txt: nothing is installed
    return home


def missing(shown: str, printed: str) -> list[str]:
    """The lines of a block that did not come, in their order; "..." stands for anything."""
    rest, lost = printed.splitlines(), []
    for line in shown.splitlines():
        pattern = re.compile(r"\s*" + ".*".join(re.escape(part.strip()) for part in line.split("...")))
        place = next((at for at, text in enumerate(rest) if pattern.match(text)), None)
        if place is None:
            lost.append(line)
        else:
            rest = rest[place + 1 :]
    return lost


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tutorial(page: Path, tmp_path: Path) -> None:
    home, printed = copied(tmp_path / "ropewalk"), ""
    for language, block in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "text":
            assert missing(block, printed) == [], printed
            continue
        printed = ""
        for command in typed(block):
            code, said = executed(command, home)
            assert code == 0, f"{command}\n{said}"
            printed += said


def test_pages_are_found() -> None:
    names = ["first_run", "your_cluster", "your_data", "your_metric", "your_model", "your_optimizer"]
    assert [page.stem for page in PAGES] == names
    for page in PAGES:
        languages = re.findall(r"^```(\w*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert set(languages) <= {"sh", "text", ""}, "a block of another kind would not be tested"
        assert languages.count("sh") >= 3


def test_a_line_that_does_not_come_is_seen() -> None:
    printed = "step 5/20  loss 3.1  900 tok/s\nstep 6/20\n"
    assert missing("step 5/20 ... loss ... tok/s\nstep 6/20\n", printed) == []
    assert missing("step 6/20\nstep 5/20\n", printed) == ["step 5/20"]
    assert missing("loss 3.1\n", printed) == ["loss 3.1"]
