"""Compares the figures of a layout with those of one device: relative errors, tolerances, a verdict. Arithmetic
only.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import inf, isfinite, sqrt
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from src.distributed.precision.config import Dtype

SHOWN = 12  # parameters in the table; the certificate has them all

# A gradient far below the others is the small difference of large sums: its rounding is judged against this share of
# the root mean square of all parameters' norms.
SMALL = 0.1
# Every step sees the same rows, which a wide model knows by heart after one (Llama 3 8B with 4 layers: from 12.2 to
# 0.001 nats). A loss that has fallen below this share of the first one is judged against the share.
KNOWN = 0.5


@dataclass(frozen=True)
class Tolerances:
    """Largest relative differences that reordering the same sums may cause."""

    loss: float
    grad_norm: float
    gradient: float  # norm of one parameter's, in the first step
    direction: float  # of the same: see `Gradient`
    load: float  # share of a layer's choices of experts that fall on other experts, in one step
    why: str


TOLERANCES: dict[Dtype | Literal["float8"], Tolerances] = {
    "float32": Tolerances(
        loss=2e-5,
        grad_norm=5e-4,
        gradient=1e-4,
        direction=1e-4,
        load=1e-2,
        why="fp32 sums in another order differ by some 1e-6 in the first step; then an optimizer that normalises, by a "
        "moment or to a sign, magnifies what is near zero, step by step. A wrong reduction is off by 1e-2 and more.",
    ),
    "bfloat16": Tolerances(
        loss=5e-3,
        grad_norm=5e-2,
        gradient=5e-2,
        direction=1.5e-1,
        load=1e-1,
        why="bf16 keeps 8 bits (4e-3): another kernel, cut or order of sums rounds each activation anew, and a "
        "gradient is some hundred such roundings deep, 2e-2 to 4e-2 of it. A norm averages that out; one product with "
        "a random tensor differs by a normal variable of that size, the worst of many by four times as much. "
        "A wrong sum over two ranks halves a norm, and wrong rows or signs move most directions by 1 and more.",
    ),
    "float8": Tolerances(
        loss=1e-2,
        grad_norm=1e-1,
        gradient=1e-1,
        direction=6e-1,
        load=3e-1,
        why="e4m3 keeps 4 bits and e5m2 3: rounding is 2.7e-2 and 5.3e-2 of a number (root mean square), so a product "
        "that sums a weight's gradient is off by 5.9e-2, and by 9.3e-2 where one scale for a tensor leaves its small "
        "numbers fewer bits; deeper models add little. A cut sequence has other largest values, so other scales, and "
        "every number rounds anew: two gradients are sqrt(2) * 9.3e-2 = 1.3e-1 apart. A direction is a normal variable "
        "of that size, beyond 4.5 times as much once in 150,000 figures; a norm averages it out, to 1e-2. "
        "A wrong sum over two ranks halves a norm, and wrong rows or signs move most directions by 1 and more.",
    ),
}
# Biases are fp32 whatever the precision: sums of a few equal steps, so far apart by rounding, in steps.
BIAS_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Gradient:
    """Norm of one parameter's gradient, and its product with a fixed random tensor."""

    norm: float
    direction: float  # its product with a fixed random tensor: sees order and sign, which a norm does not


@dataclass(frozen=True)
class LayerRouting:
    """The experts of one layer on one rank."""

    loads: tuple[tuple[int, ...], ...]  # tokens of each expert over all ranks, step by step
    bias: tuple[float, ...]  # that balances each expert, after the last step
    rate: float | None  # step of a bias; None: the layer is not balanced


@dataclass(frozen=True)
class Trace:
    """Losses, norms and gradients of a few steps, over all ranks."""

    losses: list[float]
    grad_norms: list[float]  # before clipping
    gradients: dict[str, Gradient]  # of the first step, before clipping, by parameter
    routing: Mapping[str, Sequence[LayerRouting]] = field(default_factory=dict)  # by layer, of each rank that has it


@dataclass(frozen=True)
class Difference:
    """One figure in the layout and on the single device."""

    kind: str  # loss, grad_norm, gradient, direction, load or bias
    name: str  # a step, a parameter or a layer
    value: float
    expected: float
    error: float  # relative
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # a nan passes nothing

    @property
    def rank(self) -> float:
        """Sort key: larger is worse, and non-finite worst."""
        return self.error if isfinite(self.error) else inf


def compare(layout: Trace, single: Trace, tolerances: Tolerances) -> list[Difference]:
    """The difference of every figure, in the order of steps and parameters."""
    return [
        *_by_step("loss", layout.losses, single.losses, tolerances.loss, least=KNOWN * abs(single.losses[0])),
        *_by_step("grad_norm", layout.grad_norms, single.grad_norms, tolerances.grad_norm),
        *_by_parameter(layout.gradients, single.gradients, tolerances),
        *_by_layer(layout.routing, single.routing, tolerances),
    ]


def _by_step(
    kind: str, layout: Sequence[float], single: Sequence[float], tolerance: float, least: float = 0.0
) -> Iterator[Difference]:
    for step, (value, expected) in enumerate(zip(layout, single, strict=True), start=1):
        error = abs(value - expected) / max(abs(expected), least)
        yield Difference(kind, f"step {step}", value, expected, error, tolerance)


def _by_parameter(
    layout: dict[str, Gradient], single: dict[str, Gradient], tolerances: Tolerances
) -> Iterator[Difference]:
    assert layout.keys() == single.keys(), "both have every parameter of the model"
    least = SMALL * sqrt(sum(gradient.norm**2 for gradient in single.values()) / len(single))
    for name, expected in single.items():
        value, scale = layout[name], max(expected.norm, least)
        error = abs(value.norm - expected.norm) / scale
        yield Difference("gradient", name, value.norm, expected.norm, error, tolerances.gradient)
        error = abs(value.direction - expected.direction) / scale
        yield Difference("direction", name, value.direction, expected.direction, error, tolerances.direction)


def _by_layer(
    layout: Mapping[str, Sequence[LayerRouting]], single: Mapping[str, Sequence[LayerRouting]], tolerances: Tolerances
) -> Iterator[Difference]:
    """Of the rank that is furthest off. Loads are held against those of one device; biases against the rule and the
    loads that the rank itself counted, since a token that rounding sends to another expert may turn a bias around.
    """
    assert layout.keys() == single.keys(), "both have every layer with experts"
    for name, (alone, *_) in single.items():
        loads = (
            _load(step, there) for each in layout[name] for step, there in zip(each.loads, alone.loads, strict=True)
        )
        error, value, expected = max(loads)
        yield Difference("load", name, value, expected, error, tolerances.load)
        error, value, expected = max(_bias(each) for each in layout[name])
        yield Difference("bias", name, value, expected, error, BIAS_TOLERANCE)


def _load(here: Sequence[int], there: Sequence[int]) -> tuple[float, float, float]:
    """Share of choices that fall on other experts, and both loads of the expert that differs most. All of them where
    not as many choices were counted: no rounding changes that.
    """
    moved = sum(abs(mine - other) for mine, other in zip(here, there, strict=True)) / 2
    share = moved / sum(there) if sum(here) == sum(there) else 1.0
    return share, *_furthest(here, there)


def _bias(layer: LayerRouting) -> tuple[float, float, float]:
    """Distance from arXiv 2408.15664, algorithm 1, in steps of a bias, with the mean step of all experts taken off;
    and the bias that is furthest off, as it is and as it should be.
    """
    expected = [0.0] * len(layer.bias)
    for loads in layer.loads if layer.rate is not None else ():
        mean = sum(loads) / len(loads)
        signs = [(load < mean) - (load > mean) for load in loads]
        drift = sum(signs) / len(signs)
        expected = [bias + (layer.rate or 0.0) * (sign - drift) for bias, sign in zip(expected, signs, strict=True)]
    value, right = _furthest(layer.bias, expected)
    return _distance(value, right) / (layer.rate or 1.0), value, right


def _furthest(here: Sequence[float], there: Sequence[float]) -> tuple[float, float]:
    return max(zip(here, there, strict=True), key=lambda pair: _distance(*pair))


def _distance(here: float, there: float) -> float:
    """Infinite where one is no number: a maximum might pass over a nan."""
    return abs(here - there) if isfinite(here - there) else inf


@dataclass(frozen=True)
class Certificate:
    """Result of task=verify, written to certificate.json."""

    facts: dict[str, Any]  # config, layout, versions, device
    tolerances: Tolerances
    differences: list[Difference]

    @property
    def failed(self) -> list[Difference]:
        """Figures beyond their tolerance, worst first."""
        return sorted((each for each in self.differences if not each.passed), key=lambda each: -each.rank)

    def worst(self, *kinds: str) -> float:
        """The largest relative error among figures of these kinds."""
        return max(each.rank for each in self.differences if each.kind in kinds)

    def to_dict(self) -> dict[str, Any]:
        """What certificate.json holds."""
        return {
            "verdict": "failed" if self.failed else "passed",
            "largest_error": {kind: self.worst(kind) for kind in dict.fromkeys(each.kind for each in self.differences)},
            **self.facts,
            "tolerances": asdict(self.tolerances),
            "figures": [asdict(each) | {"passed": each.passed} for each in self.differences],
        }

    def problem(self) -> str:
        """One line: how many figures are beyond tolerance, and the worst."""
        named = dict.fromkeys(f"{each.kind} of {each.name} by {each.error:.1e}" for each in self.failed)
        some = ", ".join(list(named)[:SHOWN])
        return f"{len(self.failed)} of {len(self.differences)} figures are beyond their tolerance: {some}"

    def tables(self) -> tuple[Table, ...]:
        """Tables of steps in order, of parameters, worst first, and of the layers with experts in order."""
        parameters = [each for each in self.differences if each.kind in ("gradient", "direction")]
        parameters.sort(key=lambda each: -each.rank)
        steps = [each for each in self.differences if each.kind in ("loss", "grad_norm")]
        layers = [each for each in self.differences if each.kind in ("load", "bias")]
        title = f"gradients of step 1, the worst {min(SHOWN, len(parameters))} of {len(parameters)} figures"
        experts = (figures_table("tokens and biases of the experts that differ most", layers),) if layers else ()
        return figures_table("steps", steps), figures_table(title, parameters[:SHOWN]), *experts


def figures_table(title: str, rows: list[Difference]) -> Table:
    """A row for each, no wider than the terminal that it is printed on, from 76 columns on."""
    table = Table(title=title, title_justify="left")
    table.add_column("figure", no_wrap=True)
    table.add_column("of", overflow="fold")  # names of parameters go on below, on a narrow terminal
    for heading in ("layout", "one device", "error", "tolerance", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        verdict = Text("ok") if row.passed else Text("WRONG", style="bold red")
        numbers = (f"{row.value:.6g}", f"{row.expected:.6g}", f"{row.error:.1e}", f"{row.tolerance:.0e}")
        table.add_row(row.kind, row.name, *numbers, verdict)
    return table
