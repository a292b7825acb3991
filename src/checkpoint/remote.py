"""Checkpoints at a URL: whole step folders as they lie in a run folder, copied file by file, COMPLETE.json last.

Nothing is written there but copies of complete local checkpoints, and nothing is read from there but into a local
folder, against the sizes and checksums that COMPLETE.json has had since the save.
"""

from collections.abc import Callable, Container, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from src.checkpoint.folder import (
    MARKER,
    CheckpointFile,
    Marker,
    best,
    expendable,
    fault,
    marker_of,
    read_marker,
    step_folder,
    step_of,
)
from src.errors import CheckpointError, RemoteError, some
from src.storage.json_lines import facts_in
from src.storage.remote import RemoteFolder, below, patiently

MIRROR = "checkpoint.mirror"
HOME = "checkpoints"  # in a run's folder, here and there
TOKENIZERS = ("cache", "tokenizers")  # of a root, here and there
AT_ONCE = 8  # files of one checkpoint on their way; a connection to an object store carries some 100 MB/s


def mirror_url(root: str, run: Path) -> str:
    """Where the run in this folder has its mirror: a folder of the same name."""
    return below(root, run.name)


def tokenizers_of(run: Path) -> list[str]:
    """Names of the stored tokenizers that the recipes of a run folder name."""
    names = {facts_in(each).get("tokenizer") for each in run.glob("data*.json")}
    return sorted(name for name in names if isinstance(name, str) and Path(name).name == name)


class RemoteCheckpoints:
    """The step folders in a folder at a URL. RemoteError from every method, after some tries; one thread at a time."""

    def __init__(self, folder: RemoteFolder, *, tries: int = 5) -> None:
        self.folder, self._tries = folder, tries
        self._sent: set[tuple[str, str]] = set()  # name and checksum of files that this process has sent
        self._known: dict[int, Marker] = {}  # whole when they were last looked at

    def steps(self) -> list[int]:
        """Of all step folders, whole or not, in order."""
        names = patiently(self.folder.names, tries=self._tries)
        return sorted(step for step in (step_of(Path(name)) for name in names) if step is not None)

    def marker(self, step: int) -> Marker | None:
        """What a whole checkpoint says of itself; None where its marker is missing or torn, or a file has another size
        than it says.
        """
        name = _name(step)
        try:
            marker = marker_of(patiently(lambda: self.folder.read(f"{name}/{MARKER}"), tries=self._tries))
        except (FileNotFoundError, ValueError):
            return None
        sizes = patiently(lambda: self.folder.sizes(name), tries=self._tries)
        whole = all(sizes.get(each) == file.bytes for each, file in marker.files.items())
        return marker if whole and marker.step == step else None

    def newest(self, but: Container[int] = ()) -> Marker | None:
        """The newest whole one, leaving out some steps."""
        steps = (step for step in reversed(self.steps()) if step not in but)
        return next((marker for step in steps if (marker := self.marker(step)) is not None), None)

    def send(self, path: Path) -> int:
        """Copy a complete checkpoint there, unless it is there already; the bytes that went. What this object has sent
        before it failed is not sent again.

        CheckpointError or FileNotFoundError where the local one is gone, or going.
        """
        marker, name = read_marker(path), path.name
        step = marker.step
        if self._known.get(step) == marker or self.marker(step) == marker:
            self._known[step] = marker
            return 0
        self._known.pop(step, None)
        self._attempt(partial(self.folder.remove, f"{name}/{MARKER}"))  # one of the same step that is to be replaced
        going = {each: file for each, file in marker.files.items() if (f"{name}/{each}", file.crc32) not in self._sent}
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="mirror") as pool:
            for each in [pool.submit(self._send, path, file, going[file]) for file in going]:
                each.result()
        sizes = patiently(lambda: self.folder.sizes(name), tries=self._tries)
        wrong = [each for each, file in marker.files.items() if sizes.get(each) != file.bytes]
        if wrong:
            self._sent -= {(f"{name}/{each}", marker.files[each].crc32) for each in wrong}
            raise RemoteError(f"{self.folder.url}/{name}: {some(wrong)} did not arrive whole")
        self._attempt(partial(self.folder.send, path / MARKER, f"{name}/{MARKER}"))
        self._known[step] = marker
        self._sent -= {(f"{name}/{each}", file.crc32) for each, file in marker.files.items()}
        return sum(file.bytes for file in going.values())

    def fetch(self, marker: Marker, names: Iterable[str], into: Path) -> None:
        """Copy files of a whole checkpoint into a folder here. CheckpointError where one is not what was saved."""
        name, asked = _name(marker.step), list(names)
        if astray := [each for each in asked if Path(each).name != each]:
            raise CheckpointError(f"{self.folder.url}/{name}: its {MARKER} leads out of its folder, to {some(astray)}")

        def one(file: str) -> str | None:
            patiently(lambda: self.folder.fetch(f"{name}/{file}", into / file), tries=self._tries)
            return fault(into / file, marker.files[file], "full")

        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="mirror") as pool:
            faults = [each for each in pool.map(one, asked) if each is not None]
        if faults:
            raise CheckpointError(f"fetched from {self.folder.url}/{name}: {each}" for each in faults)

    def faults(self, step: int, *, full: bool) -> list[str]:
        """What is wrong with one: none where it is whole. `full`: reads every byte, by way of a folder here."""
        name = _name(step)
        if (marker := self.marker(step)) is None:
            return [f"{self.folder.url}/{name}: no {MARKER}, or a file has another size than it says"]
        found: list[str] = []
        for file in marker.files if full else ():
            with TemporaryDirectory() as place:
                try:
                    self.fetch(marker, [file], Path(place))
                except CheckpointError as error:
                    found += error.problems
        return found

    def prune(self, keep: int | None, keep_every: int | None, keep_best: int | None) -> None:
        """Remove those that no rule keeps, as a run does with its own, and what was left half-sent before the newest;
        the marker goes first.
        """
        steps = self.steps()
        for step in (each for each in steps if each not in self._known):
            if (marker := self.marker(step)) is not None:
                self._known[step] = marker
        found = [Path(_name(step)) for step in steps if step in self._known]
        kept = best(found, keep_best, read=lambda path: self._known[step_of(path) or 0])
        going = expendable(found, keep, keep_every, protected=kept)
        half = [step for step in steps if step not in self._known and found and step < (step_of(found[-1]) or 0)]
        for name in [*(each.name for each in going), *map(_name, half)]:
            self._attempt(partial(self.folder.remove, f"{name}/{MARKER}"))
            self._attempt(partial(self.folder.remove, name))
            self._known.pop(step_of(Path(name)) or 0, None)

    def _send(self, path: Path, name: str, file: CheckpointFile) -> None:
        self._attempt(partial(self.folder.send, path / name, f"{path.name}/{name}"))
        self._sent.add((f"{path.name}/{name}", file.crc32))

    def _attempt(self, action: Callable[[], None]) -> None:
        patiently(action, tries=self._tries)


def _name(step: int) -> str:
    return step_folder(Path(), step).name
