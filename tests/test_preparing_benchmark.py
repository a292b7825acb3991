"""`python -m benchmarks.preparing` makes the text that it is asked for and measures a process of its own."""

from pathlib import Path

import pytest

from benchmarks.preparing import row, write_text


def test_the_text_is_of_the_size_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.preparing.FILE_BYTES", 100_000)
    assert 240_000 < write_text(tmp_path, 250_000) <= 250_000
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"part_0000{number}.jsonl" for number in range(3)]


def test_memory_is_that_of_the_process_alone() -> None:
    """What the process that asks holds is not counted."""
    held = bytearray(300 << 20)
    found = row(0.0005, "bytes")
    assert found["file_bytes"] == pytest.approx(500_000, rel=0.1)
    assert isinstance(found["peak_mib"], float)
    assert 0 < found["peak_mib"] < len(held) >> 20
    assert {"megabytes_per_second", "cpu_seconds", "documents", "tokens"} <= found.keys()
