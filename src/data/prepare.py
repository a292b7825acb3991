"""Tokenizes text into shards: once for each content and tokenizer, in parallel, resumable.

Any number of preparers may work on one folder, on one machine or several: each takes pieces that nobody has
(src/data/preparing/claims.py), and all of them return when the last piece is done.
"""

import multiprocessing
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

from src.data.config import Data
from src.data.corpus import Corpus, Part, survey
from src.data.fingerprint import fingerprint
from src.data.mapped.open_maps import OpenMaps
from src.data.mapped.piece_table import SPLITS, Shard, shard_name
from src.data.preparing.claims import claimed
from src.data.preparing.progress import Progress, bar, quiet
from src.data.shards import FORMAT, ShardWriter, finished, write_index, write_record
from src.data.sources import DataSource, HoldOut, Piece, SkippedRows, Source, divided
from src.data.token_files.config import TokenFileSource
from src.data.token_files.streams import index_token_files, open_streams
from src.data.tokenizer import Tokenizer, TokenizerConfig
from src.errors import DataError, DiskFullError

DOCUMENTS_PER_BATCH = 256
LOOK_SECONDS = 1.0  # between two looks at a signal, and at what others have done

Stopped = Callable[[], bool]  # whether somebody has asked to end


class PreparationStoppedError(Exception):
    """Somebody asked to end; what is done stays, and the next preparer goes on."""


def never() -> bool:
    """Of a preparation that nobody stops but by ending its process."""
    return False


def prepare(
    data: Data,
    tokenizer: TokenizerConfig,
    cache: Path,
    *,
    progress: bool | Progress,
    verify: bool = True,
    stopped: Stopped = never,
    commits: Mapping[str, str] | None = None,
) -> Corpus:
    """The tokenised corpus, made first where `cache` lacks it. DataError when text, tokenizer or shards are no good.

    Safe to call from several processes and hosts at once: they share the pieces of work. `verify` reads every shard's
    checksum, which a rank may leave to the process that started it. PreparationStoppedError soon after `stopped`.
    `commits`: of datasets of the hub, by source, that a run has begun with; None: of a new one.
    """
    shown = (bar if progress else quiet) if isinstance(progress, bool) else progress
    began = time.perf_counter()
    cache = cache.resolve()
    named, data = data, data.pinned(cache, commits)
    opened = tokenizer.open(cache, data)
    if problems := row_problems(opened, data):
        raise DataError(problems)
    cached = True
    parts, maps = [], OpenMaps()
    for name, (weight, source) in data.parts().items():
        if isinstance(source, TokenFileSource):
            folder = index_token_files(source, opened, data.validation_fraction, cache)
        else:
            assert isinstance(source, Source), "a source of neither text nor tokens"
            folder, made = _shards_of(name, source, opened, cache, data, shown, stopped)
            cached = cached and not made
        parts.append(Part(name, weight, open_streams(folder, maps), source.commit))
        parts[-1].shards.check_sizes()
    rules = data.row_rules(opened.bos_id, opened.eos_id)
    facts = survey(parts, time.perf_counter() - began, cached=cached, cut=data.hold_out == "ends")
    corpus = Corpus(parts, opened, replace(facts, notes=(*data.branches(named), *facts.notes)), rules)
    if empty := [_nothing(part, data.parts()[part.name][1]) for part in parts if not _documents(part)]:
        raise DataError(empty)
    if verify:
        corpus.verify()
    return corpus


def row_problems(tokenizer: Tokenizer, data: Data) -> list[str]:
    """Marks that rows need and the tokenizer has not."""
    found = []
    if data.packing == "best_fit" and tokenizer.eos_id is None:
        found.append("data.packing=best_fit needs a tokenizer with an end of document: name one by tokenizer.eos")
    if data.bos_at_row_start and tokenizer.bos_id is None:
        found.append("data.bos_at_row_start=true needs a tokenizer with a begin of document: name one by tokenizer.bos")
    return found


def _shards_of(
    name: str, source: Source, tokenizer: Tokenizer, cache: Path, data: Data, shown: Progress, stopped: Stopped
) -> tuple[Path, bool]:
    """The folder of a source's shards, and whether they had to be made."""
    folder = cache / "tokens" / _key(source, tokenizer, data, cache)
    if (folder / "index.json").is_file():
        return folder, False
    try:
        _tokenise(name, source, tokenizer, folder, data, shown, stopped)
    except DiskFullError:
        raise
    except OSError as error:  # sources turn theirs into DataErrors: this one is of the cache
        raise DataError(f"{folder}: cannot be written: {error.strerror or error}") from error
    return folder, True


def _key(source: Source, tokenizer: Tokenizer, data: Data, cache: Path) -> str:
    return fingerprint(FORMAT, source.fingerprint(cache), tokenizer.fingerprint, *data.held_out_by)


def _nothing(part: Part, source: DataSource) -> str:
    shards = part.shards
    found = [f"{part.name}: no document with text in it ({source.whence()})"]
    if empty := sum(shards.empty(split) for split in SPLITS):
        found.append(f"{empty:,} are empty")
    if shards.skipped_rows:
        found.append(f"{shards.skipped_rows:,} bad rows were skipped, the first: {shards.skipped_places[0]}")
    return "; ".join(found)


def _documents(part: Part) -> int:
    return sum(part.shards.documents(split) for split in SPLITS)


def _tokenise(
    name: str,
    source: Source,
    tokenizer: Tokenizer,
    folder: Path,
    data: Data,
    shown: Progress,
    stopped: Stopped,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pieces = source.pieces()
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    held = (data.validation_fraction, data.hold_out)
    with shown(name, folder, pieces) as look:
        while waiting := [number for number in range(len(pieces)) if not finished(folder, number)]:
            # Another preparer may begin at the same moment: a random start lets both do different pieces.
            start = random.SystemRandom().randrange(len(waiting))
            chosen = waiting[start:] + waiting[:start]
            jobs = [_PieceJob(source, pieces[number], number, tokenizer, folder, dtype, held) for number in chosen]
            if not _share(jobs, data.processes or _cores(), look, stopped):
                time.sleep(LOOK_SECONDS)  # the rest is being done by others, who may still fail
            look()
    write_index(folder, len(pieces), dtype)


class _PieceJob:
    """One piece -> one shard of each split, and the record that says so."""

    def __init__(
        self,
        source: Source,
        piece: Piece,
        number: int,
        tokenizer: Tokenizer,
        folder: Path,
        dtype: str,
        held: tuple[float, HoldOut],
    ) -> None:
        """`held`: the share that is held out, and of what."""
        self.source = source
        self.piece = piece
        self.number = number
        self.tokenizer = tokenizer
        self.folder = folder
        self.dtype = dtype
        self.held = held

    def __call__(self, stopped: Stopped = never) -> bool:
        """Whether it is done now; false where another preparer is at it."""
        with claimed(self.folder / f".{self.number:05d}.claim") as ours:
            if ours and not finished(self.folder, self.number):
                self._write(stopped)
        return ours or finished(self.folder, self.number)

    def _write(self, stopped: Stopped) -> None:
        writers = {split: ShardWriter(self.folder, shard_name(self.number, split), self.dtype) for split in SPLITS}
        skipped = SkippedRows()
        try:
            for texts in _batched(self.source.texts(self.piece, skipped)):
                if stopped():
                    raise PreparationStoppedError
                parts = [part for text in texts for part in divided(text, *self.held)]
                encoded = self.tokenizer.documents([text for _, text in parts])
                for (split, text), ids in zip(parts, encoded, strict=True):
                    writers[split].add(ids, len(text.encode(errors="replace")))
            shards: dict[str, Shard] = {split: writer.close() for split, writer in writers.items()}
        except BaseException:
            for writer in writers.values():
                writer.discard()
            raise
        write_record(self.folder, self.number, shards, skipped)


def _batched(texts: Iterable[str]) -> Iterator[list[str]]:
    """At most 256 documents or about 1 MiB at a time: the memory of a worker, whatever the size of a piece."""
    waiting: list[str] = []
    size = 0
    for text in texts:
        waiting.append(text)
        size += len(text)
        if len(waiting) == DOCUMENTS_PER_BATCH or size > 1 << 20:
            yield waiting
            waiting, size = [], 0
    if waiting:
        yield waiting


def _share(jobs: Sequence[_PieceJob], processes: int, look: Callable[[], None], stopped: Stopped) -> bool:
    """Do those that nobody else does; whether there was one. The first failure stops the rest."""
    if min(len(jobs), processes) <= 1:
        done = False
        for job in jobs:
            if stopped():
                raise PreparationStoppedError
            done |= job(stopped)
            look()
        return done
    # Spawned, not forked: the caller may hold threads and CUDA.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(len(jobs), processes), mp_context=context, initializer=_die_with_parent)
    try:
        futures: set[Future[bool]] = {pool.submit(job) for job in jobs}
        took = False
        for results in _as_done(futures, look, stopped):
            took |= any(results)
        return took
    except PreparationStoppedError:
        for worker in list(pool._processes.values()):  # a piece may take minutes; nobody reads what is half-written
            worker.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _as_done(futures: set[Future[bool]], look: Callable[[], None], stopped: Stopped) -> Iterator[list[bool]]:
    while futures:
        done, futures = wait(futures, LOOK_SECONDS, FIRST_COMPLETED)
        if stopped():
            raise PreparationStoppedError
        yield [future.result() for future in done]
        look()


def _cores() -> int:
    """Those that this process may use: a batch system gives a part of the node."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _die_with_parent() -> None:
    """A worker waits for work for ever; when its parent was killed there will be none."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this runs in a worker"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
