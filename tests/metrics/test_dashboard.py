"""The dashboard of wandb as its own library writes it, without a server: what it asks for is what runs record."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from wandb_workspaces.workspaces import Workspace, internal

from src.metrics.names import NAMES, metric_name
from src.metrics.trackers import dashboard
from src.metrics.trackers.weights_and_biases import _in_sections

SECTIONS = ["Loss", "Throughput", "Memory", "Experts", "Goodput", "Incidents"]


@pytest.fixture
def panels(capsys: pytest.CaptureFixture[str]) -> dict[str, list[dict[str, Any]]]:
    """The config of every panel by section, out of the printed JSON."""
    assert dashboard.main(["--project", "p", "--json"]) == 0
    bank = json.loads(capsys.readouterr().out)["section"]["panelBankConfig"]
    found = {each["name"]: [panel["config"] for panel in each["panels"]] for each in bank["sections"]}
    assert list(found) == SECTIONS
    return found


def test_every_panel_shows_what_runs_record(panels: dict[str, list[dict[str, Any]]]) -> None:
    examples = {
        _in_sections(re.sub(r"<layer>", "layer_13", re.sub(r"<(?!layer)\w+>", "dead", each.pattern))) for each in NAMES
    }
    examples |= {_in_sections(f"experts/layer_13/{key}") for key in ("load_max_over_mean", "dead")}
    every = [config for section in panels.values() for config in section]
    assert len(every) > 20
    for config in every:
        axis, names = config["xAxis"], config.get("metrics", [])
        assert axis in ("step", "tokens"), config
        assert [name for name in names if name != "attempt" and metric_name(name) is None] == []
        if config.get("useMetricRegex"):
            assert any(re.fullmatch(config["metricRegex"], name) for name in examples), config["metricRegex"]
        else:
            assert names, config
    titles = Counter(config["chartTitle"] for config in every)
    assert max(titles.values()) == 1


def test_the_library_reads_what_it_wrote(capsys: pytest.CaptureFixture[str]) -> None:
    """As it reads the view of a project that its server has: every panel is there again, and written the same."""
    assert dashboard.main(["--project", "p", "--json"]) == 0
    text = capsys.readouterr().out
    spec = internal.WorkspaceViewspec.model_validate_json(text)
    view = internal.View(entity="me", project="p", display_name="Mine", name="nw-1-v", id="1", spec=spec)
    board = Workspace._from_model(view)
    read = {section.name: [panel.title for panel in section.panels] for section in board.sections}
    assert read == {title: [each.title for each in specs] for title, specs in dashboard.SECTIONS.items()}
    first, second = (json.loads(each)["section"]["panelBankConfig"] for each in (text, dashboard.spec(board)))
    assert first == second


def test_each_section_has_its_numbers(panels: dict[str, list[dict[str, Any]]]) -> None:
    shown = {title: {name for each in section for name in each.get("metrics", [])} for title, section in panels.items()}
    assert {"loss", "validation_loss", "grad_norm", "lr"} <= shown["Loss"]
    assert {"tokens_per_second", "mfu_causal_percent", "step_seconds"} <= shown["Throughput"]
    assert {"peak_allocated_gib", "peak_rss_gib"} <= shown["Memory"]
    assert {"experts/load_max_over_mean", "experts/dead"} <= shown["Experts"]
    assert {"goodput/share", "checkpoint/stall_seconds"} <= shown["Goodput"]
    assert {"spike_score", "attempt", "goodput/interruption_seconds"} <= shown["Incidents"]


def test_it_is_saved_for_the_project_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All but the network: the library's own mutation, with the variables that it would post."""
    posted = []

    def execute(_api: object, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        posted.append((query, variables))
        return {"upsertView": {"view": {"id": "1", "name": "nw-1-v"}}}

    class Api:
        default_entity = "me"

    monkeypatch.setattr(wandb, "Api", Api)
    monkeypatch.setattr("wandb_workspaces.workspaces.internal.execute_graphql", execute)
    monkeypatch.setattr("wandb_workspaces.workspaces.interface.get_app_url", lambda _: "https://wandb.example")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"tracker": {"wandb": {"entity": None, "project": "p"}}}))
    assert dashboard.main([str(tmp_path), "--name", "Mine"]) == 0
    assert capsys.readouterr().out.startswith("https://wandb.example/me/p?nw=")
    ((query, variables),) = posted
    assert "upsertView" in query
    assert {key: variables[key] for key in ("entityName", "projectName", "displayName", "type")} == {
        "entityName": "me",
        "projectName": "p",
        "displayName": "Mine",
        "type": "project-view",
    }
    sections = json.loads(variables["spec"])["section"]["panelBankConfig"]["sections"]
    assert [each["name"] for each in sections] == SECTIONS


def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert dashboard.main([]) == 2
    assert "--project" in capsys.readouterr().err
    monkeypatch.setattr(dashboard, "find_spec", lambda _: None)
    assert dashboard.main(["--project", "p"]) == 2
    assert "pip install wandb-workspaces" in capsys.readouterr().err


def test_a_silent_server_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_route() -> None:
        raise wandb.Error("no route")

    monkeypatch.setattr(wandb, "Api", no_route)
    assert dashboard.main(["--project", "p"]) == 2
    assert capsys.readouterr().err == "p: no dashboard is made, wandb says: no route\n"
