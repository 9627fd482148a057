"""Pictures of a generator: arrays in, PNG files out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MultipleLocator

from boltzgen.report.style import FLOW_COLOUR, MARK_COLOUR, MD_COLOUR, REWEIGHTED_COLOUR, picture, symbol

#: Free energies above this, in kT, are drawn as never visited.
CEILING_KT = 10.0
_MAP_BINS = 54


@dataclass(frozen=True)
class Curve:
    """A free-energy profile to draw.

    Attributes:
        centers: Bin centres ``[k]``.
        free_energy: In kT ``[k]``; +inf where never visited.
        stderr: In kT ``[k]``.
    """

    centers: np.ndarray
    free_energy: np.ndarray
    stderr: np.ndarray


def ramachandran(path: Path, *, md: np.ndarray, flow: np.ndarray, w: np.ndarray, names: tuple[str, str], temperature_kelvin: float) -> Path:
    """Free-energy maps over two dihedrals, side by side on one colour scale: MD, flow as drawn, flow reweighted.

    Args:
        path: PNG to write.
        md: Held-out MD data ``[m, 2]`` in rad.
        flow: Flow samples ``[n, 2]`` in rad.
        w: Their normalised weights ``[n]``.
        names: Names of the dihedrals.
        temperature_kelvin: Temperature of the ensemble.

    Returns:
        ``path``.
    """
    panels = (
        ("MD", md, np.ones(len(md))),
        ("Flow, as drawn", flow, np.ones(len(flow))),
        ("Flow, reweighted", flow, w),
    )
    edges = np.linspace(-180, 180, _MAP_BINS + 1)
    with picture(path, columns=3, width=9.2, height=3.3, share=True) as (figure, axes):
        for axis, (title, angles, w) in zip(axes, panels, strict=True):
            phi, psi = np.degrees(angles).T
            density, _, _ = np.histogram2d(phi, psi, bins=[edges, edges], weights=w, density=True)
            density = density.clip(min=0.0)  # negative weights may outweigh the others in a bin
            with np.errstate(divide="ignore"):
                free_energy = -np.log(density)
            free_energy -= free_energy.min()
            shown = np.ma.masked_greater(free_energy, CEILING_KT).T
            mesh = axis.pcolormesh(edges, edges, shown, cmap="viridis", vmin=0, vmax=CEILING_KT, rasterized=True)
            axis.set(title=title, xlabel=f"{symbol(names[0])} / degree", aspect="equal", facecolor="#F4F4F4")
            _degree_ticks(axis, both=True)
        axes[0].set_ylabel(f"{symbol(names[1])} / degree")
        bar = figure.colorbar(mesh, ax=axes, shrink=0.8, pad=0.015)
        bar.set_label(f"free energy / kT at {temperature_kelvin:g} K")
        bar.outline.set_visible(False)
    return path


def energy_histograms(path: Path, *, u_md: np.ndarray, u_flow: np.ndarray, w: np.ndarray) -> Path:
    """Distributions of the reduced energy: MD, flow as drawn, flow reweighted.

    Args:
        path: PNG to write.
        u_md: Held-out MD data ``[m]`` in kT.
        u_flow: Flow samples ``[n]`` in kT; +inf is left out.
        w: Their normalised weights ``[n]``.

    Returns:
        ``path``.
    """
    finite = np.isfinite(u_flow)
    low, high = np.quantile(u_md, [0.0005, 0.9995])
    span = high - low
    low, high = low - 0.15 * span, max(high + 0.5 * span, min(float(np.quantile(u_flow[finite], 0.9)), high + 2 * span))
    edges = np.linspace(low, high, 90)
    beyond = 1 - np.mean((u_flow >= low) & (u_flow <= high))
    with picture(path, width=5.4, height=3.1) as (_, (axis,)):
        axis.hist(u_md, edges.tolist(), density=True, color=MD_COLOUR, alpha=0.22, label="MD")
        _steps(axis, u_flow[finite], edges, weights=np.full(finite.sum(), 1 / len(u_flow)), colour=FLOW_COLOUR, label="flow, as drawn")
        _steps(axis, u_flow[finite], edges, weights=w[finite], colour=REWEIGHTED_COLOUR, label="flow, reweighted")
        axis.set(xlabel="potential energy / kT", ylabel="probability density", xlim=(low, high))
        axis.legend(loc="upper right")
        if beyond > 0.0005:
            axis.text(0.985, 0.60, f"{beyond:.1%} of the flow's samples\nlie beyond this range", transform=axis.transAxes, ha="right",
                      va="top", fontsize=8, color="#666666")  # fmt: skip
    return path


def distance_histograms(path: Path, *, md: np.ndarray, flow: np.ndarray, w: np.ndarray) -> Path:
    """Distributions of the distances between particles: reference walkers, flow as drawn, flow reweighted.

    Args:
        path: PNG to write.
        md: Distances of all pairs ``[m, pairs]`` in nm, of reference configurations.
        flow: The same of flow samples ``[n, pairs]``.
        w: Their normalised weights ``[n]``.

    Returns:
        ``path``.
    """
    low, high = np.quantile(md, [0.0, 0.9999])
    edges = np.linspace(max(0.0, low - 0.1 * (high - low)), high, 120)
    n, pairs = flow.shape
    with picture(path, width=5.4, height=3.1) as (_, (axis,)):
        axis.hist(md.ravel(), edges.tolist(), density=True, color=MD_COLOUR, alpha=0.22, label="reference")
        _steps(axis, flow.ravel(), edges, weights=np.full(n * pairs, 1 / (n * pairs)), colour=FLOW_COLOUR, label="flow, as drawn")
        _steps(axis, flow.ravel(), edges, weights=np.repeat(w / pairs, pairs), colour=REWEIGHTED_COLOUR, label="flow, reweighted")
        axis.set(xlabel="distance between two particles / nm", ylabel="probability density", xlim=(edges[0], edges[-1]))
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    return path


def weight_distribution(path: Path, *, log_w: np.ndarray, clip_fraction: float, pareto_k: float | None) -> Path:
    """Distribution of the importance weights, by size, relative to their mean, with the tail that the diagnostics look at.

    Args:
        path: PNG to write.
        log_w: Log weights ``[n]``.
        clip_fraction: Share of the largest weights that clipped diagnostics cut off.
        pareto_k: Shape k̂ of the tail, if known.

    Returns:
        ``path``.
    """
    relative = np.sort(log_w[np.isfinite(log_w)] - np.log(np.mean(np.exp(log_w - log_w.max()))) - log_w.max()) / np.log(10)
    n = len(log_w)
    tail_rows = int(min(0.2 * n, 3 * np.sqrt(n)))
    tail = relative[-min(tail_rows, len(relative)) :][0]
    clip = relative[-max(1, min(round(clip_fraction * n), len(relative))) :][0]
    low = max(relative[0], float(np.quantile(relative, 0.002)) - 0.3, -8.0)
    with picture(path, width=5.4, height=3.3) as (_, (axis,)):
        edges = np.linspace(low, relative[-1] + 0.05, 90)
        axis.hist(relative, edges.tolist(), color=REWEIGHTED_COLOUR, alpha=0.75, log=True)
        axis.axvline(0, color=MD_COLOUR, lw=1, ls=":")
        axis.axvspan(tail, edges[-1], color=MARK_COLOUR, alpha=0.12, lw=0)
        shape = "" if pareto_k is None else f", k̂ = {pareto_k:.2f}"
        axis.axvline(tail, color=MARK_COLOUR, lw=1.2, label=f"tail: the {tail_rows:,} largest{shape}")
        axis.axvline(clip, color=MARK_COLOUR, lw=1.2, ls="--", label=f"clipped diagnostics cut here (top {clip_fraction:.2%})")
        axis.set(xlabel="weight / mean weight, as a power of ten", ylabel="number of samples", xlim=(edges[0], edges[-1]))
        axis.set_ylim(bottom=0.7)
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), borderpad=0.2)
    return path


def profile_plot(
    path: Path, *, name: str, unit: str, flow: Curve, md: Curve | None, labels: tuple[str, str] = ("flow, reweighted", "MD")
) -> Path:
    """A free-energy profile of the reweighted flow beside that of MD, with bands of ± 2 standard errors.

    Bins without a known error are left out.

    Args:
        path: PNG to write.
        name: Name of the collective variable.
        unit: ``rad``, drawn in degrees, or ``nm``.
        flow: Profile of the reweighted samples.
        md: Profile of the MD data, on the same zero.
        labels: What the two are called.

    Returns:
        ``path``.
    """
    angular = unit == "rad"
    with picture(path, width=5.4, height=3.1) as (_, (axis,)):
        for curve, colour, label in ((md, MD_COLOUR, labels[1]), (flow, REWEIGHTED_COLOUR, labels[0])):
            if curve is None:
                continue
            s = np.degrees(curve.centers) if angular else curve.centers
            known = np.isfinite(curve.free_energy) & np.isfinite(curve.stderr)
            f, error = np.where(known, curve.free_energy, np.nan), 2 * curve.stderr
            axis.fill_between(s, f - error, f + error, color=colour, alpha=0.22, lw=0)
            axis.plot(s, f, color=colour, ls="--" if curve is md else "-", label=label)
        highest = flow.free_energy[np.isfinite(flow.free_energy)].max()
        axis.set(xlabel=f"{symbol(name)} / {'degree' if angular else unit}", ylabel="free energy / kT")
        axis.set_ylim(-0.8, min(highest * 1.1 + 1.0, 25.0))
        if angular and np.ptp(flow.centers) > np.pi:
            _degree_ticks(axis)
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderpad=0.2)
    return path


def training_curves(path: Path, *, rows: Sequence[Mapping[str, object]]) -> Path:
    """Losses and effective sample sizes against the time spent in all stages in a row; dotted lines part the stages.

    Args:
        path: PNG to write.
        rows: Logged steps: ``seconds`` within the ``stage``, and any of ``forward_kl flow_matching held_out_loss reverse_kl log_variance
            ess forward_ess``; panels without any number are left out.

    Returns:
        ``path``.
    """
    minutes, borders = _running_minutes(rows)
    panels = [panel for panel in _TRAINING_PANELS if any(_number(row.get(key)) is not None for row in rows for key, *_ in panel[2])]
    with picture(path, columns=max(1, len(panels)), width=3.2 * max(1, len(panels)), height=2.9) as (_, axes):
        for axis, (title, unit, curves) in zip(axes, panels, strict=False):
            for key, label, colour, dashes in curves:
                points = [(x, value) for x, row in zip(minutes, rows, strict=True) if (value := _number(row.get(key))) is not None]
                if points:
                    axis.plot(*zip(*points, strict=True), color=colour, ls=dashes, label=label, marker="." if len(points) < 3 else "")
            for border in borders:
                axis.axvline(border, color="#BBBBBB", lw=0.8, ls=":")
            axis.set(title=title, xlabel="training / min", ylabel=unit, xlim=(0, max([*minutes, 1e-3])))
            if len(curves) > 1:
                axis.legend(loc="best")
            _robust_limits(axis)
            if title == _OVERLAP:
                axis.set_ylim(0, 1)
    return path


_OVERLAP = "Overlap"
_TRAINING_PANELS = (
    (
        "Misfit to the data",
        "loss per configuration",
        (
            ("forward_kl", "training", FLOW_COLOUR, "-"),
            ("flow_matching", "flow matching", REWEIGHTED_COLOUR, "-"),
            ("held_out_loss", "held out", MD_COLOUR, "--"),
        ),
    ),
    ("Misfit to the energies", "energy − entropy of samples / kT", (("reverse_kl", "flow's samples", REWEIGHTED_COLOUR, "-"),)),
    ("Spread of log weights", "variance", (("log_variance", "data and flow's samples", REWEIGHTED_COLOUR, "-"),)),
    (
        _OVERLAP,
        "effective sample size, fraction",
        (("ess", "flow's samples", REWEIGHTED_COLOUR, "-"), ("forward_ess", "held-out data", MD_COLOUR, "--")),
    ),
)


def _running_minutes(rows: Sequence[Mapping[str, object]]) -> tuple[list[float], list[float]]:
    """Minutes counted through all stages, and where a stage ends."""
    minutes: list[float] = []
    borders: list[float] = []
    offset, last, stage = 0.0, 0.0, None
    for row in rows:
        if stage is not None and row.get("stage") != stage:
            offset = last
            borders.append(offset)
        stage = row.get("stage")
        last = offset + (_number(row.get("seconds")) or 0.0) / 60
        minutes.append(last)
    return minutes, borders


def _robust_limits(axis: Axes) -> None:
    """Limits of y that a few wild points at the start do not spoil."""
    curves = [np.asarray(line.get_ydata(), dtype=np.float64) for line in axis.lines]
    values = np.concatenate([curve for curve in curves if len(curve) > 2] or [np.zeros(0)])
    values = values[np.isfinite(values)]
    if len(values) > 20:
        low, high = values.min(), np.quantile(values, 0.97)
        axis.set_ylim(low - 0.06 * (high - low), high + 0.25 * (high - low) + 1e-9)


def _steps(axis: Axes, values: np.ndarray, edges: np.ndarray, *, weights: np.ndarray, colour: str, label: str) -> None:
    counts, _ = np.histogram(values, edges, weights=weights)
    axis.stairs(counts / np.diff(edges), edges, color=colour, label=label, lw=1.6)


def _degree_ticks(axis: Axes, *, both: bool = False) -> None:
    axis.set_xlim(-180, 180)
    axis.xaxis.set_major_locator(MultipleLocator(90))
    if both:
        axis.set_ylim(-180, 180)
        axis.yaxis.set_major_locator(MultipleLocator(90))


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and np.isfinite(value) else None
