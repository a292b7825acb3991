"""What a week asks of the store and of the shared disk: what each start, save, logged step and failure takes of them,
as tests/scale counts it for a world of this size, as often as the week had them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.scale.site import Site
from tests.scale.laws import ROWS, WORLDS, Row, broken


@dataclass(frozen=True)
class Operation:
    """A row of the scale test, and how often a week pays for it."""

    what: str
    part: str
    row: str
    event: str  # of `Story`, as `_row` of __main__ averages them
    ranks: Callable[[Site], int]  # how many pay for it each time

    @property
    def counted(self) -> Row:
        return next(each for each in ROWS if (each.part, each.what) == (self.part, self.row))


def _world(site: Site) -> int:
    return site.nodes * site.gpus_per_node


def _nodes(site: Site) -> int:
    return site.nodes


def _once(_site: Site) -> int:
    return 1


OPERATIONS = (
    Operation("operations of the store", "preflight", "store operations of a rank", "starts", _world),
    Operation(
        "files of the shared disk opened for code and config",
        "start",
        "files of the shared disk that a node's ranks open, n modules",
        "starts",
        _nodes,
    ),
    Operation(
        "calls of the file system to open the data",
        "opening the data",
        "calls of the file system of a rank, 16 n pieces",
        "starts",
        _world,
    ),
    Operation("files made by starts", "start", "creates and renames by all ranks", "starts", _once),
    Operation(
        "files made by saves, beside tensors", "first save", "creates and renames by rank 0, 2 n files", "saves", _once
    ),
    Operation(
        "calls of the file system for metrics",
        "metrics",
        "calls of the file system by all ranks, a logged step",
        "logged",
        _once,
    ),
    Operation(
        "lines of attempts.jsonl about failures",
        "crash",
        "lines of attempts.jsonl by all ranks, a lost peer",
        "failures",
        _once,
    ),
)


def week_of(site: Site, events: Mapping[str, float]) -> dict[str, float]:
    """How often each was done; `events`: starts, saves, logged steps and failures of the week. AssertionError where one
    of them breaks its law in this world.
    """
    world, found = _world(site), {}
    for each in OPERATIONS:
        row = each.counted
        number = row.measure(world)
        assert (words := broken(row, world, row.measure(WORLDS[0]), number)) is None, words
        found[each.what] = number * each.ranks(site) * events[each.event]
    return found
