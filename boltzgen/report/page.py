"""One self-contained HTML page about a finished run."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from boltzgen.files import written
from boltzgen.report.style import REMEDY, symbol

#: Picture → heading and what a reader sees in it, in the order of the page. Names may end in ``*``.
_PICTURES = {
    "works.png": (
        "Works",
        "What it costs to take configurations of one state for the other, in both directions. The distributions cross at the difference; "
        "the narrower they are and the more they overlap, the smaller its error.",
    ),
    "bounds.png": (
        "Bounds",
        "The mean work from A to B bounds the difference from above, minus that from B to A from below. Training closes the gap; "
        "one of held-out rows that widens means that the map learns its training data by heart.",
    ),
    "convergence.png": (
        "Convergence",
        "The estimate from the first and from the last part of the data. Both must settle on the same value well before all data are used.",
    ),
    "overlap.png": (
        "Overlap",
        "How often a configuration made in one state could as well be one of the other. Off-diagonal entries of a few percent are too few.",
    ),
    "ramachandran.png": (
        "Where the molecule goes",
        "Free energy over the two main torsions: blue is frequent, yellow rare, grey never visited. The third map, the flow's samples with "
        "their weights, should show every basin of the first, and usually reaches further because it rests on more samples. "
        "The first holds the frames of the simulation.",
    ),
    "profile_*.png": (
        "Free-energy profile along {name}",
        "The reweighted flow beside molecular dynamics on the same zero. Bands are ± 2 standard errors of the difference to the zero. "
        "Where the bands do not overlap, one of the two is wrong or has not sampled enough.",
    ),
    "walkers_*.png": (
        "Walkers along {name}",
        "Where the first walkers were after every cycle, one colour each; the shaded part is adaptation. A walker that jumps shows in "
        "every basin; bands of one colour mean that it never leaves.",
    ),
    "jump_profile_*.png": (
        "Free-energy profile along {name}",
        "From production, once with the proposals counted in proportion to their acceptance, once from the walkers alone. Both are exact; "
        "the first has the smaller error. Bands are ± 2 standard errors of the difference to the zero.",
    ),
    "acceptance.png": (
        "Acceptance",
        "Share of accepted jumps and local moves in every round of learning, and with the flow frozen (square). Jumps become accepted as "
        "the flow learns where the walkers have been.",
    ),
    "distances.png": (
        "Distances",
        "How often two particles are that far apart, all pairs together. With its weights the flow must reproduce the grey distribution of "
        "the reference walkers.",
    ),
    "energies.png": (
        "Energies",
        "How often each potential energy occurs. With its weights the flow must reproduce the grey distribution of molecular dynamics; "
        "without them it may lie higher.",
    ),
    "weights.png": (
        "Weights",
        "How unequal the samples count. A narrow peak is good. The shaded tail holds the largest weights: k̂ below 0.7 means that averages "
        "do not rest on a few samples.",
    ),
    "training.png": (
        "Training",
        "Left and middle: lower is better; a held-out curve that rises means the flow learns its training data by heart. "
        "Right: the share of samples that effectively count.",
    ),
}

#: Diagnostics worth a line: name → label, explanation, whether it is a fraction.
_DIAGNOSTICS = {
    "ess_raw": ("Effective sample size, raw", "Share of the samples that effectively count; no weight was changed.", True),
    "ess_batch_median": ("… median over batches", "Raw, in batches of fresh samples: the figure that other work reports.", True),
    "ess_clipped": ("… with the largest weights clipped", "Biased; only for comparison with published numbers.", True),
    "clip_fraction": ("Share of weights clipped there", "Estimates never use clipped weights.", True),
    "pareto_k": ("Pareto k̂", "Shape of the tail of the weights: below 0.5 good, above 0.7 error bars cannot be trusted.", False),
    "forward_ess": ("Effective sample size on MD data", "Sees basins that the flow misses; far below the raw one means trouble.", True),
    "acceptance": ("Acceptance of the exact chain", "Share of accepted moves when the samples are turned into an unweighted chain.", True),
    "jump_acceptance": ("Accepted jumps", "Share of the flow's proposals that walkers moved to, in production.", True),
    "local_acceptance": ("Accepted local moves", "In production; far below a half asks for shorter steps.", True),
    "fewest_round_trips": ("Round trips", "Between a basin and the rest, all walkers together; of the basin with the fewest.", False),
    "largest_r_hat": ("Disagreement of the walkers", "Largest R-hat of energy and coordinates: 1 where all tell the same.", False),
    "log_z_lower": ("ln Z, lower bound", "From the flow's samples.", False),
    "elbo": ("ln Z, lower bound", "From the flow's samples.", False),
    "log_z_upper": ("ln Z, upper bound", "From MD data; valid only if those data cover every basin.", False),
    "eubo": ("ln Z, upper bound", "From MD data; valid only if those data cover every basin.", False),
    "log_det_error": ("Error of the log densities / nats", "Largest difference, in some hundred rows, to a finer solution.", False),
    "overlap": ("Overlap of the two states", "1 for equal states, 0 for states that do not know of each other; 0.05 is the least.", False),
    "carriers_forward": ("Independent works from A", "How many effectively carry the estimate; 50 are needed.", False),
    "carriers_reverse": ("Independent works from B", "Likewise.", False),
    "mismatch": ("Contradiction of the directions", "0 within its error where both sets of works belong together (Crooks).", False),
    "mismatch_stderr": ("… its error", "", False),
    "spread_forward": ("Spread of works from A / kT", "Standard deviation; 1 or less makes any estimator good.", False),
    "spread_reverse": ("Spread of works from B / kT", "Likewise.", False),
    "n_samples": ("Fresh samples", "Drawn after training; none of them trained the flow.", False),
}  # fmt: skip

#: Task → what the page is about, where it is not a generator.
_KINDS = {"tfep": "Free energy difference", "jumps": "Sampling by jumps", "campaign": "Free energy campaign"}
_COLOURS = {"reliable": "good", "low overlap": "poor", "missing modes": "bad", "not converged": "poor", "not exact": "bad"}


@dataclass(frozen=True)
class _Picture:
    heading: str
    caption: str
    data: str
    wide: bool


def write_report(folder: Path, results: Mapping[str, Any]) -> Path:
    """Write ``report.html`` from the results, ``config.yaml`` and the pictures of a run.

    Args:
        folder: Folder of the run.
        results: The content of ``results.json``.

    Returns:
        Path of the page; it needs no other file and no network.

    Raises:
        OutputError: If it cannot be written.
    """
    folder = Path(folder)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("boltzgen", "report"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    text = environment.get_template("page.html.j2").render(
        folder=folder.name,
        kind=_KINDS.get(results["task"], "Boltzmann generator"),
        results=results,
        colour=_COLOURS.get(results["verdict"], "poor"),
        reasons=results.get("verdict_reasons", []),
        estimates=[_estimate_row(estimate) for estimate in results["estimates"] if not isinstance(estimate["value"], list)],
        remarks=_remarks(results["estimates"]),
        diagnostics=_diagnostic_rows(results["diagnostics"]),
        evaluations=_evaluation_rows(results["diagnostics"].get("energy_evaluations", {}), results["wall_seconds"]),
        notes=results.get("notes", []),
        provenance=results["provenance"],
        pictures=_pictures(folder),
        config=(folder / "config.yaml").read_text(encoding="utf-8"),
    )
    path = folder / "report.html"
    with written(path, remedy=REMEDY) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def _estimate_row(estimate: Mapping[str, Any]) -> dict[str, str]:
    """Value and error with the digits that the error allows."""
    value, stderr = estimate["value"], estimate["stderr"]
    known = value is not None and stderr is not None
    digits = 3 if not known or stderr <= 0 else min(max(1 - math.floor(math.log10(stderr)), 0), 8)
    n = estimate["n_effective"]
    return {
        "name": str(estimate["name"]),
        "value": f"{value:.{digits}f}" if value is not None else "not known",
        "stderr": f"± {stderr:.{digits}f}" if stderr is not None else "",
        "unit": estimate["unit"] if value is not None else "",
        "n_effective": "" if n is None else f"{n:,.0f}",
    }


def _remarks(estimates: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every note once, after the names of the quantities that it concerns."""
    names: dict[str, list[str]] = {}
    for estimate in estimates:
        if estimate.get("note"):
            names.setdefault(estimate["note"], []).append(str(estimate["name"]))
    return [f"{'; '.join(concerned)}: {note}" for note, concerned in names.items()]


def _diagnostic_rows(diagnostics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    rows = []
    for key, (label, meaning, is_fraction) in _DIAGNOSTICS.items():
        value = diagnostics.get(key)
        if value is None:
            continue
        shown = f"{value:.1%}" if is_fraction and value >= 0.01 else f"{value:.2%}" if is_fraction else _number(value)
        rows.append((label, shown, meaning))
    return rows


def _evaluation_rows(evaluations: Mapping[str, Any], seconds: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Stage, energy evaluations and wall time."""
    stages = list(dict.fromkeys([*seconds, *evaluations]))
    stages.sort(key=lambda stage: stage == "total")
    return [(stage.replace("_", " "), _number(evaluations.get(stage)), _duration(seconds.get(stage))) for stage in stages]


def _pictures(folder: Path) -> list[_Picture]:
    pictures = []
    for pattern, (heading, caption) in _PICTURES.items():
        for path in sorted(folder.glob(pattern)):
            name = path.stem.removeprefix(pattern.partition("*")[0])
            data = base64.b64encode(path.read_bytes()).decode()
            wide = path.stem in ("ramachandran", "training", "works")
            pictures.append(_Picture(heading=heading.format(name=symbol(name)), caption=caption, data=data, wide=wide))
    return pictures


def _number(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_number(item) for item in value)
    if isinstance(value, float) and not value.is_integer():
        if abs(value) < 0.001:
            return f"{value:.1e}"
        return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.1f}"
    return f"{int(value):,}" if isinstance(value, (int, float)) else str(value)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
