"""A tokenised corpus: its sources with their weights, and what a run may ask of it."""

from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

from src.data.config import Data
from src.data.fingerprint import fingerprint
from src.data.mapped.open_maps import OpenMaps
from src.data.mapped.piece_table import SPLITS
from src.data.order import Interleave
from src.data.packing.rows import Rows, rows_of
from src.data.packing.rules import RowRules
from src.data.shards import TokenStreams
from src.data.sources import PLACES_KEPT
from src.data.token_files.streams import open_streams
from src.data.tokenizer import ByteTokenizer, StoredTokenizer, Tokenizer, open_kept
from src.data.tokenizer_formats.hub_files import read_facts
from src.errors import DataError

RECIPE = "data.json"  # of a run folder
AS_EVER = RowRules()  # rows as every version made them


def recipe_file(stage: int = 1) -> str:
    """The file of a run folder that says what a stage of the run reads: data.json, data_2.json, ..."""
    return RECIPE if stage == 1 else f"data_{stage}.json"


@dataclass(frozen=True)
class Part:
    name: str
    weight: float
    shards: TokenStreams
    commit: str | None = None  # of a dataset of the hub


@dataclass(frozen=True)
class Preparation:
    """Facts of a prepared corpus for the console: its size, and what this call had to tokenize."""

    documents: int
    tokens: int
    text_bytes: int
    empty_documents: int
    skipped_rows: int
    skipped_places: tuple[str, ...]
    seconds: float
    cached: bool
    notes: tuple[str, ...] = ()  # of files that were tokenised elsewhere

    def lines(self) -> list[str]:
        """The facts in one line, and one for each of the first rows that were skipped."""
        made = "from the cache" if self.cached else f"tokenised in {self.seconds:.1f} s"
        empty = f" ({self.empty_documents:,} without text left out)" if self.empty_documents else ""
        line = f"data: {self.documents:,} document{'s' * (self.documents != 1)}{empty}, {self.tokens:,} tokens, {made}"
        if not self.skipped_rows:
            return [line, *self.notes]
        more = ", the first of them" if self.skipped_rows > len(self.skipped_places) else ""
        found = f"warning: {self.skipped_rows:,} bad rows were skipped{more}:"
        return [line, *self.notes, found, *(f"  {place}" for place in self.skipped_places)]


class Corpus:
    def __init__(
        self, parts: list[Part], tokenizer: Tokenizer, preparation: Preparation, rules: RowRules = AS_EVER
    ) -> None:
        self.parts = parts
        self.tokenizer = tokenizer
        self.preparation = preparation
        self.rules = rules
        self.interleave = Interleave([part.weight for part in parts])
        self._rows: dict[tuple[int, str, int], Rows] = {}

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def bos_id(self) -> int | None:
        return self.tokenizer.bos_id

    @property
    def eos_id(self) -> int | None:
        return self.tokenizer.eos_id

    @cached_property
    def fingerprint(self) -> str:
        """Hash of tokens, weights, tokenizer and how rows are made; independent of where the corpus lies."""
        facts = [[part.name, part.weight, part.shards.fingerprint] for part in self.parts]
        return fingerprint(facts, self.tokenizer.fingerprint, *self.rules.facts)

    def tokens(self, split: str) -> int:
        return sum(part.shards.tokens(split) for part in self.parts)

    def documents(self, split: str) -> int:
        return sum(part.shards.documents(split) for part in self.parts)

    def commits(self) -> dict[str, str]:
        """Of its datasets of the hub, by source; without those that a version before has tokenised."""
        return {part.name: part.commit for part in self.parts if part.commit is not None}

    def source_tokens(self) -> dict[str, int]:
        """Training tokens of each source."""
        return {part.name: part.shards.tokens("train") for part in self.parts}

    def windows(self, split: str, seq_len: int) -> int:
        """Number of samples before any source repeats: an epoch of a single source, the shortest epoch of a mixture."""
        return self.interleave.longest([self.rows(part, split, seq_len).count for part in range(len(self.parts))])

    def rows(self, part: int, split: str, seq_len: int) -> Rows:
        """The samples of one source, by number."""
        key = (part, split, seq_len)
        if key not in self._rows:
            self._rows[key] = rows_of(self.parts[part].shards, split, seq_len, self.rules)
        return self._rows[key]

    def notes(self, seq_len: int) -> list[str]:
        """How documents lie in the training samples of each source, where that was asked for."""
        found = [(part.name, self.rows(number, "train", seq_len).notes()) for number, part in enumerate(self.parts)]
        return [f"data: {name}: {line}" for name, lines in found for line in lines]

    def verify(self) -> None:
        """Reads every shard; DataError names the corrupted ones."""
        for part in self.parts:
            part.shards.verify()

    def recipe(self) -> dict[str, Any]:
        """JSON from which `reopen` opens exactly these tokens on ranks, without reading the sources again."""
        tokenizer = self.tokenizer.folder.name if isinstance(self.tokenizer, StoredTokenizer) else None
        parts = [[part.name, part.weight, part.shards.folder.name] for part in self.parts]
        skipped = {
            part.name: {"rows": part.shards.skipped_rows, "places": part.shards.skipped_places}
            for part in self.parts
            if part.shards.skipped_rows
        }
        recipe: dict[str, Any] = {"fingerprint": self.fingerprint, "tokenizer": tokenizer, "parts": parts}
        recipe |= {"rows": asdict(self.rules)} if self.rules.facts else {}
        recipe |= {"commits": commits} if (commits := self.commits()) else {}
        return recipe | ({"skipped": skipped} if skipped else {})


def read_recipe(folder: Path, stage: int = 1) -> dict[str, Any]:
    """What `Corpus.recipe` said in data.json of a run folder. DataError where it is missing, cut off or no recipe."""
    file = folder / recipe_file(stage)
    recipe = read_facts(file)
    if not isinstance(recipe, dict) or not {"fingerprint", "tokenizer", "parts"} <= recipe.keys():
        raise DataError(f"{file}: says nothing of tokens; the command that began the run makes it anew")
    return recipe


def known_commits(folder: Path, stage: int = 1) -> dict[str, str] | None:
    """The commits of the datasets that a stage of the run in this folder reads; None where it has not begun."""
    try:
        found = read_recipe(folder, stage).get("commits")
    except DataError:  # missing or cut off: made anew
        return None
    return found if isinstance(found, dict) else {}


def reopen(recipe: dict[str, Any], cache: Path) -> Corpus:
    """Open the corpus of a `recipe`. No file of tokens is looked at before it is read: `prepare` has, on the launcher,
    and thousands of ranks that ask the disk for each of 250,000 files would take hours. DataError for a broken index.
    """
    name = recipe["tokenizer"]
    tokenizer = ByteTokenizer() if name is None else open_kept(cache / "tokenizers" / name)
    commits, tokens, maps = recipe.get("commits", {}), cache / "tokens", OpenMaps()
    parts = [
        Part(name, weight, open_streams(tokens / folder, maps), commits.get(name))
        for name, weight, folder in recipe["parts"]
    ]
    return Corpus(parts, tokenizer, survey(parts, 0.0, cached=True), RowRules(**recipe.get("rows", {})))


def survey(parts: list[Part], seconds: float, *, cached: bool, cut: bool = False) -> Preparation:
    """`cut`: each document has a part in the training split and perhaps one in the other (data.hold_out=ends)."""
    shards = [part.shards for part in parts]
    return Preparation(
        documents=sum(one.documents(split) for one in shards for split in (SPLITS[:1] if cut else SPLITS)),
        tokens=sum(one.tokens(split) for one in shards for split in SPLITS),
        text_bytes=sum(one.text_bytes(split) for one in shards for split in SPLITS),
        empty_documents=sum(one.empty(split) for one in shards for split in SPLITS),
        skipped_rows=sum(one.skipped_rows for one in shards),
        skipped_places=tuple(place for one in shards for place in one.skipped_places)[:PLACES_KEPT],
        seconds=seconds,
        cached=cached,
        notes=tuple(line for one in shards for line in one.notes()),
    )


def check(
    corpus: Corpus,
    data: Data,
    *,
    seq_len: int,
    global_batch: int,
    steps: int,
    validation_samples: int = 0,
) -> list[str]:
    """Problems of this corpus for this run: key, value, rule, remedy; empty when there are none. Runs on the
    launcher. `steps`: 0 where nothing is trained.
    """
    problems = []
    if corpus.eos_id is None and (data.document_masks or data.mask_document_starts):
        problems.append("data.document_masks and data.mask_document_starts need a tokenizer with an end of document")
    if steps > 0:
        problems += _scarcity(corpus, data, seq_len, global_batch, steps)
    held = corpus.windows("validation", seq_len)
    if validation_samples > 0 and held == 0:
        problems.append(
            f"data.validation_fraction={data.validation_fraction} holds out {corpus.documents('validation')} documents "
            f"of {corpus.preparation.documents}, not one window: raise it, give more documents "
            "(data.separator cuts a text file into documents) or do not validate"
        )
    elif validation_samples > held:
        problems.append(
            f"task.validate_samples={validation_samples} is more than the {held} held-out samples of task.seq_len="
            f"{seq_len}: use task.validate_samples={held} or less, or a larger data.validation_fraction"
        )
    return problems


def _scarcity(corpus: Corpus, data: Data, seq_len: int, global_batch: int, steps: int) -> list[str]:
    problems = []
    counts = corpus.interleave.counts(steps * global_batch)
    for number, (part, needed) in enumerate(zip(corpus.parts, counts, strict=True)):
        windows, tokens = corpus.rows(number, "train", seq_len).count, part.shards.tokens("train")
        if windows == 0:
            problems.append(
                f"{part.name}: {tokens} training tokens fill no sample of task.seq_len={seq_len}: "
                f"use task.seq_len={max(tokens - 1, 1)} or less, or more text"
            )
        elif len(corpus.parts) == 1 and windows < global_batch:
            problems.append(
                f"{part.name}: {windows} samples of task.seq_len={seq_len} do not fill one task.global_batch="
                f"{global_batch}: use task.global_batch={windows} or less, a shorter task.seq_len, or more text"
            )
        elif data.max_epochs is not None and Fraction(needed, windows) > Fraction(data.max_epochs):
            share = Fraction(data.max_epochs) * windows * steps / needed
            problems.append(
                f"{part.name}: task.steps={steps} reads it {needed / windows:.2f} times, data.max_epochs="
                f"{data.max_epochs:g} allows {int(share)} steps ({tokens} training tokens)"
            )
    return problems
