"""Lion against its paper's program, written in float64."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from src.optim.lion import Lion
from src.optim.state import scale_learning_rates
from tests.optim.test_adamw import CPU, gradients, network
from tests.train.runs import changed, section


def lion(**changes: Any) -> Lion:
    found: Lion = changed(section("optim", "lion"), **changes)
    return found


def by_hand(steps: int, beta1: float, beta2: float, lr: float, weight_decay: float) -> dict[str, torch.Tensor]:
    """Chen et al. 2023, program 1: the update from the old momentum, then the new one."""
    model = network()
    weights = {name: each.detach().double() for name, each in model.named_parameters()}
    momenta = {name: torch.zeros_like(each) for name, each in weights.items()}
    for step in range(steps):
        gradients(model, step)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradient, rate = parameter.grad.double(), lr / (step + 1)
                direction = torch.sign(beta1 * momenta[name] + (1 - beta1) * gradient)
                weights[name] = weights[name] - rate * (direction + weight_decay * weights[name])
                momenta[name] = beta2 * momenta[name] + (1 - beta2) * gradient
    return weights


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_equals_the_program_of_the_paper(moments: str) -> None:
    keys = {"beta1": 0.8, "beta2": 0.95, "lr": 1e-2, "weight_decay": 0.3}
    model = network()
    optimizer = lion(moments=moments, **keys).build(model.named_parameters(), CPU)
    for step in range(6):
        scale_learning_rates(optimizer, 1.0 / (step + 1))
        gradients(model, step)
        optimizer.step()
    expected, start = by_hand(6, **keys), dict(network().named_parameters())
    for name, weight in model.named_parameters():
        differs = (weight.double() - expected[name]).abs()
        if moments == "float32":
            assert differs.max() < 1e-6, name
        else:  # a rounded momentum may turn a sign that is near zero: few weights, by two steps at most
            assert (differs > 1e-6).float().mean() < 0.05, name
        assert name.startswith("frozen") or not torch.equal(weight, start[name])


def test_a_momentum_that_would_never_fall_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"beta2=0.999 never decays in moments=bfloat16"):
        lion(moments="bfloat16", beta2=0.999)
    assert lion(beta2=0.999).smaller_state() is None
    smaller = lion().smaller_state()
    assert smaller == ("optim.moments=bfloat16", lion(moments="bfloat16"))
