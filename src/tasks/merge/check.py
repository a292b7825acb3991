"""What the launcher sees of the parts of a merge before ranks start: shapes, models, tokenizers that do not agree."""

from pathlib import Path

from src.checkpoint.config import FOREIGN
from src.checkpoint.folder import fault, read_marker, step_folder
from src.checkpoint.stored import shapes
from src.config.tree import leaves_of, read
from src.data.corpus import RECIPE, read_recipe
from src.errors import UserError, some
from src.hugging_face.load import OURS, examine
from src.run import Run
from src.tasks.merge.part import MergePart


def unlike(part: MergePart, run: Run, first: str) -> list[str]:
    """Why the weights of a part are not to be averaged with those of `first`, whose model and tokenizer the run has."""
    try:
        if part.source.startswith(FOREIGN):
            found = examine(Path(part.source.removeprefix(FOREIGN)).expanduser(), run.model)
            return [f"task.runs={part.source}: {line}" for line in found if line.startswith("model.")]
        return _run(part, run, first)
    except UserError as error:
        return [f"task.runs={part.source}: {line}" for line in error.problems]


def _run(part: MergePart, run: Run, first: str) -> list[str]:
    folder = Path(part.source)
    if part.step is None or not (folder / "config.yaml").is_file():
        return []  # src/tasks/source.py has said that it is no run
    path = step_folder(folder / "checkpoints", part.step)
    found = _files(path) or ([] if run.checkpoint.trusted else _shapes(path, run))
    there, here = leaves_of(read(folder / "config.yaml")["model"]), leaves_of(run.model.model_dump(mode="json"))
    found += [
        f"model.{key} is {there[key]} there and {here[key]} here; only weights of one model have a mean"
        for key in there
        if key in here and here[key] != there[key] and not any(key == own or key.startswith(f"{own}.") for own in OURS)
    ]
    if not first.startswith(FOREIGN) and (ours := _tokenizer(Path(first))) != (theirs := _tokenizer(folder)):
        found.append(
            f"its tokenizer is {theirs} and that of {first} is {ours}; only weights that read the same tokens have a "
            "mean"
        )
    return [f"task.runs={part.name}: {line}" for line in found]


def _files(path: Path) -> list[str]:
    """What is missing or cut off; ranks look at every byte, where checkpoint.verify says so."""
    marker = read_marker(path)
    faults = (fault(path / name, each, "size") for name, each in marker.files.items())
    return [each for each in faults if each is not None]


def _shapes(path: Path, run: Run) -> list[str]:
    """Weights that are not there in the run's shapes."""
    there = {name: shape for name, (shape, _) in shapes(path).items()}
    wrong = [each.name for each in run.model.weights() if there.get(f"model.{each.name}") != tuple(each.shape)]
    return [f"{len(wrong)} weights are missing or of another shape than model says: {some(wrong)}"] if wrong else []


def _tokenizer(folder: Path) -> str:
    """Its name in the cache, which is made of its content."""
    name = read_recipe(folder)["tokenizer"] if (folder / RECIPE).is_file() else None
    return "bytes" if name is None else str(name)
