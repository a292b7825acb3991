"""Each number that a run records has a unit and a meaning."""

import json
from dataclasses import fields
from pathlib import Path

from src.metrics.console import COLUMNS
from src.metrics.expert_load import WORST
from src.metrics.goodput import Goodput
from src.metrics.names import NAMES, metric_name
from src.metrics.startup import Startup
from src.train.step.metrics import PREDICTION_METRICS, STEP_METRICS

FACTS = {"attempt", "time", "step", "event", "status"}  # of a line itself
OLDER = {"experts/forced_balance"}  # what version 0.1 called experts/force_load_balance


def known(name: str) -> bool:
    return metric_name(name) is not None


def test_what_the_code_records_is_there() -> None:
    goodput = Goodput(*(1.0 for _ in fields(Goodput)))
    names = {each.name for each in (*STEP_METRICS, *PREDICTION_METRICS)} | {name for name, _ in COLUMNS}
    names |= (
        goodput.metrics().keys() | {f"experts/{key}" for key in WORST} | {f"experts/layer_03/{key}" for key in WORST}
    )
    startup = Startup()
    startup.done("import")
    names |= startup.metrics().keys()
    assert sorted(name for name in names if not known(name)) == []
    assert not known("nothing")
    assert not known("experts/layer_03/dead/more")


def test_what_whole_runs_have_recorded_is_there() -> None:
    files = sorted(Path(__file__).parents[1].glob("upgrade/*/*/metrics.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    names = {name for line in lines for name, value in line.items() if isinstance(value, float | int)} - FACTS - OLDER
    assert len(names) > 20
    assert sorted(name for name in names if not known(name)) == []


def test_a_name_stands_once() -> None:
    assert len({each.pattern for each in NAMES}) == len(NAMES)
    assert metric_name("startup/total_seconds") in NAMES
    assert all(each.meaning and not each.meaning.endswith(".") for each in NAMES)
