"""Compiled kernels lie on each machine's own disk; the shared one has one file of them."""

import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from src.cluster.kernel_cache import FOLDERS, KernelCache


def machine(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).mkdir(exist_ok=True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / name))


def test_another_machine_finds_the_kernels_in_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = tmp_path / "shared/cache/compile/c0de-0a0a0a0a"
    machine(tmp_path, "first", monkeypatch)
    cache = KernelCache.on_node(shared, "7.0")
    for name, content in {"inductor/a/b.so": b"1", "triton/c.json": b"2", "inductor/a/b.lock": b""}.items():
        (cache.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (cache.folder / name).write_bytes(content)
    cache.keep()
    assert [each.name for each in shared.parent.iterdir()] == ["c0de-0a0a0a0a.kernels"]
    written = (shared.parent / "c0de-0a0a0a0a.kernels").stat().st_mtime_ns
    cache.keep()  # nothing is new
    assert (shared.parent / "c0de-0a0a0a0a.kernels").stat().st_mtime_ns == written

    machine(tmp_path, "second", monkeypatch)
    reads: list[Path] = []
    whole = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (reads.append(path), whole(path))[1])
    others = [KernelCache.on_node(shared, "8.0") for _ in range(8)]
    assert [each.parent for each in reads] == [shared.parent], "one of the ranks of a node reads the shared disk"
    assert (others[0].folder / "inductor/a/b.so").read_bytes() == b"1"
    assert not (others[0].folder / "inductor/a/b.lock").exists()
    (others[0].folder / "triton/d.json").write_bytes(b"3")
    others[0].keep()  # of a graph that came later
    machine(tmp_path, "third", monkeypatch)
    assert (KernelCache.on_node(shared, "9.0").folder / "triton/d.json").read_bytes() == b"3"


def test_a_site_may_choose_the_folders_and_a_damaged_archive_is_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(tmp_path, "first", monkeypatch)
    shared = tmp_path / "cache/key"
    shared.parent.mkdir()
    shared.with_name("key.kernels").write_bytes(b"not whole")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    cache = KernelCache.on_node(shared, "7.0")
    cache.export()
    assert {name: os.environ[name] for name in FOLDERS} == {
        "TORCHINDUCTOR_CACHE_DIR": str(cache.folder / "inductor"),
        "TRITON_CACHE_DIR": "/elsewhere",
    }


def test_a_machine_that_runs_nothing_of_its_own_disk_uses_the_shared_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(tmp_path, "first", monkeypatch)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=os.ST_NOEXEC | os.ST_NOSUID))
    cache = KernelCache.on_node(tmp_path / "cache/key", "7.0")
    assert (cache.folder, cache.archive) == (tmp_path / "cache/key", None)
    assert "noexec" in capsys.readouterr().err
    cache.keep()
    assert not (tmp_path / "cache").exists()
