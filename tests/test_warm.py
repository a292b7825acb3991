"""A Python that a test starts goes on by itself where the warm one cannot take its life over."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest

CLIENT_CODE = """
import os, sys
sys.path.insert(0, os.environ["CLIENT_FOLDER"])
sys.orig_argv[1:] = ["-m", "src.of_a_test"]
import warm_client
print("a second life")
"""
CLIENT = Path(__file__).parent / "warm/site/warm_client.py"


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """As imported by a Python that nobody warms."""
    monkeypatch.delenv("WARM", raising=False)
    spec = importlib.util.spec_from_file_location("client_under_test", CLIENT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("reads", [True, False])
def test_who_is_refused_goes_on(client: ModuleType, tmp_path: Path, reads: bool) -> None:
    """The line is closed as soon as all, or nothing, has been read: the last word of the asker may come too late."""
    line = socket.socket(socket.AF_UNIX)
    line.bind(place := str(tmp_path / "socket"))
    line.listen()

    def refuse() -> None:
        for _ in range(300):
            asking, _ = line.accept()
            with asking:
                while reads and not asking.recv(2**20).endswith(b"\n"):
                    pass

    server = threading.Thread(target=refuse, daemon=True)
    server.start()
    for _ in range(300):
        client.hand_over(place)
    server.join()
    line.close()
    client.hand_over(place)  # nobody listens


def test_a_signal_for_a_process_that_has_ended_starts_no_second_life(tmp_path: Path) -> None:
    """SLURM's SIGCONT found such a one, and its rank began the next attempt of a run that was being requeued."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    line = socket.socket(socket.AF_UNIX)
    line.bind(str(tmp_path / "socket"))
    line.listen()
    environment = os.environ | {"WARM": str(tmp_path / "socket"), "CLIENT_FOLDER": str(CLIENT.parent), "PYTHONPATH": ""}
    asking = subprocess.Popen([sys.executable, "-c", CLIENT_CODE], env=environment, stdout=subprocess.PIPE)
    asked, _ = line.accept()
    with asked:
        while not asked.recv(2**20).endswith(b"\n"):
            pass
        asked.sendall(f"{gone.pid}\n".encode())
        until_it_passes_signals_on(asking.pid)
        for number in (signal.SIGCONT, signal.SIGUSR2):
            os.kill(asking.pid, number)
        asked.sendall(b"7\n")
        assert asking.communicate(timeout=60)[0] == b""
    assert asking.returncode == 7
    line.close()


def until_it_passes_signals_on(pid: int) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        caught = next(
            each for each in Path(f"/proc/{pid}/status").read_text().splitlines() if each.startswith("SigCgt")
        )
        if int(caught.split()[1], 16) >> (signal.SIGCONT - 1) & 1:
            return
        time.sleep(0.01)
    raise AssertionError("it has no handler")
