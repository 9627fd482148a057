"""The steps along a velocity field as a map between two states: in double precision, and only where they are one to one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor

from boltzgen.core import Context, Transform
from boltzgen.distributions import where_solved
from boltzgen.errors import InputError, SolverError
from boltzgen.transforms.continuous import ContinuousTransform, FixedStep
from boltzgen.transforms.volume import StepJacobian

#: Configurations that differ by less than this in nm are the same; Newton's method is a million times closer.
_SAME = 1e-6
#: Numbers in the Jacobians of the configurations solved at a time: those of a whole trajectory would not fit into memory.
_NUMBERS = 500_000

_Map = Callable[[Tensor], tuple[Tensor, Tensor]]


class OneToOne(Transform):
    """The Runge–Kutta steps T of a velocity field where they are one to one; elsewhere the log determinant is −inf.

    T and its derivative are those of the steps (:class:`~boltzgen.transforms.volume.StepJacobian`): no error of discretisation is in
    them. But steps may fold space, so that several x lead to one y. Let N be the way back, Newton's method on every step, which finds one
    configuration for a y, or none, and keep

        D = {x : N(T(x)) = x, and no step turns x inside out}

    T is one to one on D: T(x) = T(x') and both in D give x = N(T(x)) = N(T(x')) = x'. Its image is E = {y : N(y) exists}, since
    N(T(N(y))) = N(y). For y outside E, and for x outside D, the log determinant is −inf and a work
    u_B(Tx) − u_A(x) − ln|det ∂T/∂x| is +inf: no configuration of one state belongs to it in the other. With the Fermi function
    f(w) = 1/(1 + e^w), any number c, and y = T(x),

        ∫_D e^{−u_A(x)} f(Φ_F(x) − c) dx = e^c ∫_E e^{−u_B(y)} f(Φ_R(y) + c) dy

    since Φ_R(y) = −Φ_F(x) = −w, e^{−u_A(x)} dx = e^{w − u_B(y)} dy and e^w f(w − c) = e^c f(c − w). That f(+inf) = 0 extends both to all
    configurations: Bennett's acceptance ratio is exact with such rows. The average of one side alone is not:
    ⟨e^{−Φ_F}⟩_A = Z_B P_B(E)/Z_A, which misses what lies outside E; rows of B tell how much that is.

    Args:
        transform: The field, with fixed steps and the log determinant of these. It shares its weights, which may be of single
            precision; it is computed in double precision.

    Raises:
        InputError: If its log determinant is not that of its steps.

    References:
        Bennett, J. Comput. Phys. 22, 245 (1976), eq. 7; Jarzynski, Phys. Rev. E 65, 046122 (2002), section II (the map must be
        invertible).
    """

    transform: ContinuousTransform

    def __init__(self, transform: ContinuousTransform) -> None:
        super().__init__()
        if not transform.volume.of_steps:
            raise InputError("expected a continuous transform whose log determinant is that of its steps: give it StepJacobian()")
        self.transform = transform

    @classmethod
    def of(cls, learned: ContinuousTransform, solver: FixedStep) -> OneToOne:
        """The field of a map in other steps; it shares the weights."""
        return cls(learned.with_solver(solver, volume=StepJacobian()))

    def with_solver(self, solver: FixedStep) -> OneToOne:
        """The same field (shared weights) in other steps."""
        return self.of(self.transform, solver)

    @property
    def log_det_error(self) -> float | None:  # type: ignore[override]
        """Measured rounding error in nats, None before it is measured (:func:`~boltzgen.transforms.continuous.measure_work_error`)."""
        return self.transform.log_det_error

    def forward(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        exact = self._exact()
        x, log_det = _in_parts(lambda rows: self._there(exact, rows, context), z.to(torch.float64))
        return x.to(z.dtype), log_det

    def inverse(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        exact = self._exact()
        z, log_det = _in_parts(lambda rows: _where_it_is(lambda at: exact.inverse(at, context), rows), x.to(torch.float64))
        return z.to(x.dtype), log_det

    def _there(self, exact: ContinuousTransform, start: Tensor, context: Context | None) -> tuple[Tensor, Tensor]:
        """Where configurations ``[b, n, d]`` are led, and the log determinants: −inf where the way back ends elsewhere."""
        x, log_det = _where_it_is(lambda at: exact.signed(at, context)[:2], start)
        known = torch.isfinite(log_det)
        if bool(known.any()):
            with torch.no_grad():
                back, log_det_back = _where_it_is(lambda at: exact.inverse(at, context), x[known].detach())
                there = torch.isfinite(log_det_back) & ((back - start[known]).abs().amax(dim=(1, 2)) < _SAME)
            known[known.clone()] = there
        return x, torch.where(known, log_det, -math.inf)

    def _exact(self) -> ContinuousTransform:
        """The transform in double precision: itself, or a copy."""
        if next(self.transform.field.parameters()).dtype == torch.float64:
            return self.transform
        return copy.deepcopy(self.transform).double()


def _in_parts(solve: _Map, x: Tensor) -> tuple[Tensor, Tensor]:
    """A map of configurations ``[b, n, d]``, some at a time."""
    moved, log_det = zip(*(solve(rows) for rows in x.split(max(1, _NUMBERS // x[0].numel() ** 2))), strict=True)
    return torch.cat(moved), torch.cat(log_det)


def _where_it_is(solve: _Map, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a map makes of configurations ``[b, n, d]``; those that its solver cannot follow stay, with −inf."""
    stays, nowhere = x.detach().clone(), torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device)

    def both(at: Tensor) -> Tensor:
        y, log_det = solve(at)
        return torch.cat([y.flatten(1), log_det.unsqueeze(1)], dim=1)

    try:
        found, rows = where_solved(both, x)
    except SolverError as failure:
        if not failure.rows:
            raise
        return stays, nowhere
    return stays.index_copy(0, rows, found[:, :-1].reshape(len(rows), *x.shape[1:])), nowhere.index_copy(0, rows, found[:, -1])
