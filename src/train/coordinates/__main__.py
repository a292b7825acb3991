"""The coordinate check of a model: activations at several widths, with muP and without, as a table and a picture.

    python -m src.train.coordinates parametrization.base_width=128 parametrization.base.n_heads=4 model.n_layers=2
    python -m src.train.coordinates model=deepseek_v3_debug optim=muon widths=64,128,256 steps=10 out=check.pdf

Words as of launch.py, and: widths=128,256,512,1024 (values of model.dim; keys of parametrization.base grow along),
steps=10, seeds=2 (models of the widest; of narrower ones up to 8 times as many), out=coordinates.svg (or .pdf, .png).
One core, a minute for small models.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from src.config.build import Top, build
from src.config.composition.requests import asked
from src.errors import ConfigError, FolderError, UserError
from src.models.base import ModelConfig
from src.models.parametrization.config import MuP
from src.optim.base import Optimizer
from src.storage.atomic_write import atomic_write
from src.storage.streams import to_stderr

FORMS = ("svg", "pdf", "png")
OWN = {"widths": "128,256,512,1024", "steps": "10", "seeds": "2", "out": "coordinates.svg"}


@dataclass(frozen=True)
class WidthQuestion:
    """What the words ask for."""

    model: ModelConfig
    optim: Optimizer
    mup: MuP
    widths: tuple[int, ...]
    steps: int
    seeds: int
    out: Path


def question(argv: Sequence[str]) -> WidthQuestion:
    """ConfigError for a word that means nothing."""
    mine = {key: text for key, equals, text in (each.partition("=") for each in argv) if equals and key in OWN}
    theirs = [each for each in argv if each.partition("=")[0] not in OWN]
    words, problems = OWN | mine, []
    if flags := [each for each in theirs if each.startswith("-")]:
        raise ConfigError(
            f"{' '.join(flags)}: a coordinate check is of one model, and takes words such as widths=64,128"
        )
    for key in ("widths", "steps", "seeds"):
        numbers = words[key].split(",")
        whole = all(each.isdigit() and int(each) > 0 for each in numbers)
        if not whole or (key != "widths" and len(numbers) > 1) or (key == "widths" and len({*numbers}) < 2):
            rule = "are two different widths or more" if key == "widths" else "is a whole number from 1"
            problems.append(f"{key}={words[key]}: {key} {rule}, such as {key}={OWN[key]}")
    out = Path(words["out"]).expanduser()
    if (form := out.suffix.removeprefix(".")) not in FORMS:
        problems.append(f"out={out}: {form or 'no ending'} is no format; end the name with .svg, .pdf or .png")
    (tree,) = asked(["parametrization=mup", *theirs]).trees
    top = {key: value for key, value in tree.items() if key in Top.model_fields}
    wanted = ("model", "optim", "parametrization")
    sections: dict[str, Any] = build(top | {key: tree[key] for key in wanted}, sections=wanted)
    model, mup = sections["model"], sections["parametrization"]
    if not isinstance(mup, MuP):
        problems.append("parametrization=standard: is what muP is compared with; leave it out")
    elif isinstance(model, ModelConfig):
        problems += mup.problems(model)
    else:
        problems.append("model=auto: has no sizes; choose a model")
    if problems:
        raise ConfigError(problems)
    widths = sorted({int(each) for each in words["widths"].split(",")})
    return WidthQuestion(model, sections["optim"], mup, tuple(widths), int(words["steps"]), int(words["seeds"]), out)


def main(argv: Sequence[str]) -> int:
    """Exit code 0 whatever the curves look like: a person judges."""
    if not argv or {"-h", "--help"} & {*argv}:
        print(__doc__)
        return 0
    try:
        _answer(question(argv))
    except UserError as error:
        to_stderr(error.problems)
        return error.exit_code
    return 0


def _answer(asked_for: WidthQuestion) -> None:
    from src.train.coordinates.check import SameTokens, coordinates
    from src.train.coordinates.drawing import drawn

    try:
        found = coordinates(
            asked_for.model,
            asked_for.optim,
            asked_for.mup,
            asked_for.widths,
            steps=asked_for.steps,
            seeds=asked_for.seeds,
            batch=SameTokens(),
        )
    except ValidationError as error:
        told = (f"widths={','.join(map(str, asked_for.widths))}: {each['msg']}" for each in error.errors())
        raise ConfigError(dict.fromkeys(told)) from error
    try:
        atomic_write(asked_for.out, drawn(found, asked_for.out.suffix.removeprefix(".")))
    except OSError as error:
        raise FolderError(f"out={asked_for.out}: cannot be written ({error.strerror or error})") from error
    print(f"{'':16}" + "".join(f"{each.name:>12}" for each in found))
    for what in found[0].sizes:
        print(f"{what:16}" + "".join(f"{each.spread(what):12.1%}" for each in found))
    print("the widest over the narrowest, at the worst step;", asked_for.out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
