"""Files that URLs name, by themselves, by a folder or by a glob, and copies of them here.

Who maps files into memory or reads them many times wants them on a disk. A copy lies in a cache, under a hash of its
store and there as it lies in it: every URL that names a file, in whatever way, means one copy. Folders are walked by
listings of ours: fsspec's own walk takes a listing that failed for an empty one.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from glob import escape, glob
from pathlib import Path, PurePosixPath

from src.errors import RemoteError
from src.storage.atomic_write import TEMPORARY, atomic_write, temporary_beside
from src.storage.remote import BUCKETS, SCHEME, RemoteEntry, RemoteFolder, below, patiently
from src.storage.space import room
from src.storage.streams import Tell

MAGIC = re.compile(r"[*?[]")
RECORD = ".fetched.json"  # of a store's copies: what of the store each is, and what of this disk
RECORD_SECONDS = 10.0  # between two of its writes: after a kill so much is fetched again
AT_ONCE = 8  # files


@dataclass(frozen=True)
class FilesAt:
    """What somebody wants of a URL. `key`: of the config, for errors."""

    key: str
    url: str
    suffixes: tuple[str, ...] | None
    """Of the files that a folder stands for; None: all of them."""
    companions: tuple[str, ...] = ()
    """URLs of what belongs to these files, where it is there."""


@dataclass(frozen=True)
class RemoteFile:
    url: str
    size: int
    stamp: str
    """Changes with the content: what the store says of it, such as its ETag; empty: nothing."""


def copy_of(url: str, cache: Path) -> str:
    """The path, or the glob, that stands for a URL here."""
    store, _, path = url.partition("://")[2].rstrip("/").partition("/")
    folder = str(_home(url, cache) / store)
    return f"{escape(folder)}/{path}" if MAGIC.search(path) else str(_place(url, cache))


def files_at(wanted: FilesAt) -> list[RemoteFile]:
    """The files that are there, by name, with their companions. RemoteError where there is none."""
    named = _named(wanted.url, wanted)
    found = {each.url: each for url in wanted.companions for each in _named(url, wanted)} | {
        each.url: each for each in named
    }
    if not found:
        _told_missing(wanted)
    return [found[url] for url in sorted(found)]


def missing(files: Sequence[RemoteFile], cache: Path) -> list[RemoteFile]:
    """Those that have no copy, or another one than the store would give now: of another size or stamp."""
    records: dict[Path, Mapping[str, list[str]]] = {}

    def lacks(file: RemoteFile) -> bool:
        home = _home(file.url, cache)
        known = records.setdefault(home, _record(home)).get(file.url, ["", ""])
        return not file.stamp or known != [file.stamp, _stamp(_place(file.url, cache))]

    return [file for file in files if lacks(file)]


def fetch(wanted: FilesAt, files: Sequence[RemoteFile], cache: Path, tell: Tell) -> None:
    """Copy what is missing of these `files_at`, and remove copies of what is no longer there. RemoteError,
    DiskFullError; what has arrived by then stays.
    """
    lacking = missing(files, cache)
    _remove_strangers(wanted, files, cache)
    if not lacking:
        return
    size, home = sum(file.size for file in lacking), _home(wanted.url, cache)
    tell([f"{wanted.key}={wanted.url}: fetches {len(lacking)} of {len(files)} files, {size:,} bytes, into {home}"])
    arrived: dict[str, list[str]] = {}
    written = time.monotonic()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        waiting = {pool.submit(_fetch_one, file, wanted.key, cache): file for file in lacking}
        try:
            for each in as_completed(waiting):
                file = waiting[each]
                arrived[file.url] = [file.stamp, each.result()]
                if time.monotonic() - written > RECORD_SECONDS:
                    _remember(home, arrived)
                    written = time.monotonic()
        finally:
            pool.shutdown(cancel_futures=True)
            _remember(home, arrived)


def _named(url: str, wanted: FilesAt) -> list[RemoteFile]:
    base, parts = _parted(url)
    folder = RemoteFolder(base, wanted.key)
    if parts and MAGIC.search(url):
        entries = _Listings(folder).matching("", parts)
    else:
        entries = _Listings(folder).below("/".join(parts), wanted.suffixes)
    return [_file(below(base, name) if name else base, entry, wanted) for name, entry in entries]


def _parted(url: str) -> tuple[str, list[str]]:
    """The URL of a folder, and the rest: from the first part on that is a pattern, or the last part."""
    scheme, _, rest = url.partition("://")
    parts = rest.rstrip("/").split("/")
    at = next((number for number, part in enumerate(parts) if MAGIC.search(part)), len(parts) - 1)
    at = max(at, 1 if parts[0] else 2)  # the store itself, or the first folder of one without a name
    return f"{scheme}://{'/'.join(parts[:at])}", parts[at:]


class _Listings:
    """Listings of a folder and of those in it, each made once. Names are relative to the folder."""

    def __init__(self, folder: RemoteFolder) -> None:
        self._folder = folder
        self._known: dict[str, list[RemoteEntry]] = {}

    def below(self, name: str, suffixes: tuple[str, ...] | None) -> Iterator[tuple[str, RemoteEntry]]:
        """The file of this name, or all at any depth of the folder of this name."""
        try:
            itself = patiently(partial(self._folder.entry, name))
        except FileNotFoundError:
            return
        if itself.folder:
            yield from self._files(name, suffixes)
        else:
            yield name, itself

    def matching(self, name: str, parts: Sequence[str]) -> Iterator[tuple[str, RemoteEntry]]:
        """Files in a folder that match a glob, by the rules of Python's: ** is any number of folders, and a * means no
        name that begins with a dot.
        """
        part, rest = parts[0], parts[1:]
        if part == "**" and rest:
            yield from self.matching(name, rest)
        for entry in self._listed(name):
            inside = f"{name}/{entry.name}" if name else entry.name
            if entry.name.startswith(".") and not part.startswith("."):
                continue
            if part == "**":
                if entry.folder:
                    yield from self.matching(inside, parts)
                elif not rest:
                    yield inside, entry
            elif fnmatchcase(entry.name, part):
                if entry.folder and rest:
                    yield from self.matching(inside, rest)
                elif not entry.folder and not rest:
                    yield inside, entry

    def _files(self, name: str, suffixes: tuple[str, ...] | None) -> Iterator[tuple[str, RemoteEntry]]:
        for entry in self._listed(name):
            inside = f"{name}/{entry.name}" if name else entry.name
            if entry.folder:
                yield from self._files(inside, suffixes)
            elif _has(entry.name, suffixes):
                yield inside, entry

    def _listed(self, name: str) -> list[RemoteEntry]:
        if name not in self._known:
            try:
                self._known[name] = patiently(partial(self._folder.entries, name))
            except FileNotFoundError:
                self._known[name] = []
        return self._known[name]


def _file(url: str, entry: RemoteEntry, wanted: FilesAt) -> RemoteFile:
    """RemoteError for what could be fetched only unchecked, or would not lie where it belongs."""
    parts = url.partition("://")[2].split("/")[1:]
    if any(part in ("", ".", "..") for part in parts):
        raise RemoteError(f"{wanted.key}={wanted.url}: {url} has an empty part, . or .. in its name; rename it there")
    if entry.size is None:
        raise RemoteError(f"{wanted.key}={wanted.url}: of {url} nobody says how long it is, so no copy can be checked")
    return RemoteFile(url, entry.size, entry.stamp)


def _told_missing(wanted: FilesAt) -> None:
    base, _ = _parted(wanted.url)
    found = SCHEME.match(base)
    if found and found[1].lower() in BUCKETS:
        RemoteFolder(base, wanted.key).reach()  # which says so where even its bucket is not there
    held = "" if wanted.suffixes is None else f"; of a folder those with {', '.join(wanted.suffixes)} are taken"
    raise RemoteError(f"{wanted.key}={wanted.url}: matches no file there{held}")


def _fetch_one(file: RemoteFile, key: str, cache: Path) -> str:
    """The stamp of the copy."""
    base, _, name = file.url.rpartition("/")
    if base.endswith(("/", ":")):
        base, name = file.url, ""
    folder, place = RemoteFolder(base, key), _place(file.url, cache)

    def attempt() -> None:
        folder.fetch(name, draft)
        if (size := draft.stat().st_size) != file.size:
            raise RemoteError(f"{key}: {file.url}: {size:,} bytes arrived where {file.size:,} are there")

    draft = temporary_beside(place)
    try:
        with room(place, file.size):
            place.parent.mkdir(parents=True, exist_ok=True)
            patiently(attempt)
            os.replace(draft, place)
    except FileNotFoundError as error:
        raise RemoteError(f"{key}: {file.url}: is gone since it was listed; type the command again") from error
    finally:
        draft.unlink(missing_ok=True)
    return _stamp(place)


def _remove_strangers(wanted: FilesAt, files: Sequence[RemoteFile], cache: Path) -> None:
    """A glob or a folder here has to mean what it means there."""
    kept = {_place(file.url, cache) for file in files}
    for url in (wanted.url, *wanted.companions):
        pattern = copy_of(url, cache)
        inside = Path(pattern).is_dir()
        places = Path(pattern).rglob("*") if inside else map(Path, glob(pattern, recursive=True))
        for place in [each for each in places if each.is_file() and each not in kept]:
            if not place.name.endswith(TEMPORARY) and (not inside or _has(place.name, wanted.suffixes)):
                place.unlink(missing_ok=True)


def _has(name: str, suffixes: tuple[str, ...] | None) -> bool:
    return suffixes is None or PurePosixPath(name).suffix.lower() in suffixes


def _home(url: str, cache: Path) -> Path:
    """The folder of all copies of a store."""
    scheme, _, rest = url.partition("://")
    store = f"{scheme.lower()}://{rest.partition('/')[0]}"
    return cache / "remote" / hashlib.sha256(store.encode()).hexdigest()[:12]


def _place(url: str, cache: Path) -> Path:
    """Of the copy of the file or folder that has this URL."""
    return _home(url, cache) / url.partition("://")[2].strip("/")


def _stamp(path: Path) -> str:
    """Size and time of a copy, which say that it is the one that was fetched; empty where there is none."""
    try:
        facts = path.stat()
    except OSError:
        return ""
    return f"{facts.st_size} {facts.st_mtime_ns}"


def _record(home: Path) -> dict[str, list[str]]:
    """By URL, stamps there and here. It only saves bytes, so a missing or broken one counts as empty."""
    try:
        known: dict[str, list[str]] = json.loads((home / RECORD).read_text())
    except (OSError, ValueError):
        return {}
    return known


def _remember(home: Path, more: dict[str, list[str]]) -> None:
    if more:
        atomic_write(home / RECORD, json.dumps(_record(home) | more, indent=0, sort_keys=True))
