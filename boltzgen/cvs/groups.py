"""Variables of many atoms: radius of gyration, distance from a reference structure, coordination number."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from boltzgen.cvs.geometry import nearest_image, reduced_box
from boltzgen.cvs.variable import CollectiveVariable
from boltzgen.errors import ConfigError

#: Mean squared deviations below this, nm², are zero and have no gradient (OpenMM's threshold).
_NO_DEVIATION = 1e-20


class RadiusOfGyration(CollectiveVariable):
    """Radius of gyration √(Σ m_i |x_i − x̄|² / Σ m_i) in nm, x̄ the mean of the same weights.

    Args:
        name: What the user calls it.
        atoms: At least two atoms.
        masses: Their masses ``[m]``, in any unit; all atoms weigh the same by default.

    Raises:
        ConfigError: If there are fewer than two atoms, or the masses do not fit them.
    """

    unit = "nm"

    def __init__(self, name: str, atoms: Sequence[int], *, masses: ArrayLike | None = None) -> None:
        super().__init__(name, atoms)
        if len(atoms) < 2:
            raise ConfigError(f"the radius of gyration {name!r} needs at least two atoms, got {list(atoms)}")
        self.masses = None if masses is None else np.array(masses, dtype=np.float64)
        if self.masses is not None and (self.masses.shape != (len(atoms),) or not (self.masses.min() >= 0 < self.masses.sum())):
            raise ConfigError(f"the radius of gyration {name!r} of {len(atoms)} atoms needs as many masses, none negative and not all "
                              f"zero, got {self.masses.tolist()}")  # fmt: skip

    def _value(self, x: Tensor) -> Tensor:
        positions = self._positions(x)
        weights = self.masses if self.masses is not None else np.ones(len(self.atoms))
        share = torch.as_tensor(weights / weights.sum(), dtype=x.dtype, device=x.device)[:, None]
        centred = positions - (share * positions).sum(1, keepdim=True)
        return (share * centred**2).sum((1, 2)).sqrt()


class RMSD(CollectiveVariable):
    """Root mean square deviation from a reference after the best superposition, min over R, t of √(Σ |R x_i + t − y_i|² / m), in nm.

    With both sets centred, Σ|R x_i − y_i|² = Σ|x_i|² + Σ|y_i|² − 2 λ, λ the largest eigenvalue of a symmetric 4 × 4 matrix of the
    correlations; computed in float64. Equals OpenMM's ``RMSDForce``: all atoms weigh the same, mirror images are not superposed.

    Args:
        name: What the user calls it.
        atoms: At least three atoms.
        reference: Positions ``[n, 3]`` in nm of **all** atoms of the system; those of ``atoms`` are used.

    Raises:
        ConfigError: If there are fewer than three atoms, or the reference lacks one.

    References:
        Coutsias, Seok & Dill, J. Comput. Chem. 25, 1849 (2004), eqs. 10 and 16.
    """

    unit = "nm"

    def __init__(self, name: str, atoms: Sequence[int], *, reference: ArrayLike) -> None:
        super().__init__(name, atoms)
        self.reference = np.array(reference, dtype=np.float64)
        if len(atoms) < 3:
            raise ConfigError(f"the RMSD {name!r} needs at least three atoms: any two can be superposed but for their distance; "
                              f"got {list(atoms)}")  # fmt: skip
        if self.reference.ndim != 2 or self.reference.shape[1] != 3 or len(self.reference) <= max(atoms):
            raise ConfigError(f"the reference of the RMSD {name!r} must hold positions [n, 3] of all atoms of the system, up to atom "
                              f"{max(atoms)}; got {list(self.reference.shape)}")  # fmt: skip

    def _value(self, x: Tensor) -> Tensor:
        positions = self._positions(x).double()
        reference = torch.as_tensor(self.reference[list(self.atoms)], device=x.device)
        moved, fixed = positions - positions.mean(1, keepdim=True), reference - reference.mean(0)
        overlap = torch.linalg.eigvalsh(_quaternion_matrix(moved.mT @ fixed))[:, -1]
        squared = ((moved**2).sum((1, 2)) + (fixed**2).sum() - 2 * overlap) / len(self.atoms)
        apart = squared > _NO_DEVIATION
        return torch.where(apart, torch.where(apart, squared, 1.0).sqrt(), 0.0).to(x.dtype)


class Coordination(CollectiveVariable):
    """Coordination number of two groups of atoms, Σ_{i ∈ A, j ∈ B} s(r_ij), s(r) = (1 − (r/r0)ⁿ) / (1 − (r/r0)ᵐ).

    Divided by their common factor, both polynomials are free of the zero at r = r0: with p = (r/r0)^g, g the greatest common divisor of
    n and m, s = (1 + p + … + p^{n/g − 1}) / (1 + p + … + p^{m/g − 1}). Every pair counts, at any distance.

    Args:
        name: What the user calls it.
        first: Atoms of A.
        second: Atoms of B, none of them in A; by default the pairs within A are counted, each once.
        r0: Distance r0 in nm, at which a pair counts n/m.
        n: Exponent of the numerator.
        m: Exponent of the denominator, larger than n.
        box: Box vectors ``[3, 3]`` in nm: distances are then those of the nearest images.

    Raises:
        ConfigError: If the groups overlap, there is no pair, r0 is not positive, not 0 < n < m, or the box is not in reduced form.
    """

    def __init__(
        self,
        name: str,
        first: Sequence[int],
        second: Sequence[int] | None = None,
        *,
        r0: float,
        n: int = 6,
        m: int = 12,
        box: ArrayLike | None = None,
    ) -> None:
        common = sorted(set(first) & set(second or ()))
        if common:
            raise ConfigError(f"the groups of the coordination {name!r} share the atoms {common}; leave the second group out to count the "
                              f"pairs within the first")  # fmt: skip
        super().__init__(name, (*first, *(second or ())))
        pairs = itertools.combinations(first, 2) if second is None else itertools.product(first, second)
        self.pairs = tuple((int(i), int(j)) for i, j in pairs)
        if not self.pairs:
            raise ConfigError(f"the coordination {name!r} has no pair of atoms: got groups {list(first)} and {list(second or ())}")
        if not r0 > 0 or not 0 < n < m:
            raise ConfigError(f"the coordination {name!r} needs r0 > 0 and exponents 0 < n < m, got r0 = {r0} nm, n = {n}, m = {m}")
        self.r0, self.n, self.m = float(r0), int(n), int(m)
        self.box = None if box is None else reduced_box(box)

    @property
    def reduced_exponents(self) -> tuple[int, int, int]:
        """g, n/g and m/g, g the greatest common divisor of n and m."""
        g = math.gcd(self.n, self.m)
        return g, self.n // g, self.m // g

    def _value(self, x: Tensor) -> Tensor:
        i, j = torch.tensor(self.pairs, device=x.device).unbind(1)
        r = nearest_image(x[:, j] - x[:, i], self.box).norm(dim=-1)
        g, n, m = self.reduced_exponents
        p = (r / self.r0) ** g
        return (_geometric_sum(p, n) / _geometric_sum(p, m)).sum(1)


def _geometric_sum(p: Tensor, n_terms: int) -> Tensor:
    """1 + p + … + p^{n_terms − 1}."""
    total = torch.ones_like(p)
    for _ in range(n_terms - 1):
        total = 1 + p * total
    return total


def _quaternion_matrix(correlation: Tensor) -> Tensor:
    """The symmetric matrix ``[b, 4, 4]`` of which λ is the largest eigenvalue, from Σ x_i y_iᵀ ``[b, 3, 3]``."""
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = (row.unbind(-1) for row in correlation.unbind(-2))
    rows = (
        (xx + yy + zz, yz - zy, zx - xz, xy - yx),
        (yz - zy, xx - yy - zz, xy + yx, xz + zx),
        (zx - xz, xy + yx, yy - xx - zz, yz + zy),
        (xy - yx, xz + zx, yz + zy, zz - xx - yy),
    )
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
