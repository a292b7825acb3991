"""`folder=<run>` alone, or with keys that may change in a run: the run goes on as it was, from its own config.yaml.

As soon as a key is typed that decides numbers the command line is a whole question again, which a folder that holds
another run refuses.
"""

import sys
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path

from src.config.groups import SECTIONS
from src.config.tree import SITE, Tree, read
from src.launch.auto_cadence import saved_in_time
from src.launch.auto_layout import decided
from src.runs.folder import may_change
from src.tasks import source
from src.tasks.inherit import take


def completed(tree: Tree, typed: Mapping[str, str]) -> Tree:
    """`src.tasks.source.completed` and what parallel=auto stands for, but for a run that shall go on as it was; and
    what checkpoint.every=auto stands for.

    ConfigError, CheckpointError, PlanError.
    """
    recorded = _recorded(tree, typed)
    if recorded is None:
        return saved_in_time(decided(source.completed(tree, typed), typed))
    changes = [f"{key}={text}" for key, text in typed.items() if key not in ("folder", "dry_run")]
    told = f", with {' '.join(changes)}" if changes else ""
    print(f"as {tree['folder']} was{told}", file=sys.stderr)
    return saved_in_time(overlaid(recorded, tree, typed))


def _recorded(tree: Tree, typed: Mapping[str, str]) -> Tree | None:
    """The config of the run in `folder`, if the command line asks for no other."""
    if not isinstance(tree.get("folder"), str) or not typed.get("folder"):
        return None
    config = Path(tree["folder"]).expanduser() / "config.yaml"
    if not config.is_file() or not all(key.partition(".")[0] in SITE or may_change(key) for key in typed):
        return None
    return read(config)


def overlaid(recorded: Tree, tree: Tree, typed: Mapping[str, str]) -> Tree:
    """The recorded config with the groups and the keys that were typed, as `tree` has them."""
    found = deepcopy(recorded) | {"dry_run": tree["dry_run"], "folder": tree["folder"]}
    if "root" not in typed and (root := Path(tree["folder"]).expanduser().absolute().parent / "cache").is_dir():
        found["root"] = str(root.parent)  # its own, from whichever place the command is typed
    groups = [key for key in typed if key in SECTIONS]
    for key in [*groups, *(key for key in typed if key not in groups and key.partition(".")[0] not in groups)]:
        take(key, tree, found)
    return found
