"""Free energies of several states from samples of all of them (MBAR), the package's door to pymbar's solver."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp

from boltzgen.errors import EnergyError, ShapeError
from boltzgen.estimators.quiet_pymbar import pymbar

#: Stands for +inf inside the solver, in kT: its Boltzmann factor is exactly zero, and sums of it stay finite.
_ZERO_WEIGHT = 1e10


@dataclass(frozen=True)
class MbarFreeEnergies:
    """Solution of the MBAR equations.

    Attributes:
        f: Reduced free energies ``[K]`` in kT relative to the first state.
        covariance: Their covariance ``[K, K]`` in kT², valid for uncorrelated samples; its first row and column are zero.
        log_mixture: ln Σ_k N_k exp(f_k − u_k(x_n)) of every sample, ``[N]``.
        overlap: Smallest gap-closing eigenvalue 1 − λ₂ of the overlap matrix: 0 means disconnected states.
    """

    f: np.ndarray
    covariance: np.ndarray
    log_mixture: np.ndarray
    overlap: float

    def log_weights(self, u: np.ndarray) -> np.ndarray:
        """Normalised log weights of all samples in any state, sampled or not: ln w_n = −u(x_n) − log_mixture_n − const.

        Args:
            u: Reduced potential of the state at every sample ``[N]`` in kT; +inf has weight zero.

        Returns:
            ``[N]``, with Σ exp = 1. Expectations, histograms and probabilities of the state follow from them.

        Raises:
            ShapeError: If ``u`` is not ``[N]``.
            EnergyError: If an energy is NaN or −inf, or none is finite.

        References:
            Shirts and Chodera, J. Chem. Phys. 129, 124105 (2008), eq. 15.
        """
        if np.shape(u) != self.log_mixture.shape:
            raise ShapeError(f"expected the energies of all {len(self.log_mixture)} samples, got shape {np.shape(u)}")
        log_w = -_sanitised(u) - self.log_mixture
        return log_w - logsumexp(log_w)

    def free_energy(self, u: np.ndarray) -> float:
        """Reduced free energy in kT of any state, relative to the first one (as ``f``): −ln Σ_n exp(−u(x_n) − log_mixture_n)."""
        if np.shape(u) != self.log_mixture.shape:
            raise ShapeError(f"expected the energies of all {len(self.log_mixture)} samples, got shape {np.shape(u)}")
        return -float(logsumexp(-_sanitised(u) - self.log_mixture))


def mbar_free_energies(u_kn: np.ndarray, n_k: np.ndarray) -> MbarFreeEnergies:
    """Solve f_k = −ln Σ_n exp(−u_k(x_n)) / Σ_l N_l exp(f_l − u_l(x_n)).

    Args:
        u_kn: Reduced potential of every sample in every state ``[K, N]`` in kT, samples of state 0 first; +inf is weight zero.
        n_k: Number of samples drawn in every state ``[K]``, summing to N.

    Returns:
        Free energies, covariance and what is needed for expectations in other states.

    Raises:
        ShapeError: If the shapes do not belong together.
        EnergyError: If an energy is NaN or −inf, or a sample is impossible in every sampled state.

    References:
        Shirts and Chodera, J. Chem. Phys. 129, 124105 (2008), eqs. 11 and 8.
    """
    counts = np.asarray(n_k, dtype=np.int64)
    if np.ndim(u_kn) != 2 or counts.shape != (len(u_kn),) or counts.sum() != np.shape(u_kn)[1] or (counts < 0).any():
        raise ShapeError(f"expected u_kn [K, N] and K counts summing to N, got shape {np.shape(u_kn)} and counts {counts.tolist()}")
    u = _sanitised(u_kn)
    impossible = (u[counts > 0] >= _ZERO_WEIGHT).all(axis=0)
    if impossible.any():
        raise EnergyError(
            f"sample {int(np.argmax(impossible))} has infinite energy in every sampled state: it cannot come from any of them"
        )
    solver = pymbar.MBAR(u, counts, solver_protocol="robust")
    theta = solver.compute_free_energy_differences(compute_uncertainty=True, return_theta=True)["Theta"]
    covariance = theta - theta[:1] - theta[:, :1] + theta[0, 0]
    with np.errstate(divide="ignore"):
        log_mixture = logsumexp(np.log(counts)[:, None] + solver.f_k[:, None] - u, axis=0)
    eigenvalues = np.sort(np.real(solver.compute_overlap()["eigenvalues"]))
    overlap = float(1 - eigenvalues[-2]) if len(eigenvalues) > 1 else 1.0
    return MbarFreeEnergies(solver.f_k - solver.f_k[0], np.asarray(covariance), log_mixture - solver.f_k[0], overlap)


def _sanitised(u: np.ndarray) -> np.ndarray:
    """Energies fit for the solver: float64, +inf replaced by a weight of zero, NaN and −inf refused."""
    u = np.asarray(u, dtype=np.float64)
    bad = np.isnan(u) | np.isneginf(u)
    if bad.any():
        raise EnergyError(f"reduced potential {np.argwhere(bad)[0].tolist()} is {u[bad][0]}; evaluate the samples again or leave them out")
    return np.where(u >= _ZERO_WEIGHT, _ZERO_WEIGHT, u)
