"""Pictures and report of a finished run over particles, rebuilt from the files in its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from boltzgen.config import ParticlesConfig
from boltzgen.errors import OutputError
from boltzgen.report.page import write_report
from boltzgen.report.pictures import distance_histograms, energy_histograms, training_curves, weight_distribution

#: Configurations of the walkers behind a histogram of distances.
_ROWS = 20_000


def build_particles_report(folder: Path, config: ParticlesConfig, results: Mapping[str, Any]) -> Path:
    """Draw every picture and write ``report.html``.

    Args:
        folder: Folder of the run with ``weights.npz`` (``log_w``, ``u`` ``[n]``), ``samples.npz`` and ``data.npz`` (``x`` ``[m, n, d]``,
            ``u`` ``[m]``) and ``training.jsonl``.
        config: Its configuration.
        results: The content of its ``results.json``, which need not be written yet.

    Returns:
        Path of the page.

    Raises:
        OutputError: If a file of the run is missing, or a picture or the page cannot be written.
    """
    weights, samples, data = (_arrays(folder / name) for name in ("weights.npz", "samples.npz", "data.npz"))
    energy_histograms(folder / "energies.png", u_md=data["u"], u_flow=weights["u"], log_w=weights["log_w"])
    distance_histograms(
        folder / "distances.png",
        md=pair_distances(data["x"][:: max(1, len(data["x"]) // _ROWS)]),
        flow=pair_distances(samples["x"]),
        log_w=weights["log_w"],
    )
    weight_distribution(
        folder / "weights.png",
        log_w=weights["log_w"],
        clip_fraction=config.evaluation.clip_fraction,
        pareto_k=results["diagnostics"].get("pareto_k"),
    )
    lines = (folder / "training.jsonl").read_text(encoding="utf-8").splitlines()
    training_curves(folder / "training.png", rows=[json.loads(line) for line in lines if line.strip()])
    return write_report(folder, results)


def pair_distances(x: np.ndarray) -> np.ndarray:
    """Distances of all pairs ``[m, n (n − 1) / 2]`` in nm of configurations ``[m, n, d]``."""
    first, second = np.triu_indices(x.shape[1], 1)
    return np.linalg.norm(x[:, first] - x[:, second], axis=-1)


def _arrays(path: Path) -> Mapping[str, np.ndarray]:
    if not path.exists():
        raise OutputError(f"the run in {path.parent} has no {path.name}: it is not finished, or the file was deleted; run it again")
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
