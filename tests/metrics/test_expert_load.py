"""Figures of a layer's experts against numbers worked out on paper."""

from math import log
from pathlib import Path

import pytest
from matplotlib.image import imread
from numpy import unique

from src.metrics.expert_load import ExpertLoad, LayerLoad

EVEN, LOPSIDED = LayerLoad([6, 6, 6, 6], bias_norm=0.0), LayerLoad([18, 0, 6, 0], bias_norm=0.25)


def test_a_layer_by_hand() -> None:
    values = LOPSIDED.values(asked=25)
    assert values.pop("entropy") == pytest.approx(-(0.75 * log(0.75) + 0.25 * log(0.25)) / log(4))
    assert values == {"load_max_over_mean": 3.0, "dead": 2.0, "bias_norm": 0.25, "dropped": 1.0}


def test_even_loads_have_entropy_one_and_a_single_expert_zero() -> None:
    assert EVEN.values(24)["entropy"] == pytest.approx(1.0)
    assert LayerLoad([0, 24, 0, 0], 0.0).values(24)["entropy"] == 0.0


def test_a_model_tells_of_its_worst_layer_and_of_each() -> None:
    values = ExpertLoad({12: LOPSIDED, 3: EVEN}, asked=24, forced=False).values()
    assert values["experts/load_max_over_mean"] == values["experts/layer_12/load_max_over_mean"] == 3.0
    assert values["experts/layer_03/load_max_over_mean"] == 1.0
    assert values["experts/entropy"] == values["experts/layer_12/entropy"] < values["experts/layer_03/entropy"]
    assert (values["experts/dead"], values["experts/dropped"], values["experts/bias_norm"]) == (2.0, 0.0, 0.25)
    assert values["experts/force_load_balance"] == 0.0
    assert ExpertLoad({3: EVEN}, asked=24, forced=True).values()["experts/force_load_balance"] == 1.0


def test_travels_add_up_over_the_layers_of_a_model() -> None:
    layers = {layer: LayerLoad([6, 6], 0.0, travel_ms=(1.5, 0.5 * layer)) for layer in (1, 2)}
    values = ExpertLoad(layers, asked=12, forced=False).values()
    assert (values["experts/dispatch_ms"], values["experts/combine_ms"]) == (3.0, 1.5)
    assert values["experts/layer_02/combine_ms"] == 1.0
    assert "experts/dispatch_ms" not in ExpertLoad({1: EVEN}, asked=24, forced=False).values()


@pytest.mark.parametrize(("layers", "experts"), [(1, 8), (58, 256)])
def test_a_picture_has_a_cell_for_each_expert(tmp_path: Path, layers: int, experts: int) -> None:
    rows = [expert % 3 for expert in range(experts)]
    load = ExpertLoad({layer: LayerLoad(rows, 0.0) for layer in range(3, 3 + layers)}, sum(rows), forced=False)
    path = load.draw(tmp_path, 70)
    assert path == tmp_path / "expert_load" / "step_00000070.png"
    colours = (255 * imread(path)).round().astype("uint8").view("uint32")
    assert len(unique(colours)) >= 4
