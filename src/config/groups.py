"""What may stand at the top of a config, and the options that conf/ offers for each group."""

import re
from pathlib import Path

CONF = Path(__file__).parents[2] / "conf"

# Sections that must be there; each is a group of conf/ and names its class with `_target_`.
SECTIONS = (
    "task",
    "model",
    "parallel",
    "precision",
    "recompute",
    "compile",
    "data",
    "tokenizer",
    "optim",
    "parametrization",
    "schedule",
    "checkpoint",
    "tracker",
    "alert",
    "evaluate",
    "fault_tolerance",
    "cluster",
    "sweep",
)
# Groups whose files change the other sections and leave none of their own.
RECIPE = "recipe"
EXPERIMENT = "experiment"
GROUPS = (*SECTIONS, RECIPE, EXPERIMENT)
# `from=<run>[@step]` stands for a run's config and `checkpoint.initial`; src/tasks/from_run.py spells it out.
FROM = "from"
# `scale=` of experiment=ladder, and the rules that it turns; src/tasks/ladder.py spells them out.
SCALE, LADDER = "scale", "ladder"
# Keys that a task which has them takes without its section: `run=...` is `task.run=...`.
SHORT = (
    "run",
    "step",
    "ema",
    "to",
    "dtype",
    "fp8",
    "push",
    "prompt",
    "prompts",
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "split",
    "samples",
    "seq_len",
    "micro_batch",
    "stages",
    "biases",
    "shard_gb",
    "check",
    "text",
    "send",
    "batch",
    "runs",
    "steps",
    "weights",
)
# Of these, what only one class takes so: for the others `steps=` is a slip for the steps of a training.
SHORT_OF = {"steps": "src.tasks.merge.config.Merge"}


def options(group: str, conf: Path = CONF) -> list[str]:
    """Names that `group=` accepts."""
    return sorted(file.stem for file in (conf / group).glob("*.yaml"))


def tasks_with(key: str, conf: Path = CONF) -> list[str]:
    """Options of the group task that have this key."""
    pattern = re.compile(rf"^{re.escape(key)}:", re.MULTILINE)
    return [name for name in options("task", conf) if pattern.search((conf / "task" / f"{name}.yaml").read_text())]
