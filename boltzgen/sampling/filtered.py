"""Proposals sharpened by rejection: what a cheap model finds unlikely is not worth a long path."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from boltzgen.core import Context, Distribution
from boltzgen.errors import InputError, SolverError

#: Draws per wanted sample after which the model and the proposal are taken to have nothing in common.
_MOST_DRAWS = 1_000_000


class FilteredProposal(Distribution):
    """A density that is kept where a model agrees, and lowered to the model elsewhere: p(x) ∝ min(q(x), e^{ℓ(x) − c}).

    A draw of q is kept with probability min(1, e^{ℓ(x) − c} / q(x)). So p is known up to its normalisation, which no Metropolis rule needs,
    and is the exact density of the proposals whatever ℓ is: a bad model costs acceptance, not exactness. With c high enough p is the model.

    Args:
        proposal: q, exact and frozen.
        log_model: ℓ, the log density of a model up to a constant: configurations to ``[b]``.
        level: c. The larger, the closer to the model, and the more draws of q are thrown away.

    Raises:
        InputError: If the level is not finite.

    References:
        Liu, Chen and Wong, J. Am. Stat. Assoc. 93, 1022 (1998): rejection control.
    """

    def __init__(self, proposal: Distribution, log_model: Callable[[Tensor], Tensor], *, level: float) -> None:
        super().__init__()
        if not torch.isfinite(torch.tensor(level)):
            raise InputError(f"expected a finite level, got {level}")
        self.proposal, self.log_model, self.level = proposal, log_model, level
        self.event_shape = proposal.event_shape
        self.kept, self.drawn = 0, 0

    @property
    def log_det_error(self) -> float | None:
        """That of q."""
        return self.proposal.log_det_error

    def sample(self, n: int, *, generator: torch.Generator, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """Samples ``[n, *event]``, and ln p of them without its constant.

        Raises:
            SolverError: If hardly any draw is kept.
        """
        parts: list[tuple[Tensor, Tensor]] = []
        found, batch, drawn = 0, max(64, 4 * n), 0
        while found < n:
            x, log_q = self.proposal.sample(batch, generator=generator, context=context)
            log_p = self._lowered(x, log_q)
            kept = torch.rand(batch, generator=generator, dtype=torch.float64).log() < log_p - log_q
            parts.append((x[kept], log_p[kept]))
            found, drawn = found + int(kept.sum()), drawn + batch
            batch = min(8192, 2 * batch)
            if drawn > _MOST_DRAWS * max(n, 1):
                raise SolverError(f"{found} of {drawn} draws were kept: lower the level, or train the proposal on what the model knows")
        self.kept, self.drawn = self.kept + found, self.drawn + drawn
        return torch.cat([x for x, _ in parts])[:n], torch.cat([log_p for _, log_p in parts])[:n]

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        """ln p without its constant, ``[b]``."""
        return self._lowered(x, self.proposal.log_prob(x, context))

    def _lowered(self, x: Tensor, log_q: Tensor) -> Tensor:
        return torch.minimum(log_q.to(torch.float64), self.log_model(x).to(torch.float64) - self.level)
