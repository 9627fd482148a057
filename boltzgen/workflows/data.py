"""The data of a generator: simulated here or read from the user's files, kept in the run folder, judged for coverage."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from boltzgen.config import MoleculeConfig, SystemConfig
from boltzgen.core import Target
from boltzgen.errors import CheckpointError, InputError
from boltzgen.md.ladder import temperature_ladder
from boltzgen.md.loading import LoadedSystem
from boltzgen.md.platforms import PlatformChoice
from boltzgen.md.simulate import DynamicsSettings, langevin, with_hydrogens_of
from boltzgen.md.trajectory import Trajectory, read_trajectory, torsion_angles
from boltzgen.targets.constrained import ConstrainedTarget
from boltzgen.transforms.internal import InternalCoordinates
from boltzgen.transforms.zmatrix import build_zmatrix
from boltzgen.workflows.run_folder import RunFolder, fingerprint_of

logger = logging.getLogger(__name__)

_FILE = "trajectory.npz"

#: Width of the sectors of a torsion whose visits are compared, rad.
_SECTOR = np.pi / 3
#: Frames that the target's data should hold of a sector before its absence counts as a missed basin.
_EXPECTED_VISITS = 5.0
#: How much hotter than the target the probe of a single-temperature data set runs, and its share of the data's steps.
_PROBE_HEAT, _PROBE_SHARE = 2.0, 0.2
#: What the 0.001 nm of XTC and PDB files can do to a bond length, nm.
_ROUNDING_NM = 2e-3


def collect(config: MoleculeConfig, loaded: LoadedSystem, *, folder: RunFolder, target: Target, progress: bool) -> Trajectory:
    """The data, from the run folder where they are already there.

    Args:
        config: Configuration.
        loaded: System.
        folder: Run folder that keeps the data for a resumed run.
        target: What the data are samples of; their ``u`` is its reduced potential, the mass-metric term of rigid bonds included.
        progress: Whether to show progress bars.

    Returns:
        Frames at the target temperature; ``hot`` holds hotter ones of a ladder or, for data of one temperature, of a short hot probe.

    Raises:
        CheckpointError: If the data in the folder are corrupt or were made for another system.
        InputError, EnergyError: If the user's files do not fit, or the simulation blows up.
    """
    path, fingerprint = folder.path / _FILE, _fingerprint(config, loaded)
    if path.exists():
        return _read(path, fingerprint=fingerprint)
    trajectory = _simulate_or_read(config, loaded, target=target, progress=progress)
    _write(folder, trajectory, fingerprint=fingerprint)
    return trajectory


def sampled_system(config: MoleculeConfig, loaded: LoadedSystem) -> Any:
    """The system whose dynamics make the configurations: that of the user, with the masses that were asked for.

    Raises:
        InputError: If other masses would sample another density.
    """
    mass = config.data.hydrogen_mass_dalton
    return loaded.system if mass is None or config.data.source == "trajectory" else with_hydrogens_of(loaded.system, mass)


def platform_choice(config: SystemConfig) -> PlatformChoice:
    """What the configuration asks of the platform."""
    asked = config.platform
    return PlatformChoice(name=asked.name, precision=asked.precision, device=asked.device, contexts=asked.contexts)


def coverage_warnings(trajectory: Trajectory, *, torsions: dict[str, tuple[int, int, int, int]]) -> tuple[str, ...]:
    """Sectors of torsions that hotter data visit, that should hold frames at the target temperature, and hold none.

    A sector with probability p at temperature T_h has about p^(T_h/T) at T where energy decides; it is missed if that
    times the number of frames is at least five.

    Args:
        trajectory: Data at the target temperature, with hotter data in ``hot``.
        torsions: Name → atoms.

    Returns:
        One sentence per missed region.
    """
    if not torsions or not trajectory.hot:
        return ()
    edges = np.arange(-np.pi, np.pi + 1e-9, _SECTOR)
    atoms = list(torsions.values())
    cold = torsion_angles(trajectory.x, atoms)
    missed: dict[str, float] = {}
    for hot in trajectory.hot:
        ratio = hot.temperature_kelvin / trajectory.temperature_kelvin
        angles = torsion_angles(hot.x, atoms)
        for column, name in enumerate(torsions):
            seen, _ = np.histogram(cold[:, column], bins=edges)
            expected = (np.histogram(angles[:, column], bins=edges)[0] / len(angles)) ** ratio * len(cold)
            for k in np.flatnonzero((seen == 0) & (expected >= _EXPECTED_VISITS)):
                region = f"{name} between {np.degrees(edges[k]):.0f} and {np.degrees(edges[k + 1]):.0f} degrees"
                missed[region] = max(missed.get(region, 0.0), hot.temperature_kelvin)
    return tuple(
        f"the data at {trajectory.temperature_kelvin:g} K never visit {region}, where dynamics at {kelvin:.0f} K go: "
        "a basin may be missing from every number below; use the temperature ladder, or run it longer"
        for region, kelvin in missed.items()
    )


def _simulate_or_read(config: MoleculeConfig, loaded: LoadedSystem, *, target: Target, progress: bool) -> Trajectory:
    data, settings, system = config.data, _settings(config, loaded), sampled_system(config, loaded)
    if data.source == "ladder":
        ladder = temperature_ladder(
            system, loaded.positions, temperatures_kelvin=data.temperatures_kelvin, exchange_every=data.exchange_interval,
            settings=settings, progress=progress,
        )  # fmt: skip
        return replace(_with_metric(ladder, target), hot=tuple(_with_metric(hot, target) for hot in ladder.hot))
    if data.source == "trajectory":

        def energies(x: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                return target.reduced_potential(torch.as_tensor(onto_constraints(x, loaded))).numpy()

        read = read_trajectory(data.files, loaded.topology, temperature_kelvin=config.temperature_kelvin, energies=energies)
        cold = replace(read, x=onto_constraints(read.x, loaded))
    else:
        plain = langevin(system, loaded.positions, temperature_kelvin=config.temperature_kelvin, settings=settings, progress=progress)
        cold = _with_metric(plain, target)
    if not loaded.is_one_molecule:
        return cold  # coverage is judged by torsions
    n_probe = max(int(_PROBE_SHARE * data.steps_per_replica) // data.save_interval, 10) * data.save_interval
    logger.info("data of one temperature cannot show what they miss: probing at %g times the temperature", _PROBE_HEAT)
    hot = langevin(
        system, loaded.positions, temperature_kelvin=_PROBE_HEAT * config.temperature_kelvin,
        settings=replace(settings, n_steps=n_probe), progress=progress,
    )  # fmt: skip
    probe = _with_metric(hot, target)
    return replace(cold, hot=(probe,), n_force_evaluations=cold.n_force_evaluations + probe.n_force_evaluations)


def onto_constraints(x: np.ndarray, loaded: LoadedSystem) -> np.ndarray:
    """Configurations ``[n, n_atoms, 3]`` in nm with constrained bonds at their exact lengths; files round them.

    Angles, torsions and all other bonds stay as they are.

    Raises:
        InputError: If a constrained bond is off by more than a file format rounds.
    """
    x = np.asarray(x, dtype=np.float64)
    if not loaded.system.getNumConstraints() or not loaded.is_one_molecule:
        return x
    molecule = loaded.molecule
    i, j = molecule.constraints.T
    off = np.abs(np.linalg.norm(x[:, i] - x[:, j], axis=-1) - molecule.constraint_lengths).max(axis=0)
    worst = int(off.argmax())
    if off[worst] > _ROUNDING_NM:
        pair = "–".join(molecule.names[atom] for atom in molecule.constraints[worst])
        raise InputError(
            f"the bond {pair} is constrained to {molecule.constraint_lengths[worst]:.5f} nm in the system, but is {off[worst]:.4f} nm off "
            "in the trajectory: it was made without constraints; give the system it was made with"
        )
    coordinates = InternalCoordinates(build_zmatrix(molecule))
    with torch.no_grad():
        q, _ = coordinates.inverse(torch.from_numpy(x))
        return coordinates(q)[0].numpy()


def _settings(config: MoleculeConfig, loaded: LoadedSystem) -> DynamicsSettings:
    data = config.data
    return DynamicsSettings(
        n_steps=data.steps_per_replica, save_every=data.save_interval, timestep_ps=data.timestep_ps, friction_per_ps=data.friction_per_ps,
        seed=config.seed, n_chains=data.chains, platform=platform_choice(config), box=loaded.box,
    )  # fmt: skip


def _with_metric(trajectory: Trajectory, target: Target) -> Trajectory:
    """A simulated trajectory with the mass-metric term of its rigid bonds, which OpenMM's energies lack, in its reduced potentials."""
    if not isinstance(target, ConstrainedTarget):
        return trajectory
    with torch.no_grad():
        metric = target.metric_potential(torch.as_tensor(trajectory.x, dtype=torch.float64))
    return replace(trajectory, u=trajectory.u + metric.numpy())


def _fingerprint(config: MoleculeConfig, loaded: LoadedSystem) -> str:
    """Hash of whatever the data depend on."""
    settings = config.model_dump(mode="json", include={"temperature", "parameters", "seed", "data"})
    return fingerprint_of({"inputs": sorted(loaded.sha256.values()), "settings": settings})


def _write(folder: RunFolder, trajectory: Trajectory, *, fingerprint: str) -> None:
    arrays: dict[str, np.ndarray] = {"n_hot": np.array(len(trajectory.hot)), "fingerprint": np.array(fingerprint)}
    for k, part in enumerate((trajectory, *trajectory.hot)):
        scalars = (part.temperature_kelvin, part.statistical_inefficiency, part.n_force_evaluations)
        arrays |= {f"x{k}": part.x, f"u{k}": part.u, f"block{k}": part.block, f"chain{k}": part.chain}
        arrays |= {f"scalars{k}": np.array(scalars, dtype=np.float64), f"notes{k}": np.array(part.notes, dtype=np.str_)}
    folder.write_npz(_FILE, arrays)


def _read(path: Path, *, fingerprint: str) -> Trajectory:
    advice = f"delete {path} and {path.parent / 'checkpoints'} to make the data again, or start again with --overwrite"
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        if str(arrays["fingerprint"]) != fingerprint:
            raise CheckpointError(f"the data in {path} belong to another system or configuration; {advice}")
        parts = [_part(arrays, k) for k in range(int(arrays["n_hot"]) + 1)]
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"the data in {path} are corrupt ({error}); {advice}") from error
    return replace(parts[0], hot=tuple(parts[1:]))


def _part(arrays: Mapping[str, np.ndarray], k: int) -> Trajectory:
    """One temperature of a stored trajectory."""
    temperature, inefficiency, evaluations = arrays[f"scalars{k}"].tolist()
    return Trajectory(
        x=arrays[f"x{k}"], u=arrays[f"u{k}"], block=arrays[f"block{k}"], chain=arrays[f"chain{k}"], temperature_kelvin=temperature,
        statistical_inefficiency=inefficiency, n_force_evaluations=int(evaluations), notes=tuple(arrays[f"notes{k}"].tolist()),
    )  # fmt: skip
