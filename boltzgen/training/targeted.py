"""The loss of a map between two states: the mean works in both directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from boltzgen.core import Objective, Target, Transform
from boltzgen.errors import InputError, ShapeError
from boltzgen.training.objectives import frozen, limited

_Map = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class EndState:
    """A state and samples of it that a map may learn from.

    Attributes:
        target: Its density.
        x: Samples ``[n, *event]``.
        u: Their reduced potentials ``[n]`` in kT.
        u_gradient: The gradients ``[n, *event]``.
    """

    target: Target
    x: Tensor
    u: Tensor
    u_gradient: Tensor

    @classmethod
    def of(cls, target: Target, x: Tensor, *, batch_size: int = 5000) -> EndState:
        """Samples with the energies and forces that training needs of each of them, once."""
        parts = [target.value_and_grad(rows.to(torch.float64)) for rows in x.split(batch_size)]
        return cls(target, x, torch.cat([u for u, _ in parts]), torch.cat([g for _, g in parts]).to(x))

    def __post_init__(self) -> None:
        if self.u.shape != (len(self.x),) or self.u_gradient.shape != self.x.shape:
            raise ShapeError(f"expected one energy and one gradient for each of {len(self.x)} samples")


class TargetedPerturbation(Objective[Transform]):
    """E_A[Φ_F] + E_B[Φ_R] of a map M from A to B, its gradient by paths: the loss of learned BAR, or of LFEP with one term alone.

    Φ_F(x) = u_B(Mx) − u_A(x) − ln|det J_M(x)|, Φ_R the same backwards. E_A[Φ_F] − ΔF is the Kullback–Leibler divergence of mapped A from
    B, so that the sum is least, and zero, where M carries A onto B exactly; −E_B[Φ_R] ≤ ΔF ≤ E_A[Φ_F].

    With y = Mx and p the density of mapped samples, d/dθ E_A[Φ_F] = E_A[∂_y(ln p + u_B)(y) · ∂M_θ(x)/∂θ], since the explicit derivative
    of ln p has no mean; ∂_y ln p needs the forces of A at x, which are known once and for all. Unlike the plain gradient it
    vanishes row by row at the optimum.

    Args:
        a: State A with its training samples.
        b: State B likewise.
        batch_size: Rows of each state per step; each costs one energy and force of the other state.
        forward_weight: Weight of E_A[Φ_F].
        reverse_weight: Weight of E_B[Φ_R].
        outlier_limit: See :func:`~boltzgen.training.objectives.limited`.

    Raises:
        InputError: If both weights are zero, or a weight is negative.

    References:
        Wirnsberger et al., J. Chem. Phys. 153, 144112 (2020), section II; Jarzynski, Phys. Rev. E 65, 046122 (2002);
        path gradients: Roeder, Wu & Duvenaud, NeurIPS 2017, eq. 7; Vaitl et al., ICML 2022.
    """

    def __init__(
        self,
        a: EndState,
        b: EndState,
        *,
        batch_size: int,
        forward_weight: float = 1.0,
        reverse_weight: float = 1.0,
        outlier_limit: float | None = None,
    ) -> None:
        if min(forward_weight, reverse_weight) < 0 or forward_weight + reverse_weight == 0:
            raise InputError(f"expected weights of which one is positive, got {forward_weight} and {reverse_weight}")
        self.a, self.b, self.batch_size, self.outlier_limit = a, b, batch_size, outlier_limit
        self.forward_weight, self.reverse_weight = forward_weight, reverse_weight

    def __call__(self, model: Transform, *, generator: torch.Generator) -> tuple[Tensor, Mapping[str, float]]:
        total, numbers = torch.zeros((), dtype=torch.float64), {}
        ways = (
            ("forward_work", self.forward_weight, model.forward, model.inverse, self.a, self.b.target),
            ("reverse_work", self.reverse_weight, model.inverse, model.forward, self.b, self.a.target),
        )
        for name, weight, there, back, start, goal in ways:
            if weight:
                loss = self._one_way(model, there, back, start, goal, generator)
                total, numbers[name] = total + weight * loss, float(loss.detach())
        return total, numbers

    def _one_way(self, model: Transform, there: _Map, back: _Map, start: EndState, goal: Target, generator: torch.Generator) -> Tensor:
        """A loss whose value is the mean work from one state to the other, and whose gradient is its path gradient."""
        rows = torch.randint(len(start.x), (self.batch_size,), generator=generator)
        y, log_det = there(start.x[rows])
        with frozen(model):
            leaf = y.detach().requires_grad_(True)
            x, log_det_back = back(leaf)
            (score,) = torch.autograd.grad(log_det_back.sum() - (x * start.u_gradient[rows]).sum(), leaf)
        u, u_gradient = goal.value_and_grad(leaf.detach().to(torch.float64))
        surrogate = (limited(u_gradient.to(score) + score, self.outlier_limit) * y).flatten(1).sum(dim=1).mean()
        return surrogate - surrogate.detach() + (u - start.u[rows] - log_det.detach()).mean()
