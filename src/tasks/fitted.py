"""Values of a config that follow from its text: what is null, or model=auto without weights, is chosen here and told.

Of data in files: `tokenizer.vocab_size`, `task.steps`, `task.validate_samples` and the model's size. Of any tokenizer:
`model.vocab_size`. The launcher does it before anything is built, so that ranks and run folders see plain numbers.
"""

from collections.abc import Mapping
from math import ceil
from pathlib import Path, PurePath

from pydantic import ValidationError

from src.config.base import Config
from src.config.build import target_class
from src.config.groups import RECIPE
from src.config.presets import section_of
from src.config.tree import Tree
from src.data.files import ROW_SUFFIXES, TEXT_SUFFIXES
from src.data.sources import matched
from src.data.tokenizer import TokenizerConfig
from src.errors import DataError, UserError
from src.storage.remote import is_url
from src.storage.remote_files import FilesAt, files_at
from src.storage.streams import to_stderr
from src.tasks.inherit import overlaid

AUTO = "src.models.families.Auto"
BPE = "src.data.tokenizer.Bpe"
TEXT = "src.data.config.Text"
VOCABULARY_MULTIPLE = 128  # rows: what matrix kernels of GPUs like
# Bytes of text from which a preset pays: 20 tokens of 3.5 bytes for each parameter (arXiv 2203.15556), of which text
# that is seen four times gives nearly as much as fresh text (arXiv 2305.16264).
PASSES = 4
BYTES_PER_TOKEN = 3.5
# The same of smaller vocabularies, as the pages of docs/ came out; below the smallest and of bytes by themselves.
BYTES_BY_IDS = ((16384, BYTES_PER_TOKEN), (8192, 3.4), (4096, 3.2), (2048, 2.9), (512, 1.9), (0, 1.5))
BYTES = "src.data.tokenizer.Bytes"
SIZES = (("llama3_350m", 350), ("llama3_125m", 125), ("llama3_60m", 60), ("llama3_20m", 20))  # million parameters
SMALLEST = "llama3_debug"
# Bytes of text from which a vocabulary pays: each of its tokens should be met some hundred times.
VOCABULARIES = ((3e9, 32768), (3e8, 16384), (3e7, 8192), (3e6, 4096), (3e5, 2048), (0.0, 512))
FEWEST_STEPS = 100
MOST_VALIDATED = 64  # sequences
# Bytes of a file for each token that is surely in it; rows have other columns beside the text.
SURELY = 8
SURELY_IN_ROWS = 32
SHORTEST = 16  # tokens of a sequence


def fitted(tree: Tree, typed: Mapping[str, str]) -> Tree:
    """With a model, a vocabulary, steps and validation that suit the text of data.files, where they are asked for.

    DataError for files that are not there.
    """
    data, task, tokenizer = (tree.get(name) for name in ("data", "task", "tokenizer"))
    if not (isinstance(data, dict) and isinstance(task, dict) and data.get("_target_") == TEXT):
        return tree
    bpe = isinstance(tokenizer, dict) and tokenizer.get("_target_") == BPE and tokenizer.get("vocab_size", 0) is None
    asked = [key for key in ("steps", "validate_samples") if task.get(key, 0) is None]
    if not (bpe or asked or _sizeless(tree)) or not _plain(tree):
        return tree
    files, size, sure = _amount(data)
    found = dict(tree)
    if bpe:
        found["tokenizer"] = {**tree["tokenizer"], "vocab_size": _vocabulary(size)}
    if _sizeless(tree):
        found |= _sized(found, size, typed)
    found["task"] = _paced(found, size, sure, asked, typed)
    _tell(found, files, size)
    return found


def with_vocabulary(tree: Tree) -> Tree:
    """With the tokenizer's number of ids, rounded up, where model.vocab_size is null; it is told."""
    model = tree.get("model")
    if not isinstance(model, dict) or model.get("vocab_size", 0) is not None:
        return tree
    try:
        tokenizer: Config = target_class(tree, "tokenizer")(
            **{key: value for key, value in tree["tokenizer"].items() if key != "_target_"}
        )
        assert isinstance(tokenizer, TokenizerConfig)
        ids = tokenizer.vocabulary()
    except (ValidationError, UserError):
        return tree  # what is wrong with the tokenizer is told with all else
    rows = VOCABULARY_MULTIPLE * ceil(ids / VOCABULARY_MULTIPLE)
    to_stderr([f"model.vocab_size={rows}: the tokenizer's {ids:,} ids, rounded up to {VOCABULARY_MULTIPLE}"])
    return tree | {"model": model | {"vocab_size": rows}}


def _plain(tree: Tree) -> bool:
    """Whether what is reckoned with are numbers; what is not is told when the config is built."""
    counts = [tree["task"].get(key) for key in ("seq_len", "global_batch")]
    whole = all(isinstance(each, int) and each > 0 for each in counts)
    return whole and isinstance(tree["data"].get("validation_fraction"), float | int)


def _sizeless(tree: Tree) -> bool:
    """Whether model=auto stands without weights whose config.json would say the size."""
    model, checkpoint = tree.get("model"), tree.get("checkpoint")
    auto = isinstance(model, dict) and model.get("_target_") == AUTO
    return auto and isinstance(checkpoint, dict) and checkpoint.get("initial") is None


def _amount(data: Tree) -> tuple[int, int, int]:
    """Files, their bytes, and tokens that are surely in them."""
    patterns = data.get("files")
    every = [patterns] if isinstance(patterns, str) else [str(each) for each in patterns or ()]
    urls, local = [each for each in every if is_url(each)], [each for each in every if not is_url(each)]
    paths, problems = matched(local) if local or not urls else ([], [])
    if problems:
        raise DataError(problems)
    sizes: dict[PurePath, int] = {path: _text_bytes(path, data.get("field")) for path in paths}
    for url in urls:
        sizes |= {PurePath(each.url): each.size for each in files_at(FilesAt("data.files", url, TEXT_SUFFIXES))}
    sure = sum(size // _bytes_of_a_token(path) for path, size in sizes.items())
    return len(sizes), sum(sizes.values()), sure


def _text_bytes(path: Path, column: object) -> int:
    """Of a file, or of the column of a parquet file before it was compressed."""
    if path.suffix.lower() == ".parquet":
        from pyarrow import ArrowException, parquet

        try:
            facts = parquet.read_metadata(path)
        except (ArrowException, OSError):
            return path.stat().st_size  # what is wrong with it is told when it is read
        groups = [facts.row_group(number) for number in range(facts.num_row_groups)]
        chunks = [group.column(place) for group in groups for place in range(group.num_columns)]
        return sum(each.total_uncompressed_size for each in chunks if each.path_in_schema == column)
    return path.stat().st_size


def _bytes_of_a_token(path: PurePath) -> int:
    return SURELY_IN_ROWS if path.suffix.lower() in ROW_SUFFIXES else SURELY


def _bytes_by(tokenizer: Tree) -> float:
    """Bytes of a token, about."""
    if tokenizer.get("_target_") == BYTES:
        return 1.0
    ids = tokenizer.get("vocab_size")
    return next(each for least, each in BYTES_BY_IDS if ids >= least) if isinstance(ids, int) else BYTES_PER_TOKEN


def _vocabulary(size: int) -> int:
    return next(ids for least, ids in VOCABULARIES if size >= least)


def preset_for(size: int) -> str:
    """The largest model preset that so many bytes of text pay for."""
    enough = (name for name, millions in SIZES if size >= millions * 1e6 * 20 * BYTES_PER_TOKEN / PASSES)
    return next(enough, SMALLEST)


def _sized(tree: Tree, size: int, typed: Mapping[str, str]) -> Tree:
    """The model, and the sections that its recipe decides, but for what was typed."""
    preset = preset_for(size)
    model = section_of("model", preset) | {"vocab_size": None}
    found: Tree = {"model": overlaid("model", model, tree, typed)}
    recipe = section_of(RECIPE, preset) if preset != SMALLEST else {}
    for section in ("task", "optim", "schedule"):
        chosen = {key: value for key, value in recipe.get(section, {}).items() if f"{section}.{key}" not in typed}
        kept = {key: tree[section][key] for key in chosen if tree[section].get(key, 0) is None}
        found[section] = tree[section] | chosen | kept
    return found


def _paced(tree: Tree, size: int, sure: int, asked: list[str], typed: Mapping[str, str]) -> Tree:
    """The task with a batch that the text fills, and with the steps and validation that were asked for."""
    task, fraction = tree["task"], float(tree["data"]["validation_fraction"])
    trained = max(int(sure * (1.0 - fraction)), 1)
    shortest = max(SHORTEST, 1 << (trained // 4).bit_length() - 1) if trained >= 4 else SHORTEST
    seq_len = task["seq_len"] if "task.seq_len" in typed else min(task["seq_len"], shortest)
    batch = task["global_batch"]
    if "task.global_batch" not in typed:
        there = max(1, trained // seq_len)
        batch = batch if batch <= there else 1 << there.bit_length() - 1  # which passes divide, as 7 or 13 they do not
    chosen = {"seq_len": seq_len, "global_batch": batch}
    if "steps" in asked:
        chosen["steps"] = max(FEWEST_STEPS, int(PASSES * size / _bytes_by(tree["tokenizer"]) / (seq_len * batch)))
    if "validate_samples" in asked:
        chosen["validate_samples"] = min(MOST_VALIDATED, max(1, int(sure * fraction / seq_len)))
    return {**task, **chosen}


def _tell(tree: Tree, files: int, size: int) -> None:
    task, model, tokenizer = tree["task"], tree["model"], tree["tokenizer"]
    tokens = size / _bytes_by(tokenizer)
    passes = task["steps"] * task["seq_len"] * task["global_batch"] / tokens if tokens else 0.0
    shape = f"{model.get('n_layers')} layers of {model.get('dim')}"
    vocabulary = f", a tokenizer of {tokenizer['vocab_size']:,} ids" if "vocab_size" in tokenizer else ""
    lines = [
        f"text: {files:,} file{'s' * (files != 1)}, {size / 1e6:,.2f} MB, about {tokens:,.0f} tokens",
        f"  model: {shape}{vocabulary}",
        f"  task.steps={task['steps']} task.seq_len={task['seq_len']} task.global_batch={task['global_batch']}: "
        f"about {passes:,.1f} passes; whatever is typed wins",
    ]
    to_stderr(lines)
