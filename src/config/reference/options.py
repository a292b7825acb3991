"""What each group of conf/ decides, and what each of its options is, in half a line.

An option says it in the first sentence of its file's first comment; one without a comment by the keys that it sets.
"""

import re
from collections.abc import Iterable
from functools import cache
from math import prod

import yaml

from src.config.groups import CONF, EXPERIMENT, options
from src.config.tree import leaves_of
from src.config.wording import bare

ABOUT_GROUPS = {
    "task": "prepare, train, measure, verify, evaluate, generate, export, merge",
    "model": "the network, by family and size; a released one brings its recipe",
    "parallel": "how ranks divide the work: shard, tensor, context, expert, pipeline",
    "precision": "dtypes of weights, products and gradient sums",
    "recompute": "which activations are computed again instead of kept",
    "compile": "what torch.compile compiles",
    "data": "the text that is trained on",
    "tokenizer": "how text becomes token ids",
    "optim": "the optimizer: learning rate, decay, clipping",
    "parametrization": "how initialisation and learning rates follow the model's width",
    "schedule": "the learning rate over the steps",
    "checkpoint": "when to save, what to keep, what to start from",
    "tracker": "where metrics go beside the run folder",
    "alert": "who is told of a failure, and how",
    "evaluate": "which tasks score the weights while they train, and how often",
    "fault_tolerance": "replica groups that survive each other, or exchange rarely",
    "cluster": "where ranks run: this machine, or a site's batch system",
    "sweep": "which points -m makes of several values",
    "recipe": "batch, length and learning rate as published; the model chooses it",
    "experiment": "a study: a file that sets any of the others",
    "data/source": "a source of data=mixture: +data/source@data.sources.<name>=<option>",
}
LONGEST = 90  # letters of what an option is; a line of a list stays below 120 columns
_SENTENCE_END = re.compile(r"\.(?: |$)")
_RANKS = ("replicate", "shard", "context", "tensor", "pipeline")


@cache
def about(group: str, option: str) -> str:
    """Half a line: "Llama 3.2 1B", or "4 ranks: shard=2 tensor=2" where the file has no comment."""
    file = CONF / group / f"{option}.yaml"
    if not file.is_file():  # of a folder of hydra.searchpath
        return ""
    text = file.read_text(encoding="utf-8")
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package") and not (group == EXPERIMENT and line.startswith("# python launch.py")):
            return _SENTENCE_END.split(line.removeprefix("# "))[0]
    loaded = yaml.safe_load(text) or {}
    values = {key: value for key, value in leaves_of(loaded).items() if not key.startswith("defaults")}
    said = " ".join(f"{key}={bare(value)}" for key, value in values.items())
    if group != "parallel":
        return said
    ranks = prod(values.get(axis, 1) for axis in _RANKS)
    return f"{ranks} rank{'s' * (ranks > 1)}: {said}"


def listed(group: str, names: Iterable[str] | None = None) -> list[str]:
    """A line for each option, or for those of `names`: its name and what it is, where conf/ has it."""
    known = [*(options(group) if names is None else names)]
    width = max(map(len, known), default=0)
    return [f"  {name:{width}}  {about(group, name)}".rstrip() for name in known]
