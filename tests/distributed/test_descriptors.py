"""Open files of a rank: the soft limit is raised where a world needs it, and a hard one that is too low is refused."""

import resource
from unittest.mock import patch

import pytest

from src.distributed.process import descriptors
from src.distributed.process.descriptors import FULL_MESH, make_room
from src.errors import PlanError


@pytest.mark.parametrize(
    ("limits", "rank", "world", "raised"),
    [
        ((256, 256), 0, 2, None),
        ((1024, 4096), 0, FULL_MESH, None),
        ((1024, 1 << 20), 7, 16_384, None),  # a rank that hosts no store needs 188
        ((1024, 1 << 20), 0, 4_096, (1 << 20, 1 << 20)),
        ((1024, resource.RLIM_INFINITY), 0, 4_096, (8_372, resource.RLIM_INFINITY)),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), 0, 4_096, None),
    ],
)
def test_the_soft_limit_is_raised_where_it_is_too_low(
    limits: tuple[int, int], rank: int, world: int, raised: tuple[int, int] | None
) -> None:
    told: list[tuple[int, int]] = []
    with (
        patch.object(resource, "getrlimit", lambda _kind: limits),
        patch.object(resource, "setrlimit", lambda _kind, given: told.append(given)),
    ):
        make_room(rank, world)
    assert told == ([] if raised is None else [raised])


def test_a_hard_limit_that_is_too_low_is_told_with_the_number() -> None:
    words = r"rank 0 needs 8,372 open files in a world of 4,096 ranks, and its hard limit is 4,096 \(ulimit -Hn\)"
    with patch.object(resource, "getrlimit", lambda _kind: (1024, 4096)), pytest.raises(PlanError, match=words):
        make_room(0, 4096)


def test_nearly_nothing_of_it_grows_with_the_world() -> None:
    assert [descriptors.descriptors(1, world) for world in (64, 512, 4_096, 16_384)] == [158, 170, 182, 190]
