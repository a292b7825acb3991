"""The whole path of a command line: ranks started, stopped, killed, refused and swept."""

import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from src.cluster.local.signals import SAME_SIGNAL_SECONDS
from tests.cluster.fakes import until_heard
from tests.end_to_end.commands import PATIENCE_SECONDS, command, start, wait_for_step
from tests.end_to_end.lives import live, opened, series
from tests.ranks import RankPool

LONG = ("task.steps=160", "checkpoint.every=20", "checkpoint.asynchronous=true", "parallel=fsdp2")

WILD = ("optim.weight_decay=100", "schedule.warmup_steps=0")  # with the largest rate, optim.lr=10


def flip(file: Path, at: int = -100) -> None:
    """One wrong bit."""
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


@pytest.mark.slow
def test_interrupted_and_killed_commands_go_on(text: tuple[str, ...], ranks: RankPool) -> None:
    """Ctrl-C saves and ends well; kill -9 leaves the last complete checkpoint; the third start ends the run."""
    root = Path(text[-1].partition("=")[2])
    argv = (*text, *LONG, "name=command")
    first = start(*argv)
    folder = wait_for_step(first, root, "command-*", 25)
    os.killpg(first.pid, signal.SIGINT)
    _, told = first.communicate(PATIENCE_SECONDS)
    assert first.returncode == 0, told
    assert "SIGINT: the ranks save and stop" in told
    assert re.search(rf"^stopped by SIGINT; the same command continues from step \d+: {folder}$", told, re.MULTILINE)
    stopped = max(series(folder))
    assert 25 <= stopped < 160
    second = start(*argv)
    wait_for_step(second, root, "command-*", stopped + 25)
    second.kill()
    second.communicate(PATIENCE_SECONDS)
    code, told = command(*argv)
    assert code == 0, told
    assert f"resumes {folder}" in told
    straight = opened(*text, *LONG, "name=uninterrupted")
    assert ranks(2, live, straight) == [True, True]
    assert series(folder) == series(straight)


@pytest.mark.slow
def test_a_second_interrupt_ends_at_once(text: tuple[str, ...]) -> None:
    root = Path(text[-1].partition("=")[2])
    # Steps of seconds, and no validation, which a stop cuts off: the first Ctrl-C must not have ended it all by then.
    slow = ("task.steps=400", "task.global_batch=1024", "task.micro_batch=1024")
    process = start(*text, *slow, "model.dim=256", "name=twice")
    wait_for_step(process, root, "twice-*", 1)
    os.killpg(process.pid, signal.SIGINT)
    until_heard(process, "SIGINT")
    time.sleep(SAME_SIGNAL_SECONDS)
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(PATIENCE_SECONDS)
    assert process.returncode == 130, told
    assert "killed (Ctrl-C twice)" in told


def test_a_damaged_checkpoint_is_named_and_the_older_one_offered(
    text: tuple[str, ...], straight: Callable[[str], Path], ranks: RankPool
) -> None:
    argv = (*text, "name=damaged")
    folder = opened(*argv)
    assert ranks(1, live, folder) == [True]
    flip(folder / "checkpoints/step_00000012/__0_0.distcp")
    code, told = command(*argv)
    assert code == 2, told
    assert re.search(r"step_00000012/__0_0\.distcp: .*crc32", told), told
    assert "Traceback" not in told
    assert f"finished before: {folder}" in told
    (advice,) = set(re.findall(r"`(mv .*?)` and run the same command again", told))
    subprocess.run(shlex.split(advice), check=True)
    code, told = command(*argv)
    assert code == 0, told
    assert "goes on after step 6, sample 24" in told
    assert series(folder) == series(straight("single"))


def test_a_sweep_goes_on_past_a_point_that_fails(text: tuple[str, ...], tmp_path: Path) -> None:
    """The largest rate and decay cannot be seen to be wrong before they run."""
    code, told = command("-m", *text, f"root={tmp_path}", *WILD, "optim.lr=10,1e-3")
    assert code == 2, told
    bad, good = sorted(tmp_path.glob("tiny-*"), key=lambda folder: len(series(folder)))
    assert "[1/2] " in told
    assert f"{bad.name} ended with code 2" in told
    assert re.search(r"step \d: loss", told)
    assert list(series(good)) == list(range(1, 13))
