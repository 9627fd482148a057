"""The MBAR equations where samples count several times, as the bootstrap asks for: a convex minimum, found by Newton's method."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse.csgraph import connected_components
from scipy.special import logsumexp

from boltzgen.errors import NoOverlapError

#: Second smallest eigenvalue 1 − λ₂ of the scaled Hessian below which double precision cannot tell how states are tied together.
_DISCONNECTED = 1e-10
#: Self-consistent iterations before the first Newton step, largest Newton step in kT, size of the last one (which leaves about its
#: square), and most of them.
_FIRST, _LONGEST, _LAST, _MOST = 20, 20.0, 1e-7, 200
#: How far in kT free energies may move before Boltzmann factors are computed anew.
_FAR = 100.0


def solve_mbar(u: np.ndarray, state: np.ndarray, counts: np.ndarray, *, start: np.ndarray | None = None) -> np.ndarray:
    """Free energies f_k in kT, f_0 = 0, where sample n counts c_n times.

    They minimise the convex function  Σ_n c_n ln Σ_l N_l e^{f_l − u_l(x_n)} − Σ_l N_l f_l, N_l = Σ_{n∈l} c_n, whose gradient is
    Σ_n c_n p_kn − N_k with p_kn = N_k e^{f_k − u_k(x_n)} / Σ_l N_l e^{f_l − u_l(x_n)}: zero where the MBAR equations hold. States without
    samples do not enter; theirs is −ln Σ_n c_n e^{−u_k(x_n)} / Σ_l N_l e^{f_l − u_l(x_n)}.

    Args:
        u: Reduced potentials ``[K, N]`` in kT; +inf is weight zero.
        state: State that every sample was drawn from ``[N]``; state 0 has samples.
        counts: How often every sample counts ``[N]``.
        start: Where to begin ``[K]``.

    Returns:
        ``[K]``, +inf for a state without samples in which no energy is finite.

    Raises:
        NoOverlapError: If states are not tied together by samples that are possible in both.

    References:
        Shirts and Chodera, J. Chem. Phys. 129, 124105 (2008), eq. 11 and app. C; convexity: Tan et al., J. Chem. Phys. 136, 144102
        (2012).
    """
    drawn = counts > 0
    u, state, c = u[:, drawn], state[drawn], counts[drawn]
    n = np.bincount(state, weights=c, minlength=len(u))
    sampled = np.flatnonzero(n)
    _require_connected(u, state, sampled)
    f = np.zeros(len(u))
    f[sampled] = _minimum(u[sampled], n[sampled], c, start=None if start is None else start[sampled] - start[0])
    for k in np.flatnonzero(n == 0):
        f[k] = -logsumexp(-u[k] - log_mixture(u[sampled], n[sampled], f[sampled]), b=c)
    return f - f[0]


def log_mixture(u: np.ndarray, n: np.ndarray, f: np.ndarray) -> np.ndarray:
    """ln Σ_l N_l e^{f_l − u_l(x_n)} of every sample ``[N]``, over the states with samples."""
    return logsumexp((np.log(n) + f)[:, None] - u, axis=0)


@dataclass(frozen=True)
class _Shares:
    """Boltzmann factors e^{g_k − u_k(x_n) − shift_n} near free energies g, from which all sums follow without further exponentials.

    Attributes:
        near: g ``[K]``.
        factors: ``[K, N]``, the largest of every sample 1.
        shift: ``[N]``.
    """

    near: np.ndarray
    factors: np.ndarray
    shift: np.ndarray

    @classmethod
    def of(cls, u: np.ndarray, near: np.ndarray) -> _Shares:
        logs = near[:, None] - u
        shift = logs.max(axis=0)
        return cls(near, np.exp(logs - shift), shift)

    def mixture(self, n: np.ndarray, f: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """N_k e^{f_k − g_k} ``[K]`` and Σ_k of it with the factors ``[N]``."""
        weights = n * np.exp(f - self.near)
        return weights, weights @ self.factors


def _minimum(u: np.ndarray, n: np.ndarray, c: np.ndarray, *, start: np.ndarray | None) -> np.ndarray:
    f = _self_consistent(u, n, c) if start is None else start
    shares = _Shares.of(u, f)
    for _ in range(_MOST):
        if float(np.abs(f - shares.near).max()) > _FAR:
            shares = _Shares.of(u, f)
        weights, mixture = shares.mixture(n, f)
        p = weights[:, None] * (shares.factors / mixture)
        gradient, hessian = p @ c - n, np.diag(p @ c) - (p * c) @ p.T
        _require_curvature(hessian, n)
        step = np.zeros(len(n))
        step[1:] = -np.linalg.solve(hessian[1:, 1:], gradient[1:])
        step *= min(1.0, _LONGEST / max(float(np.abs(step).max()), 1e-300))
        value = float(c @ np.log(mixture) - n @ f)
        f = f + _damping(shares, n, c, f, step, value=value, slope=float(gradient @ step)) * step
        if float(np.abs(step).max()) < _LAST:
            return f
    raise NoOverlapError(
        f"the MBAR equations were not solved in {_MOST} Newton steps, the last of {float(np.abs(step).max()):.2g} kT: the states hardly "
        "overlap; put states in between"
    )


def _self_consistent(u: np.ndarray, n: np.ndarray, c: np.ndarray) -> np.ndarray:
    """A few iterations of the equations themselves, from equal free energies."""
    f, log_c = np.zeros(len(n)), np.log(c)
    for _ in range(_FIRST):
        f = -logsumexp(-u + (log_c - log_mixture(u, n, f)), axis=1)
        f -= f[0]
    return f


def _damping(shares: _Shares, n: np.ndarray, c: np.ndarray, f: np.ndarray, step: np.ndarray, *, value: float, slope: float) -> float:
    """Share of a Newton step after which the function is lower; all of it near the minimum, where its change is lost in rounding."""
    share = 1.0
    while share > 1e-6 and abs(share * slope) > 1e-9 * c.sum():
        moved = f + share * step
        if float(c @ np.log(shares.mixture(n, moved)[1]) - n @ moved) <= value + 1e-4 * share * slope:
            return share
        share *= 0.5
    return share


def _require_connected(u: np.ndarray, state: np.ndarray, sampled: np.ndarray) -> None:
    """Refuse states without a way from each to each other one over samples of finite energy."""
    if np.isfinite(u[sampled]).all():
        return
    possible = np.stack([np.isfinite(u[sampled][:, state == k]).any(axis=1) for k in sampled])
    n_parts, part = connected_components(possible, directed=True, connection="strong")
    if n_parts > 1:
        apart = sampled[np.argmax(part != part[0])]
        raise NoOverlapError(
            f"states {sampled[0]} and {apart} are not tied together: no sample of one is possible in the other, or in states between; "
            "check that states and maps belong together, or add states in between"
        )


def _require_curvature(hessian: np.ndarray, n: np.ndarray) -> None:
    if len(n) > 1 and not np.linalg.eigvalsh(hessian / np.sqrt(np.outer(n, n)))[1] > _DISCONNECTED:
        raise NoOverlapError("the states have no overlap that double precision can tell: a better map, or states in between")
