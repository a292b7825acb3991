"""The certificate of task=verify by itself: what it compares, and how it looks."""

from dataclasses import replace

import pytest
from rich.console import Console

from src.errors import VerdictError
from src.tasks.verify.certificate import TOLERANCES, Difference, Gradient, Trace, compare, figures_table


def test_a_loss_that_is_known_by_heart_is_judged_by_the_first() -> None:
    """Figures of Llama 3 8B with 4 layers on an H200, whole and compiled: rounding, and then a wrong update."""
    gradients = {"a": Gradient(1.0, 0.5)}
    whole = Trace([12.2357, 0.000962205, 0.0668071, 0.131988, 0.0145541], [2.14] * 5, gradients)
    compiled = Trace([12.2357, 0.000949166, 0.0662888, 0.127149, 0.0133033], [2.14] * 5, gradients)
    assert all(each.passed for each in compare(compiled, whole, TOLERANCES["bfloat16"]))
    wrong = replace(compiled, losses=[*compiled.losses[:3], 0.19, 0.0133033])
    failed = [each for each in compare(wrong, whole, TOLERANCES["bfloat16"]) if not each.passed]
    assert [(each.kind, each.name) for each in failed] == [("loss", "step 4")]
    assert failed[0].error == pytest.approx((0.19 - 0.131988) / (12.2357 / 2))


def test_a_verdict_is_no_fault_of_the_command() -> None:
    assert VerdictError("no").exit_code == 1


@pytest.mark.parametrize("width", [80, 100, 160])
def test_a_table_of_figures_fits_the_terminal(width: int) -> None:
    name = "layers.11.moe.experts.w1_of_every_expert.weight"
    row = Difference("direction", name, 4.76713e-05, 4.76713e-05, 0.0, 1e-4)
    with (screen := Console(width=width)).capture() as drawn:
        screen.print(figures_table("gradients of step 1", [row]))
    lines = drawn.get().splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in drawn.get()
    assert "".join(line.split("│")[2].strip() for line in lines if "│" in line) == name
