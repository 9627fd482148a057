"""Free energy differences from files of work values that any program wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from boltzgen.core import Estimate
from boltzgen.errors import InputError
from boltzgen.estimators.perturbation import acceptance_ratio, bound, convergence, exponential_average, perturbation_verdict
from boltzgen.estimators.verdict import Verdict
from boltzgen.estimators.works import Works

#: Shares of the data at which convergence is looked at, and units that the smallest of them must hold.
_SHARES, _UNITS_IN_A_SHARE = 10, 4


def judge_work_files(
    forward: Path,
    reverse: Path | None = None,
    *,
    unit: Literal["kT", "kJ/mol"],
    temperature_kelvin: float | None = None,
    correlated: bool = False,
    seed: int = 1,
) -> tuple[tuple[Estimate, ...], Verdict | None]:
    """F_B − F_A from works of a switching protocol, of perturbation, or of a map, one value in every line.

    Jarzynski's average and Jensen's bound of each direction; with both directions first Crooks' acceptance ratio, and the verdict.

    Args:
        forward: Works of the way from A to B.
        reverse: Works done on the way from B to A; none leaves the verdict out, as one direction cannot tell what it has not seen.
        unit: Unit of the values.
        temperature_kelvin: Needed for kJ/mol.
        correlated: Whether rows follow each other in time and remember one another: errors then rest on blocks.
        seed: Seed of the bootstrap.

    Returns:
        Estimates in kT, the best one first, and the verdict of both directions.

    Raises:
        InputError: If a file cannot be read, or holds fewer than two independent works; or a temperature is given for kT.
    """

    def read(path: Path) -> Works:
        works = Works.read(path, unit=unit, temperature_kelvin=temperature_kelvin)
        return works.blocked(at_least=1.0) if correlated else works

    if unit == "kT" and temperature_kelvin is not None:
        raise InputError("a temperature is for works in kJ/mol; works in kT have none to be given")
    there, back = read(forward), None if reverse is None else read(reverse)
    one_sided = [exponential_average(there, name="F_B - F_A, from A alone", seed=seed), bound(there)]
    if back is None:
        return tuple(one_sided), None
    one_sided += [exponential_average(back, reverse=True, name="F_B - F_A, from B alone", seed=seed), bound(back, reverse=True)]
    found, drift = acceptance_ratio(there, back, seed=seed), None
    if min(there.n_units, back.n_units) >= _UNITS_IN_A_SHARE * _SHARES:
        drift = convergence(there, back, n_shares=_SHARES, seed=seed)
    return (found.difference, *one_sided), perturbation_verdict(found, drift=drift)
