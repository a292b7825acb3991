"""A machine's own copy of the frozen code: whole, with bytecode, made once, checked at each start."""

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import pytest

from src.errors import FolderError
from src.runs import bytecode, node_copy
from src.runs.frozen_code import NO_BYTECODE, Code, Git, importing
from src.runs.node_copy import ARCHIVE, DamagedCodeError, on_node, packed, place, unpacked

HOME = Path(__file__).parents[2]
FILES = {"src/__init__.py": b"", "src/a.py": b"one = 1\n", "src/b/broken.py": b"def (", "conf/a.yaml": b"a: 1\n"}


@pytest.fixture(autouse=True)
def own_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the machine."""
    disk = tmp_path / "disk of the machine"
    disk.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    monkeypatch.setenv("TMPDIR", str(disk))
    return disk


def frozen(tmp_path: Path, files: dict[str, bytes] = FILES) -> Path:
    code = Code(files, Git(None, None, None, "", ""))
    (tmp_path / "code").mkdir(exist_ok=True)
    return tmp_path / "code" / code.freeze(tmp_path / "code")


def test_a_copy_is_the_code_and_bytecode_that_python_takes(tmp_path: Path) -> None:
    """Whoever made it anew would write other bytes: the source is not looked at again."""
    snapshot = frozen(tmp_path)
    assert not list(snapshot.rglob("*.pyc")), "the run folder has no bytecode that would be run unread"
    copy = on_node(snapshot)
    names = {str(each.relative_to(copy)) for each in copy.rglob("*") if each.is_file()}
    tag = sys.implementation.cache_tag
    assert names == {*FILES, f"src/__pycache__/__init__.{tag}.pyc", f"src/__pycache__/a.{tag}.pyc"}
    assert {name: (copy / name).read_bytes() for name in FILES} == FILES
    script = "import src.a; assert src.a.one == 1; print(src.a.__cached__)"
    (copy / "src/a.py").write_text("one = 2\n")  # of which bytecode that is checked would be made anew
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        env={**NO_BYTECODE, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
    )
    assert (done.stderr, done.stdout.strip()) == ("", str(copy / f"src/__pycache__/a.{tag}.pyc"))


def test_code_is_compiled_once_on_a_machine(tmp_path: Path) -> None:
    compiled: list[str] = []
    whole = bytecode._bytecode

    def counted(name: str, source: bytes) -> bytes | None:
        compiled.append(name)
        return whole(name, source)

    with patch.object(bytecode, "_bytecode", counted):
        frozen(tmp_path)
        assert compiled == ["src/__init__.py", "src/a.py", "src/b/broken.py"]
        (tmp_path / "other").mkdir()
        frozen(tmp_path / "other", FILES | {"src/c.py": b"two = 2\n"})
        assert compiled[3:] == ["src/b/broken.py", "src/c.py"]  # what is no Python each time


def test_one_process_of_a_start_checks_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot, checked = frozen(tmp_path), list[Path]()
    whole = Path.read_bytes

    def read(path: Path) -> bytes:
        checked.extend([path] if path.name == ARCHIVE else [])
        return whole(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    assert len({on_node(snapshot, "7.0") for _ in range(8)}) == 1
    assert len(checked) == 1
    (place(snapshot) / "src/a.py").write_text("one = 2\n")
    (place(snapshot) / "src/evil.py").write_text("")
    for _ in range(8):
        on_node(snapshot, "7.1")  # the job again: whatever was done to the copy is undone
    assert len(checked) == 2
    assert (place(snapshot) / "src/a.py").read_bytes() == FILES["src/a.py"]
    assert not (place(snapshot) / "src/evil.py").exists()


def test_an_archive_that_is_not_the_code_is_refused(tmp_path: Path) -> None:
    snapshot = frozen(tmp_path)
    archive = (snapshot / ARCHIVE).read_bytes()
    files = unpacked(archive)
    tag = sys.implementation.cache_tag
    other = files[f"src/__pycache__/__init__.{tag}.pyc"]
    for content, words in {
        archive[:-1]: "is damaged",
        hashlib.sha256(b"zip").hexdigest().encode() + b"\nzip": "has another form",
        packed(files | {"src/a.py": b"one = 2\n"}): "holds other code",
        packed(files | {f"src/__pycache__/a.{tag}.pyc": other}): "no bytecode of its code",
        packed(files | {f"src/__pycache__/c.{tag}.pyc": other}): "no bytecode of its code",
        packed(files | {"src/__pycache__/sitecustomize.py": b""}): "no bytecode of its code",
    }.items():
        (snapshot / ARCHIVE).write_bytes(content)
        with pytest.raises(DamagedCodeError, match=words):
            on_node(snapshot)
        with pytest.raises(FolderError, match="start the run again"):
            importing(snapshot, None)
    assert frozen(tmp_path) == snapshot  # which is what a start does
    on_node(snapshot)


def test_without_a_place_of_its_own_a_machine_imports_the_snapshot(
    tmp_path: Path, own_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshot = frozen(tmp_path)
    node_copy.home().chmod(0o777)  # others could put their code there
    assert importing(snapshot, "rest")["PYTHONPATH"] == f"{snapshot}{os.pathsep}rest"
    assert "is not a folder that this user alone may write" in capsys.readouterr().err


def test_copies_that_nobody_uses_go(tmp_path: Path) -> None:
    """One that a process holds stays, however old; one whose processes have ended goes when another is made."""
    script = "import sys; from pathlib import Path; from src.runs.node_copy import on_node; on_node(Path(sys.argv[1]))"
    held, left = (frozen(tmp_path, {"src/a.py": f"one = {number}\n".encode()}) for number in range(2))
    on_node(held)
    subprocess.run([sys.executable, "-c", script, str(left)], cwd=HOME, check=True)
    for each in (held, left):
        os.utime(place(each), (0, time.time() - 2 * node_copy.KEPT_SECONDS))
    on_node(frozen(tmp_path))
    assert (place(held).is_dir(), place(left).exists()) == (True, False)


def test_a_rank_of_a_job_becomes_python_on_the_copy(tmp_path: Path) -> None:
    """As the batch script starts it, from the snapshot, with the standard library alone."""
    mine = {f"src/{name}": (HOME / "src" / name).read_bytes() for name in ("runs/node_copy.py",)}
    snapshot = frozen(tmp_path, FILES | mine)
    script = "import os, src.a; print(src.a.__file__); print(os.environ['PYTHONPATH'])"
    command = [sys.executable, "-I", "-S", str(snapshot / "src/runs/node_copy.py"), str(snapshot), "7.0"]
    environment = os.environ | NO_BYTECODE | {"PYTHONPATH": f"{snapshot}{os.pathsep}/more", "WARM": ""}

    def start() -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*command, "-P", "-c", script], env=environment, capture_output=True, text=True, cwd=tmp_path
        )

    done = start()
    copy = place(snapshot)
    assert done.stdout.splitlines() == [str(copy / "src/a.py"), f"{copy}{os.pathsep}/more"], done.stderr
    (snapshot / ARCHIVE).write_bytes(b"")
    command[-1] = "7.1"
    done = start()
    assert (done.returncode, done.stderr) == (2, f"{snapshot / ARCHIVE}: is damaged; start the run again\n")


def test_the_last_archive_is_made_once_on_a_machine() -> None:
    """But for other code, and where what was kept is damaged."""
    made: list[str] = []

    def archive(digest: str) -> bytes:
        def make() -> bytes:
            made.append(digest)
            return node_copy.packed({"a.py": digest.encode()})

        return bytecode.last_archive(digest, make)

    first = archive("0" * 8)
    assert archive("0" * 8) == first
    assert archive("1" * 8) != first
    assert archive("0" * 8) == first
    assert made == ["0" * 8, "1" * 8, "0" * 8]
    (kept,) = node_copy.home().glob("archive.*")
    kept.write_bytes(kept.read_bytes()[:-1])
    assert archive("0" * 8) == first
    assert len(made) == 4
