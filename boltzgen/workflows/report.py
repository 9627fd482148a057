"""Pictures and report of a finished run, rebuilt from the files in its folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from boltzgen.config import EvaluationConfig, MoleculeConfig
from boltzgen.core import WeightedSamples
from boltzgen.errors import OutputError
from boltzgen.estimators.profiles import Profile, profile_1d
from boltzgen.estimators.weights import normalised_weights
from boltzgen.report.page import write_report
from boltzgen.report.pictures import Curve, energy_histograms, profile_plot, ramachandran, training_curves, weight_distribution

_PROFILE_BINS = 60

Arrays = Mapping[str, np.ndarray]


def build_report(folder: Path, config: MoleculeConfig, results: Mapping[str, Any]) -> Path:
    """Draw every picture and write ``report.html``.

    Args:
        folder: Folder of the run with ``weights.npz`` (``log_w``, ``sign``, ``log_q``, ``u`` ``[n]``; ``cvs`` ``[n, k]`` in rad or nm;
            ``cv_names``, ``cv_units`` ``[k]``), ``data.npz`` (MD frames: ``cvs`` ``[m, k]``; ``u``, ``block``, ``chain`` ``[m]``)
            and ``training.jsonl`` (a row of numbers per line).
        config: Its configuration.
        results: The content of its ``results.json``, which need not be written yet.

    Returns:
        Path of the page.

    Raises:
        OutputError: If a file of the run is missing, or a picture or the page cannot be written.
    """
    folder = Path(folder)
    flow, md = arrays(folder / "weights.npz"), arrays(folder / "data.npz")
    draw_common(folder, config.evaluation, results, flow=flow, u_md=md["u"])
    _draw_ramachandran(folder, config, flow, md)
    for column, name in enumerate(flow["cv_names"]):
        _draw_profile(folder, config, flow, md, column=column, name=str(name))
    return write_report(folder, results)


def draw_common(folder: Path, settings: EvaluationConfig, results: Mapping[str, Any], *, flow: Arrays, u_md: np.ndarray) -> None:
    """The pictures of every run: energies, weights and training.

    Args:
        folder: Folder of the run with ``training.jsonl``.
        settings: Its evaluation.
        results: Its results.
        flow: ``log_w``, ``sign`` and ``u`` ``[n]`` of its samples.
        u_md: Reduced potentials of the data ``[m]``.
    """
    energy_histograms(folder / "energies.png", u_md=u_md, u_flow=flow["u"], w=weights(flow))
    weight_distribution(
        folder / "weights.png",
        log_w=flow["log_w"],
        clip_fraction=settings.clip_fraction,
        pareto_k=results["diagnostics"].get("pareto_k"),
    )
    lines = required(folder / "training.jsonl").read_text(encoding="utf-8").splitlines()
    training_curves(folder / "training.png", rows=[json.loads(line) for line in lines if line.strip()])


def _draw_ramachandran(folder: Path, config: MoleculeConfig, flow: Arrays, md: Arrays) -> None:
    """The map over the first two coordinates that go around the whole circle, φ and ψ of a peptide."""
    names = [str(name) for name in flow["cv_names"]]
    circular = [k for k in range(len(names)) if flow["cv_units"][k] == "rad" and flow["cvs"][:, k].min() < 0]
    if len(circular) < 2:
        return
    pair = circular[:2]
    ramachandran(
        folder / "ramachandran.png",
        md=md["cvs"][:, pair],
        flow=flow["cvs"][:, pair],
        w=weights(flow),
        names=(names[pair[0]], names[pair[1]]),
        temperature_kelvin=config.temperature_kelvin,
    )


def _draw_profile(folder: Path, config: MoleculeConfig, flow: Arrays, md: Arrays, *, column: int, name: str) -> None:
    """The profile of the reweighted flow and that of MD, with the flow's most probable bin as the zero of both."""
    unit = str(flow["cv_units"][column])
    values, md_values = flow["cvs"][:, column], md["cvs"][:, column]
    edges = bin_edges(values[np.isfinite(flow["log_w"])], md_values, unit=unit)
    n_bootstrap, seed = config.evaluation.n_bootstrap, config.seed
    profile = profile_1d(_flow_samples(flow), values, edges=edges, name=name, n_bootstrap=n_bootstrap, seed=seed)
    zero = profile.reference[0]
    visited = bool(np.any((md_values >= edges[zero]) & (md_values < edges[zero + 1])))
    reference = (
        profile_1d(_md_samples(md), md_values, edges=edges, name=name, reference=zero, n_bootstrap=n_bootstrap, seed=seed)
        if visited
        else None
    )
    path = folder / f"profile_{name}.png"
    profile_plot(path, name=name, unit=unit, flow=_curve(profile), md=None if reference is None else _curve(reference))


def bin_edges(values: np.ndarray, md_values: np.ndarray, *, unit: str) -> np.ndarray:
    """The whole circle for a dihedral; the range of what was visited for anything else."""
    low, high = min(values.min(), md_values.min()), max(values.max(), md_values.max())
    if unit == "rad" and low < 0:
        return np.linspace(-math.pi, math.pi, _PROFILE_BINS + 1)
    return np.linspace(low, np.nextafter(high, math.inf) + 1e-9, _PROFILE_BINS + 1)


def _flow_samples(flow: Arrays) -> WeightedSamples:
    n = len(flow["log_w"])
    rows = torch.zeros(n, dtype=torch.int64)
    log_w, log_q, u = (torch.from_numpy(flow[name].astype(np.float64)) for name in ("log_w", "log_q", "u"))
    sign = torch.from_numpy(flow["sign"]) if "sign" in flow else None  # runs of earlier versions have positive weights only
    return WeightedSamples(x=torch.zeros(n, 0), u=u, log_w=log_w, log_q=log_q, block=rows, chain=rows, role="evaluate", sign=sign)


def _md_samples(md: Arrays) -> WeightedSamples:
    u, block, chain = (torch.from_numpy(md[name]) for name in ("u", "block", "chain"))
    return WeightedSamples.unweighted(torch.zeros(len(u), 0), u, role="evaluate", block=block, chain=chain)


def _curve(profile: Profile) -> Curve:
    return Curve(profile.centers[0], profile.free_energy, profile.stderr)


def weights(flow: Arrays) -> np.ndarray:
    """Normalised weights ``[n]`` of the samples of a flow."""
    return normalised_weights(flow["log_w"], flow.get("sign"))


def arrays(path: Path) -> Arrays:
    """The arrays of a file of the run.

    Raises:
        OutputError: If it is missing.
    """
    with np.load(required(path), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def required(path: Path) -> Path:
    """A file of the run.

    Raises:
        OutputError: If it is missing.
    """
    if not path.exists():
        raise OutputError(f"the run in {path.parent} has no {path.name}: it is not finished, or the file was deleted; run it again")
    return path
