"""Pictures and report of a finished free energy difference, rebuilt from the files in its folder."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from boltzgen.report.page import write_report
from boltzgen.report.work_pictures import bounds_over_training, convergence_plot, overlap_matrices, work_histograms
from boltzgen.workflows.report import required

_TITLES = {"none": "Without a map", "learned": "With the map"}


def build_tfep_report(folder: Path, results: Mapping[str, Any]) -> Path:
    """Draw every picture and write ``report.html``.

    Args:
        folder: Folder of the run with ``works.csv`` and ``training.jsonl``.
        results: The content of its ``results.json``, which need not be written yet.

    Returns:
        Path of the page.

    Raises:
        OutputError: If a file of the run is missing, or a picture or the page cannot be written.
    """
    works = _works(required(folder / "works.csv"))
    values = {estimate["name"]: estimate["value"] for estimate in results["estimates"]}
    differences = {"learned": _number(values["F_B - F_A"]), "none": _number(values.get("F_B - F_A, without a map, all data"))}
    diagnostics = results["diagnostics"]
    numbers = {"learned": diagnostics, "none": diagnostics["without_map"]}
    work_histograms(folder / "works.png", panels=[(_TITLES[k], *works[k], differences[k]) for k in works])
    panels = [(_TITLES[k], _number(numbers[k]["overlap"]), numbers[k]["n_forward"], numbers[k]["n_reverse"]) for k in _TITLES]
    overlap_matrices(folder / "overlap.png", panels=panels)
    lines = required(folder / "training.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["stage"] == "map"]
    if rows:
        bounds_over_training(folder / "bounds.png", rows=rows, difference=differences["learned"])
    if "convergence" in diagnostics:
        convergence_plot(folder / "convergence.png", curves=diagnostics["convergence"])
    return write_report(folder, results)


def _works(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Forward and reverse works by map."""
    found: dict[tuple[str, str], list[float]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            found.setdefault((row["map"], row["direction"]), []).append(float(row["work_kT"]))
    return {name: (np.array(found[name, "forward"]), np.array(found[name, "reverse"])) for name in _TITLES if (name, "forward") in found}


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
