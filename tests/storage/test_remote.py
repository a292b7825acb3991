"""Files at a URL arrive whole, are tried again, and what is wrong is told with the URL."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from src.errors import RemoteError
from src.storage.remote import RemoteFolder, is_url, patiently
from tests.storage.s3 import S3Server, files, served

CONTENT = bytes(range(256)) * 300


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with served() as server:
        yield server


@pytest.fixture
def local(tmp_path: Path) -> Path:
    path = tmp_path / "content.bin"
    path.write_bytes(CONTENT)
    return path


def now(_seconds: float) -> None:
    """Instead of waiting."""


@pytest.mark.parametrize("scheme", ["s3", "memory", "file"])
def test_files_go_there_and_come_back(scheme: str, s3: S3Server, local: Path, tmp_path: Path) -> None:
    root = {"s3": s3.bucket, "memory": lambda name: f"memory://{name}", "file": lambda _: f"file://{tmp_path}/there"}
    folder = RemoteFolder(f"{root[scheme]('round')}/runs/")
    assert (folder.names(), folder.sizes("a")) == ([], {})
    folder.send(local, "a/one.bin")
    folder.send(local, "a/two.bin")
    folder.send(local, "top.bin")
    assert folder.names() == ["a", "top.bin"]
    assert folder.sizes("a") == dict.fromkeys(("one.bin", "two.bin"), len(CONTENT))
    assert folder.folder("a").names() == ["one.bin", "two.bin"]
    folder.fetch("a/two.bin", tmp_path / "back.bin")
    assert (tmp_path / "back.bin").read_bytes() == folder.read("top.bin") == CONTENT
    local.write_bytes(b"shorter")
    folder.send(local, "top.bin")
    assert folder.read("top.bin") == b"shorter"
    folder.remove("a/one.bin")
    folder.remove("a/one.bin")  # twice is fine
    assert list(folder.sizes("a")) == ["two.bin"]
    folder.remove("a")
    assert folder.names() == ["top.bin"]
    with pytest.raises(FileNotFoundError):
        folder.read("a/two.bin")
    folder.reach()


def test_a_503_is_told_and_got_over(s3: S3Server, local: Path) -> None:
    folder = RemoteFolder(f"{s3.bucket('busy')}/x", "checkpoint.mirror")
    s3.busy = 1
    with pytest.raises(RemoteError, match=r"checkpoint\.mirror=s3://busy/x/one\.bin: .*busy"):
        folder.send(local, "one.bin")
    assert folder.names() == []
    s3.busy = 2
    waited: list[float] = []
    patiently(lambda: folder.send(local, "one.bin"), sleep=waited.append)
    assert (waited, s3.busy) == ([1.0, 2.0], 0)
    assert folder.read("one.bin") == CONTENT


def test_an_upload_that_is_cut_leaves_nothing(s3: S3Server, local: Path) -> None:
    folder = RemoteFolder(s3.bucket("cut"))
    s3.cut = 1000  # the driver's HTTP client tries by itself, too
    with pytest.raises(RemoteError, match=r"s3://cut/one\.bin"):
        patiently(lambda: folder.send(local, "one.bin"), tries=1, sleep=now)
    s3.cut = 0
    assert folder.names() == []
    folder.send(local, "one.bin")
    assert folder.read("one.bin") == CONTENT


def test_a_folder_goes_there_with_its_last_file_last(s3: S3Server, tmp_path: Path) -> None:
    folder, local = RemoteFolder(f"{s3.bucket('all')}/x"), tmp_path / "folder"
    (local / "deep").mkdir(parents=True)
    for name in ("a.bin", "deep/b.bin", "last.json", "old.bin"):
        (local / name).write_text(name)
    folder.send_all(local, "last.json")
    (local / "old.bin").unlink()
    s3.requests.clear()
    folder.send_all(local, "last.json")
    wrote = [each for each in s3.requests if each.startswith(("PUT", "POST", "DELETE"))]
    assert (wrote[0].partition(" ")[0] != "PUT", wrote[-1]) == (True, "PUT /all/x/last.json")
    assert (folder.names(), list(folder.sizes("deep"))) == (["a.bin", "deep", "last.json"], ["b.bin"])


def test_what_is_not_there_is_told(s3: S3Server, local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RemoteError, match=r"key=s3://nobodys/x: there is no bucket nobodys"):
        RemoteFolder("s3://nobodys/x", "key").reach()
    with pytest.raises(RemoteError, match=r"s3://nobodys/x/a: its bucket or folder is not there"):
        RemoteFolder("s3://nobodys/x").send(local, "a")
    with pytest.raises(FileNotFoundError):
        RemoteFolder(s3.bucket("mine")).send(local.with_name("nothing"), "a")
    with pytest.raises(RemoteError, match=r"s4://x: fsspec knows no s4://; among others it knows s3, gs"):
        RemoteFolder("s4://x")
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(RemoteError, match=r"key=s3://x: s3:// needs a package more; pip install s3fs"):
        RemoteFolder("s3://x", "key")


def test_urls_are_no_paths() -> None:
    assert [is_url(each) for each in ("s3://a", "hdfs://h:1/x", "a/b", "hf:me/model", "C:/x", "/s3://a")] == [
        *(True, True),
        *(False, False, False, False),
    ]
    assert files("memory") is not None
