"""The picture of path_baselines.json and path_sampling.json: root mean square error of ΔF of the polymer against force evaluations.

    python benchmarks/path_figure.py

The error is that over replicas against the reference of reference_umbrella.json (its two entries, weighted by their errors), whose own
error is the grey band. A method is drawn from where all of its replicas have an estimate; earlier ones are counted in the table.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from boltzgen.report.style import picture

HERE = Path(__file__).parent
#: Method and estimator → label, colour, line.
CURVES = {
    ("md", "frequencies"): ("plain MD", "#999999", "-"),
    ("metadynamics", "bias"): ("metadynamics, bias", "#E69F00", ":"),
    ("metadynamics", "reweighted"): ("metadynamics, reweighted", "#E69F00", "-"),
    ("umbrella", "mbar"): ("umbrella + MBAR", "#009E73", "-"),
    ("fixed", "bar"): ("steered paths, fixed proposal", "#56B4E9", "-"),
    ("learned", "bar"): ("steered paths, learned proposal", "#0072B2", "-"),
}


def reference() -> tuple[float, float]:
    """ΔF and its error in kT."""
    stored = json.loads((HERE / "results/reference_umbrella.json").read_text())
    rows = [one for name, one in stored.items() if name.startswith("polymer_in_solvent")]
    weights = np.array([one["stderr_kT"] ** -2.0 for one in rows])
    return float(np.average([one["delta_f_kT"] for one in rows], weights=weights)), float(weights.sum() ** -0.5)


def curves(stored: dict[str, Any], method: str, estimator: str) -> np.ndarray:
    """Estimates ``[replicas, checkpoints]``, NaN where there is none."""
    rows = [run["delta_f_kT"][estimator] for run in stored["runs"] if run["method"] == method]
    return np.array([[np.nan if value is None else value for value in row] for row in rows], dtype=float)


def main() -> None:
    """Draw, and print the table."""
    truth, error = reference()
    files = [json.loads((HERE / f"results/{name}.json").read_text()) for name in ("path_baselines", "path_sampling")]
    table = []
    with picture(HERE.parent / "docs/pictures/polymer_side_by_side.png", width=6.2, height=3.6) as (_, (axis,)):
        for (method, estimator), (label, colour, line) in CURVES.items():
            stored = next(one for one in files if any(run["method"] == method for run in one["runs"]))
            values, spent = curves(stored, method, estimator), np.array(stored["evaluations"])
            complete = np.isfinite(values).all(axis=0)
            rmse = np.sqrt(np.mean((values - truth) ** 2, axis=0))
            axis.plot(spent[complete], rmse[complete], color=colour, ls=line, marker=".", label=label)
            last = values[:, -1]
            table.append(
                {"method": label, "replicas": len(values), "evaluations": int(spent[-1]), "rmse_kT": round(float(rmse[-1]), 3),
                 "rmse_error_kT": round(float(rmse[-1] / np.sqrt(2 * len(values))), 3), "mean_kT": round(float(np.nanmean(last)), 3),
                 "without_estimate": np.isnan(values).sum(axis=0).tolist()}
            )  # fmt: skip
        axis.axhspan(1e-3, error, color="0.9", lw=0, label="error of the reference")
        axis.set(xscale="log", yscale="log", xlabel="force evaluations, all counted", ylabel="RMS error of ΔF / kT", ylim=(0.03, 3))
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderpad=0.2)
    out = {"command": "python benchmarks/path_figure.py", "reference_kT": truth, "reference_error_kT": error, "rows": table}
    (HERE / "results/path_figure.json").write_text(json.dumps(out, indent=1) + "\n")
    for row in table:
        print(row)


if __name__ == "__main__":
    main()
