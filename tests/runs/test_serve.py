"""`python -m src.runs serve`: what a browser on this machine is shown, and what nobody is."""

import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from src.errors import FolderError
from src.runs.commands.serve.server import ADDRESS, PageServer, serve
from tests.runs.made import made
from tests.sweeps.points import finished, grid


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, one of them with a log, and a sweep of two."""
    root = tmp_path_factory.mktemp("serve") / "runs"
    made(root, "big-1", "optim.lr=3e-4", loss=2.5)
    made(root, "big-2", "optim.lr=0.002", loss=2.6, ended="failed", said="rank 0: ValueError: <b>")
    (root / "big-2/logs/attempt_1").mkdir(parents=True)
    (root / "big-2/logs/attempt_1/rank_0.log").write_text("the <last> words\n")
    (root.parent / "secret").write_text("secret")
    for point in grid(root, ["1e-4", "1e-3"], ["0"]).points():
        finished(point, loss=3.0)
    return root


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[PageServer]:
    with PageServer(root, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server: PageServer, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
    """Code, headers and body. With the server's cookie unless another is given."""
    connection = http.client.HTTPConnection(ADDRESS, server.server_port, timeout=300)
    cookie = {"Cookie": f"runs_{server.server_port}={server.token}"}
    connection.request(method, path, headers=cookie | headers)
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, dict(answer.getheaders()), body


def test_nobody_is_answered_without_the_token(server: PageServer) -> None:
    for path in (
        "/",
        "/runs?name=big-1",
        "/plotly.js",
        "/log?name=big-2",
        "/?token=",
        "/?token=wrong",
        "/?token=%C3%A9",
    ):
        code, _, body = ask(server, path, Cookie="")
        assert (code, "big" in body) == (403, False), path
    assert ask(server, "/", Cookie=f"runs_{server.server_port}=wrong")[0] == 403
    assert ask(server, "/", Host=f"evil.example:{server.server_port}")[0] == 403
    code, headers, _ = ask(server, f"//evil.example/?token={server.token}&name=a", Cookie="")
    assert (code, headers["Location"]) == (302, "/evil.example/?name=a")  # a path of this host
    assert headers["Set-Cookie"].endswith("; HttpOnly; SameSite=Strict; Path=/")
    assert server.token in headers["Set-Cookie"]
    assert server.server_address[0] == "127.0.0.1"


def test_pages_are_shown_and_nothing_is_changed(server: PageServer, root: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    code, headers, index = ask(server, "/")
    assert (code, headers["Cache-Control"]) == (200, "no-store")
    assert '<a href="/runs?name=big-1">big-1</a>' in index
    assert '<a href="/sweep?name=tiny-0a1b2c3d">' in index
    assert "rank 0: ValueError: &lt;b&gt;" in index
    code, _, run = ask(server, "/runs?name=big-2")
    assert (code, '<script src="/plotly.js"></script>' in run) == (200, True)
    assert '<a href="/log?name=big-2">log</a>' in run
    code, _, both = ask(server, "/runs?name=big-1&name=big-2")
    assert (code, "<td>optim.lr</td><td>0.0003</td><td>0.002</td>" in both) == (200, True)
    code, _, sweep = ask(server, "/sweep?name=tiny-0a1b2c3d")
    assert (code, "best validation loss" in sweep) == (200, True)
    assert ask(server, "/log?name=big-2")[2] == "the <last> words\n"
    assert ask(server, "/log?name=big-2")[1]["Content-Type"].startswith("text/plain")
    code, headers, library = ask(server, "/plotly.js")
    assert (code, "max-age" in headers["Cache-Control"], "plotly.js v" in library[:200]) == (200, True, True)
    assert ask(server, "/", "HEAD")[2] == ""
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


@pytest.mark.parametrize(
    "path",
    ["/runs", "/runs?name=none", "/runs?name=..%2Fsecret", "/runs?name=.", "/log?name=big-1", "/log?name=/etc",
     "/sweep?name=..%2F..", "/sweep", "/../secret", "/secret"],
)  # fmt: skip
def test_an_address_of_nothing_is_told(path: str, server: PageServer) -> None:
    code, _, body = ask(server, path)
    assert code == 404
    assert body.strip()
    assert "secret" not in body.replace("..%2Fsecret", "").replace("../secret", "").replace("/secret", "")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_it_can_only_be_read(method: str, server: PageServer) -> None:
    assert ask(server, "/", method)[0] == 501


def test_a_port_that_is_taken_and_a_folder_that_is_not_there(
    server: PageServer, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(FolderError, match="in use; pass another, or 0 for any that is free"):
        serve(root, server.server_port, as_json=False)
    with pytest.raises(FolderError, match="pass another"):
        serve(root, 70_000, as_json=False)
    with pytest.raises(FolderError, match="no such folder"):
        serve(root / "none", 0, as_json=False)


def test_it_prints_its_address_and_ends_at_ctrl_c(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: PageServer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PageServer, "serve_forever", interrupted)
    assert serve(root, 0, as_json=True) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["url"].startswith("http://127.0.0.1:")
    assert "/?token=" in told["url"]
