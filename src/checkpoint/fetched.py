"""A run at a URL as a run folder here: what `checkpoint.initial=`, `from=` and `run=` read where they name one.

The folder lies in the cache of the root, under a hash of the URL, and looks as the run's own does: config.yaml,
checkpoints/, and beside it cache/tokenizers. A step that is there, and the same, is not fetched again.
"""

import hashlib
import shutil
import uuid
from contextlib import suppress
from functools import partial
from pathlib import Path

from src.checkpoint import folder as files
from src.checkpoint.folder import Marker, step_folder, step_of
from src.checkpoint.remote import HOME, TOKENIZERS, RemoteCheckpoints, tokenizers_of
from src.errors import CheckpointError, some
from src.storage.remote import RemoteFolder, below, is_url, patiently
from src.storage.streams import to_stderr

RECORDS = ("config.yaml", "plan.json")


def cached(url: str, cache: Path) -> Path:
    """The folder that stands for a URL, whether it is there yet: a run's, or a step's in it."""
    home, step = _parted(url)
    name = home.rpartition("/")[2]
    run = cache / "remote" / hashlib.sha256(home.encode()).hexdigest()[:12] / name
    return run if step is None else step_folder(run / HOME, step)


def fetch(url: str, cache: Path, key: str, step: int | None = None) -> Path:
    """The step folder, here: of the URL of a step folder, or of a step or the newest whole one of a run or of its
    folder of checkpoints. Told on stderr where bytes have to travel.

    RemoteError, and CheckpointError where it is none or arrives otherwise than it was saved. `key`: of the config.
    """
    home, named = _parted(url)
    run = cached(home, cache)
    remote, marker = _found(home, key, named if step is None else step)
    path = step_folder(run / HOME, marker.step)
    if remote.folder.url != home:
        _fetch_beside(RemoteFolder(home, key), run)
    if files.is_complete(path):
        with suppress(CheckpointError):
            if files.read_marker(path) == marker:
                return path
        files.remove(path)
    to_stderr([f"{key}={url}: fetches {path.name}, {marker.bytes:,} bytes, into {path}"])
    draft = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}")  # several launchers may want it
    draft.mkdir(parents=True)
    try:
        remote.fetch(marker, marker.files, draft)
        files.write_marker(draft, marker)
        files.publish(draft, path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return path


def opened(url: str, key: str) -> tuple[RemoteCheckpoints, list[int]]:
    """The checkpoints that a URL names, as `fetch` takes it, and their steps, whole or not. CheckpointError where there
    are none.
    """
    home, named = _parted(url)
    for place in (below(home, HOME), home):
        remote = RemoteCheckpoints(RemoteFolder(place, key))
        if steps := [step for step in remote.steps() if named in (None, step)]:
            return remote, steps
    inside = [each for each in patiently(RemoteFolder(home, key).names) if each != "cache"]
    held = f"; it holds {some(inside)}: add one of these" if inside else ""
    raise CheckpointError(f"{key}={url}: neither a folder step_XXXXXXXX nor a run folder with checkpoints{held}")


def _parted(url: str) -> tuple[str, int | None]:
    """The URL of the run, and the step that its end names."""
    assert is_url(url), f"{url} is no URL"
    home, _, last = url.rstrip("/").rpartition("/")
    step = step_of(Path(last))
    if step is None:
        home = url.rstrip("/")
    return home.removesuffix(f"/{HOME}"), step


def _found(home: str, key: str, step: int | None) -> tuple[RemoteCheckpoints, Marker]:
    remote, steps = opened(home, key)
    marker = remote.newest() if step is None else remote.marker(step)
    if marker is None:
        which = "" if step is None else f" of step {step}"
        raise CheckpointError(
            f"{key}={home}: no whole checkpoint{which} there; its steps: {', '.join(map(str, steps))}"
        )
    return remote, marker


def _fetch_beside(home: RemoteFolder, run: Path) -> None:
    """The run's records, and the tokenizers that they name."""
    run.mkdir(parents=True, exist_ok=True)
    there = patiently(home.names)
    recipes = [name for name in there if name.startswith("data") and name.endswith(".json")]
    for name in (each for each in (*RECORDS, *recipes) if each in there):
        patiently(partial(home.fetch, name, run / name))
    root = RemoteFolder(home.url.rpartition("/")[0])
    for name in tokenizers_of(run):
        place, here = "/".join((*TOKENIZERS, name)), run.parent.joinpath(*TOKENIZERS, name)
        for file in patiently(partial(root.sizes, place)):
            here.mkdir(parents=True, exist_ok=True)
            patiently(partial(root.fetch, f"{place}/{file}", here / file))
