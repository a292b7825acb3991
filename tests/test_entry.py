"""Ctrl-C and the collector while a process of ours still imports, and modules of ours that are no commands."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import launch
import src
from src import entry

HOME = Path(__file__).parents[1]
ENTRIES = ("src.cluster.rank", "src.cluster.replicas.worker", "src.cluster.local.side_by_side")
COMMANDS = (("launch.py", "task.steps=2"), *(("-m", name, "-h") for name in ("src.runs", "src.sweeps", "src.planning")))


def cold(*words: str, path: Path = HOME) -> "subprocess.Popen[str]":
    """A Python of its own, which looks into `path` for modules first."""
    kept = {key: value for key, value in os.environ.items() if key != "WARM"}
    environment = kept | {"PYTHONPATH": f"{path}{os.pathsep}{HOME}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-P", *words], env=environment, text=True, cwd=HOME, **pipes)


@pytest.mark.parametrize("words", [*(("-m", module, "nowhere") for module in ENTRIES), *COMMANDS])
def test_what_imports_ends_without_a_traceback(words: tuple[str, ...], tmp_path: Path) -> None:
    slow = "import time\nprint('importing', flush=True)\ntime.sleep(60)\n"
    for needed in ("pydantic", "yaml", "rich"):  # each of them needs one of these
        (tmp_path / f"{needed}.py").write_text(slow)
    process = cold(*words, path=tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (-signal.SIGINT, "")


@pytest.mark.parametrize("before", [signal.SIG_IGN, signal.SIG_DFL, signal.default_int_handler])
def test_an_interrupt_that_was_ignored_stays_ignored(before: signal.Handlers) -> None:
    """nohup, or a script's background job: meant not to hear it."""
    handler = signal.signal(signal.SIGINT, before)
    ignored = before is signal.SIG_IGN
    try:
        entry.end_at_once()
        assert signal.getsignal(signal.SIGINT) is (signal.SIG_IGN if ignored else signal.SIG_DFL)
        entry.raise_again()
        assert signal.getsignal(signal.SIGINT) is (signal.SIG_IGN if ignored else signal.default_int_handler)
    finally:
        signal.signal(signal.SIGINT, handler)


AT_THE_END = """
import atexit, gc
atexit.register(lambda: print(gc.get_freeze_count() > 0))
from src.entry import collect_seldom
collect_seldom()
print(gc.get_threshold())
"""


def test_the_collector_seldom_runs_and_not_at_the_end() -> None:
    said, _ = cold("-c", AT_THE_END).communicate(timeout=60)
    assert said == f"{entry.THRESHOLDS}\nTrue\n"


@pytest.mark.parametrize("name", [*ENTRIES, "src.planning.__main__", "src.runs.__main__", "src.sweeps.__main__", ""])
def test_every_entry_begins_before_it_imports(name: str) -> None:
    text = (HOME / (name.replace(".", "/") or "launch")).with_suffix(".py").read_text("utf-8")
    before, found, _ = text.partition('if __name__ == "__main__":\n    begin()\n')
    assert found
    assert len(re.findall(r"^(?:from|import) ", before, re.MULTILINE)) == 1, "src.entry alone"


def test_a_module_that_is_no_command_says_so() -> None:
    process = cold("-m", "src.metrics.curve", "runs/demo")
    said = process.communicate(timeout=60)
    assert process.returncode == 2
    words = "python -m src.metrics.curve: no command; there are python launch.py and, behind python -m,"
    assert said == ("", "".join(f"{line}\n" for line in (words, *(f"  {each}" for each in src.COMMANDS))))


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
