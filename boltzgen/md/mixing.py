"""Mixtures w_A U_A + w_B U_B of two systems over the same atoms, for states in between."""

from __future__ import annotations

import copy
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping

import numpy as np
import openmm
from openmm import unit

from boltzgen.errors import InputError
from boltzgen.md.checks import share_constraints
from boltzgen.md.loading import without_couplings
from boltzgen.units import thermal_energy

#: Force groups of the two systems in their mixture.
GROUP_A, GROUP_B = 0, 1
#: How far box vectors in nm may differ: files round them.
_SAME_BOX = 6e-4
#: Attributes of a serialised force that hold no names of parameters.
_NO_NAMES = ("type", "version", "forceGroup")


class MixedLangevinIntegrator(openmm.CustomIntegrator):
    """Langevin dynamics under w_A U_A + w_B U_B of a :func:`mixed_system`.

    One step is v += h f/m; x += h/2 v; v → e^{−γh} v + √(1 − e^{−2γh}) √(kT/m) ξ; x += h/2 v, with f = w_A f_A + w_B f_B and constraints
    applied to v after the first and to x after the last part: the scheme of OpenMM's LangevinMiddleIntegrator, which gives a harmonic
    oscillator the exact variance for every h. Weights can be changed at any time.

    Args:
        temperature_kelvin: Temperature in kelvin.
        friction_per_ps: γ in 1/ps.
        timestep_ps: h in ps.
        weights: w_A and w_B.

    References:
        Zhang et al., J. Phys. Chem. A 123, 6056 (2019).
    """

    def __init__(
        self, *, temperature_kelvin: float, friction_per_ps: float, timestep_ps: float, weights: tuple[float, float] = (1.0, 0.0)
    ) -> None:
        super().__init__(timestep_ps)
        kt, kept = thermal_energy(temperature_kelvin), math.exp(-friction_per_ps * timestep_ps)
        for name, value in (("weight_a", weights[0]), ("weight_b", weights[1]), ("kept", kept), ("noise", math.sqrt(kt * (1 - kept**2)))):
            self.addGlobalVariable(name, float(value))
        self.addPerDofVariable("x_free", 0.0)
        self.addUpdateContextState()
        for group, weight in ((GROUP_A, "weight_a"), (GROUP_B, "weight_b")):  # an expression may have the forces of one group only
            self.addComputePerDof("v", f"v + dt*{weight}*f{group}/m")
        self.addConstrainVelocities()
        self.addComputePerDof("x", "x + 0.5*dt*v")
        self.addComputePerDof("v", "kept*v + noise*gaussian/sqrt(m)")
        self.addComputePerDof("x", "x + 0.5*dt*v")
        self.addComputePerDof("x_free", "x")
        self.addConstrainPositions()
        self.addComputePerDof("v", "v + (x - x_free)/dt")

    def set_weights(self, a: float, b: float) -> None:
        """Weigh the energies of A and B otherwise from the next step on."""
        self.setGlobalVariableByName("weight_a", float(a))
        self.setGlobalVariableByName("weight_b", float(b))


def mixed_system(a: openmm.System, b: openmm.System) -> openmm.System:
    """One system with the forces of A in force group 0 and those of B in group 1, without couplings.

    Its groups have the energies of A and B (:func:`end_energies`); :class:`MixedLangevinIntegrator` samples mixtures of them. Any
    forces will do, as none is changed but for the names of global parameters of B that A has with another value. Masses are those of A:
    they do not enter the density of configurations.

    Args:
        a: System A.
        b: System B, over the same atoms.

    Raises:
        InputError: If atoms, virtual sites, constraints, boxes or atoms without mass differ.
    """
    mixed, (b, _) = without_couplings(a)[0], without_couplings(b)
    _require_same_frame(mixed, b)
    if b.usesPeriodicBoundaryConditions():
        mixed.setDefaultPeriodicBoxVectors(*b.getDefaultPeriodicBoxVectors())
    values, others = _global_parameters(mixed), _global_parameters(b)
    taken = {*values, *others}
    renamed = {name: _free_name(name, taken) for name, value in others.items() if name in values and values[name] != value}
    for force in mixed.getForces():
        _put(force, GROUP_A)
    for force in b.getForces():
        moved = _with_names(force, renamed) if renamed else copy.deepcopy(force)
        _put(moved, GROUP_B)
        mixed.addForce(moved)
    return mixed


def end_energies(context: openmm.Context) -> tuple[float, float]:
    """U_A and U_B in kJ/mol of the present configuration of a context of a :func:`mixed_system`."""
    a, b = (context.getState(energy=True, groups={group}).getPotentialEnergy() for group in (GROUP_A, GROUP_B))
    return a.value_in_unit(unit.kilojoules_per_mole), b.value_in_unit(unit.kilojoules_per_mole)


def _put(force: openmm.Force, group: int) -> None:
    force.setForceGroup(group)
    if isinstance(force, openmm.NonbondedForce):
        force.setReciprocalSpaceForceGroup(-1)  # with the rest of it


def _require_same_frame(a: openmm.System, b: openmm.System) -> None:
    """Refuse systems of which not every configuration of one is a configuration of the other."""
    n = a.getNumParticles()
    if b.getNumParticles() != n:
        raise InputError(f"expected two systems over the same atoms, got {n} and {b.getNumParticles()}")
    if [a.getParticleMass(i)._value == 0 for i in range(n)] != [b.getParticleMass(i)._value == 0 for i in range(n)]:
        raise InputError("the two systems hold other atoms fixed (mass zero): give both the same")
    if _virtual_sites(a) != _virtual_sites(b):
        raise InputError("the two systems have other virtual sites: give both the same")
    if not share_constraints(a, b):
        raise InputError("the two systems constrain different bonds, or the same to other lengths: make both with the same constraints")
    if a.usesPeriodicBoundaryConditions() and b.usesPeriodicBoundaryConditions():
        box_a, box_b = (np.array([vector._value for vector in one.getDefaultPeriodicBoxVectors()]) for one in (a, b))
        if not np.allclose(box_a, box_b, rtol=0, atol=_SAME_BOX):
            raise InputError("the two systems have other boxes: give both the same")


def _virtual_sites(system: openmm.System) -> list[list[str]]:
    """What defines the virtual site at every atom, if it is one."""
    bare = copy.deepcopy(system)
    while bare.getNumForces():
        bare.removeForce(0)
    particles = ET.fromstring(openmm.XmlSerializer.serialize(bare)).find("Particles")
    return [[ET.tostring(site, encoding="unicode").strip() for site in particle] for particle in particles or ()]


def _global_parameters(system: openmm.System) -> dict[str, float]:
    """Name → value of all global parameters of a system, those of nested forces too."""
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    return dict(context.getParameters())


def _free_name(name: str, taken: set[str]) -> str:
    """A name that no parameter has; it becomes one of those taken."""
    made = f"{name}_of_b"
    while made in taken:
        made += "_b"
    taken.add(made)
    return made


def _with_names(force: openmm.Force, renamed: Mapping[str, str]) -> openmm.Force:
    """A copy of a force with other names of global parameters, in its expressions and wherever else it names them."""
    root = ET.fromstring(openmm.XmlSerializer.serialize(force))
    if not _names_any(root, renamed):
        return copy.deepcopy(force)
    pattern = re.compile(r"(?<![\w.])(" + "|".join(re.escape(name) for name in sorted(renamed, key=len, reverse=True)) + r")(?!\w)")
    for element in root.iter():
        for key, text in element.attrib.items():
            if key not in _NO_NAMES:
                element.set(key, pattern.sub(lambda found: renamed[found[1]], text))
    return openmm.XmlSerializer.deserialize(ET.tostring(root, encoding="unicode"))


def _names_any(root: ET.Element, renamed: Mapping[str, str]) -> bool:
    """Whether a serialised force, or one inside it, has one of these global parameters."""
    parameters = (parameter for group in root.iter("GlobalParameters") for parameter in group)
    return any(parameter.get("name") in renamed for parameter in parameters)
