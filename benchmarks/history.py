"""Which files mean something else than they did at a commit. Git tells what moved; comments, docstrings, annotations,
the layout of the code and new names for what this repository defines do not count.
"""

import ast
import io
import subprocess
import tarfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import yaml

HOME = Path(__file__).resolve().parents[1]
KINDS = (".py", ".yaml")


class NoHistoryError(Exception):
    """Git is missing, or does not know a commit: a tarball, a shallow clone, or a commit that a rebase left behind."""


def git(*argv: str, home: Path = HOME) -> bytes:
    """What a git command prints."""
    try:
        return subprocess.run(["git", "-C", str(home), *argv], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr.decode().strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
        raise NoHistoryError(said) from None


def head(home: Path = HOME) -> str:
    """The commit of the checkout, 7 digits or as many as tell it from others."""
    return git("rev-parse", "--short=7", "HEAD", home=home).decode().strip()


def uncommitted(*paths: str, home: Path = HOME) -> list[str]:
    """What below these paths differs from the commit of the checkout."""
    return [line[3:] for line in git("status", "--porcelain", "--", *paths, home=home).decode().splitlines()]


def commits(home: Path = HOME) -> int:
    """How many lead to the checkout."""
    if git("rev-parse", "--is-shallow-repository", home=home).strip() == b"true":
        raise NoHistoryError("a shallow clone")
    return int(git("rev-list", "--count", "HEAD", home=home))


@cache
def changed(commit: str, folders: tuple[str, ...], home: Path = HOME) -> frozenset[str]:
    """Paths below these folders, as they are now and as they were then, whose programs (.py) or values (.yaml) differ
    between a commit and the checkout.
    """
    tokens = iter(
        git("diff", "--name-status", "--find-renames", "-z", commit, "--", *folders, home=home).decode().split("\0")
    )
    then = _contents_then(commit, folders, home)
    now = {path: (home / path).read_bytes() for folder in folders for path in _files(home, folder)}
    ours_then, ours_now = _defined(then), _defined(now)
    found: set[str] = set()
    for status in tokens:
        if not status:
            break
        old = next(tokens)
        new = next(tokens) if status[0] == "R" else old
        if status == "R100" or not (new.endswith(KINDS) or old.endswith(KINDS)):
            continue
        if _meaning(old, then.get(old, b""), ours_then) != _meaning(new, now.get(new, b""), ours_now):
            found |= {old, new}
    return frozenset(found)


def _files(home: Path, folder: str) -> Iterator[str]:
    for file in (home / folder).rglob("*"):
        if file.suffix in KINDS:
            yield file.relative_to(home).as_posix()


def _contents_then(commit: str, folders: tuple[str, ...], home: Path) -> dict[str, bytes]:
    known = git("ls-tree", "--name-only", commit, "--", *folders, home=home).decode().splitlines()
    with tarfile.open(fileobj=io.BytesIO(git("archive", commit, "--", *known, home=home))) as archive:
        files = {member.name: archive.extractfile(member) for member in archive if member.isfile()}
        return {name: file.read() for name, file in files.items() if file is not None}


def _defined(files: dict[str, bytes]) -> set[str]:
    """Every name that these files give to something."""
    found: set[str] = set()
    for path, content in files.items():
        for node in ast.walk(ast.parse(content)) if path.endswith(".py") else ():
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found.add(node.name)
            elif isinstance(node, ast.arg):
                found.add(node.arg)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
    return found


def _meaning(path: str, content: bytes, ours: set[str]) -> str:
    """The same text for the same program or values, however they are written down and whatever our names are: each of
    `ours` is numbered by its first appearance.
    """
    if path.endswith(".yaml"):
        values = yaml.safe_load(content) or {}
        return repr({key: value for key, value in values.items() if key != "_target_"})  # where its class lies
    tree, numbers = ast.parse(content), dict[str, str]()
    for node in ast.walk(tree):
        _strip(node)
    for node in ast.walk(tree):
        for field, value in ast.iter_fields(node):
            if isinstance(value, str) and value in ours and not isinstance(node, ast.Constant):
                setattr(node, field, numbers.setdefault(value, str(len(numbers))))
    return ast.dump(tree)


def _strip(node: ast.AST) -> None:
    """Of docstrings, annotations, words of assertions, and imports of our own modules, which follow every move."""
    body = getattr(node, "body", None)
    if isinstance(body, list):
        first = body[0] if body else None
        documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
        kept = body[1:] if documented else body
        body[:] = [each for each in kept if not (isinstance(each, ast.ImportFrom) and _own(each.module))]
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        node.returns = None
    if isinstance(node, ast.Assert):
        node.msg = None
    if isinstance(node, ast.arg):
        node.annotation = None
    if isinstance(node, ast.AnnAssign):
        node.annotation = ast.Constant(None)


def _own(module: str | None) -> bool:
    return module is not None and module.partition(".")[0] == "src"
