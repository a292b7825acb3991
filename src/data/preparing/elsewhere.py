"""Files of data at URLs: looked at, and copied into the cache, before anything reads them."""

from dataclasses import replace
from pathlib import Path

from src.data.config import Data, Mixture
from src.errors import DiskFullError, UserError
from src.storage.remote_files import FilesAt, fetch, files_at, missing
from src.storage.streams import Tell


def look_at_files(named: Data, here: Data, cache: Path, *, fetches: bool, tell: Tell) -> list[str]:
    """What is wrong with the sources of a section, as it was `named` and with its copies `here`, as far as that is seen
    without reading a text. `fetches`: copies what is missing first; otherwise URLs are listed, and told.
    """
    problems: list[str] = []
    for name, (_, source) in named.parts().items():
        section = f"data.sources.{name}" if isinstance(named, Mixture) else "data"
        wanted = [replace(each, key=f"{section}.{each.key}") for each in source.elsewhere()]
        unreachable = [line for each in wanted for line in _brought(each, cache, fetches, tell)]
        problems += unreachable
        if not unreachable and (fetches or not wanted):
            problems += here.parts()[name][1].problems()
    return problems


def _brought(wanted: FilesAt, cache: Path, fetches: bool, tell: Tell) -> list[str]:
    """What is wrong with a URL, once its files are here or told of."""
    try:
        files = files_at(wanted)
        if fetches:
            fetch(wanted, files, cache, tell)
        elif lacking := missing(files, cache):
            size = sum(file.size for file in lacking)
            tell([f"{wanted.key}={wanted.url}: a start fetches {len(lacking)} of {len(files)} files, {size:,} bytes"])
    except DiskFullError:  # nothing is wrong with the command
        raise
    except UserError as error:
        return [*error.problems]
    return []
