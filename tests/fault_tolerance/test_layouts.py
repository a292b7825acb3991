"""Groups in layouts that cut the model take the steps of one device that has all the data, healed and apart."""

from itertools import product
from pathlib import Path

import pytest

from tests.end_to_end.lives import TINY
from tests.fault_tolerance.by_hand import Method, simulate
from tests.fault_tolerance.life import Trouble
from tests.fault_tolerance.lives import Fleet, account, audited, fleet, last, losses
from tests.ranks import RankPool

STEPS, BATCH, WORLD = 8, 4, 2
ARGV = (f"task.steps={STEPS}", f"task.global_batch={BATCH}", "checkpoint=none")
BAND = 1e-4  # relative: sums over groups and ranks are made in another order
DEEPSEEK = (
    *(key for key in TINY if not key.startswith(("model.n_kv", "model.multiple"))),
    *("model=deepseek_v3_debug", "model.kv_lora_rank=16", "model.qk_nope_head_dim=8", "model.qk_rope_head_dim=8"),
    *("model.v_head_dim=8", "model.ffn_dim=32", "model.moe.hidden_dim=32", "model.moe.load_balance_coeff=0.01"),
)
MODELS = {"llama": TINY, "deepseek": DEEPSEEK}
CASES = [
    ("llama", "tp2"),
    *(pytest.param("llama", layout, marks=pytest.mark.slow) for layout in ("pp2", "cp2")),
    pytest.param("deepseek", "fsdp2_ep2", marks=pytest.mark.slow),
    ("deepseek", "tp2_ep2"),
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, float]]:
    """By model, the losses of one device."""
    found = {}
    for model, tiny in MODELS.items():
        with fleet(tmp_path_factory.mktemp(model), *ARGV, groups=1, tiny=tiny) as alone:
            alone.start(0)
            alone.wait()
            found[model] = losses(alone.folder, 1)
    return found


def check_equal(found: Fleet) -> None:
    """Each rank of both groups has ended with the weights of its twin."""
    for rank in range(WORLD):
        ends = [last(found.folder, group, rank) for group in (0, 1)]
        assert ends[0] == ends[1]
        assert ends[0]["end"] == STEPS


def heal_a_late_one(found: Fleet) -> None:
    """The second group comes when the first has done two steps, takes over its state, and both end the run."""
    found.start(0, troubles=[Trouble(3, "hold")])
    found.reach(3, 0)
    found.start(1)
    found.one_asks()
    found.go(3)
    found.wait()
    assert "healed in" in found.log(1)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "layout"), CASES)
def test_a_late_group_is_healed_and_both_take_the_steps_of_one_run(
    tmp_path: Path, undisturbed: dict[str, dict[int, float]], model: str, layout: str
) -> None:
    with fleet(tmp_path, *ARGV, f"parallel={layout}", world=WORLD, tiny=MODELS[model]) as found:
        heal_a_late_one(found)
        assert losses(found.folder, 2) == pytest.approx(undisturbed[model], rel=BAND)
        check_equal(found)
        assert audited(found.folder, STEPS, BATCH, WORLD)


@pytest.mark.slow
def test_a_late_group_takes_over_muon_s_state(tmp_path: Path) -> None:
    """Without the other's momenta and moments of rows its next update would be another."""
    with fleet(tmp_path, *ARGV, "optim=normuon", "optim.lr=1e-2", "parallel=fsdp2", world=WORLD) as found:
        heal_a_late_one(found)
        assert list(losses(found.folder, 2)) == list(range(1, STEPS + 1))
        check_equal(found)
        assert audited(found.folder, STEPS, BATCH, WORLD)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "layout"), [("llama", "tp2"), ("deepseek", "fsdp2_ep2")])
def test_groups_apart_do_what_is_written_out(ranks: RankPool, tmp_path: Path, model: str, layout: str) -> None:
    method, tiny = Method(4), MODELS[model]
    with fleet(tmp_path, *ARGV, *method.keys(), f"parallel={layout}", min_groups=2, world=WORLD, tiny=tiny) as found:
        found.start(0, 1)
        found.wait()
        check_equal(found)
        (by_hand,) = ranks(1, simulate, found.folder, method, 2, {})
        for group, rank in product((0, 1), range(WORLD)):
            mine = [line["loss"] for line in account(found.folder, group, rank) if "counted" in line]
            assert mine == pytest.approx(by_hand[group].losses, rel=BAND)
