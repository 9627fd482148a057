"""The chain of nine beads in 200 solvent particles in compiled C: many times as fast as OpenMM on one core.

Units of the model: σ = m = ε = 1, kT = 1.3. ``solute_paths.py`` checks energies, forces and a driven path against OpenMM before use.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

N_ATOMS, N_BEADS, KT = 209, 9, 1.3
EDGE = (200 / 0.48) ** (1 / 3)


def _compiled() -> ctypes.CDLL:
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError("expected a C compiler (gcc or clang), found none: install one, or run with --engine openmm")
    library = Path(tempfile.mkdtemp()) / "polymer_liquid.so"
    source = Path(__file__).with_suffix(".c")
    flags = ["-O3", "-march=native", "-ffast-math", "-mprefer-vector-width=512", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, str(source), "-o", str(library), "-lm"], check=True)
    return ctypes.CDLL(str(library))


class PolymerLiquid:
    """Energy, molecular dynamics and driven paths. Configurations are ``[209, 3]``, beads first."""

    def __init__(self) -> None:
        self._library = _compiled()
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
    assert array.flags.c_contiguous and array.dtype == np.float64
    return ctypes.c_void_p(array.ctypes.data)
