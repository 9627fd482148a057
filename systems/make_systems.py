"""Regenerate every folder of ``systems/``, or those named: ``python systems/make_systems.py [NAME ...]`` (from the repository root).

Each folder gets ``topology.pdb`` (atoms, bonds, positions), ``system.xml`` (the OpenMM System) and ``README.md`` (provenance).
Everything runs on the Reference platform, so a second run reproduces the first.
"""

from __future__ import annotations

import functools
import itertools
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import openmm
import openmmtools
from openmm import app, unit
from openmmtools import testsystems

FOLDER = Path(__file__).parent
CAPPED = {"VAL": "valine", "SER": "serine", "PHE": "phenylalanine", "PRO": "proline"}

#: Side chains as (atom, (torsion reference, angle reference, bonded to), length in nm, angle and torsion in degrees).
SIDE_CHAINS: dict[str, tuple[tuple[str, tuple[str, str, str], float, float, float], ...]] = {
    "GLY": (),
    "ALA": (),
    "VAL": (("CG1", ("N", "CA", "CB"), 0.1526, 109.5, 180), ("CG2", ("N", "CA", "CB"), 0.1526, 109.5, -60)),
    "LEU": (
        ("CG", ("N", "CA", "CB"), 0.1526, 115, -60),
        ("CD1", ("CA", "CB", "CG"), 0.1526, 109.5, 180),
        ("CD2", ("CA", "CB", "CG"), 0.1526, 109.5, 60),
    ),
    "SER": (("OG", ("N", "CA", "CB"), 0.1410, 109.5, 60),),
    "PHE": (
        ("CG", ("N", "CA", "CB"), 0.1510, 114, -60),
        ("CD1", ("CA", "CB", "CG"), 0.1400, 120, 90),
        ("CD2", ("CA", "CB", "CG"), 0.1400, 120, -90),
        ("CE1", ("CB", "CG", "CD1"), 0.1400, 120, 180),
        ("CE2", ("CB", "CG", "CD2"), 0.1400, 120, 180),
        ("CZ", ("CG", "CD1", "CE1"), 0.1400, 120, 0),
    ),
    "PRO": (("CG", ("N", "CA", "CB"), 0.1526, 104, 25), ("CD", ("CA", "CB", "CG"), 0.1526, 104, -35)),
}

System = tuple[app.Topology, np.ndarray, openmm.System]

#: kT at 300 K in kJ/mol, the unit of energy of the particle systems.
KT = (unit.MOLAR_GAS_CONSTANT_R * 300 * unit.kelvin).value_in_unit(unit.kilojoule_per_mole)


def place(a: np.ndarray, b: np.ndarray, c: np.ndarray, *, length: float, angle: float, torsion: float) -> np.ndarray:
    """Position of an atom bonded to ``c`` from its distance, its angle to ``b`` and its torsion to ``a`` (natural extension, NeRF)."""
    theta, tau = np.radians(angle), np.radians(torsion)
    axis = (c - b) / np.linalg.norm(c - b)
    normal = np.cross(b - a, axis)
    normal /= np.linalg.norm(normal)
    local = length * np.array([-np.cos(theta), np.sin(theta) * np.cos(tau), np.sin(theta) * np.sin(tau)])
    return c + local[0] * axis + local[1] * np.cross(normal, axis) + local[2] * normal


def heavy_atoms(codes: Sequence[str], *, phi: float = -75.0, psi: float = 70.0) -> dict[tuple[int, str], np.ndarray]:
    """Ideal positions in nm of the heavy atoms of ACE-X...-NME, X L amino acids, all with these torsions, every peptide bond trans."""
    at = {
        (0, "CH3"): np.zeros(3),
        (0, "C"): np.array([0.1522, 0.0, 0.0]),
        (1, "N"): np.array([0.1522 + 0.1335 * 0.45, 0.1335 * 0.893, 0.0]),
    }

    def grow(atom: tuple[int, str], *references: tuple[int, str], length: float, angle: float, torsion: float) -> None:
        at[atom] = place(*(at[r] for r in references), length=length, angle=angle, torsion=torsion)

    grow((0, "O"), (1, "N"), (0, "CH3"), (0, "C"), length=0.1229, angle=120.4, torsion=180)
    grow((1, "CA"), (0, "CH3"), (0, "C"), (1, "N"), length=0.1449, angle=121.9, torsion=180)
    for k, code in enumerate(codes, start=1):
        grow((k, "C"), (k - 1, "C"), (k, "N"), (k, "CA"), length=0.1522, angle=110.1, torsion=phi)
        if code != "GLY":
            grow((k, "CB"), (k - 1, "C"), (k, "N"), (k, "CA"), length=0.1526, angle=109.7, torsion=phi - 122.0)
        for name, references, length, angle, torsion in SIDE_CHAINS[code]:
            grow((k, name), *((k, r) for r in references), length=length, angle=angle, torsion=torsion)
        grow((k, "O"), (k, "N"), (k, "CA"), (k, "C"), length=0.1229, angle=120.4, torsion=psi + 180)
        grow((k + 1, "N"), (k, "N"), (k, "CA"), (k, "C"), length=0.1335, angle=116.6, torsion=psi)
        after = "C" if k == len(codes) else "CA"  # the carbon of NME is called C
        grow((k + 1, after), (k, "CA"), (k, "C"), (k + 1, "N"), length=0.1449, angle=121.9, torsion=180)
    return at


def capped_peptide(*codes: str, phi: float = -75.0, psi: float = 70.0) -> tuple[app.Topology, unit.Quantity]:
    """ACE-X...-NME with hydrogens in the places of amber14, no solvent.

    Args:
        codes: Three-letter codes, of ``SIDE_CHAINS``.
        phi: Torsion in degrees of every residue.
        psi: Likewise.

    Returns:
        Topology and positions.
    """
    topology, positions = app.Topology(), heavy_atoms(codes, phi=phi, psi=psi)
    chain = topology.addChain()
    for number, name in enumerate(("ACE", *codes, "NME")):
        residue = topology.addResidue(name, chain)
        for _, atom in (key for key in positions if key[0] == number):
            topology.addAtom(atom, app.Element.getBySymbol(atom[0]), residue)
    ordered = [positions[atom.residue.index, atom.name] for atom in topology.atoms()]
    topology.createStandardBonds()
    modeller = app.Modeller(topology, np.array(ordered) * unit.nanometer)
    with one_seed():
        modeller.addHydrogens(app.ForceField("amber14-all.xml"), platform=openmm.Platform.getPlatformByName("Reference"))
    return modeller.topology, modeller.positions


@contextmanager
def one_seed() -> Iterator[None]:
    """The global generator, which Modeller scatters atoms with, in a known state."""
    state = random.getstate()
    random.seed(2026)
    yield
    random.setstate(state)


def molecule(topology: app.Topology, positions: unit.Quantity, *force_field: str) -> System:
    """A molecule with a force field of OpenMM, minimised: no cutoff, no constraints."""
    system = app.ForceField(*force_field).createSystem(topology, nonbondedMethod=app.NoCutoff, constraints=None, removeCMMotion=False)
    return topology, minimised(system, positions), system


def deca_alanine(peptide: str, *solvent: str) -> System:
    """ACE-ALA10-NME, minimised from an alpha helix, with a force field of OpenMM, in vacuum or in OpenMM's implicit/obc2.xml."""
    topology, positions, system = molecule(*capped_peptide(*["ALA"] * 10, phi=-62.0, psi=-42.0), peptide, *solvent)
    if solvent:
        with_native_obc(system)
    return topology, positions, system


def with_native_obc(system: openmm.System) -> None:
    """The CustomGBForce of implicit/obc2.xml as OpenMM's native GBSAOBCForce: the same energy, several times faster on a CPU."""
    index = next(k for k, force in enumerate(system.getForces()) if isinstance(force, openmm.CustomGBForce))
    custom, native = system.getForce(index), openmm.GBSAOBCForce()
    for k in range(custom.getNumParticles()):
        charge, reduced, scaled = custom.getParticleParameters(k)
        native.addParticle(charge, reduced + 0.009, scaled / reduced)  # its radii are reduced by the dielectric offset inside, in nm
    system.removeForce(index)
    system.addForce(native)


@functools.cache
def penta_alanine_in_water() -> tuple[app.Topology, unit.Quantity]:
    """ACE-ALA5-NME, from an alpha helix, in a box of water of 2.8 nm, minimised with amber14."""
    modeller = app.Modeller(*capped_peptide(*["ALA"] * 5, phi=-62.0, psi=-42.0))
    force_field = app.ForceField("amber14-all.xml", "amber14/tip3p.xml")
    with one_seed():
        np.random.seed(2026)  # noqa: NPY002 - the generator that Modeller takes
        modeller.addSolvent(force_field, model="tip3p", boxSize=openmm.Vec3(2.8, 2.8, 2.8) * unit.nanometer)
    system = in_water(modeller.topology, force_field)
    return modeller.topology, minimised(system, modeller.positions) * unit.nanometer


def in_water(topology: app.Topology, force_field: app.ForceField) -> openmm.System:
    """PME and rigid water; the solute is free to be mapped."""
    return force_field.createSystem(
        topology, nonbondedMethod=app.PME, nonbondedCutoff=0.9 * unit.nanometer, constraints=None, rigidWater=True, removeCMMotion=False
    )


def penta_alanine(peptide: str) -> System:
    """Penta-alanine with one force field of the chain in TIP3P water; the same positions for all."""
    topology, positions = penta_alanine_in_water()
    return topology, positions.value_in_unit(unit.nanometer), in_water(topology, app.ForceField(peptide, "amber14/tip3p.xml"))


def minimised(system: openmm.System, positions: unit.Quantity) -> np.ndarray:
    """Positions ``[n, 3]`` in nm of the energy minimum next to ``positions``."""
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(positions)
    openmm.LocalEnergyMinimizer.minimize(context, 0.01, 0)
    return context.getState(positions=True).getPositions(asNumpy=True).value_in_unit(unit.nanometer)


def particles(start: np.ndarray, pair: str, *, trap: str = "") -> System:
    """Equal unbonded particles of the mass of argon, minimised; no cutoff, no box.

    Args:
        start: Positions ``[n, 3]`` in nm. A configuration in the plane z = 0 stays in it.
        pair: Energy of a pair in kT at 300 K, a formula in r (nm).
        trap: Energy of every particle in kT at 300 K, a formula in x, y and z (nm).

    Returns:
        Topology, positions ``[n, 3]`` in nm, and System.
    """
    topology, system, argon = app.Topology(), openmm.System(), app.Element.getBySymbol("Ar")
    chain = topology.addChain()
    pairs, external = openmm.CustomNonbondedForce(f"{KT!r}*({pair})"), openmm.CustomExternalForce(f"{KT!r}*({trap or 0})")
    pairs.setNonbondedMethod(openmm.CustomNonbondedForce.NoCutoff)
    for index in range(len(start)):
        topology.addAtom("AR", argon, topology.addResidue("AR", chain))
        system.addParticle(argon.mass)
        pairs.addParticle([])
        external.addParticle(index, [])
    system.addForce(pairs)
    if trap:
        system.addForce(external)
    return topology, minimised(system, start * unit.nanometer), system


def rings(*sizes: int) -> np.ndarray:
    """Concentric regular polygons ``[n, 3]`` in the plane z = 0; polygon k has radius k/2 nm, and the first may be a point."""
    polygons = []
    for k, size in enumerate(sizes):
        angle = 2 * np.pi * (np.arange(size) + 0.3 * k) / size
        polygons.append((0.5 * k if sizes[0] == 1 else 2.0) * np.stack([np.cos(angle), np.sin(angle), 0 * angle], axis=1))
    return np.concatenate(polygons)


def icosahedron(n_shells: int) -> np.ndarray:
    """Mackay icosahedron of one (13) or two (55 particles) shells around a particle, edges of about 1 nm, ``[n, 3]``."""
    golden = (1 + np.sqrt(5)) / 2
    corners = np.array([np.roll([0, a, b * golden], k) for k in range(3) for a in (-1, 1) for b in (-1, 1)]) / 2
    shells = [np.zeros((1, 3)), corners]
    if n_shells == 2:
        edges = [(i, j) for i in range(12) for j in range(i) if np.linalg.norm(corners[i] - corners[j]) < 1.1]
        shells += [2 * corners, np.array([corners[i] + corners[j] for i, j in edges])]
    return np.concatenate(shells)


def lennard_jones(n_shells: int) -> System:
    """LJ13 or LJ55: ε = kT and r_m = 1 nm; the trap about the centre, ½ Σ|x_i − x̄|² = (1/2n) Σ_{i<j} r², is a term of every pair."""
    start = icosahedron(n_shells)
    return particles(start, f"r^(-12)-2*r^(-6)+{0.5 / len(start)!r}*r^2")


def coulomb_gas(*sizes: int) -> System:
    """Equal charges in a harmonic trap at β = 10, u = 10 (Σ 1/r + Σ|x|²), in the plane z = 0."""
    return particles(rings(*sizes), "10/r", trap="10*(x^2+y^2+z^2)")


def solute_in_argon() -> System:
    """A repulsive sphere among 125 Lennard-Jones particles in a periodic box, a liquid: argon at 300 K, T* = 3.2156, box 6.290 σ.

    The global parameter ``solute_sigma`` (nm) is the size of the sphere, 2.597 σ here. Pairs of argon end at half the box, shifted to zero
    there; the repulsion of the sphere ends at 2^(1/6) solute_sigma, and is that of the nearest image only.
    """
    sigma, epsilon, edge, n = 0.3542, 0.1854 * 4.184, 2.228, 125
    end = 4 * epsilon * ((2 * sigma / edge) ** 12 - (2 * sigma / edge) ** 6)
    solvent = openmm.CustomNonbondedForce(f"is_argon1*is_argon2*({4 * epsilon!r}*(q^2-q)-({end!r})); q=({sigma!r}/r)^6")
    solvent.addPerParticleParameter("is_argon")
    solvent.setNonbondedMethod(openmm.CustomNonbondedForce.CutoffPeriodic)
    solvent.setCutoffDistance(edge / 2)
    solute = openmm.CustomBondForce(f"step(q-0.5)*({4 * epsilon!r}*(q^2-q)+{epsilon!r}); q=(solute_sigma/r)^6")
    solute.addGlobalParameter("solute_sigma", 0.92)
    solute.setUsesPeriodicBoundaryConditions(True)
    topology, system = app.Topology(), openmm.System()
    chain, vectors = topology.addChain(), edge * np.eye(3)
    for name in ("XE", *["AR"] * n):
        topology.addAtom(name, app.Element.getBySymbol(name.title()), topology.addResidue(name, chain))
        particle = system.addParticle(app.Element.getBySymbol("Ar").mass)
        solvent.addParticle([float(name == "AR")])
        if particle:
            solute.addBond(0, particle, [])
    system.addForce(solvent)
    system.addForce(solute)
    topology.setPeriodicBoxVectors(vectors * unit.nanometer)
    system.setDefaultPeriodicBoxVectors(*vectors)
    lattice = (np.indices((6, 6, 6)).reshape(3, -1).T + 0.5) * edge / 6
    far = np.argsort(-np.linalg.norm(lattice - edge / 2, axis=1), kind="stable")[:n]
    start = np.concatenate([np.full((1, 3), edge / 2), lattice[far]])
    return topology, minimised(system, start * unit.nanometer), system


def polymer_in_solvent() -> System:
    """A chain of nine beads in 200 solvent particles (arXiv 2512.16812), with σ = 0.34 nm and ε = kT/1.3 at 300 K.

    Solvent and beads attract each other (Lennard-Jones, switched off between 2 and 2.5 σ). Inside the chain, without periodic images:
    the same for |i − j| ≥ 3, springs between neighbours and next neighbours, and a double well of the end-to-end distance R around
    4.62 σ: compact and extended. ``bond`` and ``bend`` (ε/σ²) are the springs' constants.
    """
    sigma, epsilon, n_beads, n_solvent = 0.34, 8.31446261815324e-3 * 300 / 1.3, 9, 200
    edge = sigma * (n_solvent / 0.48) ** (1 / 3)
    switch = "s=select(step(y-2), select(step(2.5-y), (6.25-y^2)^2*(2*y^2-5.75)/11.390625, 0), 1)"
    lennard_jones = f"{4 * epsilon!r}*(q^2-q)*s; {switch}; q=y^(-6); y=r/{sigma!r}"
    liquid, inside = openmm.CustomNonbondedForce(lennard_jones), openmm.CustomBondForce(lennard_jones)
    liquid.setNonbondedMethod(openmm.CustomNonbondedForce.CutoffPeriodic)
    liquid.setCutoffDistance(2.5 * sigma)
    springs = []
    for name, rest in (("bond", 1.0), ("bend", 1.63)):
        spring = openmm.CustomBondForce(f"0.5*{name}*{epsilon!r}*(r/{sigma!r}-{rest!r})^2")
        spring.addGlobalParameter(name, 500.0)
        springs.append(spring)
    ends = openmm.CustomBondForce(f"{9.1 * epsilon!r}*(0.25*(q/0.8)^4-(q/0.8)^2); q=r/{sigma!r}-4.62")
    topology, system = app.Topology(), openmm.System()
    chain, vectors, atoms = topology.addChain(), edge * np.eye(3), []
    polymer = topology.addResidue("POL", chain)
    for index in range(n_beads + n_solvent):
        residue = polymer if index < n_beads else topology.addResidue("AR", chain)
        name, element = (f"B{index + 1}", "Xe") if index < n_beads else ("AR", "Ar")
        atoms.append(topology.addAtom(name, app.Element.getBySymbol(element), residue))
        system.addParticle(app.Element.getBySymbol("Ar").mass)
        liquid.addParticle([])
    for i in range(n_beads):
        for j in range(i + 1, n_beads):
            liquid.addExclusion(i, j)
            if j - i >= 3:
                inside.addBond(i, j, [])
            else:
                springs[j - i - 1].addBond(i, j, [])
    for first, second in itertools.pairwise(atoms[:n_beads]):
        topology.addBond(first, second)
    ends.addBond(0, n_beads - 1, [])
    for force in (liquid, inside, *springs, ends):
        system.addForce(force)
    topology.setPeriodicBoxVectors(vectors * unit.nanometer)
    system.setDefaultPeriodicBoxVectors(*vectors)
    beads = edge / 2 + sigma * np.array([[0.815 * (k - 4), 0.29 * (-1) ** k, 0.05 * (k % 3)] for k in range(n_beads)])
    lattice = (np.indices((7, 7, 7)).reshape(3, -1).T + 0.5) * edge / 7
    gap = lattice[:, None] - beads
    far = np.argsort(-np.linalg.norm(gap - edge * np.round(gap / edge), axis=2).min(axis=1), kind="stable")[:n_solvent]
    return topology, minimised(system, np.concatenate([beads, lattice[far]]) * unit.nanometer), system


def wca_dimer(dimension: int) -> System:
    """Two bonded particles in a fluid of purely repulsive ones (WCA); the bond is a double well, compact and extended.

    ``h (1 − (r − r₀ − w)²/w²)²`` with r₀ = 2^(1/6) σ for the bond, without periodic images; WCA for every pair but the bonded one.

    Args:
        dimension: 2: N = 100, edge 15 σ, h = 2 kT, w = 2 σ, ε = kT at 300 K, all in the plane z = 0 (arXiv 2405.18160).
            3: N = 216, ρσ³ = 0.96, ε/k_B = 120 K, h = 5 kT at 98.88 K (0.824 ε/k_B), w = r₀/2 (Nilmeier et al. 2011).
    """
    sigma, r0 = 0.34, 0.34 * 2 ** (1 / 6)
    if dimension == 2:
        n, edge, mass, epsilon, height, w = 100, 15 * sigma, 39.948, KT, 2 * KT, 2 * sigma
        lattice = (np.indices((11, 11, 1)).reshape(3, -1).T + np.array([0.5, 0.5, 0])) * edge / 11
        pair = np.array([[edge / 2 - r0 / 2, edge / 2, 0], [edge / 2 + r0 / 2, edge / 2, 0]])
    else:
        n, edge, mass, epsilon, w = 216, sigma * (216 / 0.96) ** (1 / 3), 39.9, KT * 120 / 300, r0 / 2
        height = 5 * 0.824 * epsilon
        lattice = (np.indices((6, 6, 6)).reshape(3, -1).T + 0.5) * edge / 6
        pair = lattice[[86, 122]]
    fluid = openmm.CustomNonbondedForce(f"{4 * epsilon!r}*(q^2-q)+{epsilon!r}; q=({sigma!r}/r)^6")
    fluid.setNonbondedMethod(openmm.CustomNonbondedForce.CutoffPeriodic)
    fluid.setCutoffDistance(r0)
    fluid.addExclusion(0, 1)
    bond = openmm.CustomBondForce(f"{height!r}*(1-((r-{r0 + w!r})/{w!r})^2)^2")
    bond.addBond(0, 1, [])
    topology, system, vectors = app.Topology(), openmm.System(), edge * np.eye(3)
    chain, atoms = topology.addChain(), []
    dimer = topology.addResidue("DIM", chain)
    for index in range(n):
        name, element, residue = (f"D{index + 1}", "Xe", dimer) if index < 2 else ("AR", "Ar", topology.addResidue("AR", chain))
        atoms.append(topology.addAtom(name, app.Element.getBySymbol(element), residue))
        system.addParticle(mass)
        fluid.addParticle([])
    topology.addBond(*atoms[:2])
    for force in (fluid, bond):
        system.addForce(force)
    topology.setPeriodicBoxVectors(vectors * unit.nanometer)
    system.setDefaultPeriodicBoxVectors(*vectors)
    distance = np.linalg.norm(lattice[:, None] - pair, axis=2).min(axis=1)
    return topology, np.concatenate([pair, lattice[np.argsort(-distance, kind="stable")[: n - 2]]]), system


def openmmtools_system(name: str) -> System:
    """A test system of openmmtools without constraints on the solute and without the centre-of-mass motion remover."""
    found = getattr(testsystems, name)(constraints=None)
    without_motion_remover(found.system)
    return found.topology, found.positions.value_in_unit(unit.nanometer), found.system


def alanine_dipeptide_amber99sbildn_obc() -> System:
    """Alanine dipeptide with amber99sb-ildn and OpenMM's native OBC2 implicit solvent, minimised."""
    topology, positions, _ = openmmtools_system("AlanineDipeptideVacuum")
    force_field = app.ForceField("amber99sbildn.xml", "amber99_obc.xml")
    system = force_field.createSystem(topology, nonbondedMethod=app.NoCutoff, constraints=None, removeCMMotion=False)
    return topology, minimised(system, positions * unit.nanometer), system


def alanine_dipeptide_amber14() -> System:
    """Alanine dipeptide with amber14 in vacuum, atoms in the order of openmmtools' AlanineDipeptideVacuum, at its positions."""
    topology, positions, _ = openmmtools_system("AlanineDipeptideVacuum")
    system = app.ForceField("amber14-all.xml").createSystem(topology, nonbondedMethod=app.NoCutoff, constraints=None, removeCMMotion=False)
    return topology, positions, system


def without_motion_remover(system: openmm.System) -> None:
    """Drop the centre-of-mass motion remover: it is no part of a density."""
    for index in reversed(range(system.getNumForces())):
        if isinstance(system.getForce(index), openmm.CMMotionRemover):
            system.removeForce(index)


def potential_energy(system: openmm.System, positions: np.ndarray) -> float:
    """Potential energy in kJ/mol on the Reference platform."""
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(positions)
    return context.getState(energy=True).getPotentialEnergy().value_in_unit(unit.kilojoules_per_mole)


def systems() -> dict[str, tuple[str, str, Callable[[], System]]]:
    """Every folder: title, force field and source, and how to make it."""
    tools = f"openmmtools {openmmtools.__version__} testsystems"
    made = {
        "alanine_dipeptide_vacuum": (
            "Alanine dipeptide in vacuum",
            f"Amber ff96, {tools}.AlanineDipeptideVacuum(constraints=None)",
            lambda: openmmtools_system("AlanineDipeptideVacuum"),
        ),
        "alanine_dipeptide_implicit": (
            "Alanine dipeptide in implicit solvent (OBC1)",
            f"Amber ff96 + OBC1 (CustomGBForce) with surface term, {tools}.AlanineDipeptideImplicit(constraints=None)",
            lambda: openmmtools_system("AlanineDipeptideImplicit"),
        ),
        "alanine_dipeptide_explicit": (
            "Alanine dipeptide in explicit water",
            f"Amber ff96 + rigid TIP3P, PME, 749 waters, {tools}.AlanineDipeptideExplicit(constraints=None)",
            lambda: openmmtools_system("AlanineDipeptideExplicit"),
        ),
        "alanine_dipeptide_amber99sbildn_obc": (
            "Alanine dipeptide with amber99sb-ildn in implicit solvent (OBC2)",
            "amber99sbildn.xml + amber99_obc.xml of OpenMM (GBSAOBCForce), atoms of openmmtools' AlanineDipeptideVacuum, minimised",
            alanine_dipeptide_amber99sbildn_obc,
        ),
        "alanine_dipeptide_amber14_vacuum": (
            "Alanine dipeptide with amber14 in vacuum",
            f"amber14-all.xml of OpenMM, atoms and positions of {tools}.AlanineDipeptideVacuum",
            alanine_dipeptide_amber14,
        ),
    }
    for code, name in CAPPED.items():
        made[f"capped_{name}"] = (
            f"ACE-{code}-NME (capped L-{name}) in vacuum",
            "amber14-all.xml of OpenMM (ff14SB); heavy atoms from ideal internal coordinates, hydrogens from Modeller, minimised",
            lambda code=code: molecule(*capped_peptide(code), "amber14-all.xml"),
        )
    obc2 = ("implicit/obc2.xml",)
    for name, what, files in (
        ("vacuum", "in vacuum", ("amber14-all.xml",)),
        ("implicit", "in implicit solvent (OBC2)", ("amber14-all.xml", *obc2)),
        ("amber99sbildn_implicit", "with amber99sb-ildn in implicit solvent (OBC2)", ("amber99sbildn.xml", *obc2)),
    ):
        made[f"deca_alanine_{name}"] = (
            f"ACE-ALA10-NME (deca-alanine) {what}",
            f"{' + '.join(files)} of OpenMM{' as GBSAOBCForce' if obc2[0] in files else ''}; alpha helix from ideal "
            "internal coordinates, minimised",
            lambda files=files: deca_alanine(*files),
        )
    for name, peptide in (("amber14", "amber14-all.xml"), ("amber99sbildn", "amber99sbildn.xml")):
        made[f"penta_alanine_{name}_water"] = (
            f"ACE-ALA5-NME (penta-alanine) with {name} in explicit water",
            f"{peptide} + amber14/tip3p.xml of OpenMM (rigid TIP3P), PME with a cutoff of 0.9 nm, box of 2.8 nm; alpha helix from ideal "
            "internal coordinates, minimised with amber14",
            lambda peptide=peptide: penta_alanine(peptide),
        )
    made["polymer_in_solvent"] = (
        "A chain of nine beads in 200 solvent particles",
        "arXiv 2512.16812: kT = 1.3, density 0.48, end-to-end distance in a double well around 4.62 sigma; sigma = 0.34 nm. The "
        "global parameters bond and bend are the constants of its springs",
        polymer_in_solvent,
    )
    made["wca_dimer_2d"] = (
        "A dimer of two states among 98 repulsive particles in the plane",
        "arXiv 2405.18160: WCA fluid with beta = epsilon = sigma = m = 1, L = 15, and a bond h (1 - (r - r0 - w)^2/w^2)^2 with h = w = 2; "
        "sigma = 0.34 nm, epsilon = kT at 300 K, mass of argon, so the unit of time is 1.361 ps. Velocities and noise along z must be zero",
        lambda: wca_dimer(2),
    )
    made["wca_dimer_3d"] = (
        "A dimer of two states among 214 repulsive particles",
        "Nilmeier et al., PNAS 108, E1009 (2011): WCA fluid with sigma = 0.34 nm, epsilon/k_B = 120 K, mass 39.9, rho sigma^3 = 0.96, at "
        "98.88 K (0.824 epsilon/k_B); a bond h (1 - (r - r0 - w)^2/w^2)^2 with h = 5 kT, w = r0/2. The start is a cubic lattice: melt it",
        lambda: wca_dimer(3),
    )
    made["solute_in_argon"] = (
        "A repulsive sphere in a Lennard-Jones liquid",
        "Wirnsberger et al., J. Chem. Phys. 153, 144112 (2020), after Jarzynski, Phys. Rev. E 65, 046122 (2002): 125 particles with the "
        "sigma (0.3542 nm) and epsilon (0.1854 kcal/mol) of argon, box 2.228 nm; the sphere grows with the global parameter solute_sigma",
        solute_in_argon,
    )
    return made | particle_systems()


def particle_systems() -> dict[str, tuple[str, str, Callable[[], System]]]:
    """The analytic particle systems: title, what the energy is, and how to make it."""
    twin = f"the energy is u kT at 300 K (kT = {KT:.10g} kJ/mol) with the u of boltzgen.targets.clusters"
    return {
        "dw4": (
            "DW4: four particles in the plane, every pair a double well",
            f"u = sum over pairs of 0.9 (r - 4 nm)^4 - 4 (r - 4 nm)^2; {twin}.DoubleWellCluster()",
            lambda: particles(rings(4), "0.9*(r-4)^4-4*(r-4)^2"),
        ),
        "lj13": (
            "LJ13: Lennard-Jones cluster of 13 particles",
            f"{_LENNARD_JONES}; {twin}.LennardJonesCluster(13)",
            lambda: lennard_jones(1),
        ),
        "lj55": (
            "LJ55: Lennard-Jones cluster of 55 particles",
            f"{_LENNARD_JONES}; {twin}.LennardJonesCluster(55)",
            lambda: lennard_jones(2),
        ),
        "coulomb_6_2": (
            "Coulomb gas of 6 particles in a trap in the plane",
            f"{_COULOMB}; {twin}.CoulombGas(6, 2)",
            lambda: coulomb_gas(1, 5),
        ),
        "coulomb_20_2": (
            "Coulomb gas of 20 particles in a trap in the plane",
            f"{_COULOMB}; {twin}.CoulombGas(20, 2)",
            lambda: coulomb_gas(1, 7, 12),
        ),
    }


_LENNARD_JONES = "u = sum over pairs of r^-12 - 2 r^-6 (r in nm), plus half the sum of squared distances from the centre, as a pair term"

_COULOMB = "u = 10 (sum over pairs of 1/r + sum of |x|^2), in nm"

_IN_A_PLANE = (
    "- Two-dimensional, in the plane z = 0 of OpenMM's space: there the energy is the analytic one and the force along z vanishes. Nothing "
    "keeps the particles in the plane; sampled in three dimensions this is another system.\n"
)


_NO_GENERATOR = (
    "- No generator configuration: a flow over all atoms of a solvated box is not something this package does; `boltzgen check "
    "topology.pdb system.xml` says so and names what to do.\n"
)


def write(name: str, title: str, source: str, system: System) -> None:
    """Write one folder; the energy in its README is that of the stored positions and the stored System."""
    topology, positions, force_field = system
    folder = FOLDER / name
    folder.mkdir(exist_ok=True)
    with open(folder / "topology.pdb", "w") as handle:
        app.PDBFile.writeFile(topology, positions * unit.nanometer, handle)
    (folder / "system.xml").write_text(openmm.XmlSerializer.serialize(force_field))
    stored = app.PDBFile(str(folder / "topology.pdb")).getPositions(asNumpy=True).value_in_unit(unit.nanometer)
    forces = ", ".join(force.getName() for force in force_field.getForces())
    constrained = force_field.getNumConstraints()
    (folder / "README.md").write_text(
        f"# {title}\n\n"
        f"- Force field and source: {source}.\n"
        f"- Atoms: {force_field.getNumParticles()}. Constraints: {constrained if constrained == 0 else f'{constrained} (rigid water)'}.\n"
        f"- Forces: {forces}. No centre-of-mass motion remover.\n"
        f"- Potential energy at the stored positions: {potential_energy(force_field, stored):.4f} kJ/mol (Reference platform).\n"
        f"- Made with OpenMM {openmm.__version__} by `python systems/make_systems.py`.\n"
        + (_NO_GENERATOR if constrained else "")
        + (_IN_A_PLANE if (positions[:, 2] == 0).all() else "")
    )


if __name__ == "__main__":
    made = systems()
    for folder_name in sys.argv[1:] or made:
        title, source, make = made[folder_name]
        write(folder_name, title, source, make())
        print(folder_name)
