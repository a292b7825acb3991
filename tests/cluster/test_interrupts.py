"""Ctrl-C while a process of ours still imports, and modules of ours that are no commands."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import launch
import src

HOME = Path(__file__).parents[2]
ENTRIES = ("src.cluster.rank", "src.cluster.replicas.worker", "src.cluster.local.side_by_side")


def cold(*words: str, path: Path = HOME) -> "subprocess.Popen[str]":
    """A Python of its own, which looks into `path` for modules first."""
    kept = {key: value for key, value in os.environ.items() if key != "WARM"}
    environment = kept | {"PYTHONPATH": f"{path}{os.pathsep}{HOME}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-P", *words], env=environment, text=True, **pipes)


@pytest.mark.parametrize("module", ENTRIES)
def test_a_rank_that_imports_ends_without_a_traceback(module: str, tmp_path: Path) -> None:
    slow = "import time\nprint('importing', flush=True)\ntime.sleep(60)\n"
    for needed in ("pydantic", "yaml"):  # each of them needs one of these
        (tmp_path / f"{needed}.py").write_text(slow)
    process = cold("-m", module, "nowhere", path=tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (-signal.SIGINT, "")


def test_a_module_that_is_no_command_says_so() -> None:
    process = cold("-m", "src.metrics.curve", "runs/demo")
    said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert said == ("", f"python -m src.metrics.curve: no command; there are {', '.join(src.COMMANDS)}, "
                    "and python launch.py\n")  # fmt: skip


def test_commands_that_pages_name_are_commands() -> None:
    pages = [*HOME.glob("*.md"), *HOME.glob("docs/**/*.md"), HOME / "benchmarks/README.md"]
    named = {name for page in pages for name in re.findall(r"python -m (src(?:\.\w+)+)", page.read_text("utf-8"))}
    assert {"src.runs", "src.sweeps"} <= named
    assert [name for name in sorted({*named, *src.COMMANDS, *ENTRIES}) if src.no_command(name)] == []
    assert src.no_command("src.metrics.curve")
    assert not src.no_command("src.nowhere"), "Python says that itself"


def test_a_launcher_that_composes_ends_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "asked", interrupted)
    monkeypatch.setattr(launch, "keep_interrupts", lambda: None)  # a hook of the whole process
    monkeypatch.setattr(sys, "argv", ["launch.py", "task.steps=2"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert launch.main() == 130
    assert capsys.readouterr().err == (
        "\nCtrl-C: ended; the same command begins again, or goes on: python launch.py task.steps=2\n"
    )
