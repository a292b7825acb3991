"""What is left of a file of JSON lines after kills, full disks and other writers."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from src.errors import UnusableFileError
from src.storage.json_lines import Lines


@pytest.mark.parametrize("line", [b"null", b"[1]", b"3", b'"a"', b"", b'{"a": ', b"\x00\xff\xfe", b'{"a": 1}{"a": 2}'])
def test_a_line_that_is_no_object_is_passed_over(tmp_path: Path, line: bytes) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 3}\n')
    assert list(Lines(file).read()) == [{"a": 1}, {"a": 3}]
    file.write_bytes(b'{"a": 1}\n' + line + b"\n")
    assert Lines(file).last() == {"a": 1}


def test_a_torn_line_costs_nothing_but_itself(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "a.jsonl")
    lines.append({"a": 1})
    lines.append({"a": 2})
    lines.path.write_bytes(lines.path.read_bytes()[:-4])
    lines.append({"a": 3})
    assert list(lines.read()) == [{"a": 1}, {"a": 3}]


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "a.jsonl")
    lines.path.mkdir()
    for act in (lambda: list(lines.read()), lines.last, lambda: lines.newest("step"), lambda: lines.append({"a": 1})):
        with pytest.raises(UnusableFileError, match=r"a\.jsonl: cannot be (read|written) \(Is a directory\)"):
            act()


def test_concurrent_writers_keep_their_lines_apart(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "a.jsonl")
    records = [{"a": number, "text": "x" * 5000} for number in range(64)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lines.append, records))
    assert sorted(record["a"] for record in lines.read()) == list(range(64))


def test_the_newest_values_are_read_from_the_end(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "a.jsonl")
    assert lines.newest("step") == {}
    assert list(lines.recent()) == []
    for step in range(4000):
        lines.append({"step": step, "loss": float("nan") if step == 3998 else 4000.0 - step, "other": "loss"})
    lines.append({"step": 4000, "validation_loss": 2.0, "said": '"loss": 7'})
    with lines.path.open("a") as file:
        file.write('{"step": 5000, "loss": 1')  # a kill in the middle of a write
    found = lines.newest("step", "loss", "validation_loss", "absent")
    assert found == {"step": 4000, "loss": 1.0, "validation_loss": 2.0}
    assert next(lines.recent())["step"] == 4000
    assert len(list(lines.recent())) < 4000
