"""Load balance of routed experts in one optimizer step, by layer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from math import log
from pathlib import Path

from src.storage.atomic_write import atomic_write

FOLDER = "expert_load"  # pictures, in the run folder


@dataclass(frozen=True)
class LayerLoad:
    """Rows that each routed expert of one layer received in a step, over all ranks."""

    rows: Sequence[int]  # that each expert got
    bias_norm: float  # of the biases that balance loads; 2-norm
    travel_ms: tuple[float, float] | None = None  # to the experts and back, of the slowest rank; None: they are here

    def values(self, asked: int) -> dict[str, float]:
        """`asked`: rows that the router was to place; a difference were tokens dropped, or counted twice."""
        total, experts = sum(self.rows), len(self.rows)
        shares = [count / total for count in self.rows if count] if total else []
        times = {} if self.travel_ms is None else dict(zip(("dispatch_ms", "combine_ms"), self.travel_ms, strict=True))
        return {
            "load_max_over_mean": max(self.rows) * experts / total if total else 0.0,
            "dead": float(sum(count == 0 for count in self.rows)),
            "entropy": -sum(share * log(share) for share in shares) / log(experts) if experts > 1 else 1.0,
            "bias_norm": self.bias_norm,
            "dropped": float(asked - total),
            **times,
        }


# Of a whole model: the layer that a person would look at, or all of them together.
WORST: Mapping[str, Callable[[list[float]], float]] = {
    "load_max_over_mean": max,
    "dead": sum,
    "entropy": min,
    "bias_norm": max,
    "dropped": sum,
    "dispatch_ms": sum,
    "combine_ms": sum,
}


@dataclass(frozen=True)
class ExpertLoad:
    """Load of all layers with experts, by layer number in the whole model."""

    layers: Mapping[int, LayerLoad]
    asked: int  # rows that each layer's router was to place: tokens * top_k
    forced: bool  # experts took turns; these figures are of no real training

    def values(self, *, layers: bool = True) -> dict[str, float]:
        """`experts/dead` of the model and, if `layers` are wanted, `experts/layer_07/dead` of each.

        load_max_over_mean: rows of the busiest expert over the mean. dead: experts without a row. entropy: of the
        shares of rows, over that of equal ones: 1 is even, 0 is one expert for all. dispatch_ms, combine_ms: of one
        forward pass, where rows travel between ranks.
        """
        each = {number: layer.values(self.asked) for number, layer in sorted(self.layers.items())}
        known = set().union(*each.values())
        found = {key: float(of([values[key] for values in each.values()])) for key, of in WORST.items() if key in known}
        found["force_load_balance"] = float(self.forced)
        if layers:
            found |= {f"layer_{number:02}/{key}": one for number, values in each.items() for key, one in values.items()}
        return {f"experts/{key}": one for key, one in found.items()}

    def draw(self, folder: Path, step: int) -> Path:
        """A heat map: layers down, experts across, each cell an expert's rows over the mean of its layer."""
        from matplotlib.figure import Figure

        numbers = sorted(self.layers)
        cells = [_over_mean(self.layers[number].rows) for number in numbers]
        size = (5.5 + min(12.0, 0.12 * len(cells[0])), 1.5 + 0.17 * len(cells))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(cells, aspect="auto", cmap="RdBu_r", vmin=0.0, vmax=2.0, interpolation="nearest")
        places = range(0, len(numbers), 1 + len(numbers) // 16)
        axes.set_yticks(places, labels=[str(numbers[place]) for place in places])
        axes.set_xlabel("expert")
        axes.set_ylabel("layer")
        label = "forced balance, " if self.forced else ""
        axes.set_title(f"{label}step {step}", loc="left", fontsize=11, fontweight="bold")
        figure.colorbar(image, label="rows / mean", extend="max")
        path = folder / FOLDER / f"step_{step:08}.png"
        path.parent.mkdir(exist_ok=True)
        picture = BytesIO()
        figure.savefig(picture, format="png", dpi=100)
        atomic_write(path, picture.getvalue())
        return path


def _over_mean(rows: Sequence[int]) -> list[float]:
    mean = sum(rows) / len(rows)
    return [count / mean if mean else 0.0 for count in rows]
