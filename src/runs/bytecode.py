"""Bytecode of a run's code, compiled once when the code is frozen, so that no rank compiles it again."""

import hashlib
import marshal
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import MAGIC_NUMBER, source_hash
from pathlib import Path

from src.runs.node_copy import DamagedCodeError, bytecode_name, home, is_whole, packed, unpacked
from src.storage.atomic_write import atomic_write

# PEP 552: bytecode that goes by the hash of its source, and is not held against it at each import.
UNCHECKED_HASH = (1).to_bytes(4, "little")


def compiled(contents: Mapping[str, bytes]) -> dict[str, bytes]:
    """Bytecode of each module of `contents` that can be compiled, by the name under which this Python looks for it;
    nothing for a Python that keeps none.

    What was compiled last on this machine is kept there: compiling all takes 2 s, reading it 0.02.
    """
    tag = sys.implementation.cache_tag
    if not tag:
        return {}
    kept = _kept("bytecode")
    known = {} if kept is None else _read(kept)
    found: dict[str, bytes] = {}
    used: dict[str, bytes] = {}
    for name, source in contents.items():
        if name.endswith(".py"):
            key = hashlib.sha256(source).hexdigest()
            content = known.get(key) or _bytecode(name, source)
            if content is not None:
                used[key] = found[bytecode_name(name, tag)] = content
    if kept is not None and not used.keys() <= known.keys():
        with suppress(OSError):  # the next one compiles them again
            atomic_write(kept, packed(used))
    return found


def last_archive(digest: str, make: Callable[[], bytes]) -> bytes:
    """What `make` returns for the code of this digest, or returned when it was last called on this machine, if that was
    for the same code and Python: 0.01 s instead of 0.16.
    """
    if (kept := _kept("archive")) is None:
        return make()
    with suppress(OSError):
        name, _, archive = kept.read_bytes().partition(b"\n")
        if name == digest.encode() and is_whole(archive):
            return archive
    archive = make()
    with suppress(OSError):  # the next one makes it again
        atomic_write(kept, digest.encode() + b"\n" + archive)
    return archive


def _kept(what: str) -> Path | None:
    """The file of what this Python made last; None where this machine has no place for it."""
    with suppress(OSError):
        return home() / f"{what}.{sys.implementation.cache_tag or 'source'}.{MAGIC_NUMBER.hex()}"
    return None


def _read(kept: Path) -> dict[str, bytes]:
    """By checksum of the source; nothing where the file is not there or damaged."""
    with suppress(OSError, DamagedCodeError):
        return unpacked(kept.read_bytes())
    return {}


def _bytecode(name: str, source: bytes) -> bytes | None:
    """None of what is no Python: who imports it is told."""
    with warnings.catch_warnings():  # about odd escapes: who imports it is told
        warnings.simplefilter("ignore")
        try:
            code = compile(source, name, "exec", dont_inherit=True, optimize=0)
        except (SyntaxError, ValueError):
            return None
    return MAGIC_NUMBER + UNCHECKED_HASH + source_hash(source) + marshal.dumps(code)
