"""Diagnosis of a hang: the rank that never entered a collective, from the flight recorder's dumps.

NCCL's watchdog writes them when it gives up; on the CPU src/distributed/process/flight_recorder.py does.
"""

import json
import pickle
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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


def find(traces: Path, since: float, nodes: Sequence[str], keep: Path | None = None) -> Hang | None:
    """None without fresh dumps or without a laggard. `since`: seconds since 1970; `nodes`: by rank.

    The dumps are copied to the folder `keep`: the next attempt would overwrite them.
    """
    dumps: dict[int, Mapping[str, Any]] = {}
    for file in traces.glob("rank_*"):
        rank = file.name.removeprefix("rank_")
        if rank.isdecimal() and file.stat().st_mtime >= since:
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, keep / file.name)
            try:
                with file.open("rb") as stream:
                    dumps[int(rank)] = _PlainUnpickler(stream).load()
            except Exception:  # noqa: BLE001 (cut off: its rank was ended while it wrote; or no dump of ours)
                continue
    try:
        return compare(dumps, nodes) if dumps else None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):  # no dump of ours
        return None


def compare(dumps: Mapping[int, Mapping[str, Any]], nodes: Sequence[str]) -> Hang | None:
    """The earliest collective that a member of its group never entered; else the first rank without a dump."""
    found: list[tuple[int, Hang]] = []
    for group, by_rank in _entered(dumps).items():
        last = {rank: max(by_rank.get(rank, {0: None})) for rank in group.members if rank in dumps}
        if len(set(last.values())) < 2:
            continue
        laggard = min(last, key=lambda rank: (last[rank], rank))
        sequence = last[laggard] + 1
        kind, when = next(each[sequence] for each in by_rank.values() if sequence in each)
        words = f"rank {laggard} (node {nodes[laggard]}) never entered {kind} #{sequence} of group {group.words}"
        found.append((when, Hang(laggard, words + _whereabouts(dumps[laggard]))))
    if found:
        return min(found, key=lambda pair: pair[0])[1]
    silent = [rank for rank in range(len(nodes)) if rank not in dumps]
    if not silent:
        return None
    first = silent[0]
    words = f"rank {first} (node {nodes[first]}) left no dump: it was dead or stuck before the timeout"
    return Hang(first, words, silent=True)


def _whereabouts(dump: Mapping[str, Any]) -> str:
    """What its main thread was doing, where the dump says so."""
    stack = dump.get("stack", [])
    return f"; it was at {stack[-1]}" if stack else ""


@dataclass(frozen=True)
class _Group:
    """Disjoint groups of a mesh may share a name; the ranks tell them apart."""

    name: str
    words: str
    members: tuple[int, ...]


def _entered(dumps: Mapping[int, Mapping[str, Any]]) -> dict[_Group, dict[int, dict[int, tuple[str, int]]]]:
    """group -> rank -> sequence number -> (collective, when in nanoseconds)."""
    entered: dict[_Group, dict[int, dict[int, tuple[str, int]]]] = {}
    for rank, dump in dumps.items():
        for entry in dump["entries"]:
            if entry.get("is_p2p"):
                continue
            name, described = (str(part) for part in entry["process_group"])
            if name not in dump["pg_config"]:
                continue  # a sum over replica groups: its members are in other folders
            members = tuple(json.loads(dump["pg_config"][name]["ranks"]))
            group = _Group(name, described if described not in ("", "undefined") else name, members)
            kind = str(entry["profiling_name"]).partition(":")[2]
            when = int(entry["time_created_ns"])
            entered.setdefault(group, {}).setdefault(rank, {})[int(entry["collective_seq_id"])] = (kind, when)
    return entered
