"""`python launch.py` as a person types it: a process with ranks of its own.

All of them are forked from one that has imported torch (tests/warm), which leaves the training as what takes time.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.end_to_end.lives import HOME

PATIENCE_SECONDS = 600.0  # far beyond what a busy machine needs


def start(*argv: str, **environment: str) -> "subprocess.Popen[str]":
    """This command line, running in a process group of its own, as a terminal gives it."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.Popen(
        [sys.executable, "launch.py", *argv],
        cwd=HOME,
        env=kept | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def command(*argv: str, **environment: str) -> tuple[int, str]:
    """Exit code, and all that it said."""
    process = start(*argv, **environment)
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    return process.returncode, out + err


def wait_for_step(process: "subprocess.Popen[str]", root: Path, pattern: str, step: int) -> Path:
    """Until the metrics of the run folder that this command fills tell of a step."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        for file in root.glob(f"{pattern}/metrics.jsonl"):
            whole = [line for line in file.read_text().splitlines() if line.endswith("}")]
            if any(json.loads(line).get("step", 0) >= step for line in whole):
                return file.parent
        time.sleep(0.05)
    process.kill()
    out, err = process.communicate(PATIENCE_SECONDS)
    raise AssertionError(f"{root}/{pattern}: no step {step} in {PATIENCE_SECONDS:g} s\n{out}{err}")
