"""A file is there whole or not at all."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from src.errors import UnusableFileError
from src.storage.atomic_write import atomic_write


def refuse(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_text_bytes_and_what_is_no_utf8(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a", "é\udcff\n")
    assert (tmp_path / "a").read_bytes() == "é".encode() + b"\xff\n"
    atomic_write(tmp_path / "a", b"\r\n", durable=True)
    assert (tmp_path / "a").read_bytes() == b"\r\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    file = tmp_path / "a"
    atomic_write(file, "old")
    monkeypatch.setattr(os, broken, refuse)
    with pytest.raises(OSError, match=f"{file}: no space left on device; [0-9,]+ bytes are free, 3 are needed"):
        atomic_write(file, "new", durable=True)
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_of_its_name_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(UnusableFileError, match=r"/a: cannot be written \(Is a directory\)"):
        atomic_write(tmp_path / "a", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_new_content_is_whole_before_it_gets_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    replace = os.replace

    def watched(source: Path, target: Path) -> None:
        seen.append((source.read_text(), target.read_text(), source.parent == target.parent))
        replace(source, target)

    (tmp_path / "a").write_text("old")
    monkeypatch.setattr(os, "replace", watched)
    atomic_write(tmp_path / "a", "new")
    assert seen == [("new", "old", True)]


def test_durable_flushes_the_file_before_its_name_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    replace, fsync = os.replace, os.fsync
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("replace"), replace(*names)))
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append("fsync"), fsync(handle)))
    atomic_write(tmp_path / "a", "1")
    atomic_write(tmp_path / "a", "2", durable=True)
    assert calls == ["replace", "fsync", "replace", "fsync"]


def test_concurrent_writers_leave_one_of_their_contents(tmp_path: Path) -> None:
    contents = [str(writer) * 100_000 for writer in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda content: atomic_write(tmp_path / "a", content), contents))
    assert (tmp_path / "a").read_text() in contents
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
