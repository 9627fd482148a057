"""One honest word about a generator, with its reasons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

#: Fewer effective samples than this give no error bar worth stating.
MIN_EFFECTIVE = 100.0
#: Above this Pareto k̂ averages rest on a few rows (Vehtari et al., JMLR 25(72), 2024).
MAX_PARETO_K = 0.7
#: Below this raw ESS the flow and the system hardly overlap.
MIN_ESS = 0.01
#: A forward ESS below this share of the reverse one means that the data hold what the flow does not.
MIN_FORWARD_SHARE = 1.0 / 3.0
#: Independent held-out rows below which coverage is not judged: 50 see a mode that holds 6 % with probability 95 %.
MIN_FORWARD_ROWS = 50.0
#: The upper bound may lie above ln Z by this many times its expectation for Gaussian log weights, plus a margin in nats.
MAX_GAP_SHARE, GAP_MARGIN = 3.0, 0.5
#: An upper bound this far below ln Z, in nats, proves that the data leave out part of the target.
MAX_BOUND_VIOLATION = 0.2

Word = Literal["reliable", "low overlap", "missing modes", "not converged", "not exact"]


@dataclass(frozen=True)
class Verdict:
    """What a reader may conclude from a run.

    Attributes:
        word: The verdict.
        reasons: Sentences in plain words, the decisive ones first.
    """

    word: Word
    reasons: tuple[str, ...]


def generator_verdict(
    *,
    ess_raw: float,
    pareto_k: float,
    n_samples: int,
    forward_ess: float | None,
    n_forward_effective: float | None,
    elbo: float,
    eubo: float | None,
    log_z: float | None = None,
    warnings: Sequence[str] = (),
) -> Verdict:
    """Judge a generator by its weights, and by held-out data for what the weights cannot show.

    ``missing modes`` if a warning was given, or, with weights that can be trusted, if the forward ESS is below a third of the reverse
    one or the upper bound lies further from ln Z than the weights explain; ``low overlap`` if k̂ ≥ 0.7 or the raw ESS is below 1 %;
    ``not converged`` if fewer than 100 effective samples exist, or coverage was not checked on 50 independent held-out rows;
    ``reliable`` otherwise. For Gaussian log weights of variance σ², ESS = exp(−σ²) and E_p[ln p̃/q] − ln Z = σ²/2 = −½ ln ESS.

    Args:
        ess_raw: Raw ESS, a fraction.
        pareto_k: Pareto k̂ of the weights.
        n_samples: Number of fresh samples.
        forward_ess: Forward ESS on held-out data, a fraction, or None without data.
        n_forward_effective: Independent held-out rows behind it, or None.
        elbo: Lower bound of ln Z.
        eubo: Upper bound of ln Z on held-out data, or None.
        log_z: ln Ẑ of the weights; estimated as elbo − ½ ln ESS if None.
        warnings: Reasons to doubt that the data cover the target, such as "the data visited only one φ basin".

    Returns:
        The verdict with its reasons.
    """
    overlap = _overlap_doubts(ess_raw, pareto_k)
    n_effective = ess_raw * n_samples
    counts = () if n_effective >= MIN_EFFECTIVE else (_count_doubt(n_effective, n_samples),)
    missing = tuple(warnings)
    if not overlap and not counts:
        log_z_used = elbo - 0.5 * math.log(ess_raw) if log_z is None else log_z
        gap = None if eubo is None or not math.isfinite(log_z_used) else eubo - log_z_used
        missing += _mode_doubts(ess_raw, forward_ess, gap)
    unchecked = _coverage_doubts(forward_ess, n_forward_effective)
    ranked: tuple[tuple[Word, tuple[str, ...]], ...]
    ranked = (("missing modes", missing), ("low overlap", overlap), ("not converged", counts + unchecked))
    for word, reasons in ranked:
        if reasons:
            others = tuple(reason for reason in (*missing, *overlap, *counts, *unchecked) if reason not in reasons)
            return Verdict(word, reasons + others)
    return Verdict("reliable", (_summary(ess_raw, pareto_k, n_samples, forward_ess, n_forward_effective),))


def _overlap_doubts(ess_raw: float, pareto_k: float) -> tuple[str, ...]:
    doubts = []
    if not ess_raw >= MIN_ESS:
        doubts.append(
            f"only {100 * ess_raw:.2g} % of the samples count after reweighting: the generator and the system hardly overlap; train longer"
        )
    if not pareto_k < MAX_PARETO_K:
        doubts.append(
            f"a few samples carry most of the weight (Pareto k = {pareto_k:.2f}, trustworthy below {MAX_PARETO_K}): true errors are larger "
            "than the error bars; train longer"
        )
    return tuple(doubts)


def _count_doubt(n_effective: float, n_samples: int) -> str:
    return (
        f"the {n_samples} samples are worth {n_effective:.0f} independent ones, fewer than the {MIN_EFFECTIVE:.0f} needed for error bars; "
        "draw more samples"
    )


def _mode_doubts(ess_raw: float, forward_ess: float | None, gap: float | None) -> tuple[str, ...]:
    doubts = []
    if forward_ess is not None and not forward_ess >= MIN_FORWARD_SHARE * ess_raw:
        doubts.append(
            f"seen from the simulation data the generator is far worse ({100 * forward_ess:.2g} %) than seen from its own samples "
            f"({100 * ess_raw:.2g} %): it leaves out conformations that the data contain"
        )
    if gap is not None:
        expected = -0.5 * math.log(ess_raw)
        if not gap <= MAX_GAP_SHARE * expected + GAP_MARGIN:
            doubts.append(
                f"the simulation data lie on average {gap:.2g} kT from the generator where its weights suggest {expected:.2g} kT: it "
                "gives some of their conformations almost no probability"
            )
        elif gap < -MAX_BOUND_VIOLATION:
            doubts.append(
                f"the upper bound of ln Z lies {-gap:.2g} below ln Z, which is impossible for data that cover the system: the generator "
                "finds conformations that the simulation never visited, so the data cannot vouch for its coverage"
            )
    return tuple(doubts)


def _coverage_doubts(forward_ess: float | None, n_forward_effective: float | None) -> tuple[str, ...]:
    if forward_ess is None or n_forward_effective is None:
        return ("no held-out simulation data: the weights alone cannot show a conformation that the generator never makes",)
    if not n_forward_effective >= MIN_FORWARD_ROWS:
        return (
            f"coverage was checked on {n_forward_effective:.0f} independent held-out frames only, {MIN_FORWARD_ROWS:.0f} are needed; "
            "simulate longer",
        )
    return ()


def _summary(ess_raw: float, pareto_k: float, n_samples: int, forward_ess: float | None, n_forward_effective: float | None) -> str:
    return (
        f"{n_samples} samples are worth {ess_raw * n_samples:.0f} independent ones ({100 * ess_raw:.0f} %, Pareto k = {pareto_k:.2f}), and "
        f"{n_forward_effective or 0:.0f} independent held-out frames agree (forward ESS {100 * (forward_ess or 0):.0f} %)"
    )
