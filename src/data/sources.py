"""Sources of text: the standard library of this Python, files, a synthetic language. src/data/hub.py has the hub's.

A source divides itself into pieces, the unit of parallel work, and reads one piece as a stream of documents. Both are
pure functions of the content, so that every process on every machine agrees about them.
"""

import hashlib
import itertools
import random
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from glob import glob
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, Strict

from src.config.base import Config, one_or_more, path_or_url
from src.config.bounds import Count, Seed
from src.data import files
from src.data.files import BadRow
from src.data.fingerprint import fingerprint, hash_files
from src.errors import DataError, some
from src.storage.remote import is_url
from src.storage.remote_files import FilesAt, copy_of

PLACES_KEPT = 10  # of the rows that were skipped

Files = Annotated[str, AfterValidator(path_or_url)]
OneOrMore = Annotated[
    tuple[Files, ...],
    Strict(strict=False),
    BeforeValidator(one_or_more),
]

# A command line cannot hold a line break: the two letters \n stand for one, \r for its Windows half.
Separator = Annotated[
    str, Field(min_length=1), AfterValidator(lambda text: text.replace("\\r", "\r").replace("\\n", "\n"))
]


@dataclass(frozen=True)
class Piece:
    """Unit of parallel work: a worker turns one piece into one shard of each split."""

    spans: tuple[files.TextSpan, ...]


@dataclass
class SkippedRows:
    """How many rows were left out of a piece, and the first of them."""

    count: int = 0
    first: list[BadRow] = field(default_factory=list)

    def add(self, row: BadRow) -> None:
        self.count += 1
        if len(self.first) < PLACES_KEPT:
            self.first.append(replace(row, repaired=None))


class DataSource(Config, ABC):
    """A corpus: of text (`Source`), or of tokens that were made before (src/data/token_files). Constructing one reads
    nothing.
    """

    @abstractmethod
    def fingerprint(self, cache: Path) -> str:
        """Hash that changes whenever the content, its order or its division into documents changes."""

    @abstractmethod
    def whence(self) -> str:
        """What it reads, in words: names of files for an error."""

    def problems(self) -> list[str]:
        """What can be seen to be wrong without reading a text, such as a pattern that matches no file."""
        return []

    def elsewhere(self) -> list[FilesAt]:
        """What it reads of URLs, which the launcher copies into the cache; keys are those of this section."""
        return []

    def here(self, cache: Path) -> Self:
        """With the copies in the cache in the place of URLs, whether they are there yet."""
        return self

    @property
    def commit(self) -> str | None:
        """The state of a dataset of the hub that is read; None: unknown, or the source has no such states."""
        return None


class Source(DataSource, ABC):
    """A corpus of documents in pieces."""

    @abstractmethod
    def pieces(self) -> list[Piece]:
        """The pieces in corpus order. DataError when there is nothing to read."""

    @abstractmethod
    def rows(self, piece: Piece) -> Iterator[str | BadRow]:
        """The documents of a piece in order and, in their places, rows that are none. DataError names the file."""

    def texts(self, piece: Piece, skipped: SkippedRows | None = None) -> Iterator[str]:
        """The documents of a piece, in order. DataError names file and line of a bad row, unless the source skips
        them: then they are added to `skipped`.
        """
        skips = self.skips_bad_rows
        for row in self.rows(piece):
            if isinstance(row, str):
                yield row
            elif skips:
                if skipped is not None:
                    skipped.add(row)
            elif row.repaired is not None:
                yield row.repaired
            else:
                raise DataError(f"{files.described([row])[0]}{self._way_out()}")

    @property
    def skips_bad_rows(self) -> bool:
        return False

    def _way_out(self) -> str:
        return ""


class RowSource(Source):
    """A source of somebody's rows, some of which may be broken."""

    bad_rows: Literal["refuse", "skip"]
    """What becomes of a row without text, of the wrong type, of broken JSON or bad UTF-8; refuse: the first one ends
    the preparation and is named; skip: they are left out, counted, and the first ten named.
    """

    @property
    def skips_bad_rows(self) -> bool:
        return self.bad_rows == "skip"

    def _way_out(self) -> str:
        return (
            "; bad_rows=skip leaves such rows out and counts them (data.bad_rows, of a mixture "
            "data.sources.<name>.bad_rows)"
        )

    def _choice(self) -> list[str]:
        """For the fingerprint: nothing for the choice that every version had."""
        return ["skip bad rows"] if self.skips_bad_rows else []


class StdlibSource(Source):
    """The .py files of the Python that runs us: about 12 MB of real text on every machine, nothing redistributed.

    Tests are left out: many distributions do not ship them, and four of their files are invalid UTF-8 on purpose.
    """

    def fingerprint(self, cache: Path) -> str:
        return fingerprint("stdlib", hash_files(self._paths, cache))

    def pieces(self) -> list[Piece]:
        return group([span for path in self._paths for span in files.spans(path, files.LARGEST_PIECE_BYTES)])

    def rows(self, piece: Piece) -> Iterator[str | BadRow]:
        for span in piece.spans:
            yield from files.read(span, field="", separator=None)

    def whence(self) -> str:
        return f"the .py files of {sysconfig.get_path('stdlib')}"

    @cached_property
    def _paths(self) -> list[Path]:
        root = Path(sysconfig.get_path("stdlib"))
        skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
        found = (path for path in root.rglob("*.py") if skipped.isdisjoint(path.relative_to(root).parts))
        paths = sorted(found, key=lambda path: path.relative_to(root).as_posix())
        if not paths:
            raise DataError(f"data=stdlib: no .py file under {root}; use data=text with files of your own")
        return paths


class TextSource(RowSource):
    """Files or globs; the suffix decides: .jsonl, .ndjson and .parquet hold a document per row, others are text."""

    files: OneOrMore
    """A file, a folder, a glob ("corpus/**/*.txt"), a URL of one (s3://bucket/*.jsonl) or a list of them; .jsonl and
    .parquet hold a document per row.
    """
    field: str
    """Column of .jsonl and .parquet rows that holds the text."""
    separator: Separator | None
    r"""Cuts a plain text file into documents, such as '\n\n' for blank lines; null: a file is a document."""

    def elsewhere(self) -> list[FilesAt]:
        return [FilesAt("files", each, files.TEXT_SUFFIXES) for each in self.files if is_url(each)]

    def here(self, cache: Path) -> Self:
        return self.model_copy(update={"files": here(self.files, cache)}) if self.elsewhere() else self

    def fingerprint(self, cache: Path) -> str:
        content = zip([path.suffix.lower() for path in self._paths], hash_files(self._paths, cache), strict=True)
        return fingerprint("text", list(content), self.field, self.separator, *self._choice())

    def pieces(self) -> list[Piece]:
        total = sum(path.stat().st_size for path in self._paths)
        largest = piece_bytes(total)
        return group([span for path in self._paths for span in files.spans(path, largest)])

    def rows(self, piece: Piece) -> Iterator[str | BadRow]:
        for span in piece.spans:
            yield from files.read(span, field=self.field, separator=self.separator)

    def whence(self) -> str:
        return some(map(str, self._paths), 3)

    def problems(self) -> list[str]:
        return self._matched[1]

    @property
    def _paths(self) -> list[Path]:
        found, problems = self._matched
        if problems:
            raise DataError(problems)
        return found

    @cached_property
    def _matched(self) -> tuple[list[Path], list[str]]:
        return matched(self.files)


def here(patterns: Sequence[str], cache: Path) -> tuple[str, ...]:
    """With the copies of URLs in their places."""
    return tuple(copy_of(each, cache) if is_url(each) else each for each in patterns)


def globbed(pattern: str) -> list[str]:
    """Of files whose own names may have brackets, too."""
    return [pattern] if Path(pattern).is_file() else glob(pattern, recursive=True)


def matched(patterns: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Files in the order given, each pattern sorted, none twice; and what is wrong. A folder stands for all files in
    it, at any depth, that have a suffix of text.
    """
    found: dict[Path, None] = {}
    problems = [] if patterns else ["data.files=[]: name at least one file or glob"]
    for pattern in patterns:
        inside = Path(pattern).is_dir()
        places = files.named_inside(pattern, files.TEXT_SUFFIXES) if inside else globbed(pattern)
        matches = [path for path in map(Path, sorted(places)) if path.is_file()]
        if not matches:
            held = f" with one of the suffixes {', '.join(files.TEXT_SUFFIXES)}" if inside else ""
            problems.append(f"data.files={pattern}: matches no file{held} (looked from {Path.cwd()}){_hint(pattern)}")
        problems += [problem for path in matches if (problem := files.problem(path))]
        found |= dict.fromkeys(matches)
    return [*found], problems


def _hint(pattern: str) -> str:
    """What is there instead of a file, and what to do."""
    path = Path(pattern)
    if path.exists() and not path.is_dir():
        return "; it is a pipe or a device, which can be read once: write its text to a file, and name that"
    return f"; it is a link to {path.readlink()}, which is not there" if path.is_symlink() else ""


class SyntheticSource(Source):
    """A language of made-up words in which each word allows few successors: learnable, endless, the same everywhere."""

    documents: Count
    """Documents of the corpus."""
    words: Count
    """Mean words per document, about 7 bytes each."""
    seed: Seed
    """Seed of the text; the language stays the same."""

    def fingerprint(self, cache: Path) -> str:
        return fingerprint("synthetic", self.documents, self.words, self.seed)

    def pieces(self) -> list[Piece]:
        starts = range(0, self.documents, 4096)
        spans = [files.TextSpan("synthetic", first, min(first + 4096, self.documents)) for first in starts]
        return [Piece((span,)) for span in spans]

    def rows(self, piece: Piece) -> Iterator[str | BadRow]:
        for span in piece.spans:
            yield from (self._text(number) for number in range(span.start, span.stop))

    def whence(self) -> str:
        return "the synthetic language"

    def _text(self, number: int) -> str:
        chance = random.Random(f"{self.seed}/{number}")
        vocabulary = ["".join(pair) for pair in itertools.product(("ba", "ko", "mi", "ru", "te", "zo"), repeat=3)]
        word = chance.randrange(len(vocabulary))
        words = []
        for _ in range(chance.randint(1, 2 * self.words - 1)):
            words.append(vocabulary[word])
            word = (7 * word + chance.choice((1, 1, 1, 1, 5, 5, 11))) % len(vocabulary)
        return " ".join(words) + "."


def held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the validation split. Its text alone decides, so copies are on one side."""
    digest = hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


HoldOut = Literal["documents", "ends"]
CUT_LETTERS = 200  # before the place of a cut, in which a line or word may end


def divided(text: str, fraction: float, hold_out: HoldOut) -> list[tuple[str, str]]:
    """(split, text) of the parts of a document; one, but where the ends of documents are held out."""
    if hold_out == "documents":
        return [("validation" if held_out(text, fraction) else "train", text)]
    at = min(len(text), round(len(text) * (1.0 - fraction)))
    if at < len(text):
        line, word = (text.rfind(letter, max(0, at - CUT_LETTERS), at) + 1 for letter in "\n ")
        at = line or word or at
    return [("train", text[:at])] + ([("validation", text[at:])] if at < len(text) else [])


def piece_bytes(total: int) -> int:
    """Bytes of a piece: a 64th of the corpus, to keep all cores busy, within 2 to 256 MiB, for cheap restarts and
    few shards.
    """
    return min(max(total // 64, 2 << 20), files.LARGEST_PIECE_BYTES)


def group(spans: list[files.TextSpan]) -> list[Piece]:
    """Join neighbouring spans into pieces until each is full."""
    full = piece_bytes(sum(span.bytes for span in spans))
    pieces: list[Piece] = []
    waiting: list[files.TextSpan] = []
    size = 0
    for span in spans:
        waiting.append(span)
        size += span.bytes
        if size >= full:
            pieces.append(Piece(tuple(waiting)))
            waiting, size = [], 0
    return pieces + ([Piece(tuple(waiting))] if waiting else [])
