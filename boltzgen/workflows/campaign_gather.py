"""The table of a campaign: repeats combined, cycles closed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.stats import chi2, norm

from boltzgen.config import CampaignConfig, config_text
from boltzgen.core import Estimate
from boltzgen.estimators.cycles import close_cycles, combine_repeats
from boltzgen.estimators.verdict import Verdict
from boltzgen.report.page import write_report
from boltzgen.workflows.campaign_plan import Task, adopt, named
from boltzgen.workflows.run_folder import Results, RunFolder, provenance

#: The estimate of a run that is gathered.
_NAME = "F_B - F_A"
#: Probability, for a whole campaign, that repeats or closures with right errors scatter so much that those are not believed.
_FALSE_ALARM = 0.0027


def gather(config: CampaignConfig, tasks: Sequence[Task], out: Path) -> Results:
    """Combine the finished runs of a campaign and write the table.

    Args:
        config: The campaign.
        tasks: Its runs (:func:`~boltzgen.workflows.campaign_plan.plan`).
        out: Its folder. Results that were changed after their run, or cannot be read, count as missing.

    Returns:
        One estimate per leg and temperature, then the closed ones and the closure of every cycle.

    Raises:
        OutputError: If the folder cannot be written.
    """
    found: dict[str, list[tuple[Task, dict[str, Any]]]] = {task.difference: [] for task in tasks}
    for task in tasks:
        results = adopt(task.folder(out), task.config)
        if results is not None:
            found[task.difference].append((task, dict(results)))
    doubts, rows, combined = [], [], dict[str, Estimate]()
    for difference, runs in found.items():
        n_planned = sum(task.difference == difference for task in tasks)
        row, estimate = _row(difference, runs, n_planned=n_planned, level=_FALSE_ALARM / len(found))
        rows.append(row)
        doubts += row.pop("doubts")
        if estimate is not None:
            combined[difference] = estimate
    closed, closures = [], []
    for temperature in config.temperatures or (None,):
        legs = {leg: combined[name] for leg in config.legs if (name := named(leg, temperature)) in combined}
        known = {
            named(cycle, temperature): path for cycle, path in config.cycles.items() if all(leg.removeprefix("-") in legs for leg in path)
        }
        if known:
            result = close_cycles(legs, known)
            closed += list(result.estimates)
            closures += list(result.closures)
    doubts += [
        f"{c.name}: {float(c.value):.3g} kT with an error of {float(c.stderr):.2g}: the legs contradict each other"
        for c in closures if abs(float(c.value)) > norm.isf(_FALSE_ALARM / len(closures) / 2) * float(c.stderr)
    ]  # fmt: skip
    verdict = (
        Verdict("not converged", tuple(doubts)) if doubts else Verdict("reliable", (f"{len(combined)} differences, every run reliable",))
    )
    evaluations = _summed([results["diagnostics"]["energy_evaluations"] for runs in found.values() for _, results in runs])
    seconds = sum(results["wall_seconds"]["total"] for runs in found.values() for _, results in runs)
    table = Results(
        task="campaign",
        estimates=(*combined.values(), *closures, *closed),
        diagnostics={"legs": rows, "energy_evaluations": evaluations},
        wall_seconds={"all runs together": seconds},
        verdict=verdict.word,
        provenance=provenance(config.seed, "", sha256={}),
        reasons=verdict.reasons,
        notes=("The error of a leg is the larger of what its runs state and what their scatter says.",),
    )
    folder = RunFolder(out)
    folder.write_text("config.yaml", config_text(config))
    write_report(out, table.to_dict())
    folder.finish(table)
    return table


def _row(
    difference: str, runs: Sequence[tuple[Task, dict[str, Any]]], *, n_planned: int, level: float
) -> tuple[dict[str, Any], Estimate | None]:
    """A line of the table, and its estimate where a run has one."""
    row: dict[str, Any] = {"name": difference, "runs": len(runs), "planned": n_planned, "doubts": []}
    if len(runs) < n_planned:
        row["doubts"].append(f"{difference}: {n_planned - len(runs)} of {n_planned} runs are missing")
    estimates = []
    for task, results in runs:
        if results["verdict"] != "reliable":
            row["doubts"].append(f"{task.label}: {results['verdict']}: {'; '.join(results['verdict_reasons'])}")
        values = next(estimate for estimate in results["estimates"] if estimate["name"] == _NAME)
        if values["value"] is None or values["stderr"] is None:
            row["doubts"].append(f"{task.label}: no finite number")
            continue
        keys = ("name", "value", "stderr", "unit", "n_effective")
        estimates.append(Estimate(**{key: values[key] for key in keys}, note=values.get("note", "")))
    if not estimates:
        return row, None
    repeats = combine_repeats(estimates, name=difference)
    row |= {"value": repeats.estimate.value, "stderr": repeats.estimate.stderr, "within": repeats.within, "between": repeats.between,
            "chi_squared": repeats.chi_squared, "verdicts": [results["verdict"] for _, results in runs]}  # fmt: skip
    dof = len(estimates) - 1
    if dof and chi2.sf(repeats.chi_squared * dof, dof) < level:
        row["doubts"].append(f"{difference}: repeats scatter more than their errors say (chi squared {repeats.chi_squared:.1f})")
    return row, repeats.estimate


def _summed(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    stages = dict.fromkeys(stage for count in counts for stage in count)
    return {stage: sum(count.get(stage, 0) for count in counts) for stage in stages}
