"""A run with multi-token prediction records its loss beside the main one, and follows the schedule of its weight."""

from pathlib import Path
from unittest.mock import patch

from src.models.decoder import Decoder
from tests.end_to_end.lives import TINY, live, opened, records, write_text
from tests.ranks import RankPool

KEYS = (
    *(each for each in TINY if not each.startswith(("model.n_kv_heads", "model.multiple_of"))),
    *("model=deepseek_v3_debug", "model.ffn_dim=32", "model.kv_lora_rank=16", "model.qk_nope_head_dim=8"),
    *("model.qk_rope_head_dim=8", "model.v_head_dim=8", "model.moe.hidden_dim=16", "task.steps=4"),
    "checkpoint.every=null",
)


def lived(folder: Path) -> list[float]:
    """A rank's life; the weight before each step."""
    weights: list[float] = []
    before_step = Decoder.before_step

    def watched(model: Decoder, step: int, steps: int) -> None:
        before_step(model, step, steps)
        weights.extend([] if model.mtp is None else [round(model.mtp.weight.item(), 6)])

    with patch.object(Decoder, "before_step", watched):
        assert live(folder) is True
    return weights


def test_its_loss_is_recorded_and_its_weight_changes(ranks: RankPool, tmp_path: Path) -> None:
    argv = (*KEYS, *write_text(tmp_path), f"root={tmp_path / 'runs'}")
    folder = opened(*argv, "model.mtp.depths=1", "model.mtp.later_from=0.5")
    assert ranks(1, lived, folder) == [[0.3, 0.3, 0.1, 0.1]]
    lines = [line for line in records(folder) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(4 < line["mtp_loss"] < 7 for line in lines), "ln 258 is 5.6"
    assert all(line["mtp_loss"] != line["loss"] for line in lines)
    assert {"experts/layer_01/dead", "experts/layer_02/dead"} <= lines[-1].keys()
    plain = opened(*argv)
    assert ranks(1, lived, plain) == [[]]
    assert not any("mtp_loss" in line for line in records(plain))
