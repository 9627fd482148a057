"""Collective variables of a system as its configuration names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, singledispatch
from pathlib import Path

import mdtraj
import numpy as np
from openmm import unit

from boltzgen.config import (
    AngleConfig,
    CombinationConfig,
    CoordinationConfig,
    DihedralConfig,
    DistanceConfig,
    EndToEndConfig,
    ForceConfig,
    RadiusOfGyrationConfig,
    RMSDConfig,
    TermConfig,
    VariableConfig,
)
from boltzgen.config.collective_variables import AtomGroupConfig, CollectiveVariableConfig, Group, OrderedAtomsConfig
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
from boltzgen.errors import BoltzgenError, ConfigError, InputError
from boltzgen.md.force_variable import ForceVariable
from boltzgen.md.loading import LoadedSystem, file_hash
from boltzgen.md.selections import select_atoms, select_one_atom
from boltzgen.md.structure_files import read_coordinates
from boltzgen.md.system_xml import read_force

_UNITS = {"nanometer": "nm", "radian": "rad", "dimensionless": "1"}


@dataclass(frozen=True)
class _Site:
    """What a variable is built from besides its own configuration."""

    name: str
    loaded: LoadedSystem
    trust: bool

    @cached_property
    def topology(self) -> mdtraj.Topology:
        return mdtraj.Topology.from_openmm(self.loaded.topology)

    @property
    def n_atoms(self) -> int:
        return self.loaded.system.getNumParticles()

    def box(self, wanted: bool) -> np.ndarray | None:
        """The box of the system where nearest images are wanted."""
        if wanted and self.loaded.box is None:
            raise ConfigError("minimum_image: the system is not periodic; leave it out")
        return self.loaded.box if wanted else None

    def masses(self, atoms: Sequence[int]) -> list[float]:
        return [self.loaded.system.getParticleMass(atom).value_in_unit(unit.dalton) for atom in atoms]

    def existing(self, atoms: Sequence[int]) -> tuple[int, ...]:
        if atoms and max(atoms) >= self.n_atoms:
            raise ConfigError(f"expected atoms from 0 to {self.n_atoms - 1}, got {list(atoms)}; they count from 0")
        return tuple(atoms)

    def group(self, given: Group) -> tuple[int, ...]:
        return select_atoms(self.topology, given) if isinstance(given, str) else self.existing(given)

    def ordered(self, config: OrderedAtomsConfig) -> tuple[int, ...]:
        if not config.select:
            return self.existing(config.atoms)
        atoms = tuple(select_one_atom(self.topology, selection) for selection in config.select)
        if len(set(atoms)) != len(atoms):
            raise ConfigError(f"expected selections of different atoms, but {list(config.select)} match {list(atoms)}")
        return atoms

    def chosen(self, config: AtomGroupConfig) -> tuple[int, ...]:
        atoms = self.group(config.selection if config.selection is not None else config.atoms)
        if len(atoms) < config.fewest:
            raise ConfigError(f"{config.kind} needs at least {config.fewest} atoms, but {config.selection!r} matches {len(atoms)}")
        return atoms


def build_cvs(configs: Mapping[str, VariableConfig], loaded: LoadedSystem, *, trust: bool = False) -> CollectiveVariables:
    """Collective variables of a system, in the order in which they are named.

    Args:
        configs: Name → what it is.
        loaded: The system; its topology is what selections look in.
        trust: Read force files that may run code.

    Returns:
        The variables.

    Raises:
        ConfigError: If atoms do not exist, or a selection matches nothing or another number than needed; it says which and how many.
        InputError: If a file cannot be read or does not fit the system.
        UnsafeFileError: If a force file could run code and is not trusted.
    """
    found: list[CollectiveVariable] = []
    for name, config in configs.items():
        try:
            found.append(_build(config, _Site(name, loaded, trust)))
        except BoltzgenError as error:
            raise type(error)(f"collective_variables.{name}: {error}") from error
    return CollectiveVariables(found)


def variable_hashes(configs: Mapping[str, VariableConfig]) -> dict[str, str]:
    """Hashes of the files that variables are read from, by what they are for and their name."""
    hashes: dict[str, str] = {}
    for name, config in configs.items():
        parts = [term.of for term in config.terms] if isinstance(config, CombinationConfig) else [config]
        for part in parts:
            path = part.reference if isinstance(part, RMSDConfig) else part.file if isinstance(part, ForceConfig) else None
            if path is not None:
                hashes[f"variable {name} {path.name}"] = file_hash(path)
    return hashes


@singledispatch
def _build(config: CollectiveVariableConfig, site: _Site) -> CollectiveVariable:
    """The variable that a configuration means."""
    raise TypeError(f"no variable is built from a {type(config).__name__}")


@_build.register
def _(config: DistanceConfig, site: _Site) -> Distance:
    return Distance(site.name, site.ordered(config), box=site.box(config.minimum_image))


@_build.register
def _(config: AngleConfig, site: _Site) -> Angle:
    return Angle(site.name, site.ordered(config))


@_build.register
def _(config: DihedralConfig, site: _Site) -> Dihedral:
    return Dihedral(site.name, site.ordered(config))


@_build.register
def _(config: EndToEndConfig, site: _Site) -> Distance:
    return Distance.between_ends(site.name, site.chosen(config), box=site.box(config.minimum_image))


@_build.register
def _(config: RadiusOfGyrationConfig, site: _Site) -> RadiusOfGyration:
    atoms = site.chosen(config)
    return RadiusOfGyration(site.name, atoms, masses=site.masses(atoms) if config.mass_weighted else None)


@_build.register
def _(config: RMSDConfig, site: _Site) -> RMSD:
    reference = site.loaded.positions if config.reference is None else _reference(config.reference, site.n_atoms)
    return RMSD(site.name, site.chosen(config), reference=reference)


@_build.register
def _(config: CoordinationConfig, site: _Site) -> Coordination:
    second = None if config.second is None else site.group(config.second)
    return Coordination(
        site.name, site.group(config.first), second, r0=config.r0_nm, n=config.n, m=config.m, box=site.box(config.minimum_image)
    )


@_build.register
def _(config: ForceConfig, site: _Site) -> ForceVariable:
    force = read_force(config.file, trust=site.trust)
    return ForceVariable(
        site.name, force, n_particles=site.n_atoms, period=config.period, unit=_UNITS[config.value_unit], box=site.loaded.box
    )


@_build.register
def _(config: CombinationConfig, site: _Site) -> Combination:
    terms = [_term(term, _Site(f"{site.name}.terms.{k}", site.loaded, site.trust)) for k, term in enumerate(config.terms)]
    weights = [term.weight for term in config.terms]
    return Combination(site.name, terms, weights, offset=config.offset, unit=_UNITS[config.unit])


def _term(config: TermConfig, site: _Site) -> CollectiveVariable:
    of = _build(config.of, site)
    return {"value": lambda: of, "cos": lambda: Cosine(of), "sin": lambda: Sine(of)}[config.function]()


def _reference(path: Path, n_atoms: int) -> np.ndarray:
    positions = read_coordinates(path).positions
    if len(positions) != n_atoms:
        raise InputError(f"{path}: expected positions of all {n_atoms} particles of the system, got {len(positions)}")
    return positions
