"""Continuous normalizing flows: a velocity field integrated over time, with its log determinant. The only door to torchdiffeq."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchdiffeq import odeint

from boltzgen.core import Bridge, Context, Flow, Transform
from boltzgen.distributions import log_prob_where_known, where_solved
from boltzgen.errors import InputError, SolverError
from boltzgen.networks.field import VelocityField, late_times
from boltzgen.transforms.newton import invert_step, through_inverse
from boltzgen.transforms.volume import IntegratedDivergence, Unmeasured, VolumeChange

#: Steps may be increased up to this multiple of those asked for, until what rests on them is exact enough.
MOST_REFINED = 8
#: Numbers of steps of the tighter solve per step of the solver whose error is measured.
_TIGHTER = 2
_METHODS = ("rk4", "heun2", "midpoint")
#: Starting points of Newton's method are where the solver arrives on its way backwards in that many parts of the step.
_PARTS = (1, 8)
#: 1 − t at which late steps turn from even in ln(1 − t) to even in t: bonds settle last, and coarse steps fold space there.
_LAST = 0.005

#: Base samples that differ by more than this many square roots of the rounding, in units of their spread, are different ones.
_ELSEWHERE = 100.0

_Module = TypeVar("_Module", bound=nn.Module)

Right = Callable[[Tensor, tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]
Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class FixedStep:
    """Steps of a Runge–Kutta method that are known beforehand: every row is solved by itself, whatever its batch.

    Attributes:
        n_steps: Number of steps.
        method: ``rk4`` (order 4, four evaluations per step), ``heun2`` or ``midpoint`` (order 2, two evaluations).
        late: Steps shorten towards t = 1 (:func:`~boltzgen.networks.field.late_times`) instead of being equal.
    """

    n_steps: int
    method: Literal["rk4", "heun2", "midpoint"] = "rk4"
    late: bool = False

    def __post_init__(self) -> None:
        if self.n_steps < 1 or self.method not in _METHODS:
            raise InputError(f"expected one step or more of rk4, heun2 or midpoint, got {self.n_steps} of {self.method!r}")

    @property
    def order(self) -> int:
        """Power of the step with which the error falls."""
        return 4 if self.method == "rk4" else 2

    def times(self, like: Tensor) -> Tensor:
        """The ends of the steps, from 0 to 1, ``[n_steps + 1]``, in the precision and on the device of ``like``."""
        even = torch.linspace(0.0, 1.0, self.n_steps + 1, dtype=like.dtype, device=like.device)
        return late_times(even, end=_LAST) if self.late else even


@dataclass(frozen=True)
class Adaptive:
    """Dormand–Prince steps chosen by an error estimate that all rows of a batch share, so that a row moves when its batch changes.

    Good to train; a density made with it is refused by everything that weighs samples.

    Attributes:
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        max_steps: Steps after which the solve is given up.
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    max_steps: int = 1000


Solver = FixedStep | Adaptive


class ContinuousTransform(Transform):
    """x = z + ∫₀¹ v(t, x(t)) dt,  ln|dx/dz| = ∫₀¹ ∇·v(t, x(t)) dt (Chen et al., Neural ODEs, NeurIPS 2018, theorem 1), in steps.

    Fields of particles keep their centre: the log determinant is that on the mean-free subspace and on all coordinates alike.
    Gradients are those of the discrete solution; with ``checkpointing`` each step is computed again on the way back, so that memory does
    not grow with the number of steps. It computes in the precision and on the device of the field; log determinants are summed in
    float64. With :class:`~boltzgen.transforms.volume.StepJacobian` they are those of the steps themselves, and the inverse undoes the
    steps by Newton's method, to rounding.

    ``log_det_error`` is None until :func:`measure_log_det_error` has been called, and stays None for an adaptive solver and for an
    estimated divergence. The measured error belongs to the weights and the solver it was measured with: training or another solver
    (:meth:`with_solver`) makes it None again.

    Args:
        field: Velocity field.
        solver: Scheme of integration.
        volume: How the log determinant is found; by default as the integral of the divergence.
        checkpointing: Whether gradients recompute every step instead of keeping it: about a third slower, in the memory of one step.

    Attributes:
        n_evaluations: Evaluations of the field in the last solve.

    Raises:
        SolverError: In a solve that leaves the finite numbers, does not converge, or, unless signs are asked for, has steps that turn
            space inside out; the message has the time it reached.
    """

    measured: Tensor

    def __init__(self, field: VelocityField, solver: Solver, *, volume: VolumeChange | None = None, checkpointing: bool = True) -> None:
        super().__init__()
        self.field, self.solver, self.checkpointing = field, solver, checkpointing
        self.volume = volume or IntegratedDivergence()
        if self.volume.of_steps and not isinstance(solver, FixedStep):
            raise InputError("an adaptive solver has no steps whose log determinant could be taken: choose FixedStep")
        self.n_evaluations = 0
        self.register_buffer("measured", torch.full((4,), math.nan, dtype=torch.float64))  # error in nats, then what it belongs to

    @property
    def log_det_error(self) -> float | None:  # type: ignore[override]
        """Measured error of the log density in nats; None where it is estimated, not measured, or the weights changed since."""
        if not self.volume.is_exact or self.measured[1:].tolist() != self._fingerprint():
            return None
        return float(self.measured[0])

    @property
    def measured_steps(self) -> int | None:
        """Number of steps that the error was last measured with, which is stored with the weights; None before."""
        return None if bool(self.measured.isnan().any()) else int(self.measured[2])

    def with_solver(self, solver: Solver, *, volume: VolumeChange | None = None) -> ContinuousTransform:
        """The same field (shared weights) integrated in another way."""
        return ContinuousTransform(self.field, solver, volume=volume or self.volume, checkpointing=self.checkpointing)

    def forward(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        return self._solve(z, context, self.volume)[:2]

    def signed(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor, Tensor]:
        return self._solve(z, context, self.volume, may_fold=True)

    def inverse(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        return self._solve(x, context, self.volume, backwards=True)[:2]

    def push(self, z: Tensor) -> Tensor:
        return self._solve(z, None, Unmeasured())[0]

    def pull(self, x: Tensor) -> Tensor:
        return self._solve(x, None, self.volume if self.volume.of_steps else Unmeasured(), backwards=True, measured=False)[0]

    def accept_error(self, error: float) -> None:
        """Attach the measured error, in nats, of the log density that these weights and this solver give."""
        self.measured = torch.tensor([error, *self._fingerprint()], dtype=torch.float64)

    @torch.no_grad()
    def _fingerprint(self) -> list[float]:
        """A number that changes with the weights, and the steps: their number, method and what their log determinant is."""
        digest = hashlib.sha256()
        for parameter in self.field.parameters():
            digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
        weights = int.from_bytes(digest.digest()[:6], "big")  # exact as a float
        if not isinstance(self.solver, FixedStep):
            return [float(weights), 0.0, -1.0]
        kind = _METHODS.index(self.solver.method) + len(_METHODS) * (self.volume.of_steps + 2 * self.solver.late)
        return [float(weights), float(self.solver.n_steps), float(kind)]

    def _solve(
        self, start: Tensor, context: Context | None, volume: VolumeChange, *, backwards: bool = False, may_fold: bool = False,
        measured: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Where ``start`` is led, the log determinants and their signs; folds are refused unless they may be.

        Log determinants of steps that are undone have no gradients unless they are ``measured``.
        """
        if context is not None:
            raise InputError("this velocity field is not conditioned on anything; call it without a context")
        self.n_evaluations, reached, velocity = 0, 0.0, volume.begin(start)
        x = start.to(next(self.field.parameters()))

        def right(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            nonlocal reached
            self.n_evaluations += 1
            reached = float(t.detach())
            return velocity(self.field, t, *state)

        if isinstance(self.solver, Adaptive):
            try:
                x, log_det = _adaptive(right, x, self.solver, backwards=backwards)
                sign = torch.ones_like(log_det)
            except AssertionError as error:
                raise SolverError(_failure(reached, f"the step or their number ran out ({error})")) from None
        else:
            x, log_det, sign = self._fixed(right, x, self.solver, volume, backwards=backwards, may_fold=may_fold, measured=measured)
        return x.to(start.dtype), log_det, sign

    def _fixed(
        self, right: Right, x: Tensor, solver: FixedStep, volume: VolumeChange, *, backwards: bool, may_fold: bool, measured: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        times = solver.times(x)
        if backwards:
            times = times.flip(0)

        def carry(x: Tensor, span: Tensor) -> tuple[Tensor, Tensor]:
            states = odeint(right, (x, volume.nothing(x)), span, method=solver.method)
            return states[0][-1], states[1][-1]

        def step(x: Tensor, span: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            if backwards and volume.of_steps:
                x, jacobian = self._undo(carry, x, span, method=solver.method, measured=measured)
                log_det, sign = volume.total(jacobian)
                return x, -log_det, sign
            x, carried = carry(x, span)
            return x, *volume.total(carried)

        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        signs = torch.ones_like(total)
        again = self.checkpointing and torch.is_grad_enabled()
        for k in range(solver.n_steps):
            span = times[k : k + 2]
            x, log_det, sign = checkpoint(step, x, span, use_reentrant=False) if again else step(x, span)
            total, signs = total + log_det.to(torch.float64), signs * sign
            _require_finite(x, log_det, float(span[0]))
            if not may_fold:
                _refuse(torch.nonzero(sign < 0).flatten(), float(span[0]), "a step turns inside out")
        return x, total, signs

    def _undo(self, carry: Step, x: Tensor, span: Tensor, *, method: str, measured: bool) -> tuple[Tensor, Tensor]:
        """The y that a step carries to ``x`` ``[b, n, d]``, and the Jacobian of the step there; ``span`` goes backwards.

        Newton's method from where the solver arrives on its way backwards, each Jacobian serving some steps. Gradients are those of the
        implicit function: with y known, one more Newton step y + (x − step(y)) M⁻¹ is y again, and has the derivatives of the inverse by x
        and by the weights.
        """
        forward = span.flip(0)

        def velocity(t: Tensor, position: Tensor) -> Tensor:
            self.n_evaluations += 1
            return self.field(t, position)

        def followed(y: Tensor, times: Tensor) -> Tensor:
            return odeint(velocity, y, times, method=method)[-1]

        with torch.no_grad():
            size = x[0].numel()
            y, jacobian, left = torch.empty_like(x), x.new_empty(len(x), size, size), torch.arange(len(x), device=x.device)
            for parts in _PARTS:
                fine = torch.lerp(span[0], span[1], torch.linspace(0, 1, parts + 1).to(span))
                found = invert_step(lambda at: carry(at, forward), lambda at: followed(at, forward), x[left], followed(x[left], fine))
                y[left], jacobian[left] = found.y, found.jacobian
                left = left[~found.is_there]
                if not len(left):
                    break
            _refuse(left, float(span[0]), "a step cannot be undone for")
        if not torch.is_grad_enabled():
            return y, jacobian
        y = y + through_inverse(x - followed(y, forward), jacobian)
        return y, carry(y, forward)[1] if measured else jacobian


def measure_log_det_error(flow: Flow, *, n: int = 256, data: Tensor | None = None, generator: torch.Generator) -> float:
    """Measure how far the log density of a flow is from that of a tighter solve, and let the flow carry it.

    Samples are drawn as usual; their log density is found again from the same configurations in float64. It is the largest of a
    sample, so that a few of many more rows may be further off.

    Where log determinants are those of the steps (:class:`~boltzgen.transforms.volume.StepJacobian`) the steps stay, and rounding is
    measured. Left out are then samples that are turned inside out, configurations that the steps cannot be undone for, and samples behind
    a fold, which are led back to another base sample than they came from: weights with their signs are exact for them too, and no
    other density could be told. They must be fewer than half of all. Otherwise twice as many steps are made: the error of the
    scheme, of rounding and of the way back. Samples follow the discrete map, whose own Jacobian differs from the integral of the
    divergence by an error of the same order, which this does not see.

    Args:
        flow: Flow with one :class:`ContinuousTransform` as its transform, or as part of it.
        n: Number of samples.
        data: Other configurations ``[m, *event]`` whose log density will be used, measured as well.
        generator: Random numbers.

    Returns:
        Largest difference over samples and data, in nats; also in ``flow.log_det_error`` from now on.

    Raises:
        InputError: If there is not exactly one continuous transform, or its solver is adaptive: its error depends on the batch.
        SolverError: If a solve fails, or steps cannot be undone for half of the configurations.
    """
    part, tight = _the_part(flow), _tighter(flow)
    with torch.no_grad():
        z, log_p = flow.base.sample(n, generator=generator)
        x, log_det, sign = flow.transform.signed(z)
        z, x, log_q = (rows[sign > 0] for rows in (z, x, log_p - log_det))
        again = _led_back(tight, x, z if part.volume.of_steps else None)
        if data is not None:
            log_q = torch.cat([log_q, log_prob_where_known(flow, data)])
            again = torch.cat([again, log_prob_where_known(tight, data.to(again))])
    differences = (again - log_q).abs()
    known = ~torch.isnan(differences)
    if not bool(known.all() if not part.volume.of_steps else 2 * int(known.sum()) > len(known)):
        raise SolverError(f"the log density is not known at {int((~known).sum())} of {len(known)} configurations: use more steps")
    error = float(differences[known].max())
    part.accept_error(error)
    return error


@torch.no_grad()
def measure_work_error(bridge: Bridge, x: Tensor, y: Tensor) -> float:
    """Measure how far the works of a continuous map are from those of a tighter solve, and let the map carry it.

    Where T leads x to x', twice as many steps in float64 lead x' back to x'' and give the density of mapped samples there once more:
    the work is wrong by u_A(x'') − ln|det ∂x''/∂x'| − u_A(x) − ln|det ∂T/∂x|, and y of B likewise. It is the largest of a sample, so
    that a few of many more rows may be further off. Where the log determinants are those of the steps these stay, and rounding is
    measured. Rows that a map leaves out (:class:`~boltzgen.transforms.one_to_one.OneToOne`) have no work to be wrong; they must be
    fewer than half of all.

    Args:
        bridge: The two states and a map with one :class:`ContinuousTransform`.
        x: Samples of A ``[m, *event]``.
        y: Samples of B.

    Returns:
        Largest difference in nats; also in ``log_det_error`` of the map from now on.

    Raises:
        InputError: If there is not exactly one continuous transform, or its solver is adaptive.
        SolverError: If a solve fails, or half of the rows of a state are left out.
    """
    part, transform, tight = _the_part(bridge.transform), bridge.transform, _tighter(bridge.transform)
    error = 0.0
    for start, target, there, back in (
        (x, bridge.target_a, transform.forward, tight.inverse),
        (y, bridge.target_b, transform.inverse, tight.forward),
    ):
        start = start.to(torch.float64)
        mapped, log_det = there(start)
        known = torch.isfinite(log_det)
        if 2 * int(known.sum()) <= len(known):
            raise SolverError(f"the map is one to one at {int(known.sum())} of {len(known)} configurations only: use more steps")
        start, mapped, log_det = start[known], mapped[known], log_det[known]
        again, log_det_back = back(mapped)
        off = target.reduced_potential(again) - log_det_back - target.reduced_potential(start) - log_det
        error = max(error, float(off.abs().max()))
    part.accept_error(error)
    return error


def more_steps(steps: int, excess: float) -> int:
    """Steps that should bring an error of order four down by a factor ``excess``, with a margin of a tenth; at most twice as many."""
    return max(steps + 1, math.ceil(steps * min(1.1 * excess**0.25, 2.0))) if math.isfinite(excess) else 2 * steps


def _the_part(module: nn.Module) -> ContinuousTransform:
    """The one continuous transform in a flow or map."""
    parts = [part for part in module.modules() if isinstance(part, ContinuousTransform)]
    if len(parts) != 1 or not isinstance(parts[0].solver, FixedStep) or not parts[0].volume.is_exact:
        raise InputError("expected a flow with one continuous transform, fixed steps and an exact divergence")
    return parts[0]


def _tighter(module: _Module) -> _Module:
    """The same in double precision and, unless log determinants are those of the steps, twice as many steps."""
    tight = copy.deepcopy(module).double()
    part = _the_part(tight)
    if isinstance(part.solver, FixedStep) and not part.volume.of_steps:
        part.solver = replace(part.solver, n_steps=_TIGHTER * part.solver.n_steps)
    return tight


def _led_back(tight: Flow, x: Tensor, z: Tensor | None) -> Tensor:
    """Log densities of samples ``[b]`` from the way back, NaN where there is none or it ends elsewhere than at ``z``, if that is given."""
    log_q = torch.full((len(x),), torch.nan, dtype=torch.float64, device=x.device)

    def solve(at: Tensor) -> Tensor:
        back, log_det = tight.transform.inverse(at)
        return torch.cat([back.flatten(1).to(torch.float64), (tight.base.log_prob(back) + log_det)[:, None]], dim=1)

    try:
        found, rows = where_solved(solve, x.to(torch.float64))
    except SolverError as failure:
        if failure.rows:
            return log_q
        raise
    log_q[rows] = found[:, -1]
    if z is not None:
        off = (found[:, :-1] - z[rows].flatten(1)).abs().amax(dim=1)
        log_q[rows[off > _ELSEWHERE * torch.finfo(z.dtype).eps ** 0.5 * float(z.std())]] = torch.nan
    return log_q


def _adaptive(right: Right, x: Tensor, solver: Adaptive, *, backwards: bool) -> tuple[Tensor, Tensor]:
    ends = torch.tensor([1.0, 0.0] if backwards else [0.0, 1.0], dtype=x.dtype, device=x.device)
    states = odeint(
        right, (x, torch.zeros(len(x), dtype=x.dtype, device=x.device)), ends, method="dopri5", rtol=solver.rtol, atol=solver.atol,
        options={"max_num_steps": solver.max_steps},
    )  # fmt: skip
    _require_finite(states[0][-1], states[1][-1], float(ends[0]))
    return states[0][-1], states[1][-1].to(torch.float64)


def _require_finite(x: Tensor, log_det: Tensor, time: float) -> None:
    bad = ~(torch.isfinite(x).flatten(1).all(dim=1) & torch.isfinite(log_det))
    _refuse(torch.nonzero(bad).flatten(), time, "the numbers are no longer finite in")


def _refuse(rows: Tensor, time: float, what: str) -> None:
    if len(rows):
        first = rows[:10].tolist()
        raise SolverError(_failure(time, f"{what} {len(rows)} rows, first {first}"), rows=rows.tolist())


def _failure(time: float, reason: str) -> str:
    return (
        f"the solver got as far as time {time:.4f} of [0, 1]: {reason}. Use more steps or a smaller tolerance; if that does not help, "
        "the field is too steep: train longer or with a smaller learning rate"
    )
