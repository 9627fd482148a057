"""Profile of a run of steered paths against umbrella sampling with MBAR, bin by bin.

    python benchmarks/compare_profile.py RUN_FOLDER

Both are probabilities of the same bins, those of the run, normalised over all bins that both have seen: no bin's noise is in the others.
Those of the reference come from its bins of 0.02 σ by interpolation of their cumulative sum; its error is the scatter of pairs of sweeps.
The run's profile and its error (bootstrap over stretches of walkers) are computed from its tables of paths, looks and visits as
``boltzgen paths`` does; without ``looks.npz``, or with ``--ends``, from the ends of paths alone. Bins where the reference is below 6 kT
count. Writes into ``benchmarks/results/compare_profile.json`` under ``--name``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import yaml
from scipy.interpolate import PchipInterpolator

from boltzgen.config import PathsConfig
from boltzgen.estimators.path_averages import path_profile
from boltzgen.estimators.profiles import Profile
from boltzgen.estimators.profiles_along import profile_along_paths
from boltzgen.paths import Looks, Paths, Restraint
from boltzgen.workflows.path_basins import memberships

HERE = Path(__file__).parent
RESULT, REFERENCES = HERE / "results/compare_profile.json", HERE / "results/reference_umbrella.json"
BELOW, BOUND, N_BOOTSTRAP = 6.0, 0.25, 400


@dataclass(frozen=True)
class Binned:
    """Probabilities of bins ``[bins]``, which sum to one, and the errors of their logarithms."""

    p: np.ndarray
    error: np.ndarray


def reference_on(stored: dict[str, Any], edges: np.ndarray, seen: np.ndarray) -> Binned:
    """The reference on bins between ``edges`` in σ, of which ``seen`` are used; 0 elsewhere."""
    fine, pairs = np.array(stored["probability"]["edges_sigma"]), np.array(stored["probability"]["pairs_of_sweeps"])
    logs = np.log([_rebinned(fine, one, edges)[seen] for one in pairs])
    p, error = np.zeros(len(edges) - 1), np.full(len(edges) - 1, np.inf)
    p[seen] = _rebinned(fine, np.array(stored["probability"]["all"]), edges)[seen]
    logs -= np.log(np.exp(logs).sum(axis=1, keepdims=True))
    error[seen] = logs.std(axis=0, ddof=1) / np.sqrt(len(pairs))
    return Binned(p / p.sum(), error)


def _rebinned(fine: np.ndarray, p: np.ndarray, edges: np.ndarray) -> np.ndarray:
    cumulative = PchipInterpolator(fine, np.concatenate([[0.0], np.cumsum(p)]))
    return np.asarray(np.diff(cumulative(np.clip(edges, fine[0], fine[-1]))).clip(min=1e-300))


def profile_of(folder: Path, *, ends_only: bool) -> Profile:
    """The profile of a finished run, from its tables."""
    given = yaml.safe_load((folder / "config.yaml").read_text())
    config = PathsConfig(**given)
    paths = Paths(**_arrays(folder / "paths.npz"))
    edges = np.array(json.loads((folder / "results.json").read_text())["diagnostics"]["profiles"][config.names[0]]["edges"])
    if ends_only:
        return path_profile(paths, edges, periods=config.periods, n_bootstrap=N_BOOTSTRAP, seed=config.seed)
    visited = _arrays(folder / "visited.npz")["xi"][:, :, 0] if (folder / "visited.npz").exists() else None
    widths = json.loads((folder / "results.json").read_text())["diagnostics"]["widths"].values()
    return profile_along_paths(
        paths, Looks(**_arrays(folder / "looks.npz")), Restraint([w**-2.0 for w in widths], config.periods),
        list(memberships(config).values()), edges=edges, visited=visited, n_bootstrap=N_BOOTSTRAP, seed=config.seed,
    )  # fmt: skip


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def compared(profile: Profile, stored: dict[str, Any]) -> dict[str, Any]:
    """Bin by bin, in kT, with both errors."""
    edges = profile.edges[0] / stored["sigma_nm"]
    fine, everywhere = np.array(stored["probability"]["edges_sigma"]), np.array(stored["probability"]["pairs_of_sweeps"])
    low = np.array([_rebinned(fine, one, edges) for one in everywhere]).min(axis=0)
    seen = (profile.probability > 0) & (low > 1e-6)
    reference = reference_on(stored, edges, seen)
    p = np.where(seen, profile.probability, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        f = -np.log(reference.p / np.diff(edges))
        apart = np.log(reference.p) - np.log(p / p.sum())
        z = apart / np.hypot(profile.stderr_normalised, reference.error)
    f -= f.min()
    rows = np.flatnonzero(seen & (f < BELOW))
    off = apart[rows]
    table = {
        "centre_nm": profile.centers[0], "reference_kT": f, "run_minus_reference_kT": apart,
        "error_of_run_kT": profile.stderr_normalised, "error_of_reference_kT": reference.error, "z": z,
    }  # fmt: skip
    return {
        "bins": len(rows), "rms_kT": float(np.sqrt(np.mean(off**2))), "worst_kT": float(np.abs(off).max()),
        "beyond_0.25_kT": int((np.abs(off) > BOUND).sum()),
        "rms_z": float(np.sqrt(np.mean(z[rows] ** 2))), "worst_z": float(np.abs(z[rows]).max()),
        "largest_error_of_run_kT": float(profile.stderr_normalised[rows].max()),
        "largest_error_of_reference_kT": float(reference.error[rows].max()),
        "rows": [{name: round(float(values[i]), 4) for name, values in table.items()} for i in rows],
    }  # fmt: skip


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--reference", "key", default="polymer_in_solvent, compiled", help="Entry of reference_umbrella.json.")
@click.option("--ends", is_flag=True, help="From the ends of paths alone.")
@click.option("--name", default="polymer_paths", help="Entry to write.")
@click.option("--references", type=click.Path(exists=True, path_type=Path), default=REFERENCES)
@click.option("--out", type=click.Path(path_type=Path), default=RESULT)
def main(folder: Path, key: str, ends: bool, name: str, references: Path, out: Path) -> None:
    """Compare the profile of the run in FOLDER with its reference, print and store it."""
    stored, run = json.loads(references.read_text())[key], json.loads((folder / "results.json").read_text())
    ends_only = ends or not (folder / "looks.npz").exists()
    found = compared(profile_of(folder, ends_only=ends_only), stored)
    difference = run["estimates"][0]
    gap, error = difference["value"] - stored["delta_f_kT"], float(np.hypot(difference["stderr"], stored["stderr_kT"]))
    summary = {
        "from": "ends of paths" if ends_only else "ends of paths and looks", "reference": key,
        "delta_f_kT": difference["value"], "stderr_kT": difference["stderr"], "reference_delta_f_kT": stored["delta_f_kT"],
        "reference_stderr_kT": stored["stderr_kT"], "delta_f_z": gap / error,
        "cycles": len(np.unique(_arrays(folder / "paths.npz")["time"])),
        "force_evaluations": run["diagnostics"]["energy_evaluations"]["total"], "seed": run["provenance"]["seed"],
        "command": f"python benchmarks/compare_profile.py RUN_FOLDER --name '{name}'{' --ends' if ends else ''}",
    }  # fmt: skip
    for row in found["rows"]:
        print("  ".join(f"{value:8.3f}" for value in row.values()))
    print(", ".join(f"{label} {value:.3g}" for label, value in found.items() if label != "rows"))
    print(
        f"dF {difference['value']:.3f} +- {difference['stderr']:.3f}, reference {stored['delta_f_kT']:.3f} +- {stored['stderr_kT']:.3f} kT"
    )
    written = json.loads(out.read_text()) if out.exists() else {}
    out.write_text(json.dumps(written | {name: summary | found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
