"""A full disk is called that, wherever it shows."""

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from src.errors import DiskFullError
from src.storage.atomic_write import atomic_write
from src.storage.json_lines import Lines
from src.storage.space import disk_full, room


@contextmanager
def files_of_at_most(count: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_library_may_have_hidden_it(tmp_path: Path) -> None:
    def write() -> None:
        with room(tmp_path / "a/b", 1234):
            try:
                raise full()
            except OSError:
                raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904 (as torch does)

    with pytest.raises(DiskFullError) as caught:
        write()
    (told,) = caught.value.problems
    assert told.startswith(f"{tmp_path / 'a/b'}: no space left on device; ")
    assert told.endswith(" bytes are free, 1,234 are needed")
    assert (caught.value.errno, caught.value.exit_code) == (errno.ENOSPC, 74)
    assert isinstance(caught.value, OSError)


def test_what_is_no_full_disk_stays_what_it_is(tmp_path: Path) -> None:
    assert disk_full(ValueError("no"), tmp_path) is None
    with pytest.raises(PermissionError), room(tmp_path):
        raise PermissionError(errno.EACCES, "no")


def test_a_file_that_finds_no_room_is_as_it_was(tmp_path: Path) -> None:
    atomic_write(tmp_path / "data.json", "old")
    with files_of_at_most(10), pytest.raises(DiskFullError, match=r"data.json: file too large; .*, 100 are needed"):
        atomic_write(tmp_path / "data.json", "x" * 100)
    assert [each.name for each in tmp_path.iterdir()] == ["data.json"]
    assert (tmp_path / "data.json").read_text() == "old"


def test_a_line_that_fits_in_part_is_told_and_the_next_one_stands_alone(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "metrics.jsonl")
    lines.append({"step": 1})
    with files_of_at_most(20), pytest.raises(DiskFullError, match=r"metrics.jsonl: file too large"):
        lines.append({"step": 2, "loss": 1.0})
    lines.append({"step": 3})
    assert list(lines.read()) == [{"step": 1}, {"step": 3}]
