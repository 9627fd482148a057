"""Collective variables as plain values, which every file format can hold, and back."""

from __future__ import annotations

from collections.abc import Mapping
from functools import singledispatch
from typing import Any

import numpy as np
import openmm
from numpy.typing import ArrayLike

from boltzgen.cvs import (
    RMSD,
    Angle,
    CollectiveVariable,
    CollectiveVariables,
    Combination,
    Coordination,
    Cosine,
    Dihedral,
    Distance,
    RadiusOfGyration,
    Sine,
)
from boltzgen.errors import CheckpointError, InputError
from boltzgen.md.force_variable import ForceVariable

Description = dict[str, Any]


@singledispatch
def described(cv: CollectiveVariable) -> Description:
    """A variable as plain values; :func:`built` makes it again.

    Raises:
        InputError: If it is none of boltzgen's own.
    """
    raise InputError(f"{cv.name!r} is a {type(cv).__name__}, which cannot be written down; build it from the variables of boltzgen.cvs, or "
                     f"give its OpenMM force as a ForceVariable")  # fmt: skip


def built(description: Mapping[str, Any]) -> CollectiveVariable:
    """The variable of a description.

    Raises:
        CheckpointError: If it describes none.
    """
    kind = description.get("kind")
    if kind not in _BUILDERS:
        raise CheckpointError(f"expected a collective variable of kind {', '.join(_BUILDERS)}, got {kind!r}: the file is damaged, or of "
                              f"another version")  # fmt: skip
    return _BUILDERS[kind](description)


def in_box(cvs: CollectiveVariables, box: ArrayLike) -> CollectiveVariables:
    """The same variables, those that take nearest images in another box ``[3, 3]`` in nm."""
    vectors = np.asarray(box, dtype=np.float64).tolist()
    before = [described(cv) for cv in cvs]
    after = [_with_box(description, vectors) for description in before]
    return cvs if after == before else CollectiveVariables(built(description) for description in after)


def _with_box(value: Any, box: list[list[float]]) -> Any:
    if isinstance(value, dict):
        return {key: box if key == "box" and inner is not None else _with_box(inner, box) for key, inner in value.items()}
    return [_with_box(inner, box) for inner in value] if isinstance(value, list) and value and isinstance(value[0], dict) else value


def _listed(values: Any) -> Any:
    """Numbers in lists; None stays."""
    return None if values is None else np.asarray(values, dtype=np.float64).tolist()


@described.register
def _(cv: Distance) -> Description:
    return {"kind": "distance", "name": cv.name, "atoms": list(cv.atoms), "box": _listed(cv.box)}


@described.register
def _(cv: Angle) -> Description:
    return {"kind": "angle", "name": cv.name, "atoms": list(cv.atoms)}


@described.register
def _(cv: Dihedral) -> Description:
    return {"kind": "dihedral", "name": cv.name, "atoms": list(cv.atoms)}


@described.register
def _(cv: RadiusOfGyration) -> Description:
    return {"kind": "radius_of_gyration", "name": cv.name, "atoms": list(cv.atoms), "masses": _listed(cv.masses)}


@described.register
def _(cv: RMSD) -> Description:
    rows = cv.reference[list(cv.atoms)].tolist()
    return {"kind": "rmsd", "name": cv.name, "atoms": list(cv.atoms), "reference": rows, "n_particles": len(cv.reference)}


@described.register
def _(cv: Coordination) -> Description:
    pairs = [list(pair) for pair in cv.pairs]
    return {"kind": "coordination", "name": cv.name, "pairs": pairs, "r0": cv.r0, "n": cv.n, "m": cv.m, "box": _listed(cv.box)}


@described.register
def _(cv: Cosine) -> Description:
    return {"kind": "cosine", "name": cv.name, "of": described(cv.of)}


@described.register
def _(cv: Sine) -> Description:
    return {"kind": "sine", "name": cv.name, "of": described(cv.of)}


@described.register
def _(cv: Combination) -> Description:
    terms = [described(term) for term in cv.variables]
    return {"kind": "combination", "name": cv.name, "terms": terms, "weights": _listed(cv.weights), "offset": cv.offset, "unit": cv.unit}


@described.register
def _(cv: ForceVariable) -> Description:
    return {
        "kind": "force", "name": cv.name, "xml": openmm.XmlSerializer.serialize(cv.copy_of_force()), "n_particles": len(cv.atoms),
        "period": cv.period, "unit": cv.unit, "box": _listed(cv.box), "platform": cv.platform,
    }  # fmt: skip


def _rmsd(d: Mapping[str, Any]) -> RMSD:
    reference = np.zeros((d["n_particles"], 3))
    reference[d["atoms"]] = d["reference"]
    return RMSD(d["name"], d["atoms"], reference=reference)


def _coordination(d: Mapping[str, Any]) -> Coordination:
    """Of its pairs: all of two groups, or all within one."""
    first = list(dict.fromkeys(i for i, _ in d["pairs"]))
    second = list(dict.fromkeys(j for _, j in d["pairs"]))
    if set(first) & set(second) or len(d["pairs"]) != len(first) * len(second):
        first, second = list(dict.fromkeys([*first, *second])), []
    return Coordination(d["name"], first, second or None, r0=d["r0"], n=d["n"], m=d["m"], box=d["box"])


def _force(d: Mapping[str, Any]) -> ForceVariable:
    force = openmm.XmlSerializer.deserialize(d["xml"])
    return ForceVariable(d["name"], force, n_particles=d["n_particles"], period=d["period"], unit=d["unit"], box=d["box"],
                         platform=d["platform"])  # fmt: skip


_BUILDERS = {
    "distance": lambda d: Distance(d["name"], d["atoms"], box=d["box"]),
    "angle": lambda d: Angle(d["name"], d["atoms"]),
    "dihedral": lambda d: Dihedral(d["name"], d["atoms"]),
    "radius_of_gyration": lambda d: RadiusOfGyration(d["name"], d["atoms"], masses=d["masses"]),
    "rmsd": _rmsd,
    "coordination": _coordination,
    "cosine": lambda d: Cosine(built(d["of"]), name=d["name"]),
    "sine": lambda d: Sine(built(d["of"]), name=d["name"]),
    "combination": lambda d: Combination(d["name"], [built(term) for term in d["terms"]], d["weights"], offset=d["offset"], unit=d["unit"]),
    "force": _force,
}
