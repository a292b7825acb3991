"""Where `hf:` leads: a folder on this machine, or a repository of the hub that becomes one, its revision pinned.

huggingface_hub keeps its own house: token, cache, offline mode and endpoint come from its environment variables, and an
interrupted download goes on with the files that are not whole yet.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from src.errors import CheckpointError, some
from src.hugging_face.archive import CONVERSION, INDEX, SINGLE, shard_names

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
# What describes a model and its tokenizer; weights are named by the index. Folders inside hold other formats.
SMALL = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja")
LEGAL = ("README.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
INSIDE = "*/*"


@dataclass(frozen=True)
class Fetched:
    """A folder with all files that were asked for."""

    source: str  # as typed, after `hf:`
    folder: str
    revision: str | None  # a commit of the hub; None: a local folder

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def is_local(source: str) -> bool:
    """A folder that is there, or a path by its looks; a folder wins over a repository of the same name."""
    return source.startswith(("/", ".", "~")) or Path(source).is_dir()


def fetch(source: str, *, weights: bool) -> Fetched:
    """The folder of `source`, downloaded if need be: config and tokenizer, and with `weights` everything.

    CheckpointError when there is no such folder, repository or revision, or no way to it.
    """
    if is_local(source):
        folder = Path(source).expanduser().absolute()
        if not folder.is_dir():
            raise CheckpointError(f"hf:{source}: no such folder")
        return Fetched(source, str(folder), None)
    if not HUB_NAME.fullmatch(source):
        raise CheckpointError(
            f"hf:{source}: neither a folder nor <owner>/<name> or <owner>/<name>@<revision> of the hub"
        )
    repository, _, revision = source.partition("@")
    folder = _download(source, repository, revision or "main", [*SMALL, *LEGAL])
    # From here on the commit is pinned: the files of one revision belong together.
    if weights:
        names = shard_names(folder) if (folder / INDEX).is_file() else [SINGLE]
        folder = _download(source, repository, folder.name, [*SMALL, *LEGAL, *names])
        if not all((folder / name).is_file() for name in names):
            raise CheckpointError(f"hf:{source}: has no {some(names)}. {_what_there_is(repository, folder.name)}")
    return Fetched(source, str(folder), folder.name)


def _download(source: str, repository: str, revision: str, patterns: Sequence[str]) -> Path:
    """The snapshot's folder, named by its commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        found = snapshot_download(
            repository, revision=revision, allow_patterns=list(patterns), ignore_patterns=[INSIDE]
        )
    except GatedRepoError as error:
        raise CheckpointError(f"hf:{source}: asks for an agreement; accept it on its page, and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"hf:{source}: no folder here, and no such repository of the hub, or a private one; then set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"hf:{source}: has no revision {revision}") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"hf:{source}: no folder here; the hub cannot be reached, or HF_HUB_OFFLINE=1, and its cache has no such "
            "snapshot"
        ) from error
    except Exception as error:  # the library lets through what its transport raises; each means no download
        raise CheckpointError(
            f"hf:{source}: cannot be downloaded ({type(error).__name__}: {error}); the same "
            "command goes on with the files that miss"
        ) from error
    return Path(found)


def _what_there_is(repository: str, revision: str) -> str:
    """For a repository without safetensors."""
    from huggingface_hub import list_repo_files

    try:
        names = list_repo_files(repository, revision=revision)
    except Exception:  # noqa: BLE001  (only to say more; the transport has errors of its own)
        return CONVERSION
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    return f"It has {some(pickles)}; {CONVERSION}" if pickles else f"It has {some(names)}"
