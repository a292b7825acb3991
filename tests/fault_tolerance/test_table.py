"""What every group of a quorum concludes alike, and what is refused before a group starts."""

from dataclasses import replace

import pytest
from pydantic import ValidationError

from src.errors import PlanError
from src.fault_tolerance.config import TorchFT
from src.fault_tolerance.table import Row, Table, Tally, share
from src.planning.plan import plan
from tests.train.runs import Gpus, changed, make_run, section

ROW = Row(0, led=False, leaving=False, history=5, lost=0, failures=0, heal_seconds=0.0, fresh=False, awaits=False)


def table(**columns: tuple[object, ...]) -> Table:
    count = len(next(iter(columns.values())))
    rows = [replace(ROW, **{name: values[index] for name, values in columns.items()}) for index in range(count)]
    return Table(tuple(rows))


@pytest.mark.parametrize(("size", "micro_batches"), [(1, 1), (2, 2), (3, 4), (3, 8), (4, 7), (5, 64)])
def test_shares_are_neighbours_and_differ_by_one_at_most(size: int, micro_batches: int) -> None:
    shares = [share(rank, size, micro_batches) for rank in range(size)]
    assert [number for each in shares for number in each] == list(range(micro_batches))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_who_speaks_goes_on_speaking() -> None:
    assert table(group=(1, 2, 3)).leader() == 1
    assert table(group=(0, 1, 2), led=(False, False, True)).leader() == 2
    assert table(group=(0, 1), healed=(True, False)).leader() == 1, "it knows what the dead leader had not recorded"
    assert table(group=(0, 1), healed=(True, True)).leader() == 0


def test_a_group_with_a_past_of_its_own_is_healed() -> None:
    together = table(history=(7, 7, 7))
    assert not together.split
    apart = table(history=(9, 7, 7))
    assert apart.split
    assert [apart.astray(row) for row in apart.rows] == [True, False, False]
    even = table(history=(9, 7))
    assert [even.astray(row) for row in even.rows] == [False, True]


def test_groups_without_a_state_do_not_begin_without_one_that_may_have_it() -> None:
    assert table(fresh=(True, True), awaits=(False, True)).premature
    assert not table(fresh=(True, True)).premature, "all that live are here"
    assert not table(fresh=(True, False), awaits=(True, False)).premature, "one of them has the state"


def test_totals_never_fall() -> None:
    """Of three groups one dies, comes back and counts anew, another stays away."""
    tally, totals = Tally(), []
    for counts in ({0: 1, 1: 2, 2: 1}, {0: 2, 2: 1}, {0: 2, 1: 0, 2: 1}, {0: 2, 1: 1}):
        groups = tuple(counts)
        lost, failures = tuple(counts.values()), tuple(2 * each for each in counts.values())
        tally = tally.after(table(group=groups, lost=lost, failures=failures).rows)
        totals.append((tally.lost, tally.failures))
    assert totals == [(4, 8), (5, 10), (5, 10), (6, 12)]


def test_who_stays_inherits() -> None:
    assert table(group=(0, 1), led=(True, False)).heir() == 0
    assert table(group=(0, 1), led=(True, False), leaving=(True, False)).heir() == 1
    assert table(group=(0, 1), leaving=(True, True)).heir() is None


def test_all_leave_only_together() -> None:
    assert table(leaving=(True, True)).all_leave
    assert not table(leaving=(True, False)).all_leave


def groups(count: int, **changes: object) -> TorchFT:
    return changed(section("fault_tolerance", "torchft"), groups=count, **changes)  # type: ignore[no-any-return]


def refusal(**arguments: object) -> str:
    devices = arguments.pop("devices", None)
    with pytest.raises(PlanError) as caught:
        plan(make_run(**arguments), devices=devices)  # type: ignore[arg-type]
    return "\n".join(caught.value.problems)


def test_what_cannot_work_is_told_with_a_way_out() -> None:
    eight = {"global_batch": 8, "micro_batch": 1}
    answers = plan(make_run(eight, fault_tolerance=groups(8)))
    assert (answers.groups, answers.world, answers.micro_batches) == (8, 1, 8)
    assert "a step is 8 micro-batches of a data rank" in (told := refusal(task=eight, fault_tolerance=groups(9)))
    assert "at most 8 groups" in told
    assert "min_groups=3 of fault_tolerance.groups=2" in refusal(task=eight, fault_tolerance=groups(2, min_groups=3))
    with pytest.raises(ValidationError, match=r"no address of a lighthouse; write http://myhost:29510, say"):
        groups(2, lighthouse="myhost:80")
    told = refusal(task=eight, parallel="fsdp2", fault_tolerance=groups(3), devices=Gpus(4, 80.0))
    assert "ask for 6 GPUs, there are 4; at most 2 groups" in told


def test_a_pipeline_is_checked_for_every_number_of_groups_that_may_be_there() -> None:
    four = {"global_batch": 4, "micro_batch": 1}
    folded = changed(section("parallel", "pp2"), pipeline_schedule="DualPipeV")
    assert plan(make_run(four, parallel=folded)).micro_batches == 4
    told = refusal(task=four, parallel=folded, fault_tolerance=groups(2))
    assert "DualPipeV needs at least as many micro-batches as its 4 stages" in told
