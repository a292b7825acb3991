"""The address that a submission prints is the one that the run will have."""

from pathlib import Path
from typing import Any

import pytest

from src.config import tree as trees
from src.metrics.trackers.wandb_address import wandb_address
from src.metrics.trackers.weights_and_biases import run_id


@pytest.mark.parametrize(
    ("section", "environment", "address"),
    [
        (None, {}, "not used"),
        ({}, {}, "offline"),
        ({}, {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        ({"mode": "offline", "entity": "us"}, {"WANDB_API_KEY": "k"}, "offline"),
        ({"mode": "online", "entity": "us"}, {"WANDB_API_KEY": "k"}, "https://wandb.ai/us/uncategorized/runs/{id}"),
        (
            {"project": "llm"},
            {"WANDB_API_KEY": "k", "WANDB_ENTITY": "we", "WANDB_BASE_URL": "https://wandb.site.org/"},
            "https://wandb.site.org/we/llm/runs/{id}",
        ),
        ({"project": "llm"}, {"WANDB_API_KEY": "k"}, "https://wandb.ai, run {id} of project llm"),
    ],
)
def test_address(
    section: dict[str, Any] | None,
    environment: dict[str, str],
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for key in ("API_KEY", "MODE", "ENTITY", "PROJECT", "BASE_URL"):
        monkeypatch.delenv(f"WANDB_{key}", raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    whole = None if section is None else {"mode": None, "entity": None, "project": None} | section
    trees.write(tmp_path / "config.yaml", {"tracker": {"wandb": whole}})
    assert wandb_address(tmp_path) == address.format(id=run_id(tmp_path))
