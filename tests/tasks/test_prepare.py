"""task=prepare: several share the pieces, a kill or a signal loses none, and it says how far it is."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from src.config.build import build
from src.data.prepare import PreparationStoppedError, prepare
from src.data.preparing.claims import STALE_SECONDS, claimed
from src.data.preparing.progress import ProgressLines, told_bytes, told_seconds
from src.data.tokenizer import Bytes
from src.launch.start import unfit
from src.run import Run
from src.tasks.prepare.config import Prepare
from src.tasks.prepare.rank import prepare_data
from tests.data.corpora import corpus, synthetic
from tests.test_conf import composed

DATA = synthetic(documents=9000, words=2)  # three pieces


def elements(cache: Path, count: int) -> list[str]:
    """What each of several preparers tells, all started at once."""
    script = (
        "import sys; from pathlib import Path; from src.data.prepare import prepare; "
        "from src.data.tokenizer import Bytes; "
        "from src.data.preparing.progress import ProgressLines; from tests.data.corpora import synthetic; "
        "prepare(synthetic(documents=9000, words=2), Bytes(), Path(sys.argv[1]), progress=ProgressLines(print, 0.0))"
    )

    def run(_: int) -> str:
        return subprocess.check_output([sys.executable, "-c", script, str(cache)], text=True)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


@pytest.mark.slow
def test_elements_share_the_pieces_and_agree(tmp_path: Path) -> None:
    told = elements(tmp_path / "shared", 2)
    alone = corpus(DATA, tmp_path / "alone")
    made = corpus(DATA, tmp_path / "shared")
    assert made.preparation.cached
    assert made.fingerprint == alone.fingerprint
    assert all("synthetic: 3 of 3 pieces" in each.splitlines()[-1] for each in told)
    left = {path.suffix for path in made.parts[0].shards.folder.iterdir()}
    assert left == {".bin", ".json", ".npy"}  # tokens, records and their table of numbers; no claim, no draft


def test_a_piece_is_one_preparers_until_that_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "00001.claim"
    with claimed(path) as ours:
        assert ours
        with claimed(path) as again:
            assert not again
        assert path.exists()  # who was refused took nothing away
    assert not path.exists()
    gone = subprocess.Popen(["true"])
    gone.wait()
    for owner, age, free in (
        ({"host": os.uname().nodename, "pid": gone.pid}, 0.0, True),  # killed on this machine
        ({"host": os.uname().nodename, "pid": os.getpid()}, 10 * STALE_SECONDS, False),
        ({"host": "elsewhere", "pid": 1}, 0.0, False),
        ({"host": "elsewhere", "pid": 1}, 2 * STALE_SECONDS, True),
    ):
        path.write_text(json.dumps(owner))
        os.utime(path, (time.time() - age, time.time() - age))
        with claimed(path) as ours:
            assert ours is free, (owner, age)
        path.unlink(missing_ok=True)


def test_a_stop_keeps_what_is_done(tmp_path: Path) -> None:
    """Between two documents of the second piece; the next one goes on with it."""
    lines: list[str] = []
    told = ProgressLines(lines.append, 0.0)

    def stopped() -> bool:
        return len(list((tmp_path / "tokens").glob("*/[0-9]*.json"))) > 0

    with pytest.raises(PreparationStoppedError):
        prepare(DATA, Bytes(), tmp_path, progress=told, stopped=stopped)
    (folder,) = (tmp_path / "tokens").iterdir()
    assert len(list(folder.glob("[0-9]*.json"))) == 1
    assert not list(folder.glob("*.claim")) + list(folder.glob(".*"))
    assert lines[0] == "synthetic: 0 of 3 pieces"
    assert lines[-1].startswith("synthetic: 1 of 3 pieces, ")
    assert prepare(DATA, Bytes(), tmp_path, progress=told).fingerprint == corpus(DATA, tmp_path / "alone").fingerprint


def test_lines_say_speed_time_left_and_disk_space(tmp_path: Path) -> None:
    lines: list[str] = []
    made = prepare(DATA, Bytes(), tmp_path, progress=ProgressLines(lines.append, 0.0))
    text, size = made.preparation.text_bytes, 2 * made.preparation.tokens
    assert f"{told_bytes(text)} of {told_bytes(text)} of text at " in lines[-1]
    assert lines[-1].endswith(f"; shards {told_bytes(size)} of {told_bytes(size)}")
    middle = [line for line in lines if "1 of 3" in line or "2 of 3" in line]
    assert middle
    assert all(" MB/s, " in line and " s left; shards " in line for line in middle)
    assert (told_bytes(1.2e12), told_bytes(3_400_000), told_bytes(900)) == ("1.2 TB", "3.4 MB", "1 kB")
    assert (told_seconds(59), told_seconds(61), told_seconds(7260)) == ("59 s", "1 min 1 s", "2 h 1 min")


def problems(*argv: str) -> list[str]:
    return unfit(Run.from_sections(build(composed("task=prepare", *argv))))


def test_what_it_cannot_do_is_said_before_it_starts() -> None:
    assert problems() == []
    assert problems("model=llama3_405b", "parallel=single") == []  # no machine is too small for no model
    assert any("data.files=nothing" in line for line in problems("data=text", "data.files=nothing"))
    (line,) = problems("parallel=ddp2")
    assert "task=prepare is one process" in line
    (line,) = problems("task.pack_seq_len=64")
    assert "packs nothing with data.packing=concatenate" in line


def test_what_is_there_is_said_to_be_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("task=prepare", f"root={tmp_path}", "data=synthetic", "data.documents=100", "data.processes=1")
    run = Run.from_sections(build(composed(*argv)))
    assert isinstance(run.task, Prepare)
    told = []
    for _ in range(2):
        assert prepare_data(run.task, run, tmp_path)
        told.append(capsys.readouterr().out.splitlines()[-1].partition(" s: ")[2])
    place = tmp_path / "cache/tokens"
    assert re.fullmatch(rf"[1-9]\d+ kB of shards in {place}", told[0])
    assert told[1] == f"nothing was missing in {place}"


@pytest.mark.slow
def test_a_signal_and_the_same_command_again(tmp_path: Path) -> None:
    """As a person types it, from a console; the second start finds what the first has done."""
    argv = [sys.executable, "launch.py", "task=prepare", f"root={tmp_path}", "cluster.gpus=0", "data=synthetic"]
    argv += ["data.documents=20000", "data.words=10", "data.processes=2", "task.log_seconds=0.01"]
    first = subprocess.Popen(argv, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert first.stdout is not None
    for line in first.stdout:
        if re.search(r"[1-4] of 5 pieces", line):
            first.send_signal(signal.SIGTERM)
            break
    rest = first.stdout.read()
    assert first.wait() == 0, rest
    assert "pieces that are done stay" in rest
    done = set((tmp_path / "cache/tokens").glob("*/0*.json"))
    assert 1 <= len(done) < 5
    again = subprocess.run(argv, text=True, capture_output=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "synthetic: 5 of 5 pieces" in again.stdout
    (run,) = (path for path in tmp_path.glob("*/prepare.json"))
    facts = json.loads(run.read_text())
    assert facts["documents"] == 20000
    assert facts["tokenised_here_and_elsewhere"]["synthetic"]["pieces"] == 5
