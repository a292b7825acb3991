"""Twenty losses of the debug model, to the last bit: a refactoring may not move them, new mathematics must say why.

`python -m tests.end_to_end.test_losses` writes losses.json anew for the torch that runs it.
"""

import json
import platform
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from tests.end_to_end.commands import command
from tests.end_to_end.lives import series

KEPT = Path(__file__).with_name("losses.json")
ARGUMENTS = (
    *("model=llama3_debug", "parallel=ddp2", "data=synthetic", "data.documents=400", "task.steps=20"),
    *("task.seq_len=64", "task.global_batch=4", "task.micro_batch=2", "task.log_every=1", "task.validate_every=0"),
    *("schedule.warmup_steps=5", "checkpoint=none", "cluster.gpus=0", "cluster.threads=1", "data.processes=1"),
)
# The same kernels on every x86-64: without these a CPU's own vector width decides the order of additions.
PORTABLE = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1"}


def version() -> str:
    return f"{torch.__version__.partition('+')[0]} {platform.machine()}"


def losses(root: Path) -> list[float]:
    code, told = command(*ARGUMENTS, f"root={root}", **PORTABLE)
    assert code == 0, told
    (folder,) = root.glob("llama3_debug-*")
    return list(series(folder).values())


def test_twenty_losses(tmp_path: Path) -> None:
    kept = json.loads(KEPT.read_text())
    found = losses(tmp_path)
    assert len(found) == 20
    if version() in kept:
        assert found == kept[version()]
    else:  # other kernels: the same curve, not the same bits
        assert found == pytest.approx(next(iter(kept.values())), abs=1e-4)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as root:
        known = json.loads(KEPT.read_text()) if KEPT.exists() else {}
        KEPT.write_text(json.dumps(known | {version(): losses(Path(root))}, indent=1) + "\n")
    sys.stdout.write(f"{KEPT}: {version()}\n")
