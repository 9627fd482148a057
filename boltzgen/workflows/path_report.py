"""Pictures and report of a run of steered paths, made from what it did or again from the files in its folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from boltzgen.config import PathsConfig
from boltzgen.core import Distribution
from boltzgen.report.page import write_report
from boltzgen.report.path_pictures import (
    DensityMap,
    DensityPanel,
    RoundNumbers,
    Variable,
    density_maps,
    density_panels,
    path_plot,
    rounds_plot,
    walkers_plot,
)
from boltzgen.report.pictures import Curve, profile_plot
from boltzgen.report.style import symbol
from boltzgen.report.work_pictures import work_histograms
from boltzgen.workflows.path_basins import sent_between
from boltzgen.workflows.path_densities import PRODUCTION, Blur, Round, curve, exact, marginal, rounds_of, some
from boltzgen.workflows.path_films import FILMS, stored_films
from boltzgen.workflows.path_proposals import stored_proposal
from boltzgen.workflows.path_records import History, Recorder
from boltzgen.workflows.report import arrays
from boltzgen.workflows.run_folder import RunFolder

#: The file in which a run keeps the works between its basins.
WORKS = "works.npz"
_GRID, _MAP_GRID, _MOST_MARGINALS = 361, 121, 8
_UNITS = {"radian": "rad", "nanometer": "nm", "dimensionless": "1"}


def build_paths_report(
    folder: Path, config: PathsConfig, results: Mapping[str, Any], production: History, adaptation: History | None, *,
    proposal: Distribution,
) -> Path:  # fmt: skip
    """Draw every picture that there are data for and write ``report.html``.

    Args:
        folder: Folder of the run. Drawn where they are there: ``works.npz`` (see :func:`work_arrays`) and ``films.npz`` (see
            :meth:`boltzgen.workflows.path_films.Films.arrays`).
        config: Its configuration.
        results: The content of its ``results.json``, which need not be written yet. ``diagnostics.profiles`` holds for every variable
            ``centers``, ``free_energy`` and ``stderr`` in kT and ``unit`` (rad, nm or 1).
        production: Its production.
        adaptation: Its adaptation, if there was any.
        proposal: The proposal of the production.

    Returns:
        Path of the page.

    Raises:
        OutputError: If a picture or the page cannot be written.
    """
    folder, variables = Path(folder), _variables(config)
    stages = [stage for stage in (adaptation, production) if stage is not None]
    rounds = rounds_of(production.kept(config.production), adaptation)
    walkers_plot(
        folder / "walkers.png", values=np.concatenate([stage.xi for stage in stages]), n_adaptation=len(adaptation or ()),
        variables=variables, borders=_borders(config),
    )  # fmt: skip
    if any(len(one.paths) for one in rounds):
        rounds_plot(folder / "rounds.png", rounds=[_numbers(one, config) for one in rounds])
    _draw_densities(folder / "proposal.png", config, results, rounds, variables, proposal)
    for name, profile in (results["diagnostics"].get("profiles") or {}).items():
        _draw_profile(folder, name, profile)
    if (folder / WORKS).exists():
        _draw_works(folder)
    films = stored_films(arrays(folder / FILMS)) if (folder / FILMS).exists() else []
    if films:
        path_plot(folder / "path.png", films=films, variables=variables)
    return write_report(folder, results)


def rebuild_paths_report(folder: RunFolder, config: PathsConfig, results: Mapping[str, Any]) -> Path:
    """The report of a finished run, made again from the files in its folder.

    Raises:
        CheckpointError: If a file of the run is missing or corrupt.
        OutputError: If a picture or the page cannot be written.
    """
    recorder, learned = Recorder(folder, config.production.save_interval), config.proposal.kind == "learned"
    adaptation = recorder.history("adaptation") if learned and config.adaptation.rounds else None
    proposal = stored_proposal(config, folder.path)
    return build_paths_report(folder.path, config, results, recorder.history("production"), adaptation, proposal=proposal)


def work_arrays(pairs: Mapping[str, tuple[np.ndarray, np.ndarray, float]]) -> dict[str, np.ndarray]:
    """What ``works.npz`` holds: ``names`` and ``crossing`` ``[p]``, ``forward_i`` and ``reverse_i`` of pair i.

    Args:
        pairs: ``A to B`` → w of paths from A that ended in B, of paths from B that ended in A, and where the first and minus the second
            have the same density; in kT.
    """
    found = {"names": np.array(list(pairs), dtype=str), "crossing": np.array([crossing for _, _, crossing in pairs.values()])}
    for i, (forward, reverse, _) in enumerate(pairs.values()):
        found |= {f"forward_{i}": forward, f"reverse_{i}": reverse}
    return found


def _variables(config: PathsConfig) -> list[Variable]:
    found = []
    for (name, variable), period, (low, high) in zip(config.collective_variables.items(), config.periods, config.limits, strict=True):
        ends = (low, high) if period is None else (-period / 2, period / 2)
        found.append(Variable(name, _UNITS[variable.unit], period, *ends))
    return found


def _borders(config: PathsConfig) -> list[list[float]]:
    """Limits of basins along every variable, within what is drawn of it."""
    found = []
    for name, variable in zip(config.names, _variables(config), strict=True):
        limits = [end for box in config.basin_ranges.values() for end in box.get(name, ())]
        found.append([end for end in limits if variable.low < end < variable.high])
    return found


def _numbers(one: Round, config: PathsConfig) -> RoundNumbers:
    """Acceptance and work of a round; errors as if its paths were independent."""
    paths = one.paths
    if not len(paths):
        return RoundNumbers(one.label, (math.nan, math.nan), (math.nan, math.nan), (math.nan, math.nan, math.nan), 0)
    alpha = np.exp(-np.clip(np.nan_to_num(paths.w, nan=np.inf), 0, None))
    works = paths.work[np.isfinite(paths.work)]
    quantiles = np.quantile(works, [0.1, 0.5, 0.9]).tolist() if len(works) else [math.nan] * 3
    return RoundNumbers(
        one.label, _mean(alpha), _mean(alpha[sent_between(paths, config)]), (quantiles[0], quantiles[1], quantiles[2]),
        int(paths.failed.sum()),
    )  # fmt: skip


def _mean(values: np.ndarray) -> tuple[float, float]:
    if len(values) == 0:
        return math.nan, math.nan
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def _draw_densities(
    path: Path, config: PathsConfig, results: Mapping[str, Any], rounds: list[Round], variables: list[Variable], proposal: Distribution
) -> None:
    """One variable: curves of some rounds. Two: maps of them. More: the margins in production."""
    chosen, last = some(rounds), rounds[-1]
    widths = results["diagnostics"].get("widths") or dict(zip(config.names, config.width_values, strict=True))
    blur = Blur([widths[name] for name in config.names], config.periods)
    if len(variables) > 2:
        panels = []
        for column, variable in enumerate(variables[:_MOST_MARGINALS]):
            s = _axis(variable, last.xi[:, column], _GRID)
            proposed = marginal(proposal, blur, s, column=column, seed=config.seed)
            panels.append(DensityPanel(symbol(variable.name), variable, s, proposed, blur.density(last.xi, s, column=column)))
        density_panels(path, panels=panels)
    elif chosen and len(variables) == 1:
        s = _axis(variables[0], np.concatenate([one.xi[:, 0] for one in chosen]), _GRID)
        density_panels(path, panels=[
            DensityPanel(_title(one), variables[0], s, curve(one, blur, s, proposal), blur.density(one.xi, s, column=0)) for one in chosen
        ])  # fmt: skip
    elif chosen:
        grid = [_axis(variable, np.concatenate([one.xi[:, i] for one in chosen]), _MAP_GRID) for i, variable in enumerate(variables)]
        maps = [
            DensityMap(_title(one), exact(proposal, grid) if one.label == PRODUCTION else None, one.paths.end, blur.joint(one.xi, grid))
            for one in chosen
        ]  # fmt: skip
        density_maps(path, variables=variables, grid=grid, maps=maps)


def _title(one: Round) -> str:
    return "Production" if one.label == PRODUCTION else f"Round {one.label}"


def _axis(variable: Variable, values: np.ndarray, n: int) -> np.ndarray:
    if variable.period is not None:
        return np.linspace(variable.low, variable.high, n)
    return np.linspace(min(variable.low, values.min()), max(variable.high, values.max()), n)


def _draw_profile(folder: Path, name: str, profile: Mapping[str, Any]) -> None:
    centers, free_energy, stderr = (np.array(profile[key], dtype=np.float64) for key in ("centers", "free_energy", "stderr"))
    if np.isfinite(free_energy).any():
        curve = Curve(centers, free_energy, stderr)
        profile_plot(folder / f"profile_{name}.png", name=name, unit=profile["unit"], flow=curve, md=None, labels=("steered paths", ""))


def _draw_works(folder: Path) -> None:
    works = arrays(folder / WORKS)
    panels = [
        (str(name), works[f"forward_{i}"], works[f"reverse_{i}"], float(works["crossing"][i])) for i, name in enumerate(works["names"])
    ]
    panels = [panel for panel in panels if np.isfinite(panel[1]).any() or np.isfinite(panel[2]).any()]
    if panels:
        work_histograms(folder / "works.png", panels=panels, work="w", crossing="crossing")
