"""The source `tokens`: ids that were tokenised before, in the files of other projects, read as they are."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Self

from src.data.files import named_inside
from src.data.fingerprint import fingerprint, hash_files
from src.data.sources import DataSource, OneOrMore, globbed, here
from src.data.token_files.formats import SUFFIXES, TokenFile, Width, token_file
from src.errors import DataError, some
from src.storage.remote import is_url
from src.storage.remote_files import FilesAt

LARGEST_UINT16 = 1 << 16  # ids


class TokenFileSource(DataSource):
    """Nothing is copied: ranks map the files themselves."""

    files: OneOrMore
    """A file, a folder, a glob, a URL of one (s3://bucket/*.bin) or a list of them: .bin of Megatron (with its .idx),
    llm.c or nanoGPT, .npy of OLMo.
    """
    validation_files: OneOrMore | None
    """Files that are held out; null: of each of the others the last documents, data.validation_fraction of its tokens.
    """
    dtype: Width | None
    """Type of the ids in files without a header; null: uint16 where the tokenizer's ids fit, as OLMo-core does."""

    def elsewhere(self) -> list[FilesAt]:
        named = {"files": self.files, "validation_files": self.validation_files or ()}
        return [_shards_at(key, each) for key, urls in named.items() for each in urls if is_url(each)]

    def here(self, cache: Path) -> Self:
        if not self.elsewhere():
            return self
        held_out = None if self.validation_files is None else here(self.validation_files, cache)
        return self.model_copy(update={"files": here(self.files, cache), "validation_files": held_out})

    def fingerprint(self, cache: Path) -> str:
        every = [self._train[0], self._held_out[0]]
        return fingerprint("tokens", self.dtype, [hash_files(paths, cache) for paths in every])

    def whence(self) -> str:
        return some(map(str, self._train[0]), 3)

    def problems(self) -> list[str]:
        """Of names and headers; no id is read."""
        found = [*self._train[1], *self._held_out[1]]
        for path in dict.fromkeys([*self._train[0], *self._held_out[0]]):
            try:
                token_file(path, self.dtype, "uint16")
            except DataError as error:
                found += error.problems
        return found

    def opened(self, ids: int) -> tuple[list[TokenFile], list[TokenFile]]:
        """Files to train on, and those that are held out as a whole. `ids`: of the tokenizer. DataError."""
        headless: Width = "uint16" if ids <= LARGEST_UINT16 else "uint32"
        if problems := [*self._train[1], *self._held_out[1]]:
            raise DataError(problems)
        train, held_out = ([token_file(each, self.dtype, headless) for each in paths] for paths in self._paths)
        return train, held_out

    @property
    def _paths(self) -> tuple[list[Path], list[Path]]:
        """An explicit choice for validation wins over a glob that has it, too."""
        held_out = self._held_out[0]
        return [path for path in self._train[0] if path not in held_out], held_out

    @cached_property
    def _train(self) -> tuple[list[Path], list[str]]:
        return matched_token_files(self.files, "files")

    @cached_property
    def _held_out(self) -> tuple[list[Path], list[str]]:
        return (
            ([], [])
            if self.validation_files is None
            else matched_token_files(self.validation_files, "validation_files")
        )


def _shards_at(key: str, url: str) -> FilesAt:
    """With both files of Megatron's pair, whichever of them or what both begin with is named."""
    whole = url.rstrip("/")
    start = whole.removesuffix(".idx").removesuffix(".bin")
    pair = (f"{start}.bin", f"{start}.idx")
    alone = whole.endswith(".npy") or (whole not in pair and whole.endswith("*"))  # which matches both
    return FilesAt(key, url, (*SUFFIXES, ".idx"), () if alone else tuple(each for each in pair if each != whole))


def matched_token_files(patterns: Sequence[str], key: str) -> tuple[list[Path], list[str]]:
    """Files of ids in the order given, each pattern sorted, none twice; and what is wrong.

    Megatron's are named by their .bin, their .idx or what both begin with.
    """
    found: dict[Path, None] = {}
    problems = [] if patterns else [f"data.{key}=[]: name at least one file or glob"]
    for pattern in patterns:
        inside = Path(pattern).is_dir()
        places = named_inside(pattern, SUFFIXES) if inside else globbed(pattern)
        named = [path for path in map(Path, sorted(places)) if path.is_file()]
        if inside:
            named = [path for path in named if path.suffix in SUFFIXES]
        elif not named and Path(f"{pattern}.bin").is_file():
            named = [Path(f"{pattern}.bin")]
        if not named:
            held = f" with one of the suffixes {', '.join(SUFFIXES)}" if inside else ""
            problems.append(f"data.{key}={pattern}: matches no file{held} (looked from {Path.cwd()})")
        matches = [path.with_suffix(".bin") if path.suffix == ".idx" else path for path in named]
        problems += [f"data.{key}: {path}: is not there, only its .idx" for path in matches if not path.is_file()]
        problems += [_other(path, key) for path in matches if path.suffix in (".txt", ".jsonl", ".parquet", ".gz")]
        found |= dict.fromkeys(matches)
    return [*found], list(dict.fromkeys(problems))


def _other(path: Path, key: str) -> str:
    return f"data.{key}: {path}: {path.suffix} holds no ids; data=text reads .txt, .jsonl and .parquet"
