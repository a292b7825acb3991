"""Tokenizes text into shards: once for each content and tokenizer, in parallel, resumable."""

import multiprocessing
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

from src.data.config import Data
from src.data.corpus import Corpus, Part, survey
from src.data.fingerprint import fingerprint
from src.data.shards import FORMAT, SPLITS, Shard, ShardWriter, finished, write_index, write_record
from src.data.sources import DataSource, HoldOut, Piece, SkippedRows, Source, divided
from src.data.token_files.config import TokenFileSource
from src.data.token_files.streams import index_token_files, open_streams
from src.data.tokenizer import Tokenizer, TokenizerConfig
from src.errors import DataError, DiskFullError

DOCUMENTS_PER_BATCH = 256


def prepare(data: Data, tokenizer: TokenizerConfig, cache: Path, *, progress: bool, verify: bool = True) -> Corpus:
    """The tokenised corpus, made first where `cache` lacks it. DataError when text, tokenizer or shards are no good.

    Safe to call from several processes and hosts at once: they share the pieces of work. `verify` reads every shard's
    checksum, which a rank may leave to the process that started it.
    """
    began = time.perf_counter()
    cache = cache.resolve()
    opened = tokenizer.open(cache, data)
    if problems := row_problems(opened, data):
        raise DataError(problems)
    cached = True
    parts = []
    for name, (weight, source) in data.parts().items():
        if isinstance(source, TokenFileSource):
            folder = index_token_files(source, opened, data.validation_fraction, cache)
        else:
            assert isinstance(source, Source), "a source of neither text nor tokens"
            folder, made = _shards_of(name, source, opened, cache, data, progress=progress)
            cached = cached and not made
        parts.append(Part(name, weight, open_streams(folder)))
    rules = data.row_rules(opened.bos_id, opened.eos_id)
    corpus = Corpus(parts, opened, survey(parts, time.perf_counter() - began, cached=cached), rules)
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
    name: str, source: Source, tokenizer: Tokenizer, cache: Path, data: Data, *, progress: bool
) -> tuple[Path, bool]:
    """The folder of a source's shards, and whether they had to be made."""
    folder = cache / "tokens" / _key(source, tokenizer, data, cache)
    if (folder / "index.json").is_file():
        return folder, False
    try:
        _tokenise(name, source, tokenizer, folder, data, progress=progress)
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


def _tokenise(name: str, source: Source, tokenizer: Tokenizer, folder: Path, data: Data, *, progress: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pieces = source.pieces()
    waiting = [number for number in range(len(pieces)) if not finished(folder, number)]
    # Another preparer may be at work on the same folder: a random start lets both do different pieces.
    start = random.SystemRandom().randrange(len(waiting)) if waiting else 0
    waiting = waiting[start:] + waiting[:start]
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    jobs = [
        _PieceJob(source, pieces[number], number, tokenizer, folder, dtype, (data.validation_fraction, data.hold_out))
        for number in waiting
    ]
    with _bar(f"tokenising {name}", len(pieces), len(pieces) - len(jobs), shown=progress) as advance:
        for _ in _done(jobs, data.processes or _cores()):
            advance()
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

    def __call__(self) -> None:
        if finished(self.folder, self.number):  # meanwhile, by another preparer
            return
        writers = {split: ShardWriter(self.folder, f"{self.number:05d}.{split}.bin", self.dtype) for split in SPLITS}
        skipped = SkippedRows()
        try:
            for texts in _batched(self.source.texts(self.piece, skipped)):
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


def _done(jobs: list[_PieceJob], processes: int) -> Iterator[None]:
    """One item for each finished job; the first failure stops the rest."""
    if min(len(jobs), processes) <= 1:
        for job in jobs:
            job()
            yield
        return
    # Spawned, not forked: the caller may hold threads and CUDA.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(len(jobs), processes), mp_context=context, initializer=_die_with_parent)
    try:
        futures: list[Future[None]] = [pool.submit(job) for job in jobs]
        for future in as_completed(futures):
            future.result()
            yield
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


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


@contextmanager
def _bar(title: str, total: int, completed: int, *, shown: bool) -> Iterator[Callable[[], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn("pieces"))
    console = Console(stderr=True, markup=False, emoji=False)
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not shown, transient=True) as bar:
        task = bar.add_task(title, total=total, completed=completed)
        yield lambda: bar.advance(task)
