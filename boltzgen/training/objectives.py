"""Losses of flows: forward and reverse Kullback–Leibler divergence, and weighted sums of any objectives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from boltzgen.core import Flow, Objective, Target
from boltzgen.distributions import where_solved
from boltzgen.errors import EnergyError, InputError, ShapeError

ReverseGradient = Callable[[Flow, Target, int, torch.Generator], tuple[Tensor, Tensor]]


class WeightedRows:
    """Rows of data drawn with replacement, in proportion to their weights.

    Args:
        n: Number of rows.
        batch_size: Rows per draw.
        log_w: Log weights ``[n]``; equal by default.

    Raises:
        InputError, ShapeError: If there are no rows, or not one weight for each.
    """

    def __init__(self, n: int, *, batch_size: int, log_w: Tensor | None = None) -> None:
        if n == 0:
            raise InputError("expected samples to learn from, got none")
        if log_w is not None and log_w.shape != (n,):
            raise ShapeError(f"expected one log weight for each of {n} samples, got {list(log_w.shape)}")
        self.n, self.batch_size = n, batch_size
        self.cumulative = None if log_w is None else torch.softmax(log_w, dim=0).cumsum(dim=0)

    def draw(self, generator: torch.Generator) -> Tensor:
        """Row numbers ``[batch_size]``."""
        if self.cumulative is None:
            return torch.randint(self.n, (self.batch_size,), generator=generator)
        uniform = torch.rand(self.batch_size, generator=generator, dtype=torch.float64)
        return torch.searchsorted(self.cumulative, uniform).clamp_max(self.n - 1)


class ForwardKL(Objective[Flow]):
    """E_p[−ln q(x)] on samples of the target: the forward KL divergence up to a constant.

    Where the gradients of the reduced potential at the samples are known, the path gradient is used: the samples are mapped to
    z = T⁻¹(x), and the KL divergence of the pulled-back target to the base is descended there,

        d/dθ KL = E_p[∂_z(ln p(T(z)) + ln|dT/dz| − ln q₀(z)) · ∂T_θ⁻¹(x)/∂θ]

    (Vaitl, Nicoli, Nakajima & Kessel, ICML 2022; Vaitl et al., ICLR 2024). It has the same expectation as maximum likelihood, but
    vanishes sample by sample where q = p, so that a finite data set is fitted with its forces rather than learned by heart.

    Samples that the flow's solver cannot lead back are left out of their step, here as in the other objectives.

    Args:
        x: Samples ``[n, *event]``.
        batch_size: Rows per step, drawn with replacement in proportion to the weights.
        log_w: Log weights ``[n]`` of the samples; equal by default.
        u_gradient: Gradients of the reduced potential at the samples ``[n, *event]``, in kT per unit of x.
        outlier_limit: With path gradients, see :func:`limited`.
    """

    def __init__(
        self,
        x: Tensor,
        *,
        batch_size: int,
        log_w: Tensor | None = None,
        u_gradient: Tensor | None = None,
        outlier_limit: float | None = None,
    ) -> None:
        self.rows = WeightedRows(len(x), batch_size=batch_size, log_w=log_w)
        if u_gradient is not None and u_gradient.shape != x.shape:
            raise ShapeError(f"expected gradients of the shape of the samples {list(x.shape)}, got {list(u_gradient.shape)}")
        self.x, self.u_gradient, self.outlier_limit = x, u_gradient, outlier_limit

    def __call__(self, flow: Flow, *, generator: torch.Generator) -> tuple[Tensor, Mapping[str, float]]:
        rows = self.rows.draw(generator)
        loss = (
            -where_solved(flow.log_prob, self.x[rows])[0].mean()
            if self.u_gradient is None
            else _forward_path(flow, self.x[rows], self.u_gradient[rows], self.outlier_limit)
        )
        return loss, {"forward_kl": float(loss.detach())}


class ReverseKL(Objective[Flow]):
    """E_q[ln q(x) + u(x)]: the reverse KL divergence up to ln Z, from the flow's own samples.

    Args:
        target: Target; a regularised view is fine, it is used for training only.
        batch_size: Flow samples, and energy evaluations, per step.
        gradient: :func:`path_gradient` (default) or :func:`score_gradient`.
    """

    def __init__(self, target: Target, *, batch_size: int, gradient: ReverseGradient | None = None) -> None:
        self.target, self.batch_size = target, batch_size
        self.gradient = gradient or path_gradient

    def __call__(self, flow: Flow, *, generator: torch.Generator) -> tuple[Tensor, Mapping[str, float]]:
        loss, log_w = self.gradient(flow, self.target, self.batch_size, generator)
        return loss, {"reverse_kl": -float(log_w.mean()), "ess": batch_ess(log_w)}


class LogVariance(Objective[Flow]):
    """½ Var_r[ln q(x) − ln p̂(x)] on points x ~ r: a fit of the log density itself, up to its constant.

    Its minimum is q = p̂ for every r that covers them, so that rare regions can be given as many points as wanted; the likelihood of
    a region counts in proportion to its probability instead. The gradient of every step vanishes at the optimum. Residuals further than
    ``limit`` from their median are cut there (biased while there are such; for training only), those of own samples that the target
    forbids, u = +inf, as well: probability that the flow loses there has its price. The recorded ``log_variance`` is that of cut residuals.

    With a target, half of the points of a step are fresh samples of the flow: what it makes and the data lack. Nothing is
    differentiated through their making, as r may be anything, so that no forces are needed.

    Args:
        x: Points ``[n, *event]``; none where the flow's own samples shall do alone.
        log_p: Log density ``[n]`` to fit, up to a constant. Noisy values are averaged as logarithms: what is unbiased for the density
            itself comes out too low where it is noisy.
        batch_size: Points per step, drawn with replacement.
        limit: Largest residual in nats.
        target: Gives the log density −u of the flow's own samples, with the constant of ``log_p``; None leaves them out.

    References:
        Richter, Boustati, Nüsken, Ruiz & Akyildiz, VarGrad, NeurIPS 2020, eq. 5 (the log-variance divergence).
    """

    def __init__(self, x: Tensor, log_p: Tensor, *, batch_size: int, limit: float = 5.0, target: Target | None = None) -> None:
        if log_p.shape != (len(x),):
            raise ShapeError(f"expected one log density for each of {len(x)} points, got {list(log_p.shape)}")
        finite = torch.isfinite(log_p)
        if target is None and not bool(finite.any()):
            raise InputError("expected points with a finite log density, got none")
        self.x, self.log_p, self.batch_size, self.limit, self.target = x[finite], log_p[finite], batch_size, limit, target

    def __call__(self, flow: Flow, *, generator: torch.Generator) -> tuple[Tensor, Mapping[str, float]]:
        x, log_p = self._points(flow, generator)  # −inf in log_p: a residual of +inf, which is cut
        log_q, rows = where_solved(flow.log_prob, x)
        residual = log_q.detach() - log_p[rows]
        residual = (residual - residual[torch.isfinite(residual)].median()).clamp(-self.limit, self.limit)
        residual = residual - residual.mean()
        value = 0.5 * residual.square().mean()
        surrogate = (residual * log_q).mean()
        return surrogate - surrogate.detach() + value, {"log_variance": 2 * float(value)}

    def _points(self, flow: Flow, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The points of a step ``[b, *event]`` and their log densities ``[b]``."""
        n_own = 0 if self.target is None else self.batch_size if not len(self.x) else self.batch_size // 2
        rows = torch.randint(max(1, len(self.x)), (self.batch_size - n_own,), generator=generator)
        if self.target is None:
            return self.x[rows], self.log_p[rows]
        with torch.no_grad():
            own = flow.transform.push(flow.base.sample(n_own, generator=generator)[0])
        u = self.target.reduced_potential(own)
        if not len(self.x) and not bool(torch.isfinite(u).any()):
            raise EnergyError(f"all {n_own} samples of the flow have infinite energy: train it on data, or with a softer target, first")
        return torch.cat([self.x[rows].to(own), own]), torch.cat([self.log_p[rows].to(u), -u])


class WeightedSum(Objective[Flow]):
    """Σ wᵢ · objectiveᵢ.

    Args:
        terms: Pairs of a weight and an objective.
    """

    def __init__(self, *terms: tuple[float, Objective]) -> None:
        self.terms = terms

    def __call__(self, flow: Flow, *, generator: torch.Generator) -> tuple[Tensor, Mapping[str, float]]:
        total = torch.zeros((), dtype=torch.float64)
        numbers: dict[str, float] = {}
        for weight, objective in self.terms:
            loss, named = objective(flow, generator=generator)
            total = total + weight * loss
            numbers.update(named)
        return total, numbers


class OfPart(Objective[Flow]):
    """An objective of a part of the flow that is a flow itself, such as the marginal of its first coordinates.

    Args:
        part: The part; it shares its parameters with the flow that is trained.
        objective: Its objective.
        name: Prefix of the recorded numbers.
    """

    def __init__(self, part: Flow, objective: Objective, *, name: str) -> None:
        self.part, self.objective, self.name = part, objective, name

    def __call__(self, flow: Flow, *, generator: torch.Generator) -> tuple[Tensor, Mapping[str, float]]:
        loss, numbers = self.objective(self.part, generator=generator)
        return loss, {f"{self.name}_{key}": value for key, value in numbers.items()}


def batch_ess(log_w: Tensor) -> float:
    """Effective sample size (0–1) of the log weights ``[n]`` of a training batch; what is reported is computed from evaluation rows."""
    weights = torch.softmax(log_w, dim=0)
    return 1.0 / float(weights.square().sum() * len(weights))


def truncated_log_weights(log_w: Tensor) -> Tensor:
    """Log weights ``[n]`` cut at √n times their mean: a little bias for a bounded variance, for training only.

    References:
        Ionides, J. Comput. Graph. Stat. 17, 295 (2008).
    """
    n = len(log_w)
    limit = torch.logsumexp(log_w, dim=0) - 0.5 * math.log(n)
    return log_w.clamp_max(float(limit))


def path_gradient(
    flow: Flow, target: Target, n: int, generator: torch.Generator, *, outlier_limit: float | None = None
) -> tuple[Tensor, Tensor]:
    """Reverse KL whose gradient is the path derivative ("sticking the landing"): it has zero variance at the optimum.

    With x = T_θ(z), d/dθ E[ln q_θ(x) + u(x)] = E[∂_x (ln q_θ + u)(x) · ∂T_θ/∂θ], as the explicit θ-derivative of ln q_θ has
    expectation zero (Roeder, Wu & Duvenaud, NeurIPS 2017, eq. 7; Vaitl et al., ICML 2022). The score ∂_x ln q_θ is
    taken through the inverse with frozen parameters.

    Args:
        flow: The flow.
        target: The target.
        n: Number of samples.
        generator: Source of randomness.
        outlier_limit: See :func:`limited`; None keeps the gradient unbiased.

    Returns:
        A loss whose value is the reverse KL estimate and whose gradient is the path gradient, and log weights, one for each sample that
        the solver can lead back.
    """
    x = flow.transform.push(flow.base.sample(n, generator=generator)[0])
    with frozen(flow):
        leaf = x.detach().requires_grad_(True)
        log_q, rows = where_solved(flow.log_prob, leaf)
        (score,) = torch.autograd.grad(log_q.sum(), leaf)
    u, u_gradient = target.value_and_grad(leaf[rows])
    log_w = -u - log_q.detach()
    surrogate = (limited(u_gradient + score[rows], outlier_limit) * x[rows]).flatten(1).sum(dim=1).mean()
    return surrogate - surrogate.detach() - log_w.mean(), log_w


def limited(gradient: Tensor, outlier_limit: float | None) -> Tensor:
    """Per-sample gradients, none longer than ``outlier_limit`` times the median of the batch; all of them for None.

    A few clashing samples would otherwise set the direction of a step. Biased, for training only; the bias goes with the outliers.

    Args:
        gradient: ``[b, *event]``.
        outlier_limit: Largest norm in units of the median norm.

    Returns:
        ``[b, *event]``.
    """
    if outlier_limit is None:
        return gradient
    norm = gradient.flatten(1).norm(dim=1)
    scale = (outlier_limit * norm.median() / norm.clamp_min(1e-30)).clamp_max(1.0)
    return gradient * scale.reshape(-1, *[1] * (gradient.ndim - 1))


def score_gradient(flow: Flow, target: Target, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Reverse KL with the score-function estimator (REINFORCE) and a leave-one-out baseline; needs no forces.

    ∇ = E[(A − Ā) ∇ ln q_θ(x)] with A = ln q_θ(x) + u(x) (Williams 1992; Kool et al. 2019 for the baseline).

    Args:
        flow: The flow.
        target: The target.
        n: Number of samples, at least 2.
        generator: Source of randomness.

    Returns:
        A loss whose value is the reverse KL estimate and whose gradient is the estimator, and log weights, one for each sample that the
        solver can lead back.
    """
    with torch.no_grad():
        x = flow.transform.push(flow.base.sample(n, generator=generator)[0])
    log_q, rows = where_solved(flow.log_prob, x)
    log_w = -target.reduced_potential(x[rows]) - log_q.detach()
    n = len(rows)
    advantage = (log_w.mean() - log_w) * n / (n - 1)
    surrogate = (advantage * log_q).mean()
    return surrogate - surrogate.detach() - log_w.mean(), log_w


def _forward_path(flow: Flow, x: Tensor, u_gradient: Tensor, outlier_limit: float | None) -> Tensor:
    """A loss whose value is the mean of −ln q and whose gradient is the path gradient of the forward KL."""
    z, rows = where_solved(flow.transform.pull, x)
    with frozen(flow):
        leaf = z.detach().requires_grad_(True)
        again, log_det, sign = flow.transform.signed(leaf)  # at the edge of a fold rounding decides about the sign
        kept = sign > 0
        log_q = (flow.base.log_prob(leaf) - log_det)[kept]
        (slope,) = torch.autograd.grad(-log_q.sum() - (again * u_gradient[rows])[kept].sum(), leaf)
    surrogate = (limited(slope[kept], outlier_limit) * z[kept]).flatten(1).sum(dim=1).mean()
    return surrogate - surrogate.detach() - log_q.detach().mean()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """A model whose parameters take no gradient inside."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
