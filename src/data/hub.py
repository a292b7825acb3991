"""Datasets of the Hugging Face hub, or folders in its layout, streamed: only text that is tokenised is downloaded."""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator

from src.config.base import Line, path_or_url
from src.config.bounds import Count
from src.data.files import BadRow, TextSpan, text_of
from src.data.fingerprint import fingerprint, hash_files, write_json
from src.data.preparing.claims import claimed
from src.data.sources import Piece, RowSource
from src.data.tokenizer_formats.hub_files import read_facts
from src.errors import DataError
from src.storage.remote import is_url
from src.storage.remote_files import FilesAt, copy_of

BRANCH = "main"  # of a dataset that names no revision
COMMITS = "hub_commits"  # of a cache: which commit a branch was when it was first read there
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LOOK_SECONDS = 0.2


class HubSource(RowSource):
    """`path` is a name on the hub or a local folder; documents are taken evenly from the shards of the split."""

    path: Annotated[str, AfterValidator(path_or_url)]
    """Name on the hub (allenai/c4), or a folder in the hub's layout, here or at a URL."""
    name: str | None
    """Configuration of the dataset (en); null: its default."""
    data_dir: Line | None
    """Folder of the dataset that is read, such as data/python; null: all of it."""
    split: str
    """Split of the dataset that is read."""
    revision: str | None
    """Branch, tag or commit; a branch is read as it was when this cache first asked the hub; null: main."""
    field: str
    """Column that holds the text."""
    max_documents: Count | None
    """Documents, taken evenly from the shards; null: the whole split."""

    def elsewhere(self) -> list[FilesAt]:
        return [FilesAt("path", self.path, None)] if is_url(self.path) else []

    def here(self, cache: Path) -> Self:
        return self.model_copy(update={"path": copy_of(self.path, cache)}) if is_url(self.path) else self

    def fingerprint(self, cache: Path) -> str:
        folder = Path(self.path)
        local = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
        names = [path.relative_to(folder).as_posix() for path in local]
        where = list(zip(names, hash_files(local, cache), strict=True)) if local else [self.path, self.revision]
        more = [] if self.data_dir is None else [f"data_dir={self.data_dir}"]  # which versions before had not
        return fingerprint("hub", where, self.name, self.split, self.field, self.max_documents, *more, *self._choice())

    @property
    def commit(self) -> str | None:
        named = self.revision is not None and _COMMIT.fullmatch(self.revision) is not None
        return self.revision if named and not self.local else None

    def at_commit(self, cache: Path, commit: str | None = None) -> Self:
        """At `commit`, or at the one that its revision names for this cache: all workers, elements and later runs read
        the same text, though the branch moves. DataError where only the hub knows it, and does not say.
        """
        if self.local or self.commit is not None:
            return self
        return self.model_copy(update={"revision": commit or self._kept_commit(cache)})

    @property
    def local(self) -> bool:
        """Whether it is a folder in the hub's layout, which has no commits."""
        return Path(self.path).is_dir()

    def _kept_commit(self, cache: Path) -> str:
        """Asked of the hub once, by one of all preparers of a cache."""
        kept = cache / COMMITS / f"{fingerprint(self.path, self.revision or BRANCH)}.json"
        while not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            with claimed(kept.with_suffix(".claim")) as ours:
                if ours and not kept.exists():
                    facts = {"path": self.path, "revision": self.revision or BRANCH, "commit": self._asked_commit()}
                    write_json(kept, facts)
            if not ours:
                time.sleep(_LOOK_SECONDS)
        return str(read_facts(kept)["commit"])

    def _asked_commit(self) -> str:
        from huggingface_hub import HfApi

        try:
            return str(HfApi().dataset_info(self.path, revision=self.revision, timeout=30.0).sha)
        except Exception as error:  # of its transport, of the hub, its own
            raise DataError(
                f"data.path={self.path} data.revision={self.revision or BRANCH}: cannot be opened: which commit that "
                f"is, the hub does not say: {type(error).__name__}: {error}; data.revision=<commit> asks nobody"
            ) from error

    def pieces(self) -> list[Piece]:
        shards = self._open().num_shards
        if self.max_documents is None:
            return [Piece((TextSpan(self._where(shard), shard, -1),)) for shard in range(shards)]
        # Opening a remote shard costs seconds: take at least 10,000 documents of each one that is opened.
        opened = min(shards, -(-self.max_documents // 10_000))
        share, more = divmod(self.max_documents, opened)
        return [Piece((TextSpan(self._where(shard), shard, share + (shard < more)),)) for shard in range(opened)]

    def rows(self, piece: Piece) -> Iterator[str | BadRow]:
        """Of each shard until it has given its share of documents; bad rows that are skipped are none."""
        for span in piece.spans:
            taken = number = 0
            part = iter(self._shard(span.start))
            while taken != span.stop:
                try:
                    row = next(part, None)
                except Exception as error:  # the library raises many kinds: of parsers, of the network, its own
                    what = f"{span.name}, row {number}"
                    raise DataError(f"{what}: cannot be read: {type(error).__name__}: {error}") from error
                if row is None:
                    break
                found = text_of(row, self.field, span.name, place=f"row {number}")
                number += 1
                taken += isinstance(found, str) or not self.skips_bad_rows
                yield found

    def whence(self) -> str:
        return f"{self.path} ({self.split})"

    def _shard(self, number: int) -> Any:
        rows = self._open()
        return rows.shard(rows.num_shards, number)

    def _where(self, shard: int) -> str:
        return f"{self.path} ({self.split}), shard {shard}"

    def _open(self) -> Any:
        from datasets import load_dataset

        try:
            where = {"data_dir": self.data_dir, "split": self.split, "revision": self.revision}
            return load_dataset(self.path, self.name, **where, streaming=True)
        except Exception as error:  # the library raises many kinds; each means that this name cannot be opened here
            folder = "" if self.data_dir is None else f" data.data_dir={self.data_dir}"
            what = f"data.path={self.path} data.name={self.name}{folder} data.split={self.split}"
            raise DataError(f"{what}: cannot be opened: {type(error).__name__}: {error}") from error
