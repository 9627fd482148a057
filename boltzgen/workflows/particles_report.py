"""Pictures and report of a finished run over particles, rebuilt from the files in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from boltzgen.config import ParticlesConfig
from boltzgen.report.page import write_report
from boltzgen.report.pictures import distance_histograms
from boltzgen.workflows.report import arrays, draw_common, weights

#: Configurations of the walkers behind a histogram of distances.
_ROWS = 20_000


def build_particles_report(folder: Path, config: ParticlesConfig, results: Mapping[str, Any]) -> Path:
    """Draw every picture and write ``report.html``.

    Args:
        folder: Folder of the run with ``weights.npz`` (``log_w``, ``sign``, ``u`` ``[n]``), ``samples.npz`` and ``data.npz``
            (``x`` ``[m, n, d]``, ``u`` ``[m]``) and ``training.jsonl``.
        config: Its configuration.
        results: The content of its ``results.json``, which need not be written yet.

    Returns:
        Path of the page.

    Raises:
        OutputError: If a file of the run is missing, or a picture or the page cannot be written.
    """
    flow, samples, data = (arrays(folder / name) for name in ("weights.npz", "samples.npz", "data.npz"))
    draw_common(folder, config.evaluation, results, flow=flow, u_md=data["u"])
    distance_histograms(
        folder / "distances.png",
        md=pair_distances(data["x"][:: max(1, len(data["x"]) // _ROWS)]),
        flow=pair_distances(samples["x"]),
        w=weights(flow),
    )
    return write_report(folder, results)


def pair_distances(x: np.ndarray) -> np.ndarray:
    """Distances of all pairs ``[m, n (n − 1) / 2]`` in nm of configurations ``[m, n, d]``."""
    first, second = np.triu_indices(x.shape[1], 1)
    return np.linalg.norm(x[:, first] - x[:, second], axis=-1)
