"""Twenty losses of the debug model: a refactoring may not move them, new mathematics must say why.

`python -m tests.end_to_end.test_losses` writes losses.json anew.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest

from tests.end_to_end.commands import command
from tests.end_to_end.lives import series

KEPT = Path(__file__).with_name("losses.json")
ARGUMENTS = (
    *("model=llama3_debug", "parallel=ddp2", "data=synthetic", "data.documents=400", "task.steps=20"),
    *("task.seq_len=64", "task.global_batch=4", "task.micro_batch=2", "task.log_every=1", "task.validate_every=0"),
    *("schedule.warmup_steps=5", "checkpoint=none", "cluster.gpus=0", "cluster.threads=1", "data.processes=1"),
)
# Without these a CPU's own vector width decides the order of additions.
PORTABLE = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1"}


def losses(root: Path) -> list[float]:
    code, told = command(*ARGUMENTS, f"root={root}", **PORTABLE)
    assert code == 0, told
    (folder,) = root.glob("llama3_debug-*")
    return list(series(folder).values())


@pytest.mark.slow
def test_twenty_losses(tmp_path: Path) -> None:
    """torch 2.11 and 2.13 give the same bits; two kinds of processor differ by 1e-7 in four of the losses."""
    assert losses(tmp_path) == pytest.approx(json.loads(KEPT.read_text()), rel=1e-6, abs=0.0)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as root:
        KEPT.write_text(json.dumps(losses(Path(root)), indent=1) + "\n")
    sys.stdout.write(f"{KEPT}\n")
