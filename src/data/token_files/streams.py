"""Token streams of files that are read where they lie: an index in the cache says what of them is held out."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from src.data.fingerprint import fingerprint, hash_files, read_memory, remember, write_json
from src.data.mapped.open_maps import OpenMaps
from src.data.mapped.piece_table import SPLITS
from src.data.shards import TokenShards, TokenStreams
from src.data.token_files.config import TokenFileSource
from src.data.token_files.formats import TokenFile
from src.data.tokenizer import Tokenizer
from src.data.tokenizer_formats.hub_files import read_facts
from src.errors import DataError

INDEX = "token_files.json"  # of a folder of the cache; shards of our own have index.json
FORMAT = 1
BLOCK = 1 << 22  # ids that are looked at together
SHOWN = 24  # ids that are decoded for a person


@dataclass(frozen=True)
class FileShare:
    """What a file gives to each split: ids [0, train) and [train, tokens)."""

    path: str
    form: str
    dtype: str
    offset: int  # bytes
    tokens: int
    train: int
    documents: dict[str, int]  # by split
    digest: str

    @property
    def file(self) -> TokenFile:
        return TokenFile(Path(self.path), self.form, self.dtype, self.offset, self.tokens)

    def span(self, split: str) -> slice:
        return slice(0, self.train) if split == "train" else slice(self.train, self.tokens)


class FileStreams(TokenStreams):
    """The streams of an index that `index_token_files` wrote."""

    def __init__(self, folder: Path, maps: OpenMaps | None = None) -> None:
        index = read_facts(folder / INDEX)
        body = {key: index[key] for key in index if key != "checksum"} if isinstance(index, dict) else {}
        if not body or index.get("checksum") != fingerprint(body) or body["format"] != FORMAT:
            raise DataError(f"{folder / INDEX}: corrupted; delete {folder} and the next run makes it again")
        self._files = [FileShare(**each) for each in body["files"]]
        super().__init__(folder, {split: [_length(each, split) for each in self._files] for split in SPLITS}, maps)
        self._notes: list[str] = body["notes"]

    def documents(self, split: str) -> int:
        return sum(each.documents[split] for each in self._files)

    def text_bytes(self, split: str) -> int:
        """0: nobody has kept the text."""
        return 0

    def empty(self, split: str) -> int:
        return 0

    def notes(self) -> list[str]:
        return self._notes

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint("token files", [(each.digest, each.train, each.tokens) for each in self._files])

    def verify(self) -> None:
        """Reads every file that was written since it was last read; DataError for each that holds other ids now."""
        paths = [Path(each.path) for each in self._files]
        now = hash_files(paths, self.folder.parent.parent)
        wrong = [each.path for each, digest in zip(self._files, now, strict=True) if digest != each.digest]
        if wrong:
            raise DataError(f"{path}: changed since this run's data were indexed; start a new run" for path in wrong)

    def _segment(self, split: str, number: int) -> NDArray[np.integer]:
        each = self._files[number]
        return self._maps.get(each.path, lambda: _map(each))[each.span(split)]

    def check_sizes(self) -> None:
        if problems := [problem for each in self._files if (problem := _fault(each))]:
            raise DataError(problems)


def _map(share: FileShare) -> NDArray[np.integer]:
    if (problem := _fault(share)) is not None:
        raise DataError(problem)
    return share.file.ids()


def _fault(share: FileShare) -> str | None:
    """What is wrong with a file since it was indexed; one look."""
    size = share.offset + share.tokens * np.dtype(share.dtype).itemsize
    try:
        found = Path(share.path).stat().st_size
    except OSError:
        return f"{share.path}: missing; it is read where it lies"
    return None if found == size else f"{share.path}: {found:,} bytes, not {size:,} as when {share.form} was indexed"


def _length(share: FileShare, split: str) -> int:
    span = share.span(split)
    return int(span.stop - span.start)


def open_streams(folder: Path, maps: OpenMaps | None = None) -> TokenStreams:
    """Of a folder of the cache: shards of our own, or an index of files elsewhere. `maps`: of several."""
    return FileStreams(folder, maps) if (folder / INDEX).is_file() else TokenShards(folder, maps)


@dataclass(frozen=True)
class IdCounts:
    """What one look at all ids of a file has found."""

    smallest: int
    largest: int
    ends: int  # ends of documents

    @classmethod
    def of(cls, ids: NDArray[np.integer], eos: int | None) -> Self:
        smallest, largest, ends = 0, 0, 0
        for at in range(0, len(ids), BLOCK):
            block = ids[at : at + BLOCK]
            smallest, largest = min(smallest, int(block.min())), max(largest, int(block.max()))
            ends += 0 if eos is None else int(np.count_nonzero(block == eos))
        return cls(smallest, largest, ends)


def index_token_files(source: TokenFileSource, tokenizer: Tokenizer, fraction: float, cache: Path) -> Path:
    """Folder of the cache with the index of these files, made where it is not there. DataError for ids that the
    tokenizer has not.

    The first time every id is looked at, as fast as the disk reads; no id is copied.
    """
    train, held_out = source.opened(tokenizer.vocab_size)
    if missing := [each.path for each in (*train, *held_out) if each.tokens == 0]:
        raise DataError(f"data.files: {path}: holds no id" for path in missing)
    digests = hash_files([each.path for each in (*train, *held_out)], cache)
    places = [str(each.path.resolve()) for each in (*train, *held_out)]
    cut = fraction if not held_out else 0.0
    key = fingerprint("token files", FORMAT, places, digests, source.dtype, len(held_out), cut, tokenizer.fingerprint)
    folder = cache / "tokens" / key
    if (folder / INDEX).is_file():
        return folder
    files = [*train, *held_out]
    counts = _look(files, digests, tokenizer, cache)
    shares = []
    for number, (file, digest, count) in enumerate(zip(files, digests, counts, strict=True)):
        kept = _train_ids(file.ids(), tokenizer.eos_id, cut) if number < len(train) else 0
        shares.append(_share(file, digest, kept, tokenizer.eos_id, count))
    body: dict[str, Any] = {
        "format": FORMAT,
        "files": [asdict(each) for each in shares],
        "notes": _notes(files, counts, tokenizer, len(held_out)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / INDEX, body | {"checksum": fingerprint(body)})
    return folder


def _look(files: Sequence[TokenFile], digests: Sequence[str], tokenizer: Tokenizer, cache: Path) -> list[IdCounts]:
    """Of each file; remembered by content and end of document. DataError for ids beyond the vocabulary."""
    memory, eos = cache / "token_file_ids.json", tokenizer.eos_id
    names = [f"{digest} {file.dtype} {eos}" for file, digest in zip(files, digests, strict=True)]
    known = read_memory(memory)
    unknown = [number for number, name in enumerate(names) if name not in known]
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        found = dict(zip(unknown, pool.map(lambda number: IdCounts.of(files[number].ids(), eos), unknown), strict=True))
    remember(memory, {names[at]: list(map(str, asdict(each).values())) for at, each in found.items()})
    counts = [found[at] if at in found else IdCounts(*map(int, known[name])) for at, name in enumerate(names)]
    if problems := [line for pair in zip(files, counts, strict=True) for line in _foreign(*pair, tokenizer)]:
        raise DataError(problems)
    return counts


def _foreign(file: TokenFile, counts: IdCounts, tokenizer: Tokenizer) -> list[str]:
    """Why these cannot be ids of this tokenizer."""
    if counts.smallest < 0:
        return [f"data.files: {file.path}: holds the id {counts.smallest}; ids begin at 0"]
    if counts.largest < tokenizer.vocab_size:
        return []
    other = "; or its ids are uint16: pass data.dtype=uint16" if file.dtype == "uint32" and not file.offset else ""
    return [
        f"data.files: {file.path} ({file.form}) holds the id {counts.largest:,}, and the tokenizer has "
        f"{tokenizer.vocab_size:,} ids: pass tokenizer=file tokenizer.path=<the tokenizer that made it>{other}"
    ]


def _train_ids(ids: NDArray[np.integer], eos: int | None, fraction: float) -> int:
    """How many ids are trained on: up to the first end of a document from the share that is held out; where none is
    left, up to the last before it; where there is none at all, the share itself.
    """
    wanted = round(len(ids) * (1.0 - fraction))
    if wanted >= len(ids) or eos is None:
        return min(wanted, len(ids))
    for at in range(wanted, len(ids), BLOCK):
        if len(found := np.flatnonzero(ids[at : at + BLOCK] == eos)) and (stop := at + int(found[0]) + 1) < len(ids):
            return stop
    for at in range(wanted, 0, -BLOCK):
        first = max(at - BLOCK, 0)
        if len(found := np.flatnonzero(ids[first:at] == eos)):
            return first + int(found[-1]) + 1
    return wanted


def _share(file: TokenFile, digest: str, train: int, eos: int | None, counts: IdCounts) -> FileShare:
    """Documents are counted by their ends; what follows the last end is one more."""
    held = IdCounts.of(file.ids()[train:], eos).ends
    ends = {"train": counts.ends - held, "validation": held}
    lengths = {"train": train, "validation": file.tokens - train}
    rests = {"train": file.ids()[train - 1 : train], "validation": file.ids()[-1:]}
    documents = {split: ends[split] + int(lengths[split] > 0 and int(rests[split][0]) != eos) for split in SPLITS}
    return FileShare(
        str(file.path.resolve()), file.form, file.dtype, file.offset, file.tokens, train, documents, digest
    )


def _notes(files: Sequence[TokenFile], counts: Sequence[IdCounts], tokenizer: Tokenizer, held_out: int) -> list[str]:
    """For the console: what was found, and how it reads, so that a person sees whether it is this tokenizer's."""
    forms = ", ".join(f"{sum(each.form == form for each in files)} of {form}" for form in dict.fromkeys(_forms(files)))
    begins = tokenizer.decode(files[0].ids()[:SHOWN].tolist())
    lines = [f"tokens: {len(files)} files read as they are ({forms}); the first begins {begins!r}"]
    if held_out:
        lines.append(f"tokens: {held_out} of them are held out (data.validation_files), and nothing of the others")
    if not sum(each.ends for each in counts):
        said = sum(each.documents or 0 for each in files)
        known = f", though the index of Megatron's counts {said:,} documents (--append-eod)" if said > 1 else ""
        mark = "has none" if tokenizer.eos_id is None else f"is {tokenizer.eos_id}"
        lines.append(f"warning: no document ends in these tokens{known}: the tokenizer's end of document {mark}")
    return lines


def _forms(files: Sequence[TokenFile]) -> list[str]:
    return [each.form for each in files]
