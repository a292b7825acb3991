"""Saves and loads of one run: all ranks write their shards, rank 0 declares the folder complete."""

import json
import logging
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from operator import or_
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.storage import WriteResult

from src.checkpoint import folder as files
from src.checkpoint.background import BackgroundTask
from src.checkpoint.config import Checkpoint
from src.checkpoint.folder import VALUES, CheckpointFile, Marker
from src.checkpoint.host_group import HostGroup
from src.checkpoint.metadata import PatientReader, RestrictedReader, narrowed, read_tensors, wants_of
from src.checkpoint.mirror import Mirror
from src.checkpoint.state import (
    Fitting,
    Flat,
    Snapshot,
    difference,
    fill,
    flatten,
    merge,
    refuse_unlike,
    shared_shards,
    to_json,
    unlike,
)
from src.checkpoint.writer import CheckpointWriter, SavePlans, WrittenFiles, in_words
from src.errors import CheckpointError, DiskFaultError, DiskFullError
from src.storage.patience import Patience

T = TypeVar("T")

log = logging.getLogger(__name__)

# A save that is still in flight so long after the next one is due hangs, and is not merely slow.
HANGS_SECONDS = 60.0


@dataclass(frozen=True)
class SavedCheckpoint:
    """Result of a finished save: its size, and the seconds that it took from training."""

    step: int
    path: Path
    stall_seconds: float  # training waited in save(): for the save before, and for the copy to the host
    write_seconds: float  # until COMPLETE.json was in place
    bytes: int  # of all ranks
    faults: int = 0  # of file systems that all ranks have waited out in this attempt
    waited_seconds: float = 0.0  # by the rank that waited longest for them


@dataclass
class _Write:
    """A save on its way to the disk."""

    step: int
    snapshot: Snapshot
    values: str
    facts: dict[str, Any]
    began: float  # time.perf_counter() at the call of save()
    stall_seconds: float | None = None  # None: training waits until the end


class Store:
    """The checkpoints of one run. Every method is collective: all ranks call it or none does.

    Failures of a save in the background are raised by the next call; the checkpoints before it stay as they are. One
    that a passing fault of the disk has ended is told by `lost`, and only a second one in a row is raised.
    """

    def __init__(
        self,
        folder: Path,
        options: Checkpoint,
        *,
        writer: str = "",
        patience: Patience | None = None,
        mirror: Mirror | None = None,
    ) -> None:
        """`writer`: a name for this one where others may write here at the same time: replica groups that lost sight
        of each other may both save, even the same step. Each writes under a name of its own, and the first one that is
        complete stands. `patience`: for faults that pass, with those of other rooms counted in it. `mirror`: of
        rank 0, who is told of each save.
        """
        self.folder, self._mirror = folder, mirror
        self._writer = writer
        self.options = options
        self.last: SavedCheckpoint | None = None  # the last save that was finished
        self.lost: DiskFaultError | None = None  # why the newest save is not there
        self._patience = patience or Patience()
        self._team = HostGroup()
        self._plans = SavePlans(self._team)
        self._aside = BackgroundTask("checkpoint")
        self._loaded: Path | None = None
        self._sound: set[Path] = set()  # written or wholly verified by this process
        self._on_rank_zero(lambda: files.clean(folder, writer))

    def save(self, step: int, state: dict[str, Any], facts: dict[str, Any], *, wait: bool = False) -> None:
        """Write `state` as the checkpoint of `step`; when it returns, the state may change.

        Plain tensors and values must be equal on all ranks that have them. With `wait`, or without
        `checkpoint.asynchronous`, the checkpoint is complete on return. `facts` go into COMPLETE.json.
        """
        began = time.perf_counter()
        self._settle()
        background = self.options.asynchronous and not wait
        flat = flatten(state)
        snapshot = Snapshot(flat.tensors, coordinator=self._team.rank == 0, copy=background)
        job = _Write(step, snapshot, to_json(flat.values), json.loads(json.dumps(facts)), began)
        if not background:
            self._write(job)
            return
        job.stall_seconds = time.perf_counter() - began
        self._aside.start(lambda: self._write(job))

    def finish(self) -> None:
        """Wait until nothing is in flight; raises what went wrong with the last save."""
        self._aside.finish()

    def _settle(self) -> None:
        """The same where others follow: a first failure that may pass is `lost`."""
        try:
            self._aside.finish()
        except DiskFaultError as error:  # on all ranks alike
            if self.lost is not None:
                raise
            self.lost = error

    @property
    def failed(self) -> bool:
        """Whether a save in the background has failed, as far as this rank knows by now, and the next would as well."""
        failure = self._aside.failure
        return failure is not None and not isinstance(failure, DiskFaultError)

    def busy(self, seconds: float = HANGS_SECONDS) -> bool:
        """Not collective. Whether a save is still in flight on this rank after so many seconds of waiting for it."""
        return self._aside.busy(seconds)

    def newest(self) -> Path | None:
        """The newest complete checkpoint of this run."""
        self._settle()
        found = self._on_rank_zero(lambda: files.complete(self.folder))
        return found[-1] if found else None

    def before(self, step: int) -> Path | None:
        """The newest complete checkpoint of this run of fewer steps."""
        self._settle()
        found = self._on_rank_zero(lambda: files.complete(self.folder))
        older = [path for path in found if (files.step_of(path) or 0) < step]
        return older[-1] if older else None

    def origin(self) -> Path | None:
        """What this run starts from: `newest()`, else `checkpoint.initial`, else None."""
        self.finish()
        return self._on_rank_zero(lambda: self.options.origin(self.folder))

    def shared(self, of_rank_zero: Callable[[], T]) -> T:
        """What rank 0 alone can read."""
        return self._on_rank_zero(of_rank_zero)

    def load(
        self, path: Path, state: dict[str, Any], *, optional: Collection[str] = (), rounds: bool = False
    ) -> dict[str, Any]:
        """Fill the tensors of `state` in place, on whatever mesh they are, and return its tree with the saved values.

        Nothing is touched before the files are verified and every name, shape and dtype fits. Top-level entries that
        `state` leaves out are not read: {"model": ...} loads the weights alone. Of those that are `optional`, what the
        checkpoint has no value of is left out of the tree. `rounds`: what was saved in another floating dtype is
        rounded to that of `state` as it is read; false: it is refused.
        """
        self.finish()
        self._verify(path)
        values: dict[str, Any] = self._on_rank_zero(lambda: json.loads((path / VALUES).read_text()))
        there = {name.partition(".")[0] for name in values}
        state = {key: child for key, child in state.items() if key in there or key not in optional}
        flat = flatten(state)
        reader = self._check_fit(path, flat, values, rounds=rounds)
        self._read_tensors(path, flat.tensors, reader)
        if path.resolve().parent == self.folder.resolve():
            self._loaded = self.folder / path.name
            if self.options.verify == "full":
                self._sound.add(self._loaded)
        return fill(state, values)

    def load_fitting(
        self, path: Path, required: dict[str, Any], optional: dict[str, dict[str, Tensor]]
    ) -> tuple[dict[str, Any], set[str]]:
        """Fill the tensors of `required`, and of `optional` each entry whose tensors are all there in their shapes;
        other dtypes are converted. An entry is one parameter's, {"optimizer.norm.weight": {"step": t, "exp_avg": t}}.

        Returns the saved values, and the entries that some rank filled. CheckpointError, with nothing touched, where a
        required tensor is missing or has another shape.
        """
        self.finish()
        self._verify(path)
        values: dict[str, Any] = self._on_rank_zero(lambda: json.loads((path / VALUES).read_text()))
        wanted = flatten(required).tensors
        entries = {name: flatten({name: tensors}).tensors for name, tensors in optional.items()}
        reader = self._reader(path, wanted | {name: each for part in entries.values() for name, each in part.items()})
        saved = reader.read_metadata()
        misfits = self._team.joined(lambda: unlike(wanted, saved), or_)
        self._team.on_rank_zero(lambda: refuse_unlike(path, misfits or set()))
        mine = {name for name, tensors in entries.items() if not unlike(tensors, saved)}
        tensors = wanted | {name: tensor for part in sorted(mine) for name, tensor in entries[part].items()}
        self._read_tensors(path, tensors, reader)
        everywhere = self._team.joined(lambda: mine, or_)
        return values, self._team.on_rank_zero(lambda: everywhere or set())

    def _on_rank_zero(self, action: Callable[[], T]) -> T:
        """Collective. What may be done twice, with patience."""
        return self._team.on_rank_zero(lambda: self._patience(action, self.folder))

    # Saving: on the thread, or on the caller's when it waits.

    def _write(self, job: _Write) -> None:
        path = files.step_folder(self.folder, job.step)
        texts = self._team.joined(lambda: {job.values: None}, or_)  # of ranks that say the same, one goes on
        values = self._team.on_rank_zero(lambda: merge(list(texts or {})))
        try:
            self._write_cleanly(path, job, values)
        except DiskFullError:
            if not self._on_rank_zero(lambda: self._make_room(path)):
                raise
            self._write_cleanly(path, job, values)
        self.lost = None

    def _write_cleanly(self, path: Path, job: _Write, values: str) -> None:
        """Nothing where it is there already."""
        try:
            if self._on_rank_zero(lambda: self._open(path)):
                self._write_files(path, job, values)
        except (CheckpointError, DiskFullError, DiskFaultError):
            # A full disk must not stay full of half a checkpoint.
            with suppress(CheckpointError, DiskFullError, DiskFaultError):
                self._on_rank_zero(lambda: files.clean(self.folder, self._writer))
            raise

    def _make_room(self, path: Path) -> bool:
        """Rank 0: what is surplus once this save is done goes before it; false where that is nothing."""
        found, keep = files.complete(self.folder), self.options.keep
        protected = [each for each in (*found[-1:], self._loaded) if each is not None]
        protected += [*files.best(found, self.options.keep_best), *self._copying()]
        surplus = files.expendable(found, keep and keep - 1, self.options.keep_every, protected=protected)
        for old in surplus:
            log.warning("%s: the disk is full; %s goes before the save", path, old.name)
            files.remove(old)
        return bool(surplus)

    def _write_files(self, path: Path, job: _Write, values: str) -> None:
        place = files.draft(path, self._writer)
        writer = self._write_tensors(place, job.snapshot)
        told = self._team.joined(lambda: self._seal(place, writer, values), WrittenFiles.joined)
        written = told or WrittenFiles({}, 0, 0.0)  # on the others, who have no use for it
        marker = Marker(job.step, str(torch.__version__), job.facts, written.files)
        size, faults, waited = self._on_rank_zero(lambda: self._close(path, marker, written))
        self._sound.add(path)
        seconds = time.perf_counter() - job.began
        self.last = SavedCheckpoint(
            job.step,
            path,
            seconds if job.stall_seconds is None else job.stall_seconds,
            seconds,
            size,
            faults,
            waited,
        )

    def _open(self, path: Path) -> bool:
        """Rank 0: an empty folder to write to; False when this step is there already, known to be sound, or saved by
        another writer.
        """
        files.clean(self.folder, self._writer)
        if files.is_complete(path):
            if path in self._sound or self._writer:
                return False
            path.rename(path.with_name(path.name + files.ASIDE))
        files.draft(path, self._writer).mkdir()
        return True

    def _write_tensors(self, path: Path, snapshot: Snapshot) -> CheckpointWriter:
        """Collective. The steps of torch's `save`, with a plan that is kept and results that go to rank 0 alone."""
        # Reading ahead is for tensors on a GPU; from the thread it would open a context on GPU 0.
        ahead_bytes = 0 if snapshot.copied else 10_000_000
        options = {"sync_files": True, "per_thread_copy_ahead": ahead_bytes}
        writer = CheckpointWriter(path, snapshot.bytes, self._patience, **options)
        writer.set_up_storage_writer(self._team.rank == 0)
        plan = self._plans.agree(snapshot, writer)

        def write() -> list[WriteResult]:
            with in_words(f"{path}: cannot be written", self._team.rank):
                written = writer.write_data(plan, snapshot)
                written.wait()
                return written.value()

        self._plans.finish(self._team.on_all(write), writer)
        return writer

    def _seal(self, path: Path, writer: CheckpointWriter, values: str) -> WrittenFiles:
        """What this rank has written; rank 0 writes the small values of all."""
        written = dict(writer.written)
        if self._team.rank == 0:
            self._patience(lambda: files.write_durably(path / VALUES, values), path)
            written[VALUES] = files.of_text(values)
        return WrittenFiles(written, self._patience.faults, self._patience.seconds)

    def _close(self, path: Path, marker: Marker, written: WrittenFiles) -> tuple[int, int, float]:
        """Rank 0: declare the folder complete, then remove what is not kept. Returns bytes of all files, faults and
        the seconds waited for them.
        """
        place = files.draft(path, self._writer)
        files.write_marker(place, marker)
        if place != path:
            files.publish(place, path)
        protected = [path] if self._loaded is None else [path, self._loaded]
        found = files.complete(self.folder)
        protected += [*files.best(found, self.options.keep_best), *self._copying()]
        try:
            files.clean(self.folder, self._writer)
            for old in files.expendable(found, self.options.keep, self.options.keep_every, protected=protected):
                files.remove(old)
        except OSError as error:  # no reason to stop training: the new checkpoint is there
            log.warning("%s: old checkpoints cannot be removed: %s", self.folder, error)
        if self._mirror is not None:
            self._mirror.wake()
        return marker.bytes, written.faults, written.waited_seconds

    def _copying(self) -> list[Path]:
        """Rank 0: what somebody else is reading."""
        return [] if self._mirror is None else self._mirror.holds()

    # Loading

    def _verify(self, path: Path) -> None:
        """Each rank checks its share of the files; whatever is wrong, an older checkpoint is offered."""
        try:
            shares: list[dict[str, CheckpointFile]] = []
            self._on_rank_zero(lambda: shares.extend(self._shares(files.read_marker(path))))
            mine = self._team.spread(shares or None)
            self._team.on_all(lambda: self._check_files(path, mine))
        except CheckpointError as error:
            raise CheckpointError([*error.problems, self._team.on_rank_zero(lambda: self._way_out(path))]) from None

    def _shares(self, marker: Marker) -> list[dict[str, CheckpointFile]]:
        """By rank, the files that it checks."""
        by_size, world = sorted(marker.files, key=lambda name: (-marker.files[name].bytes, name)), self._team.world
        return [{name: marker.files[name] for name in by_size[rank::world]} for rank in range(world)]

    def _check_files(self, path: Path, expected: dict[str, CheckpointFile]) -> None:
        verify = self.options.verify
        faults = [self._patience(partial(files.fault, path / name, file, verify)) for name, file in expected.items()]
        problems = [fault for fault in faults if fault is not None]
        if problems:
            raise CheckpointError(problems)

    def _way_out(self, path: Path) -> str:
        found = files.complete(path.parent)
        older = [one for one in found if (files.step_of(one) or 0) < (files.step_of(path) or 0)]
        if not older:
            return f"there is no older complete checkpoint in {path.parent}"
        offer = f"the next older complete checkpoint is {older[-1]}"
        if path.parent.resolve() != self.folder.resolve():
            return f"{offer}: set checkpoint.initial={older[-1]}"
        return f"{offer}: to resume from it, `mv {path} {path}.bad` and run the same command again"

    def _check_fit(self, path: Path, flat: Flat, values: dict[str, Any], *, rounds: bool) -> FileSystemReader:
        reader = self._reader(path, flat.tensors)
        look = lambda: difference(flat, reader.read_metadata(), values, rounds=rounds)  # noqa: E731
        found = self._team.joined(look, Fitting.joined)
        self._team.on_rank_zero(lambda: None if found is None else found.check(path))
        return reader

    def _reader(self, path: Path, tensors: dict[str, Tensor]) -> FileSystemReader:
        """Collective. It knows of the metadata, which one rank of a node reads, what is about this rank's `tensors`."""
        reader = (PatientReader if self.options.trusted else RestrictedReader)(path, self._patience)
        asked = lambda: wants_of(tensors)  # noqa: E731
        reader.known = self._team.of_node(asked, lambda all_wants: narrowed(reader.read_metadata(), all_wants))
        return reader

    def _read_tensors(self, path: Path, tensors: dict[str, Tensor], reader: FileSystemReader) -> None:
        """Each replica reads its share of the shards that all have, and tells it the others."""
        shared = shared_shards(tensors)
        mine = {name: each for name, each in tensors.items() if name not in shared or shared[name].read_here}
        self._team.on_all(lambda: read_tensors(path, mine, reader, self._team.rank))
        for each in shared.values():
            each.tell()
