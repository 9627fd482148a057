"""Pictures of walkers that jump: arrays in, PNG files out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator

from boltzgen.report.style import FLOW_COLOUR, MARK_COLOUR, MD_COLOUR, REWEIGHTED_COLOUR, picture, symbol

_COLOURS = (REWEIGHTED_COLOUR, FLOW_COLOUR, MARK_COLOUR, MD_COLOUR)
#: Most walkers that are drawn.
MOST_WALKERS = 12


def acceptance_by_round(path: Path, *, jumps: Sequence[float], local: Sequence[float], production: tuple[float, float]) -> Path:
    """Share of accepted jumps and local moves in every round of adaptation, and in production.

    Args:
        path: PNG to write.
        jumps: Share of accepted jumps in every round; NaN where there were none.
        local: Share of accepted local moves in every round.
        production: Both in production.

    Returns:
        ``path``.
    """
    rounds = np.arange(1, len(jumps) + 1)
    with picture(path, width=5.4, height=3.1) as (_, (axis,)):
        for values, last, colour, label in (
            (local, production[1], MD_COLOUR, "local moves"),
            (jumps, production[0], REWEIGHTED_COLOUR, "jumps"),
        ):
            axis.plot(rounds, values, "o-", color=colour, label=label)
            axis.plot([len(jumps) + 1], [last], "s", color=colour, ms=7)
        axis.axvspan(len(jumps) + 0.5, len(jumps) + 1.5, color="#EEEEEE", lw=0)
        axis.text(len(jumps) + 1, 1.01, "production", ha="center", va="bottom", fontsize=8, color="#666666")
        axis.set(xlabel="round", ylabel="accepted, fraction", xlim=(0.5, len(jumps) + 1.5), ylim=(0, 1))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(loc="center left")
    return path


def walker_traces(path: Path, *, values: np.ndarray, name: str, unit: str, n_adaptation: int) -> Path:
    """A collective variable of the walkers against cycles; the shaded part is adaptation.

    Args:
        path: PNG to write.
        values: Values after every cycle, adaptation first ``[c, w]``; the first walkers are drawn.
        name: Name of the variable.
        unit: Its unit; angles are drawn in degrees.
        n_adaptation: Cycles of adaptation.

    Returns:
        ``path``.
    """
    shown = np.degrees(values) if unit == "rad" else values
    with picture(path, width=5.4, height=3.1) as (_, (axis,)):
        axis.axvspan(0, n_adaptation, color="#EEEEEE", lw=0, label="adaptation")
        for k in range(min(MOST_WALKERS, shown.shape[1])):
            axis.plot(np.arange(1, len(shown) + 1), shown[:, k], ".", ms=1.6, color=_COLOURS[k % len(_COLOURS)], rasterized=True)
        label = "degree" if unit == "rad" else unit
        axis.set(xlabel="cycle", ylabel=symbol(name) if unit == "1" else f"{symbol(name)} / {label}", xlim=(0, len(shown)))
        if unit == "rad" and shown.min() < 0:
            axis.set(ylim=(-180, 180), yticks=[-180, -90, 0, 90, 180])
    return path
