"""A chain of four beads with four solvent particles whose distribution is known exactly, and moves that look right but are biased."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from boltzgen.core import Distribution, Flow, Molecule, Target
from boltzgen.paths import PathWalkers
from boltzgen.sampling.driving import TargetDriving
from boltzgen.sampling.solute import SoluteMove
from boltzgen.transforms.internal import InternalCoordinates
from boltzgen.transforms.zmatrix import build_zmatrix

N_BEADS, N_SOLVENT = 4, 4
COORDINATES = InternalCoordinates(
    build_zmatrix(Molecule(("C",) * N_BEADS, np.array([[0, 1], [1, 2], [2, 3]]), np.full(N_BEADS, 12.0), tuple("abcd")))
)
_BOND, _ANGLE, _TIE, _TRAP = (1.0, 0.12), (1.8, 0.2), 3.0, 2.0


class ChainInSolvent(Target):
    """u = u_chain(s) + u_solvent: every solvent particle is tied to its bead with the stiffness k (1 + d²), d the end-to-end distance.

    The solvent integrates out: the chain has the density e^{−u_chain} (1 + d²)^{−3m/2} of Cartesian coordinates. u_chain has harmonic bonds
    and angles, a torsion −cos 2τ − 0.8 cos τ − 0.5 sin τ, and a trap for the centroid.
    """

    event_shape = (N_BEADS + N_SOLVENT, 3)

    def reduced_potential(self, x: Tensor) -> Tensor:
        chain, solvent = x[:, :N_BEADS], x[:, N_BEADS:]
        stiffness = _TIE * (1 + end_to_end(chain) ** 2)
        tied = 0.5 * stiffness * (solvent - chain[:, :N_SOLVENT]).square().sum((1, 2))
        return chain_energy(COORDINATES.inverse(chain)[0]) + tied + 0.5 * _TRAP * chain.mean(1).square().sum(1)


def end_to_end(chain: Tensor) -> Tensor:
    return (chain[:, 0] - chain[:, -1]).norm(dim=1)


def chain_energy(q: Tensor) -> Tensor:
    bonds, angles, torsion = q[:, :3], q[:, 3:5], q[:, 5]
    stretch = 0.5 * ((bonds - _BOND[0]) / _BOND[1]).square().sum(1) + 0.5 * ((angles - _ANGLE[0]) / _ANGLE[1]).square().sum(1)
    return stretch - torch.cos(2 * torsion) - 0.8 * torch.cos(torsion) - 0.5 * torch.sin(torsion)


class Internals(Distribution):
    """Independent normal bonds and angles, wider than the target's, and a uniform torsion."""

    event_shape = (6,)

    def sample(self, n: int, *, generator: torch.Generator, context: object = None) -> tuple[Tensor, Tensor]:
        noise = torch.randn(n, 5, generator=generator, dtype=torch.float64)
        torsion = (2 * torch.rand(n, 1, generator=generator, dtype=torch.float64) - 1) * math.pi
        q = torch.cat([noise * self._width() + self._centre(), torsion], 1)
        return q, self.log_prob(q)

    def log_prob(self, x: Tensor, context: object = None) -> Tensor:
        return (-0.5 * ((x[:, :5] - self._centre()) / self._width()).square() - self._width().log()).sum(1)

    def _centre(self) -> Tensor:
        return torch.tensor([_BOND[0]] * 3 + [_ANGLE[0] - 0.1] * 2, dtype=torch.float64)

    def _width(self) -> Tensor:
        return torch.tensor([0.15] * 3 + [0.25] * 2, dtype=torch.float64)


def proposal() -> Flow:
    return Flow(Internals(), COORDINATES, event_shape=(N_BEADS, 3))


def draw(n: int, generator: torch.Generator) -> Tensor:
    """Exact samples ``[n, 8, 3]``, by rejection."""
    kept: list[Tensor] = []
    while sum(map(len, kept)) < n:
        shape, log_q = proposal().sample(20 * n, generator=generator)
        log_w = -chain_energy(COORDINATES.inverse(shape)[0]) - 1.5 * N_SOLVENT * torch.log(1 + end_to_end(shape) ** 2) - log_q
        kept.append(shape[torch.rand(len(shape), generator=generator, dtype=torch.float64).log() < log_w - log_w.max()])
    shape = torch.cat(kept)[:n]
    noise = torch.randn(n, 1, 3, generator=generator, dtype=torch.float64) / math.sqrt(_TRAP)
    chain = (shape - shape.mean(1, keepdim=True)) @ random_rotations(n, generator) + noise
    stiffness = _TIE * (1 + end_to_end(chain) ** 2)
    solvent = (
        chain[:, :N_SOLVENT] + torch.randn(n, N_SOLVENT, 3, generator=generator, dtype=torch.float64) / stiffness.sqrt()[:, None, None]
    )
    return torch.cat([chain, solvent], 1)


def random_rotations(n: int, generator: torch.Generator) -> Tensor:
    a, b, c, d = torch.nn.functional.normalize(torch.randn(n, 4, generator=generator, dtype=torch.float64)).unbind(1)
    rows = [
        [1 - 2 * (c * c + d * d), 2 * (b * c - a * d), 2 * (b * d + a * c)],
        [2 * (b * c + a * d), 1 - 2 * (b * b + d * d), 2 * (c * d - a * b)],
        [2 * (b * d - a * c), 2 * (c * d + a * b), 1 - 2 * (b * b + c * c)],
    ]
    return torch.stack([torch.stack(row, 1) for row in rows], 1)


def variables(x: Tensor) -> Tensor:
    return end_to_end(x[:, :N_BEADS])[:, None]


def observables(x: Tensor) -> Tensor:
    """Of the conformation, of the placement, and of the solvent, ``[b, 10]``."""
    chain, solvent = x[:, :N_BEADS], x[:, N_BEADS:]
    q = COORDINATES.inverse(chain)[0]
    along = torch.nn.functional.normalize(chain[:, 1] - chain[:, 0])
    apart = (solvent - chain[:, :N_SOLVENT]).square().sum((1, 2))
    columns = [
        end_to_end(chain), q[:, :3].mean(1), q[:, 3:5].mean(1), q[:, 5].cos(), q[:, 5].sin(), (2 * q[:, 5]).cos(), along[:, 2] ** 2,
        along[:, 0], chain.mean(1).square().sum(1), apart,
    ]  # fmt: skip
    return torch.stack(columns, 1)


def stationary_scores(move: SoluteMove, *, n_walkers: int, n_moves: int, seed: int) -> tuple[np.ndarray, float, float]:
    """z-scores of the change of the observables of walkers that start from exact samples, of 2 P(w < 0), and the acceptance."""
    generator = torch.Generator().manual_seed(seed)
    state = move.init(draw(n_walkers, generator))
    before, gap, acceptance = observables(state.x), torch.zeros(n_walkers, dtype=torch.float64), 0.0
    for _ in range(n_moves):
        state, info = move.step(state, generator=generator)
        probability = info.log_ratio.clamp(max=0).exp()
        gap += (probability - 2.0 * (info.log_ratio > 0)) / n_moves
        acceptance += float(probability.mean()) / n_moves
    change = observables(state.x) - before
    scores = change.mean(0) / (change.std(0) / math.sqrt(n_walkers))
    return scores.numpy(), float(gap.mean() / (gap.std() / math.sqrt(n_walkers))), acceptance


class WithoutJacobian(Distribution):
    """A biased twin: the density of internal coordinates taken for that of Cartesian ones."""

    event_shape = (N_BEADS, 3)

    def sample(self, n: int, *, generator: torch.Generator, context: object = None) -> tuple[Tensor, Tensor]:
        x, _ = proposal().sample(n, generator=generator)
        return x, self.log_prob(x)

    def log_prob(self, x: Tensor, context: object = None) -> Tensor:
        return Internals().log_prob(COORDINATES.inverse(x)[0])


class KineticEnergyDropped(TargetDriving):
    """A biased twin: the work is the change of the potential energy."""

    def _kinetic(self, v: Tensor) -> Tensor:
        return torch.zeros(len(v), dtype=torch.float64)


def in_the_laboratory_frame(start: Tensor, shape: Tensor) -> Tensor:
    """A biased twin: the end has the orientation of the standard frame, whatever that of the start."""
    end = shape - shape.mean(1, keepdim=True) + start.mean(1, keepdim=True)
    return torch.stack([start, end], 1)


def driven(walkers_step: float, friction: float, kind: type[TargetDriving] = TargetDriving) -> TargetDriving:
    return kind(ChainInSolvent(), range(N_BEADS), variables, step_size=walkers_step, friction=friction)


def velocities_after(engine: TargetDriving, walkers: PathWalkers, places: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Steps without noise from velocities v; the solute is left at ``places`` ``[K, w, k, 3]`` one after another."""
    x, generator = walkers.x.clone(), torch.Generator()
    for place in places:
        x, v, _ = engine._driven(x, v, place, generator)
    return x, v
