"""A Python that a test starts goes on by itself where the warm one cannot take its life over."""

import importlib.util
import socket
import threading
from pathlib import Path
from types import ModuleType

import pytest

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
