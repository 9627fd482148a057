"""Pictures of sampling by steered paths: arrays in, PNG files out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, MultipleLocator, PercentFormatter

from boltzgen.paths import PathFilm
from boltzgen.report.style import DIFFERENT_COLOURS, FLOW_COLOUR, MARK_COLOUR, MD_COLOUR, REWEIGHTED_COLOUR, labelled, picture, symbol

#: Free energies above this, in kT, are drawn as never visited.
_CEILING_KT = 8.0
#: Variables that get a panel; walkers that get a colour; panels in a row.
_MOST_VARIABLES, _MOST_WALKERS, _ABREAST = 6, len(DIFFERENT_COLOURS), 4
#: Median works above this, in kT, are drawn on a scale that is logarithmic beyond it.
_LARGE_WORK = 30.0
_SENT_COLOUR, _SHADE = "#009E73", "#EEEEEE"
_ACCEPTED = {True: ("accepted", REWEIGHTED_COLOUR), False: ("rejected", MARK_COLOUR)}


@dataclass(frozen=True)
class Variable:
    """A collective variable to draw.

    Attributes:
        name: Its name.
        unit: ``rad``, drawn in degrees, ``nm``, or ``1`` where it has none.
        period: Period in its unit, None where it has none.
        low: Where its axis starts.
        high: Where its axis ends.
    """

    name: str
    unit: str
    period: float | None
    low: float
    high: float

    @property
    def label(self) -> str:
        """Label of its axis."""
        return labelled(self.name, self.unit)

    def drawn(self, values: np.ndarray | float) -> np.ndarray:
        """Values in the unit of the axis."""
        return np.degrees(values) if self.unit == "rad" else np.asarray(values, dtype=np.float64)

    def scale(self, axis: Axes, *, vertical: bool = False, values: np.ndarray | None = None) -> None:
        """Label and limits of an axis, widened to ``values`` that lie beyond."""
        known = np.zeros(0) if values is None else values[np.isfinite(values)]
        low, high = min(self.low, known.min(initial=math.inf)), max(self.high, known.max(initial=-math.inf))
        margin = 0.0 if self.period else 0.03 * (high - low)
        limits = (float(self.drawn(low - margin)), float(self.drawn(high + margin)))
        axis.set(**({"ylabel": self.label, "ylim": limits} if vertical else {"xlabel": self.label, "xlim": limits}))
        if self.period and self.unit == "rad" and high - low > math.pi:
            (axis.yaxis if vertical else axis.xaxis).set_major_locator(MultipleLocator(90))


@dataclass(frozen=True)
class DensityPanel:
    """A proposal density beside what was sampled.

    Attributes:
        title: Title of the panel.
        variable: Over what.
        s: Values of the variable ``[g]``.
        proposal: Density of proposed values ``[g]``, per unit of the variable.
        sampled: Density of sampled values ``[g]``.
    """

    title: str
    variable: Variable
    s: np.ndarray
    proposal: np.ndarray
    sampled: np.ndarray


@dataclass(frozen=True)
class DensityMap:
    """A proposal over two variables beside what was sampled.

    Attributes:
        title: Title of the column.
        proposal: Density of proposed values ``[g, h]``; None where only draws of it are known.
        sent: Values that it drew ``[n, 2]``, drawn where the density is not known.
        sampled: Density of sampled values ``[g, h]``.
    """

    title: str
    proposal: np.ndarray | None
    sent: np.ndarray
    sampled: np.ndarray


@dataclass(frozen=True)
class RoundNumbers:
    """What the paths of one round did.

    Attributes:
        label: Number of the round, or ``production``.
        acceptance: Mean of min(1, e^{−w}), and its standard error.
        between: The same of paths that were sent from one basin to another; NaN where there was none.
        work: 10, 50 and 90 % quantiles of the work of paths that did not fail, in kT; NaN where there was none.
        n_failed: Paths that failed.
    """

    label: str
    acceptance: tuple[float, float]
    between: tuple[float, float]
    work: tuple[float, float, float]
    n_failed: int


@dataclass(frozen=True)
class FilmedPath:
    """A path to draw.

    Attributes:
        film: What was seen of it.
        w: Its work + ln ρ(λ₁) − ln ρ(λ₀) in kT; +inf where it failed.
        accepted: Whether it was accepted.
    """

    film: PathFilm
    w: float
    accepted: bool


def walkers_plot(
    path: Path, *, values: np.ndarray, n_adaptation: int, variables: Sequence[Variable], borders: Sequence[Sequence[float]]
) -> Path:
    """Variables of all walkers against the cycle; periodic ones as points. Adaptation is shaded, limits of basins are dashed.

    Args:
        path: PNG to write.
        values: After every cycle ``[c, w, k]``; k may be larger than the number of ``variables``, which are its first.
        n_adaptation: How many of the cycles are adaptation.
        variables: What to draw, one panel each; the first six.
        borders: Limits of basins, for every variable.

    Returns:
        ``path``.
    """
    shown = variables[:_MOST_VARIABLES]
    cycles = np.arange(1, len(values) + 1)
    colours = (REWEIGHTED_COLOUR,) if values.shape[1] > _MOST_WALKERS else DIFFERENT_COLOURS
    faint = min(1.0, 12 / values.shape[1])
    with picture(path, rows=len(shown), width=9.2, height=0.5 + 2.3 * len(shown)) as (_, axes):
        for column, (axis, variable) in enumerate(zip(axes, shown, strict=True)):
            if n_adaptation:
                axis.axvspan(0.5, n_adaptation + 0.5, color=_SHADE, lw=0, zorder=0)
            for walker, row in enumerate(variable.drawn(values[:, :, column]).T):
                style = (
                    {"ls": "", "marker": "o", "ms": _marker_size(row.size * values.shape[1]), "mew": 0} if variable.period else {"lw": 0.9}
                )
                axis.plot(cycles, row, color=colours[walker % len(colours)], alpha=max(0.25, 0.85 * faint), **style)  # type: ignore[arg-type]
            for border in sorted(set(borders[column])):
                axis.axhline(float(variable.drawn(border)), color=MARK_COLOUR, lw=1.1, ls="--")
            variable.scale(axis, vertical=True, values=None if variable.period else values[:, :, column])
            axis.set_xlim(0.5, len(values) + 0.5)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if 0 < n_adaptation < len(values):
            axes[0].text(n_adaptation + 0.5, 1.02, "adaptation  ", ha="right", transform=axes[0].get_xaxis_transform(), fontsize=8)
            axes[0].text(n_adaptation + 0.5, 1.02, "  production", ha="left", transform=axes[0].get_xaxis_transform(), fontsize=8)
        axes[-1].set_xlabel("cycle")
    return path


def density_panels(path: Path, *, panels: Sequence[DensityPanel]) -> Path:
    """Proposed against sampled densities, side by side: of several rounds, or of several variables.

    Args:
        path: PNG to write.
        panels: What to draw.

    Returns:
        ``path``.
    """
    columns, rows = min(len(panels), _ABREAST), -(-len(panels) // _ABREAST)
    with picture(path, columns=columns, rows=rows, width=max(4.4, 3.0 * columns), height=2.8 * rows + 0.2) as (figure, axes):
        for axis in axes[len(panels) :]:
            axis.remove()
        for axis, panel in zip(axes, panels, strict=False):
            s, per_unit = panel.variable.drawn(panel.s), np.pi / 180 if panel.variable.unit == "rad" else 1.0
            axis.fill_between(s, panel.sampled * per_unit, color=MD_COLOUR, alpha=0.22, lw=0, label="sampled")
            axis.plot(s, panel.proposal * per_unit, color=FLOW_COLOUR, label="proposed")
            panel.variable.scale(axis)
            axis.set(title=panel.title)
            axis.set_ylim(0, 1.15 * float(max(panel.sampled.max(), panel.proposal.max())) * per_unit)
        for row in range(rows):
            axes[row * columns].set_ylabel("probability density")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return path


def density_maps(path: Path, *, variables: Sequence[Variable], grid: Sequence[np.ndarray], maps: Sequence[DensityMap]) -> Path:
    """Maps of −ln density over two variables, proposed above sampled, on one colour scale, each from its own minimum.

    Args:
        path: PNG to write.
        variables: The two.
        grid: Values of each, ``[g]`` and ``[h]``.
        maps: What to draw, a column each.

    Returns:
        ``path``.
    """
    n = len(maps)
    x, y = (variable.drawn(values) for variable, values in zip(variables, grid, strict=True))
    with picture(path, columns=n, rows=2, width=1.6 + 2.5 * n, height=5.2, share=True) as (figure, axes):
        for number, axis in enumerate(axes):
            row, one = number // n, maps[number % n]
            density = one.sampled if row else one.proposal
            if density is None:
                points = [variable.drawn(one.sent[:, i]) for i, variable in enumerate(variables)]
                axis.plot(*points, ls="", marker="o", ms=_marker_size(len(one.sent)), mew=0, color=MD_COLOUR, alpha=0.6)
            else:
                with np.errstate(divide="ignore"):
                    height = -np.log(density / density.max())
                shown = np.ma.masked_greater(height, _CEILING_KT).T
                mesh = axis.pcolormesh(x, y, shown, cmap="viridis", vmin=0, vmax=_CEILING_KT, shading="nearest", rasterized=True)
            variables[0].scale(axis)
            variables[1].scale(axis, vertical=True)
            axis.set(facecolor="#E8E8E8", title="" if row else one.title)
            axis.label_outer()
        for row, word in enumerate(("proposed", "sampled")):
            axes[row * n].set_ylabel(f"{word}\n{variables[1].label}")
        bar = figure.colorbar(mesh, ax=axes, shrink=0.7, pad=0.015)
        bar.set_label("−ln density, from its minimum")
        bar.outline.set_visible(False)
    return path


def rounds_plot(path: Path, *, rounds: Sequence[RoundNumbers]) -> Path:
    """Acceptance and work of the paths of every round; production comes last.

    Args:
        path: PNG to write.
        rounds: Numbers of every round, in order.

    Returns:
        ``path``.
    """
    x = np.arange(len(rounds))
    with picture(path, columns=2, width=9.2, height=3.1) as (_, (left, right)):
        for name, label, colour, marker, shift in (
            ("acceptance", "all paths", REWEIGHTED_COLOUR, "o", -0.06),
            ("between", "sent to another basin", _SENT_COLOUR, "s", 0.06),
        ):
            value, error = 100 * np.array([getattr(one, name) for one in rounds]).T
            if np.isfinite(value).any():
                left.errorbar(x + shift, value, 2 * error, color=colour, marker=marker, ms=5, lw=1.2, capsize=2, label=label)
        left.set_title("Acceptance", pad=18)
        left.set_ylabel("accepted paths")
        left.set_ylim(bottom=0)
        left.yaxis.set_major_formatter(PercentFormatter(decimals=0))
        left.legend(loc="best")
        low, middle, high = np.array([one.work for one in rounds]).T
        right.vlines(x, low, high, color=REWEIGHTED_COLOUR, alpha=0.3, lw=7, label="10–90 % of paths")
        right.plot(x, middle, color=REWEIGHTED_COLOUR, marker="o", ms=5, lw=1.2, label="median")
        right.axhline(0, color="#BBBBBB", lw=0.8, zorder=0)
        _work_scale(right, np.concatenate([low, high]))
        _failures_above(right, [one.n_failed for one in rounds])
        right.set_title("Work of the paths", pad=18)
        right.set_ylabel("work / kT")
        right.legend(loc="best")
        for axis in (left, right):
            _round_ticks(axis, [one.label for one in rounds])
    return path


def path_plot(path: Path, *, films: Sequence[FilmedPath], variables: Sequence[Variable]) -> Path:
    """Paths from start to end: the centre and the variable, of up to two variables, and the work done so far.

    Args:
        path: PNG to write.
        films: An accepted and a rejected path, or one of them.
        variables: The variables.

    Returns:
        ``path``.
    """
    shown = _widest(films, variables)
    with picture(path, columns=len(shown) + 1, width=8.8 if len(shown) < 2 else 10.4, height=3.1) as (_, axes):
        for one in films:
            film, (word, colour) = one.film, _ACCEPTED[one.accepted]
            for axis, column in zip(axes, shown, strict=False):
                variable = variables[column]
                apart = film.xi[:, column] - film.centre[:, column]
                if variable.period:
                    apart -= variable.period * np.round(apart / variable.period)
                axis.plot(film.s, variable.drawn(film.centre[:, column]), color=colour, lw=1.2, ls="--")
                axis.plot(film.s, variable.drawn(film.centre[:, column] + apart), color=colour, lw=1.8)
            end = "failed" if film.failure else f"{word}, w = {one.w:.1f} kT"
            axes[-1].plot(film.s, film.work, color=colour, lw=1.8, label=end, marker="x" if film.failure else "", markevery=[-1], mew=2)
        for axis, column in zip(axes, shown, strict=False):
            axis.plot([], [], color=MD_COLOUR, lw=1.2, ls="--", label="centre λ")
            axis.plot([], [], color=MD_COLOUR, lw=1.8, label=f"{symbol(variables[column].name)}")
            axis.set(xlabel="share of the path's steps", ylabel=variables[column].label, xlim=(0, 1))
            axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderpad=0.2)
        axes[-1].axhline(0, color="#BBBBBB", lw=0.8, zorder=0)
        _work_scale(axes[-1], np.concatenate([one.film.work for one in films]))
        axes[-1].set(xlabel="share of the path's steps", ylabel="work so far / kT", xlim=(0, 1))
        axes[-1].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderpad=0.2, columnspacing=1.0)
    return path


def _widest(films: Sequence[FilmedPath], variables: Sequence[Variable]) -> list[int]:
    """The two variables whose centres go the largest shares of their ranges, in order."""
    spans = np.array([variable.high - variable.low for variable in variables])
    ways = np.max([np.ptp(one.film.centre, axis=0) / spans for one in films], axis=0)
    return sorted(np.argsort(-ways, kind="stable")[:2].tolist())


def _work_scale(axis: Axes, works: np.ndarray) -> None:
    known = works[np.isfinite(works)]
    if len(known) and np.abs(known).max() > 10 * _LARGE_WORK:
        axis.set_yscale("symlog", linthresh=_LARGE_WORK)


def _failures_above(axis: Axes, failed: Sequence[int]) -> None:
    """How many paths failed, above every round."""
    if any(failed):
        for position, n in enumerate(failed):
            axis.text(position, 1.02, str(n), transform=axis.get_xaxis_transform(), ha="center", fontsize=7.5, color=MARK_COLOUR)
        axis.plot([], [], ls="", marker="$n$", color=MARK_COLOUR, label="failed paths, above")


def _round_ticks(axis: Axes, labels: Sequence[str]) -> None:
    """The number of every round, of some where there are many, and the last one's name."""
    every = -(-len(labels) // 10)
    ticks = [i for i in range(0, len(labels) - 1, every) if i < len(labels) - 1 - every / 2]
    axis.set_xticks([*ticks, len(labels) - 1], [*(labels[i] for i in ticks), labels[-1]])
    axis.set_xlim(-0.6, len(labels) - 0.4)
    if len(labels) > 1:
        axis.set_xlabel("round")


def _marker_size(n: int) -> float:
    """Size of ``n`` points that shows them one by one where they are few."""
    return float(np.clip(100 / n**0.5, 1.0, 4.0))
