"""The page says what was measured, and nothing that was measured is broken; the rest is for --check."""

import pytest

from benchmarks import support_matrix
from benchmarks.support_matrix import PAGE, Cell, composed, fingerprint, meaning, page, read, stale, told, wanted
from src.errors import UserError


def test_the_page_is_what_was_measured() -> None:
    assert PAGE.read_text() == page(read())


def test_nothing_is_broken() -> None:
    assert [f"{name}: {cell['broken']}" for name, cell in read().items() if "broken" in cell] == []


def test_a_cell_is_out_of_date_when_what_it_depends_on_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    cells: dict[str, Cell] = {name: {"sources": fingerprint(name)} for name, _ in wanted()}
    assert stale(cells) == []
    del cells["pp2 | plain"]
    assert stale(cells) == ["pp2 | plain"]
    known = support_matrix.sources()
    depends = {"pipeline.py": "pp", "float8.py": "float8", "shard.py": "", "process.py": "none"}
    files = {f"src/distributed/{file}": concerned for file, concerned in depends.items()}
    for file, concerned in (files | {"src/models/deepseek_v3/hugging_face.py": "none"}).items():
        changed = known | {file: "changed"}
        monkeypatch.setattr(support_matrix, "sources", lambda changed=changed: changed)
        assert set(stale(cells)) == {name for name, _ in wanted() if concerned in name or name == "pp2 | plain"}


def test_only_what_the_code_means_counts() -> None:
    code = "def f(x: int) -> int:\n    return x + 1\n"
    assert meaning(f'"""A module."""\n# a comment\n{code}') == meaning(code.replace(":\n", ':\n    """Adds."""\n'))
    assert meaning(code) != meaning(code.replace("1", "2"))


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
