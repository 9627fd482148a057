"""Pictures and report of a run of jumping walkers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from boltzgen.config import JumpsConfig
from boltzgen.cvs import CollectiveVariables
from boltzgen.estimators.profiles import Profile, profile_1d
from boltzgen.md.loading import load
from boltzgen.report.page import write_report
from boltzgen.report.pictures import Curve, profile_plot
from boltzgen.report.walker_pictures import acceptance_by_round, walker_traces
from boltzgen.workflows.coordinates import collective_variables
from boltzgen.workflows.jump_analysis import N_BOOTSTRAP, Weighted, jump_acceptance, recycled_samples, walker_samples
from boltzgen.workflows.jump_records import JumpHistory, JumpRecorder
from boltzgen.workflows.report import bin_edges
from boltzgen.workflows.run_folder import RunFolder


def build_jumps_report(
    folder: Path,
    config: JumpsConfig,
    results: Mapping[str, Any],
    production: JumpHistory,
    adaptation: JumpHistory,
    *,
    variables: CollectiveVariables,
) -> Path:
    """Draw every picture, write ``profiles.npz`` and ``report.html``.

    Args:
        folder: Folder of the run.
        config: Its configuration.
        results: The content of its ``results.json``, which need not be written yet.
        production: Its cycles with the flow frozen.
        adaptation: Those before.
        variables: Coordinates that are looked along.

    Returns:
        Path of the page.

    Raises:
        OutputError: If a picture or the page cannot be written.
    """
    first = config.production.n_discarded(len(production))
    recycled, walkers = (make(production, first, variables.periods) for make in (recycled_samples, walker_samples))
    local = [float(np.nanmean(adaptation.local_acceptance[adaptation.round == k])) for k in range(int(adaptation.round.max()) + 1)]
    diagnostics = results["diagnostics"]
    acceptance_by_round(
        folder / "acceptance.png", jumps=jump_acceptance(adaptation), local=local,
        production=(diagnostics["jump_acceptance"], diagnostics["local_acceptance"]),
    )  # fmt: skip
    profiles: dict[str, np.ndarray] = {}
    for column, variable in enumerate(variables):
        name, unit = variable.name, variable.unit
        both = np.concatenate([adaptation.xi[:, :, column], production.xi[:, :, column]])
        walker_traces(folder / f"walkers_{name}.png", values=both, name=name, unit=unit, n_adaptation=len(adaptation))
        profiles |= _draw_profile(folder, config, recycled, walkers, column=column, name=name, unit=unit)
    np.savez_compressed(folder / "profiles.npz", allow_pickle=False, **profiles)
    return write_report(folder, results)


def rebuild_jumps_report(folder: RunFolder, config: JumpsConfig, results: Mapping[str, Any]) -> Path:
    """The report of a finished run, made again from the files in its folder."""
    loaded = load(config.topology, config.system, state=config.state, coordinates=config.coordinates, trust=config.trust_files)
    variables = collective_variables(config, loaded)
    recorder = JumpRecorder(folder, config.production.save_interval, variables=variables)
    return build_jumps_report(
        folder.path, config, results, recorder.history("production"), recorder.history("adaptation"), variables=variables
    )


def _draw_profile(
    folder: Path, config: JumpsConfig, recycled: Weighted, walkers: Weighted, *, column: int, name: str, unit: str
) -> dict[str, np.ndarray]:
    """Draw the profile along one variable, with and without the proposals; its arrays."""
    weighted = recycled.xi[torch.isfinite(recycled.samples.log_w).numpy(), column]
    edges = bin_edges(weighted, walkers.xi[:, column], unit=unit)
    profile = _profile(config, recycled, column, edges=edges, name=name)
    plain = _profile(config, walkers, column, edges=edges, name=name, reference=_visited(walkers, column, profile))
    labels = ("proposals counted too", "walkers alone")
    profile_plot(folder / f"jump_profile_{name}.png", name=name, unit=unit, flow=_curve(profile), md=_curve(plain), labels=labels)
    return {f"{name}_edges": edges, f"{name}_free_energy": profile.free_energy, f"{name}_stderr": profile.stderr}


def _profile(
    config: JumpsConfig, weighted: Weighted, column: int, *, edges: np.ndarray, name: str, reference: int | None = None
) -> Profile:
    return profile_1d(
        weighted.samples, weighted.xi[:, column], edges=edges, name=name, reference=reference, n_bootstrap=N_BOOTSTRAP, seed=config.seed
    )


def _visited(walkers: Weighted, column: int, profile: Profile) -> int | None:
    """The zero of a profile, where walkers were in it."""
    low, high = (profile.edges[0][profile.reference[0] + k] for k in (0, 1))
    values = walkers.xi[:, column]
    return profile.reference[0] if bool(((values >= low) & (values < high)).any()) else None


def _curve(profile: Profile) -> Curve:
    return Curve(profile.centers[0], profile.free_energy, profile.stderr)
