"""What constrained dynamics samples: the Boltzmann density on the constrained manifold, with its mass-metric factor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from boltzgen.core import Molecule, Target
from boltzgen.errors import TopologyError


class ConstrainedTarget(Target):
    r"""A target as sampled by dynamics with rigid bonds.

    In free internal coordinates q, with J the internal-coordinate Jacobian at the constrained lengths, constrained molecular
    dynamics samples

        p(q) ∝ exp(−u(x(q))) J(q) √det H(x(q)),   H_cc' = Σ_a (1/m_a) ∇_a σ_c · ∇_a σ_c',   σ_c = |r_i − r_j|

    so that its reduced potential against J dq is u − ½ ln det H (masses in dalton). Derivation: docs/constraints.md.

    Args:
        target: The unconstrained energy.
        molecule: Masses and constrained bonds.

    Attributes:
        log_z: None: the normalisation of the constrained density is not known analytically.

    Raises:
        TopologyError: If a constrained atom has no mass, or a pair is constrained twice.

    References:
        Fixman, PNAS 71, 3050 (1974).
    """

    def __init__(self, target: Target, molecule: Molecule) -> None:
        self.target = target
        self.molecule = molecule
        self.event_shape = target.event_shape
        self.labels = target.labels
        self.box = target.box
        self.is_exact = target.is_exact
        self._clusters = _clusters(molecule)

    def reduced_potential(self, x: Tensor) -> Tensor:
        """u(x) − ½ ln det H(x) in kT ``[b]``; ``x`` ``[b, n, 3]`` in nm obeys the constraints."""
        u = self.target.reduced_potential(x)
        return u + self.metric_potential(x) if self._clusters else u

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u, gradient = self.target.value_and_grad(x)
        if not self._clusters:
            return u, gradient
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            metric = self.metric_potential(leaf)
            (metric_gradient,) = torch.autograd.grad(metric.sum(), leaf)
        return u + metric.detach(), gradient + metric_gradient

    def reduced_potentials(self, x: Tensor, states: Sequence[float]) -> Tensor:
        u = self.target.reduced_potentials(x, states)
        return u + self.metric_potential(x) if self._clusters else u

    def at(self, temperature_kelvin: float) -> ConstrainedTarget:
        return ConstrainedTarget(self.target.at(temperature_kelvin), self.molecule)

    def metric_potential(self, x: Tensor) -> Tensor:
        """−½ ln det H(x), ``[b]``, float64: a sum over clusters of constraints that share atoms."""
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for pairs, inverse_masses in self._clusters:
            bonds = x[:, pairs[..., 0]].to(torch.float64) - x[:, pairs[..., 1]].to(torch.float64)
            unit = bonds / bonds.norm(dim=-1, keepdim=True)
            metric = unit @ unit.transpose(-1, -2) * inverse_masses.to(x.device)
            total = total - torch.linalg.cholesky(metric).diagonal(dim1=-2, dim2=-1).log().sum((-1, -2))
        return total


def _clusters(molecule: Molecule) -> list[tuple[Tensor, Tensor]]:
    """Constraints by connected cluster, those of equal size together.

    Returns:
        Per size s: the pairs ``[clusters, s, 2]`` and Σ_a (±1/m_a) of every two constraints ``[clusters, s, s]``, so that
        H = (e_c · e_c') times it.
    """
    pairs = [(int(a), int(b)) for a, b in molecule.constraints]
    if len({frozenset(pair) for pair in pairs}) < len(pairs):
        raise TopologyError("a pair of atoms is constrained twice; remove the duplicate constraint from the system")
    massless = [atom for pair in pairs for atom in pair if not molecule.masses[atom] > 0]
    if massless:
        raise TopologyError(f"atom {massless[0]} is constrained but has no mass; constrained dynamics needs positive masses")
    groups: list[list[tuple[int, int]]] = []
    for pair in pairs:
        touching = [group for group in groups if any(set(pair) & set(other) for other in group)]
        groups = [group for group in groups if group not in touching] + [[other for group in touching for other in group] + [pair]]
    by_size: dict[int, list[list[tuple[int, int]]]] = {}
    for group in groups:
        by_size.setdefault(len(group), []).append(group)
    return [(torch.tensor(same), torch.from_numpy(np.stack([_inverse_masses(group, molecule.masses) for group in same])))
            for same in by_size.values()]  # fmt: skip


def _inverse_masses(group: list[tuple[int, int]], masses: np.ndarray) -> np.ndarray:
    """Σ_a s_ca s_c'a / m_a, with s = +1 for the first atom of a pair and −1 for the second, ``[s, s]``."""
    atoms = sorted({atom for pair in group for atom in pair})
    signs = np.array([[float(atom == a) - float(atom == b) for atom in atoms] for a, b in group])
    return signs / masses[atoms] @ signs.T
