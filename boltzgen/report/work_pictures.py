"""Pictures of free energy differences from works: arrays in, PNG files out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from boltzgen.report.style import FLOW_COLOUR, MARK_COLOUR, MD_COLOUR, REWEIGHTED_COLOUR, picture

_BINS = 60
#: Panels in a row.
_ABREAST = 3


def work_histograms(
    path: Path, *, panels: Sequence[tuple[str, np.ndarray, np.ndarray, float]], work: str = "work", crossing: str = "difference"
) -> Path:
    """Works from A to B beside minus those from B to A; where the true densities cross lies the difference (Crooks).

    Args:
        path: PNG to write.
        panels: Title, forward works ``[n]``, reverse works ``[m]`` and the difference, in kT. One direction may be empty.
        work: What the works are called.
        crossing: What the value is called where they cross.

    Returns:
        ``path``.
    """
    columns, rows = min(len(panels), _ABREAST), -(-len(panels) // _ABREAST)
    with picture(path, columns=columns, rows=rows, width=4.3 * columns, height=3.1 * rows) as (_, axes):
        for axis in axes[len(panels) :]:
            axis.remove()
        for axis, (title, forward, reverse, difference) in zip(axes, panels, strict=False):
            ahead, back = forward[np.isfinite(forward)], -reverse[np.isfinite(reverse)]
            both = np.concatenate([ahead, back])
            low, high = np.quantile(both, [0.002, 0.998]) if len(both) else (-1.0, 1.0)
            margin = 0.05 * (high - low) + 1e-6
            edges = np.linspace(low - margin, high + margin, int(np.clip(2 * len(both) ** 0.5, 8, _BINS)) + 1)
            for values, colour, label in ((ahead, REWEIGHTED_COLOUR, "A to B"), (back, FLOW_COLOUR, "B to A, minus")):
                if len(values):
                    axis.hist(values, edges.tolist(), density=True, histtype="stepfilled", color=colour, alpha=0.3, label=label)
                    axis.hist(values, edges.tolist(), density=True, histtype="step", color=colour, lw=1.4)
            if np.isfinite(difference):
                axis.axvline(difference, color=MARK_COLOUR, lw=1.4, ls="--", label=crossing)
            axis.set(title=title, xlabel=f"{work} / kT", ylabel="probability density")
            axis.legend(loc="best")
    return path


def bounds_over_training(path: Path, *, rows: Sequence[Mapping[str, float]], difference: float) -> Path:
    """Both bounds against the step of training: of training rows, and of a few held-out ones.

    Args:
        path: PNG to write.
        rows: Logged steps with ``step`` and any of ``forward_work reverse_work upper_bound lower_bound`` in kT.
        difference: The estimate, in kT.

    Returns:
        ``path``.
    """
    curves = (
        ("forward_work", 1, "upper, training", REWEIGHTED_COLOUR, ":"), ("reverse_work", -1, "lower, training", FLOW_COLOUR, ":"),
        ("upper_bound", 1, "upper, held out", REWEIGHTED_COLOUR, "-"), ("lower_bound", 1, "lower, held out", FLOW_COLOUR, "-"),
    )  # fmt: skip
    with picture(path, width=5.4, height=3.1) as (_, (axis,)):
        for key, sign, label, colour, dashes in curves:
            points = [(row["step"], sign * row[key]) for row in rows if isinstance(row.get(key), float) and np.isfinite(row[key])]
            if points:
                axis.plot(*zip(*points, strict=True), color=colour, ls=dashes, marker="." if len(points) < 3 else "", label=label)
        if np.isfinite(difference):
            axis.axhline(difference, color=MARK_COLOUR, lw=1.2, ls="--", label="estimate")
        held_out = [row[key] for row in rows for key in ("upper_bound", "lower_bound") if np.isfinite(row.get(key, np.nan))]
        if len(held_out) > 1:  # one bad batch of training would hide the rest
            margin = 0.3 * (max(held_out) - min(held_out)) + 0.1
            axis.set_ylim(min(held_out) - margin, max(held_out) + margin)
        axis.set(xlabel="step of training", ylabel="bound of the difference / kT")
        axis.legend(loc="best", ncols=2)
    return path


def convergence_plot(path: Path, *, curves: Mapping[str, Sequence[float]]) -> Path:
    """The estimate of growing shares of the data, from the start and from the end, with bands of two standard errors.

    Args:
        path: PNG to write.
        curves: ``shares from_start from_end from_start_error from_end_error``, each ``[k]``.

    Returns:
        ``path``.
    """
    shares = 100 * np.asarray(curves["shares"])
    with picture(path, width=5.4, height=3.1) as (_, (axis,)):
        for key, label, colour in (("from_start", "first rows", REWEIGHTED_COLOUR), ("from_end", "last rows", FLOW_COLOUR)):
            _band(axis, shares, *(np.asarray(curves[name], dtype=np.float64) for name in (key, f"{key}_error")), colour=colour, label=label)
        axis.set(xlabel="share of the data / %", ylabel="difference / kT")
        axis.legend(loc="best")
    return path


def overlap_matrices(path: Path, *, panels: Sequence[tuple[str, float, int, int]]) -> Path:
    """Which state a configuration of each state is taken for, the overlap matrix of two states.

    Args:
        path: PNG to write.
        panels: Title, overlap 1 − λ₂, and the numbers of rows of A and of B.

    Returns:
        ``path``.
    """
    with picture(path, columns=len(panels), width=2.7 * len(panels), height=2.6) as (_, axes):
        for axis, (title, overlap, n_a, n_b) in zip(axes, panels, strict=True):
            to_b, to_a = overlap * n_b / (n_a + n_b), overlap * n_a / (n_a + n_b)
            matrix = np.array([[1 - to_b, to_b], [to_a, 1 - to_a]])
            axis.imshow(matrix, cmap="Blues", vmin=0, vmax=1)
            for (row, column), value in np.ndenumerate(matrix):
                axis.text(column, row, f"{value:.3f}", ha="center", va="center", color="white" if value > 0.6 else MD_COLOUR)
            axis.set(
                title=title,
                xticks=[0, 1],
                yticks=[0, 1],
                xticklabels=["A", "B"],
                yticklabels=["A", "B"],
                xlabel="taken for",
                ylabel="made in",
            )
    return path


def _band(axis: Axes, x: np.ndarray, y: np.ndarray, error: np.ndarray, *, colour: str, label: str) -> None:
    axis.fill_between(x, y - 2 * error, y + 2 * error, color=colour, alpha=0.22, lw=0)
    axis.plot(x, y, color=colour, label=label, marker=".")
