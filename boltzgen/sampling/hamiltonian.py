"""Hamiltonian Monte Carlo of many walkers side by side, for reference samples of targets that have cheap forces."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import trange

from boltzgen.core import Move, MoveInfo, Role, Target, WalkerState, WeightedSamples
from boltzgen.errors import EnergyError, InexactDensityError, InputError, ShapeError

#: Every trajectory draws its step within this fraction of the given one: a fixed length would resonate with harmonic modes.
_JITTER = 0.2

#: Independent units behind an error: walkers are divided into time blocks only where they are fewer.
_N_UNITS = 20


@dataclass(frozen=True, kw_only=True)
class MovingWalkers(WalkerState):
    """Walkers with the gradient at ``x`` ``[w, *event]`` in kT/nm, which the next trajectory starts from."""

    gradient: Tensor


class HamiltonianMonteCarlo(Move):
    """Leapfrog trajectories with Gaussian velocities (unit masses), accepted with probability min(1, exp(H − H')), H = u + ½ |v|².

    All walkers move at the same time, in one batch of float64. Their steps differ by up to 20 % at random, so that no harmonic mode returns
    to where it was. A trajectory that meets u = +inf stops there and is rejected. With ``mean_free``, positions and velocities stay in the
    subspace Σ_i x_i = 0 and the walkers sample the target's density on it, as needed where u does not change under translation.

    Args:
        target: Density left invariant, with an exact energy.
        step_size: Leapfrog step in nm (the velocity of unit mass has unit variance at kT = 1).
        n_leapfrog: Leapfrog steps per move.
        mean_free: Keep the mean over particles at zero; needs configurations ``[n, d]``.

    Raises:
        InexactDensityError: If the target is altered.
        InputError: If the step is not positive or there is none.
        ShapeError: If ``mean_free`` is asked of a target without particles.

    References:
        Duane et al., Phys. Lett. B 195, 216 (1987); Neal, Handbook of Markov Chain Monte Carlo (2011), chapter 5, section 3.2; random steps
        also there.
    """

    def __init__(self, target: Target, *, step_size: float, n_leapfrog: int, mean_free: bool = False) -> None:
        if not target.is_exact:
            raise InexactDensityError("the target is clipped or regularised: walkers would not sample the system; use the exact target")
        if not (math.isfinite(step_size) and step_size > 0 and n_leapfrog >= 1):
            raise InputError(f"expected a positive step and at least one step per move, got {step_size} and {n_leapfrog}")
        if mean_free and len(target.event_shape) != 2:
            raise ShapeError(f"a mean over particles needs configurations [n, d], got {list(target.event_shape)}")
        self.target, self.step_size, self.n_leapfrog, self.mean_free = target, step_size, n_leapfrog, mean_free

    def with_step_size(self, step_size: float) -> HamiltonianMonteCarlo:
        """The same move with another step."""
        return HamiltonianMonteCarlo(self.target, step_size=step_size, n_leapfrog=self.n_leapfrog, mean_free=self.mean_free)

    def init(self, x: Tensor) -> MovingWalkers:
        """Walkers at ``x`` ``[w, *event]`` in nm, moved to mean zero where asked.

        Raises:
            EnergyError: If an energy is NaN.
            InputError: If a walker starts where the target has no density.
        """
        x = self._inside(x.detach().to(torch.float64))
        u, gradient = self._evaluate(x)
        if torch.isposinf(u).any():
            rows = torch.nonzero(torch.isposinf(u)).flatten()[:10].tolist()
            raise InputError(f"walkers {rows} start where the target has no density; start them where the energy is finite")
        return MovingWalkers(x=x, u=u, gradient=gradient)

    def step(self, state: WalkerState, *, generator: torch.Generator) -> tuple[MovingWalkers, MoveInfo]:
        start = state if isinstance(state, MovingWalkers) else self.init(state.x)
        v = self._inside(_normal(start.x, generator))
        jitter = 1.0 + _JITTER * (2.0 * _uniform(start.u, generator) - 1.0)
        end, v_end = self.trajectory(start, v, step_sizes=self.step_size * jitter)
        log_ratio = start.u - end.u + _kinetic_energy(v) - _kinetic_energy(v_end)
        accepted = _uniform(start.u, generator).log() < log_ratio
        return _chosen(accepted, end, start), MoveInfo(accepted=accepted, log_ratio=log_ratio)

    def trajectory(self, start: MovingWalkers, v: Tensor, *, step_sizes: Tensor) -> tuple[MovingWalkers, Tensor]:
        """Leapfrog: v ← v − ½ h ∇u, then x ← x + h v and v ← v − h ∇u in turn, the last with ½ h; reversible, volume 1.

        Args:
            start: Walkers with their gradients.
            v: Velocities ``[w, *event]``.
            step_sizes: h of every walker ``[w]`` in nm.

        Returns:
            Walkers and velocities at the end; a walker that met u = +inf stays there, with velocity zero.

        Raises:
            EnergyError: If an energy or a gradient on the way is NaN.
        """
        h = _per_walker(step_sizes, v)
        x, u, gradient = start.x, start.u, start.gradient
        v = v - 0.5 * h * gradient
        for k in range(1, self.n_leapfrog + 1):
            x = x + h * v
            u, gradient = self._evaluate(x)
            stopped = torch.isposinf(u)
            v = (v - (h if k < self.n_leapfrog else 0.5 * h) * gradient).masked_fill(_per_walker(stopped, v), 0.0)
        return MovingWalkers(x=self._inside(x), u=u, gradient=gradient), v

    def _inside(self, x: Tensor) -> Tensor:
        return x - x.mean(dim=1, keepdim=True) if self.mean_free else x

    def _evaluate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u, gradient = self.target.value_and_grad(x)
        u = u.to(x)
        gradient = gradient.to(x).masked_fill(_per_walker(torch.isposinf(u), x), 0.0)
        bad = torch.nonzero(torch.isnan(u) | torch.isneginf(u) | ~torch.isfinite(gradient.flatten(1).sum(1))).flatten()
        if len(bad):
            raise EnergyError(
                f"walkers {bad[:10].tolist()} have an energy that is NaN or -inf or a gradient that is not finite (first: u = "
                f"{float(u[bad[0]])}); check the target's energy there, or take shorter steps"
            )
        return u, self._inside(gradient)


def relaxed(target: Target, x: Tensor, *, reach: float = 0.1, n_steps: int = 200) -> Tensor:
    """Configurations downhill from any start, where Hamiltonian dynamics would be thrown out by clashes.

    Steepest descent whose steps move the coordinate that moves most by ``reach`` at first and 1 % of it at last. Not a minimum, and no
    sample of anything: walkers have to be equilibrated from there.

    Args:
        target: Gives the gradients; finite ones are needed at ``x``.
        x: Configurations ``[w, *event]`` in nm.
        reach: First step in nm, a fraction of the distance between particles.
        n_steps: Number of steps.

    Returns:
        ``[w, *event]``, float64.
    """
    x = x.detach().to(torch.float64)
    for k in range(n_steps):
        _, gradient = target.value_and_grad(x)
        largest = gradient.flatten(1).abs().amax(1).clamp(min=1e-12)
        x = x - reach * 0.01 ** (k / n_steps) * gradient / _per_walker(largest, x)
    return x


def tuned_step_size(
    move: HamiltonianMonteCarlo, state: WalkerState, *, generator: torch.Generator, n_moves: int = 200, acceptance: float = 0.75
) -> tuple[HamiltonianMonteCarlo, MovingWalkers]:
    """A step at which the mean acceptance probability over the walkers is the one asked for.

    ln h moves by (k + 1)^−½ (ā_k − a) after move k, ā_k the mean of min(1, exp(log_ratio)); the result is the mean of ln h over the last
    half. Walkers that are still on their way to equilibrium ask for another step than later: tune again after it. Nothing may be recorded
    meanwhile, because walkers do not leave the target invariant while h changes.

    Args:
        move: The move to tune.
        state: Walkers to tune on; they are moved.
        generator: Random numbers.
        n_moves: Number of moves.
        acceptance: a, within (0, 1).

    Returns:
        The move with its new step, and the walkers.

    Raises:
        InputError: If ``acceptance`` or ``n_moves`` is out of range.

    References:
        Hoffman and Gelman, J. Mach. Learn. Res. 15, 1593 (2014), section 3.2; Andrieu and Thoms, Stat. Comput. 18, 343 (2008).
    """
    if not 0.0 < acceptance < 1.0 or n_moves < 2:
        raise InputError(f"expected 0 < acceptance < 1 and at least 2 moves, got {acceptance} and {n_moves}")
    log_h = math.log(move.step_size)
    tried = []
    walkers = move.init(state.x)
    for k in range(n_moves):
        walkers, info = move.with_step_size(math.exp(log_h)).step(walkers, generator=generator)
        tried.append(log_h)
        log_h += (float(info.log_ratio.clamp(max=0.0).exp().mean()) - acceptance) / math.sqrt(k + 1)
    return move.with_step_size(math.exp(float(np.mean(tried[n_moves // 2 :])))), walkers


@dataclass(frozen=True)
class WalkerRun:
    """What a set of walkers recorded.

    Attributes:
        samples: Equally weighted rows, all walkers of one time after another; ``chain`` is the walker, ``block`` its time block.
        state: The walkers at the end, to go on from.
        acceptance: Fraction of accepted moves of every walker ``[w]``, float64. One far below the others is stuck.
    """

    samples: WeightedSamples
    state: WalkerState
    acceptance: Tensor

    def by_walker(self, values: Tensor) -> np.ndarray:
        """An observable of every row ``[n]`` as ``[walkers, times]``, the form that :mod:`boltzgen.estimators.timeseries` takes."""
        return values.reshape(-1, len(self.state.x)).T.cpu().numpy()


def sample_walkers(
    move: Move,
    state: WalkerState,
    *,
    n_times: int,
    thin: int = 1,
    generator: torch.Generator,
    role: Role = "evaluate",
    dtype: torch.dtype = torch.float64,
    progress: bool = True,
) -> WalkerRun:
    """Move walkers and record all of them after every ``thin`` moves.

    Args:
        move: Markov kernel of the target.
        state: Walkers that already follow the target.
        n_times: Recorded times; the result has ``n_times`` rows per walker.
        thin: Moves per recorded time.
        generator: Random numbers.
        role: ``evaluate`` for estimates, ``train`` for rows a model will be trained on.
        dtype: Precision in which configurations are stored; energies are those of the walkers, in float64.
        progress: Show a progress bar on stderr.

    Returns:
        The rows on the CPU, the walkers, and the acceptance. Twenty walkers or more are one ``block`` each, the unit that errors rest
        on; fewer are divided into time blocks, of which there are 20 in all.

    Raises:
        InputError: If ``n_times`` or ``thin`` is not positive.
    """
    if n_times < 1 or thin < 1:
        raise InputError(f"expected positive n_times and thin, got {n_times} and {thin}")
    w = len(state.x)
    x = torch.empty(n_times, *state.x.shape, dtype=dtype)
    u = torch.empty(n_times, w, dtype=torch.float64)
    n_accepted = torch.zeros(w, dtype=torch.float64)
    for t in trange(n_times, desc="walking", unit="time", disable=not progress):
        for _ in range(thin):
            state, info = move.step(state, generator=generator)
            n_accepted += info.accepted.cpu()
        x[t], u[t] = state.x, state.u
    n_blocks = min(n_times, math.ceil(_N_UNITS / w))
    samples = WeightedSamples.unweighted(
        x.flatten(0, 1),
        u.flatten(),
        role=role,
        block=(torch.arange(n_times) * n_blocks // n_times).repeat_interleave(w),
        chain=torch.arange(w).repeat(n_times),
    )
    return WalkerRun(samples=samples, state=state, acceptance=n_accepted / (n_times * thin))


def _chosen(accepted: Tensor, new: MovingWalkers, old: MovingWalkers) -> MovingWalkers:
    wide = _per_walker(accepted, new.x)
    return MovingWalkers(
        x=torch.where(wide, new.x, old.x), u=torch.where(accepted, new.u, old.u), gradient=torch.where(wide, new.gradient, old.gradient)
    )


def _kinetic_energy(v: Tensor) -> Tensor:
    return 0.5 * v.square().flatten(1).sum(1)


def _per_walker(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (x.ndim - 1))


def _normal(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=generator.device).to(x.device)


def _uniform(u: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(u.shape, generator=generator, dtype=u.dtype, device=generator.device).to(u.device)
