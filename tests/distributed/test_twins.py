"""Before a run: a device that is slower than its twins is named with its node, and left out where that is possible."""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from src.cluster.diagnosis.rank_failure import RankFailure
from src.distributed.process import twins
from src.distributed.process.device_speed import best_seconds, copy_seconds, product_seconds
from src.distributed.process.preflight import PreflightError
from src.distributed.process.twins import DeviceSpeed, check_twins, measured, slow_devices
from tests.ranks import RankPool


def speed(
    rank: int, product: float = 1.0, copy: float = 1.0, device: str = "H100", node_sum: float = 1.0
) -> DeviceSpeed:
    return DeviceSpeed(rank, f"n{rank // 2}", device, product, copy, node_sum)


def test_fifteen_percent_below_the_median_of_its_twins_is_slow() -> None:
    """Of speed: 1 / 1.17 is 14.5 % below, 1 / 1.2 is 16.7 %."""
    near = [speed(0), speed(1, product=1.17), speed(2), speed(3)]
    assert slow_devices(near) == []
    (slow,) = slow_devices([speed(0), speed(1), speed(2), speed(3, product=1.2)])
    assert (slow.rank, slow.node, slow.words) == (3, "n1", "rank 3 on n1 (H100): a product is 17 % below its twins")
    (slow,) = slow_devices([speed(0, copy=2.0), speed(1), speed(2), speed(3)])
    assert slow.words == "rank 0 on n0 (H100): a copy is 50 % below its twins"
    both = slow_devices([speed(0), speed(1), speed(2, node_sum=1.5), speed(3, node_sum=1.5), speed(4), speed(5)])
    assert [each.node for each in both] == ["n1", "n1"]


def test_only_twins_are_compared_and_of_two_the_faster_is_healthy() -> None:
    assert (
        slow_devices([speed(0), speed(1), speed(2, product=3.0, device="A100"), speed(3, product=3.0, device="A100")])
        == []
    )
    (slow,) = slow_devices([speed(0, product=2.0), speed(1)])
    assert slow.rank == 0
    assert slow_devices([speed(0)]) == []
    assert slow_devices([speed(0, node_sum=0.0), speed(2, node_sum=0.0)]) == []  # one rank a node sums nothing


def checked(slow_rank: int, known: tuple[str, ...]) -> tuple[str | None, str | None, list[str]]:
    """What a rank is told: the error, the node to leave out, and the words of each slow device."""
    rank, told = dist.get_rank(), list[str]()
    product, copy = (lambda _device: 2.0 if rank == slow_rank else 1.0), (lambda _device: 1.0)
    with patch.multiple(twins, product_seconds=product, copy_seconds=copy, best_seconds=lambda _work, _device: 1.0):
        try:
            nodes = [range(2), range(2, 4)]
            tell = lambda slow: told.extend(each.words for each in slow)  # noqa: E731
            check_twins(rank, f"n{rank // 2}", nodes, known, tell, torch.device("cpu"))
        except PreflightError as error:
            return str(error), RankFailure.of(error, rank, f"n{rank // 2}").bad_node, told
    return None, None, told


def test_all_ranks_refuse_and_name_the_node(ranks: RankPool) -> None:
    words = "rank 3 on n1 (cpu): a product is 50 % below its twins"
    assert ranks(4, checked, 3, ()) == [(words, "n1", [words])] * 4


def test_a_node_that_could_not_be_left_out_is_only_told(ranks: RankPool) -> None:
    words = "rank 3 on n1 (cpu): a product is 50 % below its twins"
    assert ranks(4, checked, 3, ("n1",)) == [(None, None, [words])] * 4


def speeds() -> list[DeviceSpeed]:
    rank = dist.get_rank()
    return measured(rank, "n0", "cpu", torch.device("cpu"), [range(2)])


def test_rank_0_learns_what_all_have_measured(ranks: RankPool) -> None:
    first, second = ranks(2, speeds)
    assert second == []
    assert [each.rank for each in first] == [0, 1]
    assert all(min(each.product, each.copy, each.node_sum) > 0.0 for each in first)


def test_work_is_timed_by_its_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warmed up, then three times eight in a row, by a clock of the test."""
    times = iter([0.0, 8.0, 8.0, 12.0, 12.0, 28.0])
    monkeypatch.setattr("src.distributed.process.device_speed.time.perf_counter", lambda: next(times))
    calls: list[None] = []
    assert best_seconds(lambda: calls.append(None), torch.device("cpu")) == 0.5
    assert len(calls) == 25


@pytest.mark.gpu
def test_a_gpu_has_a_speed() -> None:
    device = torch.device("cuda")
    assert 0.0 < product_seconds(device) < 1.0
    assert 0.0 < copy_seconds(device) < 1.0
