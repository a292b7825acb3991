"""What the pages name exists: files, modules, classes, keys of the site's navigation. Lines of README.md stay short."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
import yaml

from docs.links import OUTSIDE, followed, packages

HOME = Path(__file__).parents[1]
DOCS = sorted((HOME / "docs").rglob("*.md"))
PAGES = [*DOCS, *(HOME / name for name in OUTSIDE)]
LONGEST_LINE = 120
FIRST_WALK_FILES = 25
# 12. `src/cluster/rank.py`: `main`, `run_rank`. What happens there.
STATION = re.compile(r"^(\d+)\. `([\w./]+)`(?:: ((?:`[\w.]+`(?:, )?)+))?\. ", re.MULTILINE)


def named_paths(text: str) -> set[str]:
    """Paths below the rooms of the repository; "<family>", "*" and the like stand for any name."""
    found = re.findall(r"(?<![\w./-])((?:src|tests|conf|docs|benchmarks)/[\w./*<>-]*[\w*/>])", text)
    return {re.sub(r"<\w+>", "*", path).rstrip("/") for path in found}


def named_modules(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w./])((?:src|tests|benchmarks|docs)(?:\.\w+)+)(?![\w./]*/)", text))


@cache
def defined(module: Path) -> frozenset[str]:
    """Top-level names of a module, and `Class.member`."""
    found = set()
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            members = [each for each in node.body if isinstance(each, ast.FunctionDef | ast.AnnAssign)]
            names = [each.name if isinstance(each, ast.FunctionDef) else ast.unparse(each.target) for each in members]
            found |= {f"{node.name}.{name}" for name in names}
    return frozenset(found)


def exists(name: str) -> bool:
    """src.train.step.stepper, src.train.step.Stepper and src.train.step.Stepper.step, read from the files alone."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        place, rest = HOME.joinpath(*parts[:length]), ".".join(parts[length:])
        if place.is_dir():
            return not rest
        if place.with_suffix(".py").is_file():
            return not rest or rest in defined(place.with_suffix(".py"))
    return False


@cache
def words_of_keys(group: str) -> frozenset[str]:
    """Every word that a key of a group of conf/ is made of."""

    def words(node: object) -> set[str]:
        if isinstance(node, dict):
            return {str(key) for key in node} | {word for child in node.values() for word in words(child)}
        return {word for child in node for word in words(child)} if isinstance(node, list) else set()

    files = (HOME / "conf" / group).rglob("*.yaml")
    return frozenset(word for file in files for word in words(yaml.safe_load(file.read_text(encoding="utf-8"))))


def named_keys(text: str) -> set[str]:
    """Keys that a page assigns: task.steps=20; without those of a peer's command."""
    text = re.sub(r"^torchrun (?:.*\\\n)*.*\n", "", text, flags=re.MULTILINE)
    groups = "|".join(sorted(folder.name for folder in (HOME / "conf").iterdir() if folder.is_dir()))
    return set(re.findall(rf"(?<![\w./-])((?:{groups})(?:\.\w+)+)=", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(HOME).as_posix())
def test_keys_that_a_page_assigns_exist(page: Path) -> None:
    keys = named_keys(page.read_text(encoding="utf-8"))
    assert sorted(key for key in keys if not set(key.split(".")[1:]) <= words_of_keys(key.split(".")[0])) == []


def test_stale_keys_are_seen() -> None:
    assert named_keys("`task.steps=20` and (optim.gone=1), src/task.py=2") == {"task.steps", "optim.gone"}
    assert "steps" in words_of_keys("task")
    assert "gone" not in words_of_keys("optim")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(HOME).as_posix())
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    made = tuple(re.findall(r"^(?:cat >|mkdir) (\S+)", text, re.MULTILINE))  # by the commands of a tutorial
    made += tuple(place.removesuffix(".py").replace("/", ".") for place in made)
    gone = {path for path in named_paths(text) if not any(HOME.glob(path))}
    gone |= {name for name in named_modules(text) if not exists(name)}
    assert sorted(name for name in gone if not name.startswith(made)) == []


def test_stale_names_are_seen() -> None:
    text = (
        "`src/train/loop.py`, `src/models/<family>/config.py`, src.config.tree.identity, and `src/gone.py`, src.gone.x"
    )
    assert named_paths(text) == {"src/train/loop.py", "src/models/*/config.py", "src/gone.py"}
    assert {name for name in named_modules(text) if not exists(name)} == {"src.gone.x"}
    assert not exists("src.config.tree.gone")
    assert exists("src.models.llama3.config.Llama3Config.weights")


def test_lines_of_the_readme_are_short() -> None:
    lines = (HOME / "README.md").read_text(encoding="utf-8").splitlines()
    assert {number: len(line) for number, line in enumerate(lines, 1) if len(line) > LONGEST_LINE} == {}


def test_the_readme_leads_to_every_page() -> None:
    text = (HOME / "README.md").read_text(encoding="utf-8")
    names = [page.relative_to(HOME).as_posix() for page in DOCS]
    assert [name for name in names if f"({name}" not in text] == []


def test_every_page_is_in_the_navigation() -> None:
    text = (HOME / "mkdocs.yml").read_text(encoding="utf-8")
    navigation = re.findall(r": (\S+\.md)$", text[text.index("\nnav:") :], re.MULTILINE)
    assert sorted(navigation) == sorted([*(page.relative_to(HOME / "docs").as_posix() for page in DOCS), *OUTSIDE])
    assert yaml.safe_load(text)["theme"]["font"] is False, "a reader's browser fetches nothing from elsewhere"


def test_every_module_is_on_an_api_page() -> None:
    modules = {module for each in packages().values() for module in each}
    assert {"src.errors", "src.models.llama3.model", "src.config.base"} <= modules
    assert all(exists(module) for module in modules)


def test_links_lead_from_the_site_to_the_site() -> None:
    text = "[a](docs/slurm.md#resume) ![b](docs/pictures/loss.png) [c](src/run.py) [d](https://e.org) [f](gone.md)"
    expected = "[a](slurm.md#resume) ![b](pictures/loss.png) [c](api/src.md#src.run) [d](https://e.org) [f](gone.md)"
    assert followed(text, "README.md") == expected
    assert followed("[a](../benchmarks/README.md#slurm)", "slurm.md") == "[a](benchmarks/README.md#slurm)"
    assert followed("[a](../../README.md)", "tutorials/first_run.md") == "[a](../README.md)"
    assert followed("[a](../docs/slurm.md)", "benchmarks/README.md") == "[a](../slurm.md)"
    package = "[a](../src/train/step) [b](../conf/model) [c](../src/__init__.py)"
    assert followed(package, "config.md") == "[a](api/src.train.step.md) b c"


def test_the_life_of_a_run_names_each_file_once() -> None:
    """In reading order, with names that are there, and the way to the loss is not longer than it should be."""
    text = (HOME / "docs/life_of_a_run.md").read_text(encoding="utf-8")
    stations = STATION.findall(text)
    assert [int(number) for number, _, _ in stations] == list(range(1, len(stations) + 1))
    assert len(stations) == len(re.findall(r"^\d+\. ", text, re.MULTILINE))
    files = [file for _, file, _ in stations]
    assert [file for file in files if not (HOME / file).is_file()] == []
    assert [file for file in files if text.count(file) > (2 if file == "launch.py" else 1)] == []
    missing = [
        f"{file}: {name}"
        for _, file, names in stations
        for name in re.findall(r"`([\w.]+)`", names)
        if name not in defined(HOME / file)
    ]
    assert missing == []
    first = STATION.findall(text[: text.index("## A checkpoint")])
    assert 20 <= len(first) <= FIRST_WALK_FILES
