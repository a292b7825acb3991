"""A slow rank or node is named with its host after so many steps, once, until it keeps up again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from src.train.stability import stragglers
from src.train.stability.stragglers import Stragglers, StragglerWatch, slowdowns
from tests.end_to_end.lives import TINY, live, opened, records, write_text
from tests.ranks import RankPool

HOSTS = ("a", "a", "b", "b")


def test_a_slow_product_and_a_wait_for_data_are_shares_of_the_median() -> None:
    even = (0.010, 0.05, 1.0)
    assert slowdowns([even] * 4) == [0.0] * 4
    assert slowdowns([even, even, (0.012, 0.05, 1.0), even]) == pytest.approx([0.0, 0.0, 0.2, 0.0])
    assert slowdowns([even, (0.010, 0.35, 1.0), even, even]) == pytest.approx([0.0, 0.3, 0.0, 0.0])
    assert slowdowns([even, (0.012, 0.05, 1.0)]) == pytest.approx([0.0, 0.2])
    assert slowdowns([(0.0, 0.0, 0.0)] * 2) == [0.0, 0.0]


def test_a_rank_is_named_after_fifty_steps_and_once() -> None:
    watch = Stragglers(HOSTS, 0.1, 50)
    slow = [0.0, 0.0, 0.0, 0.15]
    said = [watch.add(10, slow) for _ in range(7)]
    assert said[:4] == [[]] * 4
    assert said[4] == ["rank 3 on b is 15 % slower than the median, for 50 steps"]
    assert said[5:] == [[], []]
    assert watch.add(10, [0.0] * 4) == []
    assert watch.named == []
    assert [watch.add(25, slow) for _ in range(2)][1] == ["rank 3 on b is 15 % slower than the median, for 50 steps"]


def test_ten_percent_is_not_more_than_ten_percent() -> None:
    watch = Stragglers(HOSTS, 0.1, 50)
    assert watch.add(100, [0.0, 0.0, 0.1, 0.0]) == []


def test_a_pause_begins_anew() -> None:
    watch = Stragglers(HOSTS, 0.1, 50)
    slow = [0.3, 0.0, 0.0, 0.0]
    assert [*watch.add(40, slow), *watch.add(10, [0.0] * 4), *watch.add(40, slow)] == []


def test_a_node_all_of_whose_ranks_are_slow_is_named_as_one() -> None:
    watch = Stragglers(HOSTS, 0.1, 50)
    assert watch.add(60, [0.0, 0.0, 0.2, 0.4]) == ["node b (ranks 2 to 3) is 30 % slower than the median, for 60 steps"]
    other = Stragglers(("a",) * 3 + ("b",) * 3, 0.1, 50)
    assert other.add(60, [0.0, 0.0, 0.0, 0.2, 0.2, 0.0]) == [
        "ranks 3, 4 on b are 20 % slower than the median, for 60 steps"
    ]


def watched(slow: int) -> tuple[list[str], list[dict[str, float]]]:
    """Five log steps of a rank whose product takes 20 % longer on one of them."""
    rank, said = torch.distributed.get_rank(), list[str]()
    probe = lambda _device: 0.0012 if rank == slow else 0.0010  # noqa: E731
    watch = StragglerWatch(0.1, 20, torch.device("cpu"), said.append, probe)
    return said, [watch.values(step, 0.5, 0.01) for step in (1, 10, 20, 30, 40)]


def test_all_ranks_measure_the_slow_one_and_rank_0_tells(ranks: RankPool) -> None:
    (said, values), (silent, same) = ranks(2, watched, 1)
    assert (len(said), silent) == (1, [])
    assert values == same
    assert [each["stragglers/rank"] for each in values] == [1.0] * 5
    assert [each["stragglers/named"] for each in values] == [0.0, 0.0, 1.0, 1.0, 1.0]


def slowed(folder: Path) -> Any:
    """A whole life in which the second rank's product takes twice as long."""
    rank = torch.distributed.get_rank()
    original = stragglers.StragglerWatch.__init__.__defaults__
    stragglers.StragglerWatch.__init__.__defaults__ = (lambda _device: 0.002 if rank == 1 else 0.001,)
    try:
        return live(folder)
    finally:
        stragglers.StragglerWatch.__init__.__defaults__ = original


def test_a_run_says_records_and_alerts(tmp_path: Path, ranks: RankPool) -> None:
    told = tmp_path / "told"
    command = f"cp /dev/stdin {told}"
    keys = ("alert.straggler_share=0.2", "alert.straggler_steps=8", f"alert.command='{command}'")
    folder = opened(*TINY, *write_text(tmp_path), f"root={tmp_path / 'runs'}", "parallel=ddp2", *keys)
    assert ranks(2, slowed, folder) == [True, True]
    lines = [line for line in records(folder) if "stragglers/rank" in line]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert {line["stragglers/rank"] for line in lines} == {1.0}
    assert [line["stragglers/named"] for line in lines] == [0.0] * 7 + [1.0] * 5
    alerts = [json.loads(line) for line in (folder / "alerts.jsonl").read_text().splitlines()]
    straggler = next(each for each in alerts if each.get("event") == "straggler")
    assert "rank 1 on " in straggler["detail"]
    assert "100 % slower than the median, for 8 steps" in straggler["detail"]
