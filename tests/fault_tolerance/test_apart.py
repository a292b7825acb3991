"""LocalSGD and DiLoCo with the real lighthouse, against the same groups written out in one process."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from src.config.build import build
from src.config.tree import read
from src.run import Run
from tests.end_to_end.lives import TINY, live, opened, series
from tests.fault_tolerance import lives
from tests.fault_tolerance.by_hand import Life, Method, simulate
from tests.fault_tolerance.life import Seat, Trouble
from tests.fault_tolerance.lives import Fleet, account, fleet, last
from tests.ranks import RankPool

STEPS = 12
ARGV = (f"task.steps={STEPS}", "task.global_batch=4", "checkpoint.every=6")
TOKENS = 4 * 32  # of a step
METHODS = {
    "local_sgd": Method(4, averages=True),
    "diloco": Method(4),
    "streaming": Method(6, fragments=2, delay=2, alpha=0.25),
}
PLAIN = Method(1, lr=1.0, momentum=0.0)


def lived(found: Fleet, group: int) -> Life:
    """What a group did, by its last word on each step."""
    by_step = {line["counted"]: line["loss"] for line in account(found.folder, group) if "counted" in line}
    return Life([by_step[step] for step in sorted(by_step)], last(found.folder, group)["weights"])


def told(found: Fleet, name: str) -> float:
    """In the last line of the run's log."""
    return series(found.folder, name)[STEPS]


@pytest.mark.parametrize(("name", "optim"), [*((name, "adamw") for name in METHODS), ("diloco", "normuon")])
def test_two_groups_do_what_is_written_out(ranks: RankPool, tmp_path: Path, name: str, optim: str) -> None:
    method = METHODS[name]
    with fleet(tmp_path, *ARGV, *method.keys(), f"optim={optim}", min_groups=2) as found:
        found.start(0, 1)
        found.wait()
        (by_hand,) = ranks(1, simulate, found.folder, method, 2, {})
        for group in (0, 1):
            mine = lived(found, group)
            assert mine.losses == pytest.approx(by_hand[group].losses, rel=1e-6)
            if not method.alpha:  # every bit; what is mixed is rounded in another order
                assert mine.weights == by_hand[group].weights
            assert last(found.folder, group)["tokens"] == STEPS * TOKENS
        assert lived(found, 0).weights == lived(found, 1).weights
        assert lived(found, 0).losses != pytest.approx(lived(found, 1).losses, rel=1e-6)
        assert told(found, "outer/syncs") == STEPS / method.sync_steps * method.fragments
        assert told(found, "outer/failed_syncs") == 0
        if method.fragments == 1:
            weights = Run.from_sections(build(read(found.folder / "config.yaml"))).model.counts(32).parameters
            half = -(-weights // 512) * 256  # of the weights, in whole blocks: one leaves as a part, one as an average
            assert told(found, "outer/sent_bytes") == 3 * 2 * 4 * half


@pytest.mark.parametrize("mortal", [1, 0])
def test_a_group_that_died_between_two_exchanges_counts_again_from_the_next(
    ranks: RankPool, tmp_path: Path, mortal: int
) -> None:
    """The second one, or the one that speaks: what it had not recorded is recorded by the other."""
    method = Method(4)
    with fleet(tmp_path, *ARGV, "checkpoint.every=null", *method.keys(), min_groups=2) as found:
        found.start(1 - mortal)
        found.start(mortal, troubles=[Trouble(6, "kill")])
        found.died(mortal)
        found.start(mortal)
        found.wait()
        by_hand = ranks(1, simulate, found.folder, method, 2, {mortal: (6, 8)})[0]
        assert lived(found, 0) == by_hand[0]
        assert lived(found, 1) == by_hand[1]
        assert told(found, "outer/failed_syncs") == 0
        assert list(series(found.folder, "loss")) == list(range(1, STEPS + 1))


def dying(folder: Path, group: int, lighthouse: str, troubles: Sequence[Trouble], seat: Seat) -> None:
    """A life that ends when the second exchange is on the wire."""
    from src.fault_tolerance.mean import Means

    real, calls = Means._mean, list[object]()

    def once(self: Means, *arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *arguments)

    with patch.object(Means, "_mean", once):
        lives.live(folder, group, lighthouse, troubles, seat)


def test_a_group_that_dies_in_an_exchange_takes_no_other_with_it(ranks: RankPool, tmp_path: Path) -> None:
    method = Method(4)
    with fleet(tmp_path, *ARGV, "checkpoint.every=null", *method.keys(), min_groups=2) as found:
        found.start(0)
        with patch.object(lives, "live", dying):
            found.start(1)
        found.died(1)
        found.start(1)
        found.wait()
        assert "fragment 0 could not be exchanged" in found.log(0)
        by_hand = ranks(1, simulate, found.folder, method, 2, {1: (9, 12)}, 8)[0]
        assert lived(found, 0) == by_hand[0]
        assert lived(found, 1).weights == by_hand[1].weights
        assert (told(found, "outer/syncs"), told(found, "outer/failed_syncs")) == (2, 1)


@pytest.mark.parametrize("groups", [3, 1])
def test_a_run_goes_on_with_another_number_of_groups(ranks: RankPool, tmp_path: Path, groups: int) -> None:
    method, argv = Method(4), (*ARGV, "task.global_batch=6")
    with fleet(tmp_path, *argv, *method.keys(), min_groups=2) as found:
        found.stopped_together(6)
    with fleet(tmp_path, *argv, *method.keys(), f"folder={found.folder}", groups=groups, min_groups=groups) as again:
        again.start(*range(groups))
        again.wait()
        assert "goes on after step 7, " in again.log(0)
        by_hand = ranks(1, simulate, again.folder, method, 2, {}, 0, (7, groups))[0]
        for group in range(groups):
            assert lived(again, group) == by_hand[group]
            # What the group that did not save had done in steps 5, 6 and 7 is lost.
            assert last(again.folder, group)["tokens"] == (STEPS - 3 / 2) * 6 * 32
        assert told(again, "outer/syncs") == 3


def test_a_group_told_to_stop_while_it_waits_for_another_saves(tmp_path: Path) -> None:
    """The lighthouse still takes it for alive when it is started again, and names it beside one that is."""
    argv = (*ARGV, "checkpoint.every=100", *Method(4).keys())
    with fleet(tmp_path, *argv, min_groups=2, heartbeat_seconds=5.0) as found:
        found.start(0)
        found.start(1, troubles=[Trouble(7, "hold")])
        found.reach(8, 0)
        found.reach(7, 1)
        found.one_asks()
        found.stop(0)
        found.wait(0)
        found.stop(1)
        found.go(7)
        found.wait(1)
        assert [path.name for path in (found.folder / "checkpoints").iterdir()] == ["step_00000008"]
        found.start(0, 1)
        found.wait()
        assert told(found, "outer/syncs") == 3


def test_one_group_with_a_plain_outer_step_is_a_plain_run(ranks: RankPool, tmp_path: Path) -> None:
    plain = opened(*TINY, *ARGV, "data=synthetic", f"root={tmp_path / 'plain'}")
    assert ranks(1, live, plain) == [True]
    initial = (f"checkpoint.initial={plain / 'checkpoints/step_00000006'}",)
    for argv, first in (((), 1), (initial, 7)):
        with fleet(tmp_path / str(first), *ARGV, *argv, *PLAIN.keys(), groups=1) as found:
            found.start(0)
            found.wait()
            for name in ("loss", "grad_norm", "tokens"):
                expected = {step: value for step, value in series(plain, name).items() if step >= first}
                assert series(found.folder, name) == pytest.approx(expected, rel=1e-5), name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Life:
    """One group, streaming: a fragment leaves after steps 1, 4, 7 and 10 and is merged after 3, 6, 9 and 12."""
    with fleet(tmp_path_factory.mktemp("undisturbed"), *ARGV, *METHODS["streaming"].keys(), groups=1) as found:
        found.start(0)
        found.wait()
        return lived(found, 0)


@pytest.mark.parametrize(("signal_", "at", "saved"), [("KILL", 8, 6), ("TERM", 6, 7), ("TERM", 7, 10)])
def test_a_run_goes_on_to_the_same_bits(tmp_path: Path, undisturbed: Life, signal_: str, at: int, saved: int) -> None:
    with fleet(tmp_path, *ARGV, *METHODS["streaming"].keys(), groups=1) as found:
        found.start(0, troubles=[Trouble(at, "hold")])
        found.reach(at, 0)
        found.stop(0, signal.Signals[f"SIG{signal_}"])
        found.go(at)
        found.ended(0)
        found.start(0)
        found.wait()
        assert f"goes on after step {saved}, " in found.log(0)
        assert lived(found, 0) == undisturbed
        assert told(found, "outer/syncs") == 4
