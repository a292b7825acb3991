"""How figures for papers look, and how they are saved: the same bytes for the same numbers."""

from io import BytesIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Type 42: conferences refuse type 3 fonts; text of an SVG stays text. The salt makes the ids of an SVG the same every
# time.
LOOK: dict[str, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "ropewalk",
}
_DATES = {"pdf": "CreationDate", "svg": "Date"}  # what would make two files of the same numbers differ


def saved(figure: "Figure", form: str) -> bytes:
    """The picture as pdf, png or svg, within the style that it was drawn with."""
    picture = BytesIO()
    figure.savefig(picture, format=form, metadata={_DATES[form]: None} if form in _DATES else None)
    return picture.getvalue()
