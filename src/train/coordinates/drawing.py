"""The coordinate check as a figure: a row for what is looked at, a column for each parametrization."""

from collections.abc import Sequence

from src.metrics.paper_style import LOOK, saved
from src.train.coordinates.check import Coordinates


def drawn(found: Sequence[Coordinates], form: str) -> bytes:
    """The bytes of a picture, the same for the same numbers; a line for each width, from cold to warm."""
    import matplotlib
    from matplotlib import style as styles
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        styles.use([LOOK])
        names = list(found[0].sizes)
        figure = Figure(figsize=(3.2 * len(found), 2.1 * len(names)), layout="constrained")
        panels = figure.subplots(len(names), len(found), squeeze=False, sharex=True, sharey="row")
        for row, what in enumerate(names):
            for column, each in enumerate(found):
                axes = panels[row][column]
                widths = each.sizes[what]
                colours = matplotlib.colormaps["viridis"]
                for number, (width, sizes) in enumerate(widths.items()):
                    colour = colours(0.9 * number / max(1, len(widths) - 1))
                    axes.plot(range(len(sizes)), sizes, marker="o", markersize=3, color=colour, label=str(width))
                axes.set_yscale("log")
                if row == 0:
                    axes.set_title(each.name)
                if row == len(names) - 1:
                    axes.set_xlabel("steps")
                if column == 0:
                    axes.set_ylabel(f"{what}, rms")
        panels[0][-1].legend(title="width", fontsize=8)
        return saved(figure, form)
