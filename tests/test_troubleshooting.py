"""docs/troubleshooting.md names every class of user errors, and only words that the program says."""

import ast
import re
from functools import cache
from pathlib import Path

from src import errors

HOME = Path(__file__).parents[1]
PAGE = (HOME / "docs/troubleshooting.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `([^`]+)`", re.MULTILINE)
OTHERS = {
    "CUDA out of memory",
    *(name for name in vars(errors) if name.endswith("Error")),
}  # torch's, and names of classes


@cache
def messages() -> str:
    """All strings of src, parts of one behind each other, "..." for what is put in."""
    found = []
    for file in sorted((HOME / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [each.value if isinstance(each, ast.Constant) else "..." for each in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_every_class_of_user_errors_has_its_place() -> None:
    classes = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, errors.UserError)]
    assert len(classes) >= 9
    assert [each.__name__ for each in classes if f"`{each.__name__}`" not in PAGE] == []


def test_the_words_of_the_page_are_those_of_the_program() -> None:
    words = [each for each in ROW.findall(PAGE) if each not in OTHERS]
    assert len(words) >= 25
    assert [each for each in words if each not in messages()] == []
    assert "no such message anywhere" not in messages()
