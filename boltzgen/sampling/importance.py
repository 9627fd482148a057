"""Importance sampling: draw from a flow, weigh with the target, resample."""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm import trange

from boltzgen.core import Context, Distribution, Role, Target, WeightedSamples, require_exact_density
from boltzgen.distributions import log_prob_where_known
from boltzgen.errors import EnergyError, InputError, ShapeError, WeightsError
from boltzgen.estimators.weights import normalised_weights


@torch.no_grad()
def importance_sample(
    flow: Distribution,
    target: Target,
    *,
    n: int,
    batch_size: int = 1000,
    generator: torch.Generator,
    context: Context | None = None,
    progress: bool = True,
    role: Role = "evaluate",
) -> WeightedSamples:
    """Draw from a flow and weigh every sample, log_w = −u(x) − ln q(x).

    Samples at which a flow turns space inside out have a negative weight (:meth:`~boltzgen.core.Distribution.sample_signed`).

    Args:
        flow: Density that is sampled.
        target: Density that the weights lead to.
        n: Number of samples.
        batch_size: Samples per batch; ``block`` of the result is the batch.
        generator: Random numbers.
        context: Conditions of the flow.
        progress: Show a progress bar on stderr.
        role: ``evaluate`` for estimates, ``train`` for rows a model will be trained on.

    Returns:
        ``n`` independent samples on the CPU; an energy of +inf gives log_w = −inf.

    Raises:
        ShapeError: If flow and target disagree about the shape of a configuration.
        EnergyError: If an energy or a log density is NaN, or a weight is infinite; the message names the rows.
        InputError: If ``n`` or ``batch_size`` is not positive.
    """
    if n < 1 or batch_size < 1:
        raise InputError(f"expected positive n and batch_size, got {n} and {batch_size}")
    if tuple(flow.event_shape) != tuple(target.event_shape):
        raise ShapeError(f"the flow draws {tuple(flow.event_shape)} and the target takes {tuple(target.event_shape)}; they must agree")
    xs, us, log_qs, signs = [], [], [], []
    starts = trange(0, n, batch_size, desc="sampling", unit="batch", disable=not progress)
    for start in starts:
        x, log_q, sign = flow.sample_signed(min(batch_size, n - start), generator=generator, context=context)
        u = target.reduced_potential(x).to("cpu", torch.float64)
        log_q = log_q.to("cpu", torch.float64)
        require_weighable(u, log_q, first_row=start)
        xs.append(x.cpu())
        us.append(u)
        log_qs.append(log_q)
        signs.append(sign.cpu())
    u, log_q, sign = torch.cat(us), torch.cat(log_qs), torch.cat(signs).to(torch.float64)
    return WeightedSamples(
        x=torch.cat(xs),
        u=u,
        log_w=-u - log_q,
        log_q=log_q,
        block=torch.arange(n) // batch_size,
        chain=torch.zeros(n, dtype=torch.int64),
        role=role,
        log_det_error=flow.log_det_error,
        is_exact=target.is_exact,
        sign=sign if bool((sign < 0).any()) else None,
    )


@torch.no_grad()
def log_ratios(flow: Distribution, x: Tensor, u: Tensor, *, batch_size: int = 1000, context: Context | None = None) -> Tensor:
    """ln p̃(x) − ln q(x) = −u(x) − ln q(x) on rows of data, for the forward ESS and the upper bound of ln Z.

    Args:
        flow: Density that is judged.
        x: Rows that follow the target, held out from training, ``[n, *event]`` in nm.
        u: Their reduced potentials ``[n]`` in kT.
        batch_size: Rows per batch.
        context: Conditions of the flow.

    Returns:
        Log ratios ``[n]``, float64, on the CPU; +inf where the flow has no density, NaN where its solver cannot tell.

    Raises:
        InexactDensityError: If the flow's density is not exact.
        ShapeError: If ``x`` and ``u`` differ in length.
        EnergyError: If an energy or a density is NaN, or a ratio that both are known of.
    """
    if len(x) != len(u):
        raise ShapeError(f"expected one energy per configuration, got {len(u)} energies for {len(x)} configurations")
    require_exact_density(flow.log_det_error)
    batches = [log_prob_where_known(flow, rows, context).to("cpu", torch.float64) for rows in x.split(batch_size)]
    log_q = torch.cat(batches) if batches else torch.zeros(0, dtype=torch.float64)
    ratios = -u.to("cpu", torch.float64) - log_q
    bad = torch.isnan(ratios) & ~(torch.isnan(log_q) & ~torch.isnan(u).cpu())
    if bool(bad.any()):
        rows = torch.nonzero(bad).flatten()[:10].tolist()
        raise EnergyError(f"ln p - ln q is not a number in rows {rows}: the energy or the flow's density there is broken")
    return ratios


def resample(samples: WeightedSamples, n: int, *, generator: torch.Generator) -> Tensor:
    """Rows drawn in proportion to their weights, which must be positive, by systematic resampling.

    Row i is drawn ⌊n w_i⌋ or ⌈n w_i⌉ times, n w_i on average. Rows repeat: they are for training and pictures, not for error bars.

    Args:
        samples: Weighted samples of any role.
        n: Number of rows to draw.
        generator: Random numbers; one is used.

    Returns:
        Ascending row indices ``[n]``, int64.

    Raises:
        WeightsError: If the weights cannot be normalised, or one is negative.

    References:
        Kitagawa, J. Comput. Graph. Stat. 5, 1 (1996).
    """
    if samples.sign is not None and bool((samples.sign < 0).any()):
        raise WeightsError(
            "rows with a negative weight cannot be drawn in proportion to it: give the flow more steps, until none is folded"
        )
    weights = torch.from_numpy(normalised_weights(samples.log_w))
    offset = torch.rand(1, generator=generator, dtype=torch.float64, device=generator.device).cpu()
    positions = (torch.arange(n, dtype=torch.float64) + offset) / n
    cumulative = weights.cumsum(0)
    rows = torch.searchsorted(cumulative / cumulative[-1], positions, right=True)
    return rows.clamp(max=int(torch.nonzero(weights).max()))


def require_weighable(u: Tensor, log_q: Tensor, *, first_row: int = 0) -> None:
    """Refuse rows whose weight exp(−u)/q is not a number or infinite.

    Args:
        u: Reduced potentials ``[b]``; +inf is legal.
        log_q: Log densities ``[b]``.
        first_row: Row number of the first, for the message.

    Raises:
        EnergyError: Naming the rows.
    """
    bad = torch.nonzero(torch.isnan(u) | torch.isneginf(u) | ~torch.isfinite(log_q)).flatten()
    if len(bad):
        raise EnergyError(
            f"{len(bad)} samples have an energy that is NaN or -inf or a log density that is not finite, in rows "
            f"{(bad[:10] + first_row).tolist()} (first: u = {float(u[bad[0]])}, log q = {float(log_q[bad[0]])}); "
            "check the flow's coordinates and the target's energy for these rows"
        )
