"""Content hashes: what names a cache folder, so that the same text and tokenizer are never tokenised twice."""

import hashlib
import json
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from src.data.files import readable
from src.storage.atomic_write import atomic_write

# A file changed this recently may change again within one tick of the clock behind its mtime: its hash is not kept.
SETTLED_SECONDS = 2.0


def fingerprint(*facts: object) -> str:
    """16 hex digits of the canonical JSON of `facts`."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def write_json(path: Path, content: object) -> None:
    """Write JSON with sorted keys, durably: the file is there as a whole or not at all."""
    atomic_write(path, json.dumps(content, indent=1, sort_keys=True), durable=True)


def hash_files(paths: Iterable[Path], cache: Path) -> list[str]:
    """One hash of the content of each file, in order.

    Hashes are remembered in `<cache>/file_hashes.json` by path, size and mtime: a terabyte is read through once.
    """
    paths = [path.resolve() for path in paths]
    memory = cache / "file_hashes.json"
    known = read_memory(memory)
    stamps = {path: stamp(path) for path in paths}
    missing = [path for path in stamps if known.get(str(path), ["", ""])[0] != stamps[path]]
    with ThreadPoolExecutor(max_workers=8) as pool:
        fresh = dict(zip(missing, pool.map(_hash_file, missing), strict=True))
    settled = {str(path): [stamps[path], digest] for path, digest in fresh.items() if is_settled(path)}
    remember(memory, settled)
    return [fresh.get(path) or known[str(path)][1] for path in paths]


def stamp(path: Path) -> str:
    """Size and modification time as text: changes with every write to the file."""
    facts = path.stat()
    return f"{facts.st_size} {facts.st_mtime_ns}"


def is_settled(path: Path) -> bool:
    return time.time() - path.stat().st_mtime > SETTLED_SECONDS


def read_memory(memory: Path) -> dict[str, list[str]]:
    """The hashes that `remember` wrote. They only save time, so a missing or broken file counts as empty."""
    try:
        known: dict[str, list[str]] = json.loads(memory.read_text())
    except (OSError, ValueError):
        return {}
    return known


def remember(memory: Path, more: dict[str, list[str]]) -> None:
    """Add hashes to the file; does nothing where the cache is read-only."""
    if more:
        with suppress(OSError):
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_json(memory, read_memory(memory) | more)


def _hash_file(path: Path) -> str:
    with readable(path), path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
