"""The page says what was measured, and nothing that was measured is broken; --sample measures some of it again."""

import subprocess
from pathlib import Path

import pytest

from benchmarks import support_matrix
from benchmarks.history import NoHistoryError, changed, head, uncommitted
from benchmarks.support_matrix import (
    CONCERNS,
    HOME,
    PAGE,
    SAMPLES,
    SOURCES,
    composed,
    disagreement,
    outdated,
    page,
    read,
    sample,
    stale,
    told,
    unknown,
    wanted,
)
from src.errors import UserError


def test_every_cell_is_there_and_the_page_is_theirs() -> None:
    assert PAGE.read_text() == page(read())
    assert outdated() == []


def test_a_missing_or_broken_cell_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = read()
    del cells["pp2 | plain"]
    cells["tp2 | plain"] = {"commit": "1", "broken": "half of it"}
    monkeypatch.setattr(support_matrix, "read", lambda: cells)
    assert outdated() == [
        "1 cells were never measured: pp2 | plain ...",
        "tp2 | plain is broken: half of it",
        "docs/support_matrix.md is not written from benchmarks/support_matrix.json",
    ]


DEPENDS = {
    "src/distributed/pipeline/stages.py": "pp",
    "src/distributed/pipeline/a_new_file.py": "pp",
    "src/distributed/precision/float8.py": "float8",
    "src/models/deepseek_v3/model.py": "deepseek",
    "src/distributed/mesh.py": "",
    "conf/parallel/hsdp2x2_ep2.yaml": "hsdp2x2_ep2 | ",
    "src/models/deepseek_v3/hugging_face.py": "none of them",
    "src/data/order.py": "none of them",
}


@pytest.mark.parametrize("file", DEPENDS)
def test_a_cell_is_stale_when_a_source_that_concerns_it_changed(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = {name: {"commit": "1"} for name, _ in wanted()}
    monkeypatch.setattr(support_matrix.history, "changed", lambda *_: frozenset())
    assert stale(cells) == []
    monkeypatch.setattr(support_matrix.history, "changed", lambda *_: frozenset({file}))
    del cells["pp2 | plain"]
    assert set(stale(cells)) == {name for name, _ in wanted() if DEPENDS[file] in name} | {"pp2 | plain"}


def test_the_tables_name_sources_that_exist() -> None:
    found = [*HOME.glob("src/**/*.py"), *HOME.glob("conf/parallel/*.yaml")]
    files = [path.relative_to(HOME).as_posix() for path in found]
    assert [each for each in SOURCES if not any(file.startswith(each) for file in files)] == []
    assert set(CONCERNS) <= {word for file in files for word in Path(file).with_suffix("").parts}


def test_without_history_nothing_is_stale(tmp_path: Path) -> None:
    cells = {name: {"commit": "0000000"} for name, _ in wanted()}
    assert stale(cells) == []
    assert unknown(cells) == {"0000000"}
    with pytest.raises(NoHistoryError):
        head(tmp_path)


BEFORE = '''
from src.models import base

class Journey:
    """A trip."""
    def land(self, rows: int) -> int:
        return self.take(rows) + 1  # a reason
'''
AFTER = '''
from src.modules import contract
class Transfer:

    def wait(self, x: "Rows"):
        """Its rows."""
        return (self.take(x) + 1)
'''
CHANGES: dict[str, tuple[dict[str, str | None], set[str]]] = {
    "a move": ({"src/b.py": BEFORE, "src/a.py": None}, set()),
    "other words": ({"src/a.py": AFTER}, set()),
    "a move and another word": ({"src/c/d.py": BEFORE.replace("Journey", "Transfer"), "src/a.py": None}, set()),
    "another number": ({"src/a.py": BEFORE.replace("1", "2")}, {"src/a.py"}),
    "another call": ({"src/a.py": AFTER.replace("take", "drop")}, {"src/a.py"}),
    "a new file": ({"src/e.py": "x = 1"}, {"src/e.py"}),
    "an empty new file": ({"src/__init__.py": "# nothing"}, set()),
    "a file that is gone": ({"src/a.py": None}, {"src/a.py"}),
    "a comment on a value": ({"src/x.yaml": "a: 1  # metres\n"}, set()),
    "another value": ({"src/x.yaml": "a: 2\n"}, {"src/x.yaml"}),
    "no program": ({"src/a.css": "1"}, set()),
    "outside": ({"b.py": "2"}, set()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_only_what_a_program_means_counts(change: str, tmp_path: Path) -> None:
    def git(*argv: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=b@c")
        subprocess.run(["git", "-C", tmp_path, *identity, *argv], check=True, capture_output=True)

    (tmp_path / "src").mkdir()
    (tmp_path / "src/a.py").write_text(BEFORE)
    (tmp_path / "src/x.yaml").write_text("a: 1\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    first = head(tmp_path)
    files, differ = CHANGES[change]
    for name, content in files.items():
        (tmp_path / name).unlink(missing_ok=True)
        if content is not None:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(content)
    assert bool(uncommitted("src", home=tmp_path)) == (change != "outside")
    git("add", ".")
    git("commit", "-m", "second")
    assert uncommitted("src", home=tmp_path) == []
    assert changed(first, ("src",), tmp_path) == differ


def test_samples_come_round() -> None:
    names = [name for number in range(SAMPLES) for name in sample(number)]
    assert sorted(names) == sorted(name for name, _ in wanted())
    assert sample(SAMPLES + 1) == sample(1)


def test_disagreements_in_words() -> None:
    fine, far = {"commit": "1", "loss": 1e-7, "gradient": 0.0}, {"loss": 3e-6, "gradient": 1e-5}
    refused, broken = {"refused": ["no rows"]}, {"broken": "half of it"}
    assert disagreement(fine, far) is None
    assert disagreement({"commit": "1"} | refused, refused) is None
    assert disagreement(fine, refused) == "now refused: ['no rows']; written down: ok 1e-07 / 0e+00"
    assert disagreement(refused, {"refused": ["no"]}) == "now refused: ['no']; written down: refused: ['no rows']"
    assert disagreement(fine, broken) == "now broken: half of it; written down: ok 1e-07 / 0e+00"
    assert disagreement(broken, broken) is not None


def test_cells_in_words() -> None:
    notes: dict[str, int] = {}
    assert told({"loss": 1.2e-7, "gradient": 3e-6}, notes) == "ok 1e-07 / 3e-06"
    assert told({"refused": ["b", "a"]}, notes) == "refused (1, 2)"
    assert told({"refused": ["a"]}, notes) == "refused (2)"
    assert told({"broken": "c"}, notes) == "**broken** (3)"
    assert told(None, notes) == "not measured"
    assert notes == {"b": 1, "a": 2, "c": 3}


def test_what_is_refused_is_refused_in_the_plans_words() -> None:
    commands = dict(wanted())
    (first, *_) = (name for name, cell in read().items() if "refused" in cell)
    with pytest.raises(UserError) as caught:
        composed(*commands[first])
    assert list(caught.value.problems) == read()[first]["refused"]
