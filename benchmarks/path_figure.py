"""The picture of path_baselines.py and path_sampling.py: root mean square error of ΔF against force evaluations, a panel a system.

    python benchmarks/path_figure.py

The error is that over replicas against the reference of reference_umbrella.json (its entries, weighted by their errors), whose own
error is the grey band. A method is drawn from where all of its replicas have an estimate; earlier ones are counted in the table.
Systems of which no comparison is stored are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from boltzgen.report.style import picture

HERE = Path(__file__).parent
#: Folder of the system → its title.
SYSTEMS = {
    "polymer_in_solvent": "polymer, 200 solvent particles",
    "wca_dimer_2d": "dimer in the plane, 98 solvent particles",
    "wca_dimer_3d": "dimer in space, 214 solvent particles",
}
#: Method and estimator → label, colour, line.
CURVES = {
    ("md", "frequencies"): ("plain MD", "#999999", "-"),
    ("metadynamics", "bias"): ("metadynamics, bias", "#E69F00", ":"),
    ("metadynamics", "reweighted"): ("metadynamics, reweighted", "#E69F00", "-"),
    ("umbrella", "mbar"): ("umbrella + MBAR", "#009E73", "-"),
    ("fixed", "bar"): ("steered paths, fixed proposal", "#56B4E9", "-"),
    ("learned", "bar"): ("steered paths, learned proposal", "#0072B2", "-"),
}


def reference(system: str) -> tuple[float, float]:
    """ΔF and its error in kT."""
    stored = json.loads((HERE / "results/reference_umbrella.json").read_text())
    rows = [one for name, one in stored.items() if name.startswith(system)]
    weights = np.array([one["stderr_kT"] ** -2.0 for one in rows])
    return float(np.average([one["delta_f_kT"] for one in rows], weights=weights)), float(weights.sum() ** -0.5)


def curves(stored: dict[str, Any], method: str, estimator: str) -> np.ndarray:
    """Estimates ``[replicas, checkpoints]``, NaN where there is none."""
    rows = [run["delta_f_kT"][estimator] for run in stored["runs"] if run["method"] == method]
    return np.array([[np.nan if value is None else value for value in row] for row in rows], dtype=float)


def draw(axis: Axes, system: str) -> Iterator[dict[str, Any]]:
    """The panel of a system, and its rows of the table."""
    truth, error = reference(system)
    files = [json.loads((HERE / f"results/{name}_{system}.json").read_text()) for name in ("path_baselines", "path_sampling")]
    for (method, estimator), (label, colour, line) in CURVES.items():
        stored = next(one for one in files if any(run["method"] == method for run in one["runs"]))
        values, spent = curves(stored, method, estimator), np.array(stored["evaluations"])
        complete = np.isfinite(values).all(axis=0)
        rmse = np.sqrt(np.mean((values - truth) ** 2, axis=0))
        axis.plot(spent[complete], rmse[complete], color=colour, ls=line, marker=".", label=label)
        last = values[:, -1]
        yield {
            "method": label, "replicas": len(values), "evaluations": int(spent[-1]), "rmse_kT": round(float(rmse[-1]), 3),
            "rmse_error_kT": round(float(rmse[-1] / np.sqrt(2 * len(values))), 3), "mean_kT": round(float(np.nanmean(last)), 3),
            "mean_error_kT": round(float(np.nanstd(last, ddof=1) / np.sqrt(len(last))), 3),
            "without_estimate": np.isnan(values).sum(axis=0).tolist(),
        }  # fmt: skip
    axis.axhspan(1e-3, error, color="0.9", lw=0, label="error of the reference")
    axis.set(xscale="log", yscale="log", xlabel="force evaluations, all counted", ylim=(0.03, 3), xlim=(9e3, 2.8e5))
    axis.set_title(SYSTEMS[system])


def main() -> None:
    """Draw, and print the table."""
    out: dict[str, Any] = {"command": "python benchmarks/path_figure.py"}
    systems = [
        one for one in SYSTEMS if all((HERE / f"results/{name}_{one}.json").exists() for name in ("path_baselines", "path_sampling"))
    ]
    shape: dict[str, Any] = {"columns": len(systems), "width": 1.2 + 3.0 * len(systems), "height": 3.6, "share": True}
    with picture(HERE.parent / "docs/pictures/side_by_side.png", **shape) as (figure, axes):
        for axis, system in zip(axes, systems, strict=True):
            truth, error = reference(system)
            out[system] = {"reference_kT": truth, "reference_error_kT": error, "rows": list(draw(axis, system))}
        axes[0].set_ylabel("RMS error of ΔF / kT")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    (HERE / "results/path_figure.json").write_text(json.dumps(out, indent=1) + "\n")
    for system in systems:
        print(f"{system}: reference {out[system]['reference_kT']:.3f} +- {out[system]['reference_error_kT']:.3f} kT")
        for row in out[system]["rows"]:
            print(row)


if __name__ == "__main__":
    main()
