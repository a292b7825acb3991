"""What a plan says of a model whose tokens choose experts."""

import pytest

from src.errors import PlanError
from src.models.deepseek_v3.config import DeepseekV3Config
from src.planning.plan import plan
from tests.train.runs import changed, make_run, section


def forced() -> DeepseekV3Config:
    config: DeepseekV3Config = section("model", "deepseek_v3_debug")
    return config.model_copy(update={"moe": changed(config.moe, force_load_balance=True)})


def test_figures_of_forced_routing_are_labelled() -> None:
    assert any("force_load_balance=true" in line for line in plan(make_run(model=forced())).warnings)
    assert not any("force_load_balance" in line for line in plan(make_run(model="deepseek_v3_debug")).warnings)


def test_grouped_products_are_compiled_in_bf16_only() -> None:
    assert plan(make_run(model="deepseek_v3_debug", compile="blocks", precision="bf16")).world == 1
    with pytest.raises(PlanError, match=r"compile\.blocks=true with precision\.compute=float32"):
        plan(make_run(model="deepseek_v3_debug", compile="blocks", precision="fp32"))
    assert plan(make_run(model="llama3_debug", compile="blocks", precision="fp32")).world == 1


def test_active_parameters_are_told() -> None:
    answers = plan(make_run(model="deepseek_v3_16b", precision="bf16"))
    assert (answers.parameters, answers.active_parameters) == (15_706_484_224, 2_661_150_208)
