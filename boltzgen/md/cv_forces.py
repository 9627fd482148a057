"""Collective variables as OpenMM forces: their values as energies, and restraints that hold them at moving centres."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch

import openmm

from boltzgen.cvs import (
    RMSD,
    Angle,
    CollectiveVariable,
    CollectiveVariables,
    Combination,
    Coordination,
    Dihedral,
    Distance,
    RadiusOfGyration,
)
from boltzgen.cvs.combination import AngleFunction
from boltzgen.errors import InputError
from boltzgen.md.force_variable import ForceVariable

#: A CustomCVForce evaluates each of its variables in a force group of its own.
_MOST_INNER_FORCES = 32


@dataclass(frozen=True)
class _Formula:
    """A variable as an expression of the energies of forces.

    Attributes:
        expression: In Lepton's language; a name alone where one force is the variable.
        forces: Name → force whose energy in kJ/mol stands for the name.
    """

    expression: str
    forces: dict[str, openmm.Force]


@dataclass(frozen=True)
class _Internal:
    """A function of one distance, angle or dihedral, which OpenMM computes by a bonded force.

    Attributes:
        base: The distance, angle or dihedral.
        function: ``{q}`` stands for its value.
    """

    base: Distance | Angle | Dihedral
    function: str

    @property
    def kind(self) -> tuple[type[CollectiveVariable], str, bool]:
        """What variables of one bonded force have in common."""
        return type(self.base), self.function, _is_periodic(self.base)


def center_name(index: int) -> str:
    """Global parameter that holds the centre of the restraint of one variable, in its unit."""
    return f"boltzgen_center_{index}"


def stiffness_name(index: int) -> str:
    """Global parameter that holds the stiffness of the restraint of one variable, in kJ/mol per its unit squared."""
    return f"boltzgen_stiffness_{index}"


def cv_force(cv: CollectiveVariable) -> openmm.Force:
    """A force whose energy in kJ/mol is the value of the variable in its unit.

    Where the variable has a box, the force takes the box of its context: they are equal at constant volume only. A ``ForceVariable`` with
    a period gives the force it was made of, whose energy may be whole turns away.

    Raises:
        InputError: If boltzgen cannot express the variable by OpenMM's forces.
    """
    formula = _formula(cv, "v")
    if list(formula.forces) == [formula.expression]:
        return formula.forces[formula.expression]
    return _custom_cv_force(formula.expression, formula.forces)


def restraint_forces(cvs: CollectiveVariables, *, group: int) -> list[openmm.Force]:
    """Restraints of all variables, Σ_i ½ k_i (ξ_i − c_i)², or k_i (P/2π)² (1 − cos(2π (ξ_i − c_i)/P)) where ξ_i has period P.

    Both have the curvature k_i at c_i. The centres c_i and stiffnesses k_i are the global parameters :func:`center_name` and
    :func:`stiffness_name`, all 0 at first. Distances, angles and dihedrals become bonded forces, which are much faster than a
    ``CustomCVForce``; the others share as few of those as OpenMM allows.

    Args:
        cvs: The variables.
        group: Force group of all forces.

    Returns:
        Forces for one system.

    Raises:
        InputError: If boltzgen cannot express a variable by OpenMM's forces.
    """
    direct = [(k, cv) for k, cv in enumerate(cvs) if isinstance(cv, (Distance, Angle, Dihedral))]
    forces = [_with_parameters(_bonded([_Internal(cv, _restraint("{q}", cv.period, k))], None), [k]) for k, cv in direct]
    others = [(k, cv.period, _formula(cv, f"v{k}_")) for k, cv in enumerate(cvs) if not isinstance(cv, (Distance, Angle, Dihedral))]
    for together in _batches(others):
        energy = "+".join(_restraint(f"({formula.expression})", period, k) for k, period, formula in together)
        inner = {name: force for *_, formula in together for name, force in formula.forces.items()}
        forces.append(_with_parameters(_custom_cv_force(energy, inner), [k for k, *_ in together]))
    for force in forces:
        force.setForceGroup(group)
    return forces


def _batches(others: Sequence[tuple[int, float | None, _Formula]]) -> list[list[tuple[int, float | None, _Formula]]]:
    """The same in runs that hold no more forces than one ``CustomCVForce`` may."""
    batches: list[list[tuple[int, float | None, _Formula]]] = []
    room = 0
    for other in others:
        size = len(other[2].forces)
        if size > room:
            batches.append([])
            room = _MOST_INNER_FORCES
        batches[-1].append(other)
        room -= size
    return batches


def _restraint(value: str, period: float | None, index: int) -> str:
    """Energy of the restraint of a value."""
    away = f"({value}-{center_name(index)})"
    if period is None:
        return f"0.5*{stiffness_name(index)}*{away}^2"
    turns = period / (2 * math.pi)
    if math.isclose(turns, 1.0):
        return f"{stiffness_name(index)}*(1-cos({away}))"
    return f"{stiffness_name(index)}*{turns**2!r}*(1-cos({away}/{turns!r}))"


def _with_parameters(force: openmm.Force, indices: Sequence[int]) -> openmm.Force:
    for index in indices:
        force.addGlobalParameter(center_name(index), 0.0)
        force.addGlobalParameter(stiffness_name(index), 0.0)
    return force


def _custom_cv_force(expression: str, forces: dict[str, openmm.Force]) -> openmm.CustomCVForce:
    outer = openmm.CustomCVForce(expression)
    for name, force in forces.items():
        outer.addCollectiveVariable(name, force)
    return outer


def _is_periodic(cv: CollectiveVariable) -> bool:
    return isinstance(cv, (Distance, Coordination)) and cv.box is not None


def _internal(cv: CollectiveVariable) -> _Internal | None:
    """The variable as a function of one distance, angle or dihedral, if it is that."""
    if isinstance(cv, (Distance, Angle, Dihedral)):
        return _Internal(cv, "{q}")
    if isinstance(cv, AngleFunction) and isinstance(cv.of, (Angle, Dihedral)):
        return _Internal(cv.of, f"{cv.function}({{q}})")
    return None


def _bonded(internals: Sequence[_Internal], weights: Sequence[float] | None) -> openmm.Force:
    """One bonded force for functions of one kind; its energy is their sum, weighted where weights are given."""
    base, function, periodic = internals[0].kind
    factor = "" if weights is None else "weight*"
    if issubclass(base, Distance):
        force = openmm.CustomBondForce(factor + function.format(q="r"))
        add, parameter = force.addBond, force.addPerBondParameter
    elif issubclass(base, Angle):
        force = openmm.CustomAngleForce(factor + function.format(q="theta"))
        add, parameter = force.addAngle, force.addPerAngleParameter
    else:
        force = openmm.CustomTorsionForce(factor + function.format(q="theta"))
        add, parameter = force.addTorsion, force.addPerTorsionParameter
    if weights is not None:
        parameter("weight")
    for k, internal in enumerate(internals):
        add(*internal.base.atoms, [] if weights is None else [weights[k]])
    force.setUsesPeriodicBoundaryConditions(periodic)
    return force


@singledispatch
def _formula(cv: CollectiveVariable, name: str) -> _Formula:
    """The variable by forces whose names begin with ``name``."""
    internal = _internal(cv)
    if internal is None:
        raise InputError(f"{cv.name!r} is a {type(cv).__name__}, which boltzgen cannot express by OpenMM's forces; build it from the "
                         f"variables of boltzgen.cvs, or give the force itself as a ForceVariable")  # fmt: skip
    return _Formula(name, {name: _bonded([internal], None)})


@_formula.register
def _(cv: AngleFunction, name: str) -> _Formula:
    internal = _internal(cv)
    if internal is not None:
        return _Formula(name, {name: _bonded([internal], None)})
    inside = _formula(cv.of, name)
    return _Formula(f"{cv.function}({inside.expression})", inside.forces)


@_formula.register
def _(cv: RadiusOfGyration, name: str) -> _Formula:
    if cv.masses is None:
        return _Formula(name, {name: openmm.RGForce(list(cv.atoms))})
    force = openmm.CustomCentroidBondForce(2, "share*distance(g1, g2)^2")
    force.addPerBondParameter("share")
    centre = force.addGroup(list(cv.atoms), cv.masses.tolist())
    for atom, share in zip(cv.atoms, cv.masses / cv.masses.sum(), strict=True):
        force.addBond([force.addGroup([atom], [1.0]), centre], [share])
    return _Formula(f"sqrt({name})", {name: force})


@_formula.register
def _(cv: RMSD, name: str) -> _Formula:
    return _Formula(name, {name: openmm.RMSDForce(cv.reference, list(cv.atoms))})


@_formula.register
def _(cv: Coordination, name: str) -> _Formula:
    g, n, m = cv.reduced_exponents
    force = openmm.CustomBondForce(f"{_geometric_sum(n)}/{_geometric_sum(m)}; p=(r/{cv.r0!r})^{g}")
    for pair in cv.pairs:
        force.addBond(*pair)
    force.setUsesPeriodicBoundaryConditions(_is_periodic(cv))
    return _Formula(name, {name: force})


@_formula.register
def _(cv: ForceVariable, name: str) -> _Formula:
    return _Formula(name, {name: cv.copy_of_force()})


@_formula.register
def _(cv: Combination, name: str) -> _Formula:
    """Terms of one kind share a force: each force of a ``CustomCVForce`` costs an evaluation of its own."""
    expression = [repr(_offset(cv))]
    forces: dict[str, openmm.Force] = {}
    shared: dict[tuple, list[tuple[_Internal, float]]] = {}
    for k, (term, weight) in enumerate(_terms(cv, 1.0)):
        internal = _internal(term)
        if internal is not None:
            shared.setdefault(internal.kind, []).append((internal, weight))
            continue
        formula = _formula(term, f"{name}{k}_")
        expression.append(f"{weight!r}*({formula.expression})")
        forces |= formula.forces
    for k, together in enumerate(shared.values()):
        internals, weights = zip(*together, strict=True)
        forces[f"{name}s{k}"] = _bonded(internals, weights)
        expression.append(f"{name}s{k}")
    return _Formula("+".join(expression), forces)


def _offset(cv: Combination) -> float:
    """Sum of the offsets of a combination and of the combinations in it, weighted as those are."""
    inside = (w * _offset(term) for term, w in zip(cv.variables, cv.weights, strict=True) if isinstance(term, Combination))
    return float(cv.offset + sum(inside))


def _terms(cv: Combination, factor: float) -> list[tuple[CollectiveVariable, float]]:
    """Every term that is no combination itself, and its weight."""
    found: list[tuple[CollectiveVariable, float]] = []
    for term, weight in zip(cv.variables, cv.weights, strict=True):
        found += _terms(term, factor * weight) if isinstance(term, Combination) else [(term, float(factor * weight))]
    return found


def _geometric_sum(n_terms: int) -> str:
    """1 + p + … + p^{n_terms − 1} by Horner's rule."""
    text = "1"
    for _ in range(n_terms - 1):
        text = f"(1+p*{text})"
    return text
