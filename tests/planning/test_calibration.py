"""A site that is slower than the records: its runs say so, and plans then do."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from src.errors import UserError
from src.planning.plan import load_of, plan
from src.planning.time.calibration import Measured, fit, measured
from src.planning.time.devices import GPUS, scaled
from src.planning.time.prediction import Prediction
from src.planning.time.step import Question, step_time
from tests.planning.test_time_step import EIGHT, PLAIN, layout, site
from tests.train.runs import make_run

SLOW = {"products": 0.9, "grouped": 0.9, "float8": 0.9, "memory": 0.8, "casts": 0.8, "update": 0.8}


def test_a_slower_site_is_found_out() -> None:
    runs = []
    for parallel in (layout(shard=8), layout(shard=4, tensor=2), layout(shard=2, pipeline=4), layout(shard=64)):
        run = make_run(EIGHT, model="llama3_8b", precision="bf16", compile="blocks", parallel=parallel)
        before, truth = (
            step_time(Question(load_of(run), gpu, PLAIN)) for gpu in (GPUS["H200"], scaled(GPUS["H200"], SLOW))
        )
        runs.append(Measured("run", before.parts, truth.seconds))
    found = fit(runs)
    assert found.before > 0.05
    assert found.after < found.before / 3
    assert found.factors["products"] == found.factors["grouped"] == pytest.approx(0.9, abs=0.04)


def test_folders(tmp_path: Path) -> None:
    run = make_run(EIGHT, site(), model="llama3_8b", parallel="fsdp8", precision="bf16", compile="blocks")
    planned = plan(run)
    assert isinstance(planned.time, Prediction)
    (tmp_path / "plan.json").write_text(planned.to_json())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"cluster": {"time_factors": {}}}))
    with pytest.raises(UserError, match="no step was measured"):
        measured(tmp_path)
    expected = planned.time.step.seconds
    lines = [{"step_seconds": share * expected} for share in (2.0, 1.0, 1.2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert measured(tmp_path).seconds == pytest.approx(1.2 * expected)
    (tmp_path / "bench.json").write_text(json.dumps({"step_seconds": 1.1 * expected}))
    found = measured(tmp_path)
    assert found.seconds == pytest.approx(1.1 * expected)
    assert sum(found.parts.values()) == pytest.approx(expected)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"cluster": {"time_factors": {"products": 0.9}}}))
    with pytest.raises(UserError, match="time_factors were set"):
        measured(tmp_path)
    (tmp_path / "bench.json").write_text(json.dumps({"step_seconds": 100 * expected}))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"cluster": {"time_factors": {}}}))
    with pytest.raises(UserError, match=r"beyond a factor of 3 that is no speed of a site; pass runs on the device"):
        measured(tmp_path)
    (tmp_path / "plan.json").write_text(replace(planned, time=None).to_json())
    with pytest.raises(UserError, match="its plan predicts no time"):
        measured(tmp_path)
    with pytest.raises(UserError, match="No such file or directory; pass run folders"):
        measured(tmp_path / "gone")
