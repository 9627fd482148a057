"""Densities over all coordinates of a molecule, from flows that leave out where it is or how it is turned."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from boltzgen.config import CartesianConfig, GeneratorConfig, load_config
from boltzgen.core import LOG_DET_TOLERANCE, Distribution, Molecule, require_exact_density
from boltzgen.distributions import log_prob_where_known
from boltzgen.errors import CheckpointError, InputError, SolverError
from boltzgen.md.checks import constraints_of
from boltzgen.md.loading import file_hash
from boltzgen.targets.constrained import ConstrainedTarget
from boltzgen.training.checkpoints import read_description
from boltzgen.workflows.cartesian import load_cartesian_flow
from boltzgen.workflows.generator import load_flow
from boltzgen.workflows.plugins.distributions import (
    DescribedDistribution,
    DistributionSource,
    SavedDistribution,
    require_unchanged,
    source_of,
)
from boltzgen.workflows.run_folder import RunFolder

_FLOW = "flow.safetensors"
#: Lengths of constraints that differ by less, in nm, are the same.
_SAME_LENGTH_NM = 1e-6
#: A normalised density over all coordinates falls by more than a nat over this distance, in nm.
_FAR, _FALL = 1000.0, 1.0


class Frame(ABC):
    """What a flow says about the place and the orientation of a molecule."""

    @abstractmethod
    def enter(self, x: Tensor) -> Tensor:
        """Configurations ``[b, n, 3]`` where the flow expects them."""

    @abstractmethod
    def place(self, proposed: Tensor, present: Tensor, *, generator: torch.Generator) -> Tensor:
        """A proposal ``[n, 3]`` put where the present configuration ``[n, 3]`` is, as far as the flow leaves it open."""


class WholeSpace(Frame):
    """The flow is a density over all 3n coordinates."""

    def enter(self, x: Tensor) -> Tensor:
        return x

    def place(self, proposed: Tensor, present: Tensor, *, generator: torch.Generator) -> Tensor:
        return proposed


class FreeCentre(Frame):
    """The flow is a density over configurations with mean position zero: a proposal keeps the present centre."""

    def enter(self, x: Tensor) -> Tensor:
        return x - x.mean(dim=1, keepdim=True)

    def place(self, proposed: Tensor, present: Tensor, *, generator: torch.Generator) -> Tensor:
        return proposed - proposed.mean(dim=0) + present.mean(dim=0)


class FreeMolecule(FreeCentre):
    """The flow is a density over internal coordinates: a proposal keeps the present centre and is turned at random.

    Volume is dc dR J dq with centre c and Haar measure dR: keeping c, and drawing R from that measure, leaves the ratio of densities of q.
    Exact for any energy, also one that depends on the orientation.
    """

    def place(self, proposed: Tensor, present: Tensor, *, generator: torch.Generator) -> Tensor:
        quaternion = torch.randn(4, generator=generator, dtype=torch.float64).numpy()
        turn = torch.from_numpy(Rotation.from_quat(quaternion).as_matrix())
        return super().place(proposed @ turn.T, present, generator=generator)


@dataclass(frozen=True)
class MoleculeDensity:
    """A proposal of all coordinates of a molecule, in double precision.

    Attributes:
        distribution: The flow.
        frame: What it leaves open.
        molecule: The molecule it was trained on, with its rigid bonds; None where a distribution was given without one.
    """

    distribution: Distribution
    frame: Frame
    molecule: Molecule | None = None

    @property
    def n_particles(self) -> int:
        """Number of particles."""
        return int(self.distribution.event_shape[0])

    def draw(self, n: int, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Configurations ``[n, n_particles, 3]`` and their log densities ``[n]``; NaN where the way back leads elsewhere, or nowhere.

        Maps that are not quite one to one have no density there. A proposal that is never accepted where that is so is exact.
        """
        with torch.no_grad():
            try:
                x, log_q = self.distribution.sample(n, generator=generator)
            except SolverError:
                if n == 1:
                    return torch.zeros(1, self.n_particles, 3, dtype=torch.float64), torch.full((1,), math.nan, dtype=torch.float64)
                parts = [self.draw(1, generator=generator) for _ in range(n)]
                return torch.cat([x for x, _ in parts]), torch.cat([log_q for _, log_q in parts])
        x = x.to(torch.float64)
        back = self.log_prob(x)
        return x, torch.where((back - log_q).abs() < LOG_DET_TOLERANCE, back, math.nan)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log densities ``[b]`` of configurations ``[b, n_particles, 3]``; −inf where the flow makes none."""
        with torch.no_grad():
            return log_prob_where_known(self.distribution, self.frame.enter(x)).nan_to_num(nan=-math.inf, neginf=-math.inf)

    def metric_potential(self, x: Tensor) -> Tensor:
        """What rigid bonds add to the reduced potential of the flow's coordinates ``[b]``: −½ ln det H (docs/constraints.md)."""
        return torch.zeros(len(x), dtype=torch.float64) if self._metric is None else self._metric(x)

    @functools.cached_property
    def _metric(self) -> Callable[[Tensor], Tensor] | None:
        if self.molecule is None or not len(self.molecule.constraints):
            return None
        return ConstrainedTarget(_Shape((self.n_particles, 3)), self.molecule).metric_potential  # type: ignore[arg-type]

    def require_fits(self, system: openmm.System) -> None:
        """Refuse a system that the density does not describe.

        Raises:
            InputError: If particles or constraints differ, or it is periodic.
        """
        n = system.getNumParticles()
        if n != self.n_particles:
            raise InputError(f"the flow makes {self.n_particles} particles and the system has {n}: a flow move proposes all coordinates of "
                             f"one molecule; take a steered path for a molecule in solvent")  # fmt: skip
        if system.usesPeriodicBoundaryConditions():
            raise InputError(
                "the system is periodic, and a flow of a free molecule does not know its images: use vacuum or implicit solvent"
            )
        own = _lengths((i, j, length) for i, j, length in constraints_of(system))
        flow = {} if self.molecule is None else _lengths(zip(*self.molecule.constraints.T, self.molecule.constraint_lengths, strict=True))
        if own.keys() != flow.keys() or any(abs(own[pair] - flow[pair]) > _SAME_LENGTH_NM for pair in own):
            raise InputError(f"the system has {len(own)} constraints and the flow was made for {len(flow)}, or for other lengths: make "
                             f"both with the same constraints=...")  # fmt: skip


@dataclass(frozen=True)
class _Shape:
    """What a constrained target asks of the energy beneath it where only its metric is wanted."""

    event_shape: tuple[int, ...]
    labels: tuple[str, ...] = ()
    box: None = None
    is_exact: bool = True


def _lengths(constraints: Any) -> dict[frozenset[int], float]:
    return {frozenset((int(i), int(j))): float(length) for i, j, length in constraints}


@dataclass(frozen=True)
class SavedRun:
    """The flow of a finished run of ``boltzgen run``, known by the hash of its weights.

    Those carry a fingerprint of the configuration, the coordinates and the inputs, which is checked as well.

    Attributes:
        folder: The run folder, absolute.
        sha256: Hash of ``flow.safetensors`` when it was first named.
    """

    folder: str
    sha256: str

    def load(self) -> MoleculeDensity:
        """The density.

        Raises:
            CheckpointError: If a file is missing, or is not what it was.
            InexactDensityError: If the density is only estimated.
        """
        require_unchanged(str(Path(self.folder, _FLOW)), self.sha256)
        return _density_of_run(self.folder, self.sha256)

    def to_dict(self) -> dict[str, Any]:
        """Its attributes as plain values."""
        return {"folder": self.folder, "sha256": self.sha256}


@dataclass(frozen=True)
class WholeSpaceFlow:
    """A distribution over all coordinates, written down or in a file.

    Attributes:
        source: The distribution.
    """

    source: DistributionSource

    def load(self) -> MoleculeDensity:
        """The density.

        Raises:
            CheckpointError: If the file is missing, or is not what it was.
            InputError: If it is no density over all coordinates of particles.
            InexactDensityError: If the density is only estimated.
        """
        distribution = self.source.load()
        shape = tuple(distribution.event_shape)
        if len(shape) != 2 or shape[1] != 3:
            raise InputError(f"expected a distribution of configurations [n, 3], got one of {list(shape)}")
        with torch.no_grad():
            x, log_q = distribution.sample(1, generator=torch.Generator().manual_seed(0))
            far = distribution.log_prob(x.to(torch.float64) + _FAR)
        if not float(log_q - far) > _FALL:
            raise InputError("the density does not depend on where the molecule is, so that it is none over all coordinates: give it a "
                             "centre_scale, or a flow of a run folder")  # fmt: skip
        return MoleculeDensity(distribution, WholeSpace())

    def to_dict(self) -> dict[str, Any]:
        """Its attributes as plain values."""
        return self.source.to_dict()


FlowSource = SavedRun | WholeSpaceFlow


def flow_source_of(given: FlowSource | DistributionSource | str | Path | Mapping[str, Any]) -> FlowSource:
    """A flow over all coordinates from what a user gives, or from the plain values of one.

    Raises:
        InputError: If it is none.
    """
    if isinstance(given, (SavedRun, WholeSpaceFlow)):
        return given
    if isinstance(given, (DescribedDistribution, SavedDistribution)):
        return WholeSpaceFlow(given)
    if isinstance(given, Mapping):
        return SavedRun(given["folder"], given["sha256"]) if "folder" in given else WholeSpaceFlow(source_of(given))
    if not isinstance(given, (str, Path)):
        raise InputError(f"expected the folder of a finished run or the file of a saved distribution, got a {type(given).__name__}")
    path = Path(given).resolve()
    path = path / _FLOW if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"there is no flow at {path}: give the folder of a finished run, or a file of save_distribution")
    if "recipe" in read_description(path):
        return WholeSpaceFlow(SavedDistribution.at(path))
    return SavedRun(str(path.parent), file_hash(path))


@functools.lru_cache(maxsize=4)
def _density_of_run(path: str, sha256: str) -> MoleculeDensity:
    folder = RunFolder.read(Path(path))
    config = load_config(folder.config_path)
    if isinstance(config, GeneratorConfig):
        flow, molecule = load_flow(folder, config)
        density = MoleculeDensity(flow, FreeMolecule(), molecule)
    elif isinstance(config, CartesianConfig):
        density = MoleculeDensity(load_cartesian_flow(folder, config), FreeCentre())
    else:
        raise CheckpointError(f"the run in {path} is of task {config.task!r}, which has no flow over all coordinates of one molecule")
    require_exact_density(density.distribution.log_det_error)
    return density


def positions_tensor(state: openmm.State) -> Tensor:
    """Positions ``[1, n, 3]`` of an OpenMM state in nm, float64."""
    return torch.from_numpy(np.array(state.getPositions(asNumpy=True)._value, dtype=np.float64))[None]
