"""URL of a submitted run at Weights & Biases, known on the login node without importing wandb or asking its server."""

import netrc
import os
from pathlib import Path
from urllib.parse import urlsplit

from src.config import tree as trees
from src.metrics.trackers.weights_and_biases import run_id

_SERVER = "https://api.wandb.ai"


def wandb_address(folder: Path) -> str:
    """The page that the run of this folder will have, or "offline"; "not used" where its config has no wandb."""
    section = trees.read(folder / "config.yaml")["tracker"]["wandb"]
    if section is None:
        return "not used"
    server = os.environ.get("WANDB_BASE_URL", _SERVER).rstrip("/")
    mode = section["mode"] or os.environ.get("WANDB_MODE", "online")
    if mode != "online" or not _has_key(server):
        return "offline"
    page = server.replace("//api.", "//", 1)
    entity = section["entity"] or os.environ.get("WANDB_ENTITY")
    project = section["project"] or os.environ.get("WANDB_PROJECT", "uncategorized")
    if entity is None:  # the key's own, which only the server knows
        return f"{page}, run {run_id(folder)} of project {project}"
    return f"{page}/{entity}/{project}/runs/{run_id(folder)}"


def _has_key(server: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(urlsplit(server).netloc) is not None
    except (OSError, netrc.NetrcParseError):
        return False
