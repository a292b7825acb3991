"""Whatever a person can type is refused by name or makes a run with a plan: no other exception, and nothing hangs.

Every key of every file of conf/ times VALUES, built and planned as launch.py does; and some 400 command lines. All in
this process: about 30 s on an idle core.
"""

import contextlib
import itertools
import json
import math
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import yaml

from src.config.build import Top, build
from src.config.composition import requests
from src.config.composition.composer import composer
from src.config.composition.space import ranges
from src.config.groups import SECTIONS, options
from src.config.tree import Tree, identity
from src.errors import UserError
from src.hugging_face import save  # noqa: F401  (seconds of importing, that no value is to blame for)
from src.launch.auto_layout import decided
from src.launch.dry_run import scripts
from src.launch.start import checked, unfit
from src.planning.plan import plan
from src.run import Run
from src.tasks.source import completed
from tests.test_conf import composed, offered

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 10**30, -(10**30)),
    *(0.0, 1.5, -1.5, 1e-300, 1e300, math.nan, math.inf, -math.inf),
    *(
        "",
        " ",
        "x",
        "true",
        "1",
        "null",
        "~",
        "a\nb",
        "a\0b",
        "\udcff",
        "ünï 漢字",
        "x" * 300,
        "[bold red]x[/]",
        "../x",
    ),
    *([], [1], ["a", "a"], {}, {"a": 1}),
)
SECONDS = 5.0  # the longest that a person is kept waiting for an answer

FORMS = (
    *(
        "{}",
        "x={}",
        "{}=1",
        "+{}=1",
        "~{}",
        "optim.lr={}",
        "seed={}",
        "name={}",
        "root={}",
        "model={}",
        "experiment={}",
    ),
    *("prompt={}", "task.sample_prompt={}", "data.files={} data=text", "hydra.{}=1", "hydra.mode={}", "cluster={}"),
    *("-m seed={}", "-m name={} seed=1,2", "-m sweep=optuna optim.lr={}", "cluster.partition={} cluster=slurm"),
)
TYPED = (
    *("", "=", "[", "]", "[1", "{a: b}", "(", "'", '"', "\\", ",", "a,b", "${x}", "${", "range(1,0)", "interval(1,2)"),
    *("a b", "a\nb", "ü", "\udcff", "a.b.c", "..", "@", "1e400"),
)


class HangError(Exception):
    """Nothing that the code under test would catch."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    def give_up(_number: int, _frame: FrameType | None) -> None:
        raise HangError(f"no answer within {SECONDS} s")

    # Of this process's time, since a busy machine is no fault; and many times that of the clock, for what sleeps.
    timers = ((signal.ITIMER_PROF, signal.SIGPROF, SECONDS), (signal.ITIMER_REAL, signal.SIGALRM, 20 * SECONDS))
    before = {number: signal.signal(number, give_up) for _, number, _ in timers}
    for timer, _, seconds in timers:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer, number, _ in timers:
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


def outcome(act: Callable[[], object]) -> tuple[str, ...] | Exception | None:
    """None: accepted; a UserError's problems; or what must not be."""
    try:
        with limited():
            act()
    except UserError as error:
        return error.problems
    except Exception as error:
        return error
    return None


@cache
def default() -> Mapping[str, Any]:
    return build(composed("dry_run=true"))


def keys(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Of a section, at every depth; the section itself first."""
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from keys(inner, (*path, key))


def changed(tree: Any, path: tuple[str, ...], value: Any) -> Any:
    return tree | {path[0]: changed(tree[path[0]], path[1:], value)} if path else value


def answer(section: str, tree: Tree) -> None:
    """What launch.py does with a dry run, but for what it prints; the other sections are those of the defaults."""
    tree = decided(tree, {})
    top = {key: value for key, value in tree.items() if key in Top.model_fields}
    run = Run.from_sections(default() | build({**top, section: tree[section]}, sections=(section,)))
    scripts([(tree, run, plan(run, None, None, unfit(run)))])
    json.dumps(identity(tree))
    yaml.safe_dump(tree[section], allow_unicode=True).encode()


def files() -> Iterator[tuple[str, str, Tree, list[tuple[str, ...]]]]:
    """Each option, its section, its config and those of its keys that no option with the same class had before."""
    seen: set[tuple[str, tuple[str, ...]]] = set()
    for section in SECTIONS:
        for option in options(section):
            choice = f"{section}={option}"
            tree = composed("dry_run=true") | {section: offered(choice)[section]}
            target = str(tree[section]["_target_"])
            fresh = [path for path in keys(tree[section]) if (target, path) not in seen]
            seen |= {(target, path) for path in fresh}
            yield choice, section, tree, fresh


def told(line: str, section: str, path: tuple[str, ...]) -> bool:
    """Whether it says where to look; how much memory there is may be said by the machine."""
    return section in line or any(key in line for key in path) or line.startswith("does not fit")


def test_every_key_of_every_file_takes_every_value_or_says_why_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tried, accepted, wrong = 0, 0, []
    for choice, section, tree, paths in files():
        for path, value in itertools.product(paths, VALUES):
            other = tree | {section: changed(tree[section], path, value)}
            found = outcome(lambda section=section, other=other: answer(section, other))
            tried, accepted = tried + 1, accepted + (found is None)
            name = ".".join((section, *path))
            if isinstance(found, Exception):
                wrong.append(f"{choice} {name}={value!r}: {type(found).__name__}: {found}")
            elif found is not None and not any(told(line, section, path) for line in found):
                wrong.append(f"{choice} {name}={value!r}: is not named in {found}")
    for key, value in itertools.product(Top.model_fields, VALUES):
        found = outcome(lambda key=key, value=value: answer("task", composed("dry_run=true") | {key: value}))
        tried += 1
        if isinstance(found, Exception) or (found is not None and not any(key in line for line in found)):
            wrong.append(f"{key}={value!r}: {found!r}")
    assert wrong == []
    assert len(VALUES) >= 38
    assert tried > 8000
    assert accepted > 400
    assert list(tmp_path.iterdir()) == []


def lines() -> Iterator[list[str]]:
    for form, typed in itertools.product(FORMS, TYPED):
        yield [part.replace("{}", typed) for part in form.split(" ")]
    for first, second in itertools.combinations(("seed=1,2", "seed=3", "-m", "~seed", "+seed=4", "seed=null"), 2):
        yield [first, second]


def test_every_command_line_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here := tmp_path / "above" / "here").mkdir(parents=True)  # so that data.files=.. names nothing of other tests
    monkeypatch.chdir(here)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["launch.py"])
    tried, wrong = 0, []
    with composer() as one:  # a command composes its groups once; here all commands share them
        monkeypatch.setattr(requests, "composer", lambda: contextlib.nullcontext(one))
        for argv in lines():

            def ask(argv: list[str] = argv) -> None:
                question = requests.asked([*argv, "dry_run=true"], completed)
                ranges(question.space)
                checked(question.trees[:2])

            tried += 1
            if isinstance(found := outcome(ask), Exception):
                wrong.append(f"{shlex.join(argv)}: {type(found).__name__}: {found}")
            elif found is not None and not all(found):
                wrong.append(f"{shlex.join(argv)}: says nothing")
    assert wrong == []
    assert tried >= 400
    assert list(here.iterdir()) == []
