"""Append-only lines through kills."""

import json
import math
from pathlib import Path

import pytest

from src.metrics.incidents import write_incident
from src.storage.json_lines import Lines


def test_round_trip_with_values_that_json_lacks(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "a.jsonl")
    lines.append({"loss": math.nan, "norm": math.inf, "low": -math.inf, "step": 3, "name": "x"})
    json.loads(lines.path.read_text(), parse_constant=pytest.fail)  # legal JSON: no bare NaN
    (record,) = lines.read()
    assert math.isnan(record.pop("loss"))
    assert record == {"norm": math.inf, "low": -math.inf, "step": 3, "name": "x"}


def test_torn_line_is_left_out_and_does_not_spoil_the_next(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "a.jsonl")
    lines.append({"step": 1})
    whole = lines.path.read_bytes()
    lines.path.write_bytes(whole + b'{"step": 2, "lo')
    assert list(lines.read()) == [{"step": 1}]
    assert lines.last() == {"step": 1}
    lines.append({"step": 3})
    assert list(lines.read()) == [{"step": 1}, {"step": 3}]
    assert lines.path.read_bytes().startswith(whole)


def test_last_of_a_long_file_and_of_none(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "a.jsonl")
    assert lines.last() is None
    assert list(lines.read()) == []
    lines.path.write_text("".join(json.dumps({"step": step, "pad": "x" * 90}) + "\n" for step in range(2000)))
    assert lines.last() == {"step": 1999, "pad": "x" * 90}


def test_incident(tmp_path: Path) -> None:
    for step in (7, 9):
        write_incident(tmp_path, step=step, decision="skip_step", loss=2.5, grad_norm=math.inf, samples=range(3))
    first, second = Lines(tmp_path / "incidents.jsonl").read()
    assert first.pop("time") > 1e9
    assert first == {"step": 7, "decision": "skip_step", "loss": 2.5, "grad_norm": math.inf, "samples": [0, 1, 2]}
    assert second["step"] == 9
    write_incident(tmp_path / "absent", step=1, decision="raise", loss=1.0, grad_norm=1.0, samples=())
