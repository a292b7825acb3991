"""What a launcher learns of GPUs: from the driver, without torch."""

import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from src.cluster.local import gpus
from src.cluster.local.gpus import Gpus, told_by


class Driver:
    """An H200's driver; `broken`: calls that fail."""

    def __init__(self, count: int = 4, broken: tuple[str, ...] = ()) -> None:
        self.count, self.broken = count, broken

    def __getattr__(self, call: str) -> Any:
        def answer(*arguments: Any) -> int:
            if call in self.broken:
                return 100
            into = getattr(arguments[0], "_obj", None)
            if call == "cuDeviceGetCount":
                into.value = self.count
            elif call == "cuDeviceGet":
                into.value = arguments[1]
            elif call == "cuDeviceTotalMem_v2":
                into.value = 150_110_011_392
            elif call == "cuDeviceGetName":
                ctypes.memmove(arguments[0], b"NVIDIA H200\0", 12)
            elif call == "cuDeviceGetAttribute":
                into.value = {75: 9, 76: 0}[arguments[1]]
            return 0

        return answer


H200 = Gpus(4, "NVIDIA H200", 150_110_011_392 / 2**30, (9, 0))


@pytest.mark.parametrize(
    ("driver", "found"),
    [
        (Driver(), H200),
        (Driver(count=0), Gpus(0)),
        (Driver(broken=("cuInit",)), Gpus(0)),
        (Driver(broken=("cuDeviceGetCount",)), Gpus(0)),
        (Driver(broken=("cuDeviceGet",)), Gpus(4)),
        (Driver(broken=("cuDeviceGetName", "cuDeviceTotalMem_v2")), Gpus(4, capability=(9, 0))),
        (Driver(broken=("cuDeviceGetAttribute",)), Gpus(4, "NVIDIA H200", H200.memory_gib)),
    ],
)
def test_what_the_driver_tells(driver: Driver, found: Gpus) -> None:
    assert told_by(driver) == found


def test_a_machine_without_a_driver_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "_driver", lambda: None)
    monkeypatch.setattr(Path, "exists", lambda _: False)
    gpus.visible_gpus.cache_clear()
    try:
        assert sys.platform != "linux" or gpus.visible_gpus() == Gpus(0)
    finally:
        gpus.visible_gpus.cache_clear()


@pytest.mark.gpu
def test_torch_sees_the_same() -> None:
    import torch

    seen, found = torch.cuda.get_device_properties(0), gpus.visible_gpus()
    assert found.count == torch.cuda.device_count()
    assert (found.name, found.capability) == (seen.name, (seen.major, seen.minor))
    assert found.memory_gib == pytest.approx(seen.total_memory / 2**30, rel=0.02)


STARTS = """
import subprocess, sys

class Started(Exception): pass

def popen(command, **_):
    if "src.cluster.rank" in command:
        print([name for name in ("torch", "pandas", "wandb", "transformers", "matplotlib") if name in sys.modules])
        raise Started
    return real(command, **_)

real, subprocess.Popen = subprocess.Popen, popen
sys.argv = ["launch.py", *sys.argv[1:]]
import launch
try:
    launch.main()
except Started:
    pass
"""


@pytest.mark.parametrize("layout", ["single", "ddp2"])
def test_ranks_are_started_before_anything_large_is_imported(layout: str, tmp_path: Path) -> None:
    words = ("task.steps=1", "data=synthetic", "cluster.gpus=0", f"parallel={layout}", f"root={tmp_path}")
    done = subprocess.run([sys.executable, "-c", STARTS, *words], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stdout + done.stderr
