"""What ``boltzgen check`` finds out about a system before any work is put into it."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from boltzgen.errors import TopologyError
from boltzgen.md.checks import require_flow_over_all_atoms
from boltzgen.md.loading import LoadedSystem, load
from boltzgen.md.platforms import PlatformChoice
from boltzgen.md.target import OpenMMTarget
from boltzgen.transforms.zmatrix import build_zmatrix, check_geometry
from boltzgen.units import thermal_energy

_TIMED = PlatformChoice()
_TIMED_SECONDS = 0.5
_LARGEST_HEALTHY_GRADIENT = 1e6  # kT/nm; a thermal one is about 1e4


@dataclass(frozen=True)
class SystemCheck:
    """What a user should know before training.

    Attributes:
        facts: Label and value, in the order in which they are printed.
        notes: What was left out, completed or looks odd, one sentence each.
        remedy: Why no flow fits and what to do; empty where one fits.
    """

    facts: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    remedy: str

    @property
    def usable(self) -> bool:
        """Whether a flow can be trained on this system."""
        return not self.remedy

    def __str__(self) -> str:
        width = max(len(label) for label, _ in self.facts)
        lines = [f"{label:<{width}}  {value}" for label, value in self.facts]
        lines += [f"note: {note}" for note in self.notes]
        verdict = (
            "ready; next: boltzgen config generator > config.yaml, name your two files in it, boltzgen run config.yaml"
            if self.usable
            else f"no flow can be used: {self.remedy}"
        )
        return "\n".join([*lines, verdict])


def check_system(
    topology: Path,
    system: Path | None,
    *,
    state: Path | None = None,
    coordinates: Path | None = None,
    trust: bool = False,
    temperature_kelvin: float = 300.0,
    platform: PlatformChoice = _TIMED,
) -> SystemCheck:
    """Load a system, compute and time its energy, and say which flow fits.

    Args:
        topology: Topology file.
        system: System XML.
        state: State XML with positions.
        coordinates: Coordinate file.
        trust: Allow a system XML that can run code.
        temperature_kelvin: Temperature of the reduced energy.
        platform: What is asked of the platform.

    Returns:
        Facts, notes, and the remedy where no flow fits.

    Raises:
        InputError: If the files cannot be read or do not belong together.
        EnergyError: If the energy of the given coordinates is not a number.
    """
    loaded = load(topology, system, state=state, coordinates=coordinates, trust=trust)
    flow, remedy = _flow_that_fits(loaded)
    target = OpenMMTarget.from_loaded(loaded, temperature_kelvin=temperature_kelvin, platform=platform)
    try:
        energy, energy_notes = _energy(target, loaded.positions)
        speed = _speed(target, loaded.positions)
    finally:
        target.close()
    facts = (
        ("atoms", str(loaded.topology.getNumAtoms())),
        ("residues", _residues(loaded)),
        ("forces", _counted(type(force).__name__ for force in loaded.system.getForces())),
        ("constraints", str(loaded.system.getNumConstraints() or "none")),
        ("box", "none" if loaded.box is None else " x ".join(f"{edge:.4f}" for edge in np.diag(loaded.box)) + " nm"),
        ("energy", energy),
        ("platform", speed),
        ("flow", flow),
    )
    return SystemCheck(facts=facts, notes=loaded.notes + energy_notes, remedy=remedy)


def _flow_that_fits(loaded: LoadedSystem) -> tuple[str, str]:
    """The flow for this molecule, and the remedy where there is none."""
    try:
        molecule = loaded.molecule
        require_flow_over_all_atoms(loaded)
        zmatrix = build_zmatrix(molecule)
        check_geometry(zmatrix, torch.from_numpy(loaded.positions)[None])
    except TopologyError as error:
        return "none", str(error)
    fixed = int(np.isfinite(zmatrix.fixed_bond).sum())
    kept = f", {fixed} bonds to hydrogen kept at their constrained lengths" if fixed else ""
    free = 3 * molecule.n_atoms - 6 - fixed
    return f"internal coordinates, {free} degrees of freedom{kept}; {int(zmatrix.chiral.sum())} handedness signs kept", ""


def _energy(target: OpenMMTarget, positions: np.ndarray) -> tuple[str, tuple[str, ...]]:
    u, gradient = target.value_and_grad(torch.from_numpy(positions)[None])
    steepest = float(gradient.abs().max())
    text = f"{float(u) * thermal_energy(target.temperature_kelvin):.3f} kJ/mol = {float(u):.3f} kT at {target.temperature_kelvin:g} K"
    if float(u) < float("inf") and steepest < _LARGEST_HEALTHY_GRADIENT:
        return text, ()
    return text, (f"The given coordinates are strained (largest gradient {steepest:.2g} kT/nm): data are minimised first.",)


def _speed(target: OpenMMTarget, positions: np.ndarray) -> str:
    rows = max(1, target.n_contexts)
    done, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < _TIMED_SECONDS:
        target.value_and_grad(torch.from_numpy(np.repeat(positions[None], rows, axis=0)))
        done, rows = done + rows, min(2 * rows, 1024)
    contexts = f"{target.n_contexts} context{'s' if target.n_contexts > 1 else ''}"
    return f"{target.platform_name}, {contexts}: {done / seconds:,.0f} energies and forces per second"


def _residues(loaded: LoadedSystem) -> str:
    names = [residue.name for residue in loaded.topology.residues()]
    return f"{len(names)}: " + ("-".join(names) if len(names) <= 12 else _counted(names))


def _counted(names: object) -> str:
    return ", ".join(name if n == 1 else f"{n} {name}" for name, n in Counter(names).most_common())  # type: ignore[call-overload]
