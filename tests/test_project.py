"""What is said twice of the project is the same in both places: version, licence, targets, hooks."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from src.version import VERSION

HOME = Path(__file__).parents[1]
PROJECT = tomllib.loads((HOME / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CITATION = yaml.safe_load((HOME / "CITATION.cff").read_text(encoding="utf-8"))
RELEASES = re.findall(r"^## (\d+\.\d+\.\d+) - (\d{4}-\d\d-\d\d)$", (HOME / "CHANGELOG.md").read_text(), re.MULTILINE)
MAKEFILE = (HOME / "Makefile").read_text(encoding="utf-8")


def test_the_version_is_one() -> None:
    assert VERSION == PROJECT["version"] == RELEASES[0][0] == CITATION["version"]
    assert RELEASES[0][1] == str(CITATION["date-released"])


def test_releases_are_listed_newest_first() -> None:
    numbers = [tuple(map(int, version.split("."))) for version, _ in RELEASES]
    assert numbers == sorted(set(numbers), reverse=True)
    assert [day for _, day in RELEASES] == sorted((day for _, day in RELEASES), reverse=True)


@pytest.mark.parametrize("file", ["README.md", "mkdocs.yml", "CITATION.cff", "LICENSE"])
def test_the_name_is_one(file: str) -> None:
    assert PROJECT["name"].capitalize() in (HOME / file).read_text(encoding="utf-8")


def test_the_licence_is_one() -> None:
    assert PROJECT["license"] == CITATION["license"] == "BSD-3-Clause"
    assert (HOME / PROJECT["license-files"][0]).read_text().startswith("BSD 3-Clause License")


def test_make_help_lists_every_target() -> None:
    phony = set(re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[0].split())
    ended = subprocess.run(["make", "--no-print-directory"], cwd=HOME, capture_output=True, text=True, check=True)
    assert set(re.findall(r"^  make (\S+) +\S", ended.stdout, re.MULTILINE)) == phony


def test_hooks_run_what_lint_runs() -> None:
    """And nothing that would have to be downloaded."""
    hooks = yaml.safe_load((HOME / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repository["repo"] for repository in hooks["repos"]] == ["local"]
    entries = [hook["entry"] for repository in hooks["repos"] for hook in repository["hooks"]]
    linted = re.findall(r"^\t\$\(PY\) -m (ruff check|ruff format|mypy)", MAKEFILE, re.MULTILINE)
    assert len(linted) == 3
    assert [entry.removeprefix(".venv/bin/python -m ").partition(" --")[0] for entry in entries] == linted
