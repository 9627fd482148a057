"""The look of every picture: colours that colour-blind readers can tell apart, light axes, one size of type."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # the backend is chosen first
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from boltzgen.files import written

#: Okabe–Ito colours, one meaning each in all pictures.
MD_COLOUR, FLOW_COLOUR, REWEIGHTED_COLOUR, MARK_COLOUR = "#333333", "#E69F00", "#0072B2", "#D55E00"
#: Colours of things that have no meaning but to be different.
DIFFERENT_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#333333", "#B8A900")

DPI = 200
#: What to do about a picture or page that cannot be written.
REMEDY = "free some space or make its folder writable"

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlepad": 7,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.edgecolor": "#555555",
    "axes.labelcolor": "#222222",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


@contextmanager
def picture(
    path: Path, *, columns: int = 1, rows: int = 1, width: float, height: float, share: bool = False
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure with rows of axes, written to a PNG when the block ends.

    Args:
        path: File to write.
        columns: Number of axes side by side.
        rows: Number of axes above each other; the axes come row by row.
        width: Width in inches.
        height: Height in inches.
        share: Whether the axes share both scales.

    Raises:
        OutputError: If it cannot be written.
    """
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False, sharex=share, sharey=share, layout="constrained")
        try:
            yield figure, list(axes.flat)
            with written(path, remedy=REMEDY) as partial:
                figure.savefig(partial, dpi=DPI, format="png")
        finally:
            plt.close(figure)


def symbol(name: str) -> str:
    """A coordinate's name for people: Greek letters for the usual dihedrals, and no underscores."""
    greek = {"phi": "φ", "psi": "ψ", "omega": "ω", "chi": "χ"}
    head = name.split("_")[0].rstrip("0123456789")
    return (greek[head] + name[len(head) :] if head in greek else name).replace("_", " ")


def labelled(name: str, unit: str) -> str:
    """Label of an axis in ``rad`` (drawn in degrees), ``nm``, or ``1`` without a unit."""
    return symbol(name) if unit == "1" else f"{symbol(name)} / {'degree' if unit == 'rad' else unit}"


def degree_ticks(axis: Axes, *, both: bool = False) -> None:
    """Limits and ticks of an axis that holds the whole circle in degrees; with ``both``, of both axes."""
    axis.set_xlim(-180, 180)
    axis.xaxis.set_major_locator(MultipleLocator(90))
    if both:
        axis.set_ylim(-180, 180)
        axis.yaxis.set_major_locator(MultipleLocator(90))
