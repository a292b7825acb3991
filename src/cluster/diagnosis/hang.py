"""Diagnosis of a hang: the rank that never entered a collective, from the flight recorder's dumps.

NCCL's watchdog writes them when it gives up; on the CPU src/distributed/process/flight_recorder.py does.
"""

import json
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from src.storage import rank_files


@dataclass(frozen=True)
class Hang:
    """A rank that never entered a collective which others entered; or one that left no dump at all."""

    rank: int
    words: str
    silent: bool = False  # it left no dump: dead rather than late


class _PlainUnpickler(pickle.Unpickler):
    """The dumps hold dicts, lists, texts and numbers; anything else is not ours."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in a dump")


class DumpFiles(Mapping[int, Mapping[str, Any]]):
    """Dumps by rank, read when they are asked for and not kept: one of NCCL's may have 16 MB."""

    def __init__(self, files: Mapping[int, Path]) -> None:
        self._files = files

    def __getitem__(self, rank: int) -> Mapping[str, Any]:
        """Empty for a file that is cut off, whose rank was ended while it wrote, or is no dump of ours."""
        try:
            with self._files[rank].open("rb") as stream:
                dump = _PlainUnpickler(stream).load()
        except Exception:  # noqa: BLE001 (an unpickler that is fed garbage raises anything)
            return {}
        return dump if isinstance(dump, dict) else {}

    def __iter__(self) -> Iterator[int]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def find(traces: Path, since: float, nodes: Sequence[str], keep: Path | None = None) -> Hang | None:
    """None without fresh dumps or without a laggard. `since`: seconds since 1970; `nodes`: by rank.

    The dumps are moved to the folder `keep`: the next attempt would overwrite them.
    """
    files = {rank: file for rank, file in rank_files.found(traces).items() if file.stat().st_mtime >= since}
    if keep is not None and files:
        keep.mkdir(parents=True, exist_ok=True)
        files = {rank: Path(shutil.move(file, keep / file.name)) for rank, file in files.items()}
    try:
        return compare(DumpFiles(files), nodes)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):  # no dump of ours
        return None


def compare(dumps: Mapping[int, Mapping[str, Any]], nodes: Sequence[str]) -> Hang | None:
    """The earliest collective that a member of its group never entered; else the first rank without a dump.

    Each dump is looked at once, and those that tell of what a laggard missed once more. None without any.
    """
    last, heard = _last_entered(dumps)
    if not heard:
        return None
    asked: dict[int, list[tuple[_Group, int]]] = {}  # rank that knows -> the group, and what its laggard missed
    laggards: dict[_Group, int] = {}
    for group, by_rank in last.items():
        numbers = {rank: by_rank.get(rank, 0) for rank in group.members if rank in heard}
        laggard = min(numbers, key=lambda rank: (numbers[rank], rank))
        ahead = [rank for rank, number in numbers.items() if number > numbers[laggard]]
        if ahead:
            # Of those ahead, the one that is least: a recorder forgets, and it has the least to forget since.
            knows = min(ahead, key=lambda rank: (numbers[rank], rank))
            laggards[group] = laggard
            asked.setdefault(knows, []).append((group, numbers[laggard] + 1))
    missed = [each for rank, questions in asked.items() for each in _entries(dumps[rank], questions)]
    if missed:
        _when, group, sequence, kind = min(missed, key=lambda each: each[0])
        rank = laggards[group]
        words = f"rank {rank} (node {nodes[rank]}) never entered {kind} #{sequence} of group {group.words}"
        return Hang(rank, words + _whereabouts(dumps[rank]))
    silent = next((rank for rank in range(len(nodes)) if rank not in heard), None)
    if silent is None:
        return None
    words = f"rank {silent} (node {nodes[silent]}) left no dump: it was dead or stuck before the timeout"
    return Hang(silent, words, silent=True)


def _whereabouts(dump: Mapping[str, Any]) -> str:
    """What its main thread was doing, where the dump says so."""
    stack = dump.get("stack", [])
    return f"; it was at {stack[-1]}" if stack else ""


@dataclass(frozen=True)
class _Group:
    """Disjoint groups of a mesh may share a name; the ranks tell them apart."""

    name: str
    words: str
    members: tuple[int, ...] = field(compare=False)
    number: int  # of these members, which stand in every dump


class _Membership:
    """Ranks by the text that a dump has of them, which is 28 KB for a world of 4,096 and the same in all dumps."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, tuple[int, ...]]] = {}

    def groups(self, dump: Mapping[str, Any]) -> Callable[[Sequence[object]], _Group | None]:
        """From the two names of a group in an entry of this dump to the group; each is looked up once."""
        found: dict[tuple[str, str], _Group | None] = {}

        def group(names: Sequence[object]) -> _Group | None:
            name, described = (str(part) for part in names)
            if (name, described) not in found:
                found[name, described] = self._group(dump["pg_config"].get(name), name, described)
            return found[name, described]

        return group

    def _group(self, config: Mapping[str, Any] | None, name: str, described: str) -> _Group | None:
        if config is None:
            return None  # a sum over replica groups: its members are in other folders
        text = config["ranks"]
        if text not in self._known:
            self._known[text] = (len(self._known), tuple(json.loads(text)))
        number, members = self._known[text]
        return _Group(name, _words(name, described), members, number)


def _words(name: str, described: str) -> str:
    """What a group is called to a reader."""
    return described if described not in ("", "undefined") else name


def _last_entered(dumps: Mapping[int, Mapping[str, Any]]) -> tuple[dict[_Group, dict[int, int]], set[int]]:
    """group -> rank -> its last sequence number; and the ranks whose dumps can be read."""
    last: dict[_Group, dict[int, int]] = {}
    heard: set[int] = set()
    membership = _Membership()
    for rank, dump in dumps.items():
        if not dump:
            continue
        heard.add(rank)
        group_of = membership.groups(dump)
        for entry in dump["entries"]:
            if not entry.get("is_p2p") and (group := group_of(entry["process_group"])) is not None:
                numbers = last.setdefault(group, {})
                numbers[rank] = max(numbers.get(rank, 0), int(entry["collective_seq_id"]))
    return last, heard


def _entries(
    dump: Mapping[str, Any], questions: Sequence[tuple[_Group, int]]
) -> Iterator[tuple[int, _Group, int, str]]:
    """When (nanoseconds), group, sequence number and kind of each collective that is asked for and in the dump."""
    wanted = {(group.name, group.words, sequence): group for group, sequence in questions}
    for entry in dump["entries"]:
        if entry.get("is_p2p"):
            continue
        name, described = (str(part) for part in entry["process_group"])
        sequence = int(entry["collective_seq_id"])
        if (group := wanted.get((name, _words(name, described), sequence))) is not None:
            kind = str(entry["profiling_name"]).partition(":")[2]
            yield int(entry["time_created_ns"]), group, sequence, kind
