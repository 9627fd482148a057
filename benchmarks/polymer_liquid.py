"""The chain of nine beads in 200 solvent particles in compiled C: many times as fast as OpenMM on one core.

Units of the model: σ = m = ε = 1, kT = 1.3. ``solute_paths.py`` checks energies, forces and a driven path against OpenMM before use.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from boltzgen.paths import PathResult, PathWalkers, Schedule

N_ATOMS, N_BEADS, KT = 209, 9, 1.3
EDGE = (200 / 0.48) ** (1 / 3)

#: σ in nm.
SIGMA = 0.34


def _compiled(*defined: str) -> ctypes.CDLL:
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError("expected a C compiler (gcc or clang), found none: install one, or run with --engine openmm")
    library = Path(tempfile.mkdtemp()) / "polymer_liquid.so"
    source = Path(__file__).with_suffix(".c")
    flags = [*(f"-D{name}" for name in defined), "-O3", "-march=native", "-ffast-math", "-mprefer-vector-width=512", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, str(source), "-o", str(library), "-lm"], check=True)
    return ctypes.CDLL(str(library))


class PolymerLiquid:
    """Energy, molecular dynamics, hybrid Monte Carlo and driven paths. Configurations are ``[209, 3]``, beads first.

    Args:
        defined: Macros of the compiled code: ``KEPT_VELOCITY`` and ``UNTESTED`` make :meth:`hybrid` wrong, for tests of tests.
    """

    def __init__(self, *defined: str) -> None:
        self._library = _compiled(*defined)
        self._library.potential.restype = ctypes.c_double
        self._library.drive.restype = ctypes.c_double

    def potential(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """Energy in ε and forces ``[209, 3]``."""
        at, forces = np.ascontiguousarray(x.T), np.empty((3, N_ATOMS))
        energy = self._library.potential(_pointer(at), ctypes.c_double(EDGE), _pointer(forces))
        return float(energy), forces.T

    def run(self, x: np.ndarray, *, n_steps: int, step: float, redraw: int, every: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Velocity Verlet from fresh velocities, drawn anew every ``redraw`` steps: the end, and chains ``[n_steps // every, 9, 3]``."""
        at, v = np.ascontiguousarray(x.T), np.random.default_rng(seed).normal(size=(3, N_ATOMS)) * np.sqrt(KT)
        chains = np.empty((n_steps // every, 3, N_BEADS))
        self._library.run(_pointer(at), _pointer(v), ctypes.c_double(EDGE), n_steps, ctypes.c_double(step), redraw, every,
                          ctypes.c_uint64(seed), _pointer(chains))  # fmt: skip
        return np.ascontiguousarray(at.T), np.ascontiguousarray(chains.transpose(0, 2, 1))

    def hybrid(
        self, x: np.ndarray, v: np.ndarray, *, n: int, length: int, step: float, kept: float, stiffness: float, centre: float, seed: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """Generalised hybrid Monte Carlo in an umbrella window on the end-to-end distance, exact at any time step.

        Args:
            x: Start ``[209, 3]``.
            v: Velocities ``[209, 3]``.
            n: Trajectories.
            length: Steps of one.
            step: Time step.
            kept: Part of the velocities that every trajectory starts from.
            stiffness: Of the window, in ε/σ²; 0 for none.
            centre: Of the window.
            seed: Of the noise.

        Returns:
            The end, its velocities, the distance after every trajectory ``[n]``, and how many were accepted.
        """
        at, v, distances = np.array(x.T, order="C"), np.array(v.T, order="C"), np.empty(n)
        accepted = self._library.hybrid(_pointer(at), _pointer(v), ctypes.c_double(EDGE), n, length, ctypes.c_double(step),
                                        ctypes.c_double(kept), ctypes.c_double(stiffness), ctypes.c_double(centre),
                                        ctypes.c_uint64(seed), _pointer(distances))  # fmt: skip
        return np.ascontiguousarray(at.T), np.ascontiguousarray(v.T), distances, int(accepted)

    def drive(
        self, x: np.ndarray, v: np.ndarray, ways: np.ndarray, fractions: np.ndarray, *, step: float, friction: float, seed: int
    ) -> tuple[np.ndarray, float]:
        """Driven path: the end, and its work in ε.

        Args:
            x: Start ``[209, 3]``.
            v: Velocities ``[209, 3]``; those of the beads are left out.
            ways: Corners of the beads' path ``[m + 1, 9, 3]``; the beads are at the fraction h of its m legs.
            fractions: h ``[K]`` after every step.
            step: Time step.
            friction: γ.
            seed: Of the noise.
        """
        at, v = np.ascontiguousarray(x.T), np.ascontiguousarray(v.T)
        corners, h = np.ascontiguousarray(ways.transpose(0, 2, 1)), np.ascontiguousarray(fractions)
        work = self._library.drive(_pointer(at), _pointer(v), ctypes.c_double(EDGE), _pointer(corners), len(ways) - 1, _pointer(h), len(h),
                                   ctypes.c_double(step), ctypes.c_double(friction), ctypes.c_uint64(seed))  # fmt: skip
        return np.ascontiguousarray(at.T), float(work)


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    assert array.dtype == np.float64
    return ctypes.c_void_p(array.ctypes.data)


class CompiledDriving:
    """Driving engine of the polymer, in nm and ps: what :class:`boltzgen.md.driven.DrivenSteering` does, from the compiled code.

    Args:
        liquid: The compiled code.
        variables: ξ.
        step: Time step in τ.
        friction: γ in 1/τ.
    """

    solute = tuple(range(N_BEADS))

    def __init__(self, liquid: PolymerLiquid, variables: Callable[[Tensor], Tensor], *, step: float, friction: float = 0.0) -> None:
        self.liquid, self.variables, self.step, self.friction = liquid, variables, step, friction

    def locate(self, x: Tensor) -> PathWalkers:
        u = torch.tensor([self.liquid.potential(row)[0] / KT for row in x.numpy() / SIGMA], dtype=torch.float64)
        return PathWalkers(x=x.to(torch.float64), u=u, xi=self.variables(x))

    def drive(self, walkers: PathWalkers, corners: Tensor, *, steps: Tensor, schedule: Schedule, generator: torch.Generator) -> PathResult:
        v = torch.randn(walkers.x.shape, generator=generator, dtype=torch.float64).numpy() * np.sqrt(KT)
        v[:, :N_BEADS] = 0.0
        ends, works = [], []
        for row, x in enumerate(walkers.x.numpy() / SIGMA):
            s = torch.arange(1, int(steps[row]) + 1, dtype=torch.float64) / int(steps[row])
            seed = int(torch.randint(2**62, (1,), generator=generator))
            end, work = self.liquid.drive(x, v[row], corners[row].numpy() / SIGMA, schedule.fraction(s).numpy(), step=self.step,
                                          friction=self.friction, seed=seed)  # fmt: skip
            ends.append(end)
            works.append(work / KT)
        work = torch.tensor(works, dtype=torch.float64).nan_to_num(nan=torch.inf)
        x = torch.where(torch.isfinite(work)[:, None, None], torch.from_numpy(np.stack(ends)) * SIGMA, walkers.x)
        arrived = self.locate(x)
        failures = {row: "not a number" for row in torch.nonzero(torch.isinf(work)).flatten().tolist()}
        return PathResult(x=arrived.x, u=arrived.u, xi=arrived.xi, work=work, n_force=steps + 2, failures=failures)

    def roam(self, walkers: PathWalkers, *, n_steps: int, generator: torch.Generator) -> PathResult:
        """Molecular dynamics with the error of its time step, which :meth:`drive` does not have; the work is 0."""
        seeds = torch.randint(2**31, (len(walkers.x),), generator=generator).tolist()
        rows = [
            self.liquid.run(x, n_steps=n_steps, step=0.01, redraw=200, every=n_steps, seed=seed)[0]
            for x, seed in zip(walkers.x.numpy() / SIGMA, seeds, strict=True)
        ]
        arrived = self.locate(torch.from_numpy(np.stack(rows)) * SIGMA)
        none, steps = torch.zeros(len(rows), dtype=torch.float64), torch.full((len(rows),), n_steps + 2)
        return PathResult(x=arrived.x, u=arrived.u, xi=arrived.xi, work=none, n_force=steps)


def chain_potential(x: Tensor) -> Tensor:
    """Energy inside the chain ``[b]`` in kT, of chains ``[b, 9, 3]`` in nm."""
    i, j = torch.triu_indices(N_BEADS, N_BEADS, offset=1)
    r = (x[:, i] - x[:, j]).norm(dim=2) / SIGMA
    near, next_ = j - i == 1, j - i == 2
    springs = 250 * ((r[:, near] - 1.0).square().sum(1) + (r[:, next_] - 1.63).square().sum(1))
    u = r[:, j - i >= 3].square()
    gap = 6.25 - u.clamp(4.0, 6.25)
    pairs = (4 * (u**-6 - u**-3) * gap.square() * (6.75 - 2 * gap) / 11.390625).sum(1)
    q = (r[:, (i == 0) & (j == N_BEADS - 1)][:, 0] - 4.62) / 0.8
    return (springs + pairs + 9.1 * (0.25 * q**4 - q**2)) / KT
