"""What may grow with the world, and how: one table, which docs/scale_operations.md shows.

`python -m tests.scale.laws --write` measures and writes the page.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import log2
from pathlib import Path

from tests.scale import life, measures

WORLDS = (8, 64, 512, 4096)
HUGE = 16_384  # in `make test-all`
PAGE = Path(__file__).parents[2] / "docs/scale_operations.md"


@dataclass(frozen=True)
class Law:
    words: str
    most: Callable[[int, int], float]  # from the number at the smallest world, and a world


CONSTANT = Law("O(1)", lambda first, _world: first)
LOGARITHMIC = Law("O(log n)", lambda first, world: first * log2(world) / log2(WORLDS[0]))
# A number of more digits takes some bytes more.
LINEAR = Law("O(n)", lambda first, world: 1.25 * first * world / WORLDS[0])


def memory(each: float) -> Law:
    """KiB, of rank 0 or of a node's first, that grow by so many for each rank: twice what Python 3.11 takes."""
    return Law(f"{each:g} KiB a rank", lambda _first, world: 128 + each * world)


@dataclass(frozen=True)
class Row:
    """A number of a part of a run's life."""

    part: str
    what: str
    law: Law
    measure: Callable[[int], int]
    before: Mapping[int, int]  # at d05d105
    limit: int | None = None  # at any world


ROWS = (
    Row(
        "preflight",
        "store operations of a rank",
        CONSTANT,
        measures.preflight_operations,
        {8: 12, 64: 68, 512: 516, 4096: 4_100},
        limit=10,
    ),
    Row(
        "preflight",
        "store operations of rank 0, looks aside",
        CONSTANT,
        measures.preflight_operations_of_rank_0,
        {8: 29, 64: 197, 512: 1541, 4096: 12_293},
    ),
    Row(
        "preflight",
        "bytes of store of rank 0",
        LINEAR,
        measures.preflight_bytes_of_rank_0,
        {8: 601, 64: 4_136, 512: 33_285, 4096: 273_438},
    ),
    Row(
        "start",
        "calls of new_group, tensor 8 x shard n/8",
        Law("O(1)", lambda _first, _world: 3),
        measures.mesh_groups,
        {8: 32, 64: 208, 512: 1_608, 4096: 12_808},
        limit=3,
    ),
    Row(
        "preflight_gpus",
        "calls of new_group",
        Law("O(1)", lambda _first, _world: 1),
        measures.twin_groups,
        {8: 1, 64: 8, 512: 64, 4096: 512},
        limit=1,
    ),
    Row(
        "start",
        "files of the shared disk that a node's ranks open, n modules",
        CONSTANT,
        life.start_opens,
        {8: 88, 64: 592, 512: 4_624, 4096: 36_880},
        limit=16,
    ),
    Row(
        "start",
        "creates and renames by all ranks",
        CONSTANT,
        life.start_creates,
        {},
        limit=12,
    ),
    Row(
        "opening the data",
        "calls of the file system of a rank, 16 n pieces",
        CONSTANT,
        measures.opening_data,
        {8: 513, 64: 4_097, 512: 32_769, 4096: 262_145},
        limit=10,
    ),
    Row(
        "opening the data",
        "KiB of memory of a rank, to the next 64, 16 n pieces",
        Law("64 bytes a piece", lambda first, world: first + 64 * 16 * world / 1024),
        measures.opening_data_memory,
        {},
    ),
    Row(
        "reading the data",
        "open files of a rank after n shards",
        Law("at most 64", lambda _first, _world: 64),
        measures.reading_data,
        {8: 8, 64: 64, 512: 512, 4096: 4_096},
        limit=64,
    ),
    Row("step", "all-reduces beside the layout's own", CONSTANT, life.step_calls, {}, limit=2),
    Row("step", "bytes that they sum", CONSTANT, life.step_bytes, {}, limit=64),
    Row("validation", "bytes of sums in all, 4 batches", CONSTANT, life.validation_bytes, {}, limit=32),
    Row("metrics", "calls of the file system by all ranks, a logged step", CONSTANT, life.metrics_calls, {}, limit=8),
    Row(
        "metrics",
        "bytes that alert.straggler_share sums, a logged step",
        Law("24 n", lambda _first, world: 24 * world),
        life.straggler_bytes,
        {},
    ),
    Row(
        "saves, loads",
        "ranks that one connects to",
        LOGARITHMIC,
        measures.agreement_peers,
        {8: 7, 64: 63, 512: 511, 4096: 4_095},
    ),
    Row(
        "saves, loads",
        "bytes that half of the ranks receive of all files",
        CONSTANT,
        measures.agreement_bytes,
        {8: 1_672, 64: 13_440, 512: 108_032, 4096: 868_352},
    ),
    Row(
        "saves, loads",
        "bytes that rank 0 receives of all files",
        LINEAR,
        measures.agreement_bytes_of_rank_0,
        {8: 1_672, 64: 13_440, 512: 108_032, 4096: 868_352},
    ),
    Row(
        "first save",
        "bytes of plans that rank 0 receives, 4 tensors",
        LINEAR,
        measures.first_save_of_rank_0,
        {8: 12_616, 64: 101_184, 512: 816_640, 4096: 6_549_504},
    ),
    Row("first save", "KiB of memory of rank 0, 4 tensors", memory(24), measures.first_save_memory, {}),
    Row("first save", "creates and renames by rank 0, 2 n files", CONSTANT, life.save_creates, {}, limit=16),
    Row(
        "later saves",
        "bytes of plans that any rank receives",
        CONSTANT,
        measures.later_save,
        {8: 12_616, 64: 101_184, 512: 816_640, 4096: 6_549_504},
    ),
    Row("later saves", "KiB of memory of rank 0, 4 tensors", memory(10), measures.later_save_memory, {}),
    Row(
        "stop",
        "looks at the shared disk by a node's ranks in 10 s",
        CONSTANT,
        life.stop_looks,
        {8: 160, 64: 160, 512: 160, 4096: 160},
        limit=32,
    ),
    Row(
        "resume",
        "samples that a rank hashes, after n windows",
        CONSTANT,
        life.resume_samples,
        {8: 524_293, 64: 4_194_309, 512: 33_554_437, 4096: 268_435_461},
        limit=2 * 65_536,
    ),
    Row(
        "resume",
        "bytes of metadata that a rank is told, 4 tensors",
        Law("O(1)", lambda first, _world: 1.1 * first),  # numbers of more digits
        measures.resume_metadata,
        {8: 3_000, 64: 26_267, 512: 209_515, 4096: 1_691_573},
        limit=2_000,
    ),
    Row("resume", "KiB of memory of a node's first rank, 4 tensors", memory(0.3), measures.resume_memory, {}),
    Row("resume", "files that a rank checks, 2 n files", CONSTANT, life.resume_files, {}, limit=2),
    Row(
        "crash",
        "lines of attempts.jsonl by all ranks, a lost peer",
        Law("one a node", lambda _first, world: world / 8),
        life.crash_records,
        {8: 8, 64: 64, 512: 512, 4096: 4_096},
    ),
    Row(
        "crash",
        "dumps that the diagnosis reads a second time",
        CONSTANT,
        measures.diagnosis_reads,
        {8: 0, 64: 0, 512: 0, 4096: 0},
        limit=4,
    ),
    Row(
        "crash",
        "texts of ranks that it parses",
        LINEAR,
        measures.diagnosis_texts,
        {8: 31, 64: 255, 512: 2_047, 4096: 16_383},
    ),
    Row("crash", "KiB of memory of the diagnosis, 2 groups", memory(1.3), measures.diagnosis_memory, {}),
)


def broken(row: Row, world: int, first: int, found: int) -> str | None:
    """What a number does that its law forbids; `first`: the number of the smallest world."""
    most = row.law.most(first, world)
    if row.limit is not None:
        most = min(most, row.limit)
    if found <= most:
        return None
    return f"{row.part}: {row.what}: {found:,} at {world:,} ranks, the law {row.law.words} allows {most:,.0f}"


def page() -> str:
    """docs/scale_operations.md."""
    heading = " | ".join(f"{world:,}" for world in WORLDS)
    lines = [TITLE, "", f"| part | what is counted | law | {heading} | before: {WORLDS[-1]:,} |"]
    lines.append("|---|---|---|" + "---:|" * (len(WORLDS) + 1))
    for row in ROWS:
        found = " | ".join(f"{row.measure(world):,}" for world in WORLDS)
        before = f"{row.before[WORLDS[-1]]:,}" if WORLDS[-1] in row.before else ""
        lines.append(f"| {row.part} | {row.what} | {row.law.words} | {found} | {before} |")
    return "\n".join([*lines, "", END])


TITLE = """# What grows with the world

What a run costs its ranks, counted and not timed, as the world grows: operations on the store of the
rendezvous, calls of the file system, open files, process groups, bytes. One process plays all ranks on fakes of
store, wire and file system (`tests/scale`), so no cluster was needed and no network stands behind these
numbers. The suite counts up to 512 ranks, `make test-all` up to 16,384, and fails where a change breaks a law;
`python -m tests.scale.laws --write` makes the table.

n is the number of ranks, eight a node. Memory is what Python's objects take at most, tensors aside, in steps of
64 KiB; another Python has other numbers. The last column is what 4,096 ranks took before each was mended."""

END = """- **Start.** A node's ranks open one archive of the code and, each, config.yaml; what they import is a copy on
  the node's own disk, with bytecode ([SLURM](slurm.md#what-a-start-reads-of-the-shared-disk)). Before, each rank
  opened every module, and one of a node all files again. Rank 0 alone reads who is there, one record a node.
  Beyond 32 ranks gloo connects to those it speaks with; measured with 8 processes and both of a rank's groups: 9
  descriptors after the start and 15 after use, where the full mesh has 23. The soft limit of open files is raised
  where connections need more; where the hard one is lower, the start is refused with the number. Rank 0 hosts
  the store: two connections a rank.
- **NCCL** splits a communicator for all groups of an axis at once, here as before; the calls counted are those
  of other backends. The world that the check before a run sums over is the run's own: it is made once.
- **Steps.** Two sums beside the layout's own: what is known before the backward pass, and after it. A vote to
  stop is a part of the second; no rank but the first writes numbers.
- **Data.** An index of 250,000 pieces opens in 0.02 s and 29 MiB of memory, by one core (3.1 s and 400 MB as
  JSON). The launcher looks at every file once; a rank looks at one when it first reads from it, and says then
  what is wrong with it.
- **Checkpoints.** A number that all ranks enter says whether any failed. What ranks have to tell goes to rank 0
  along a tree: ranks halfway pass on what came to them, at most half of the whole. Plans are made at the first
  save of a life and kept. At a load one rank of a node reads DCP's metadata, O(n) bytes, and
  tells each of its neighbours the places of its own shards. Replicas that hold the same shards split them by bytes,
  as they do when they write, and tell each other: however many there are, a shard is read once
  (`tests/checkpoint/test_resharding.py`).
- **Files of ranks.** Dumps of a hang and records of failures are in sub-folders of 1,024 ranks. A checkpoint's folder
  has, as DCP's format has it, a file for each rank that writes; submitit's has a log for each rank.
- **Not in the table**: Muon's ranks tell their shard group once which rows they have.
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.scale.laws", description="Measure what grows with a world.")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    if parser.parse_args().write:
        PAGE.write_text(page())
    else:
        print(page())


if __name__ == "__main__":
    main()
