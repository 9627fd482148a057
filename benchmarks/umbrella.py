"""Umbrella sampling along one distance, window by window, and what MBAR makes of it: shared by the reference and the baselines.

Lengths are in σ, energies in kT and times in τ = σ √(m/ε) of the system at hand; OpenMM gets nm, kJ/mol and ps.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openmm
from openmm import app
from scipy.special import logsumexp

from boltzgen.estimators.mbar_equations import log_mixture, solve_mbar

ROOT = Path(__file__).parent
R_GAS = 8.31446261815324e-3


@dataclass(frozen=True)
class Distance:
    """A distance between two particles that separates two basins, and how its system is sampled.

    Attributes:
        system: Folder of ``systems/``.
        atoms: The two particles.
        sigma: Unit of length in nm.
        tau: Unit of time in ps.
        kelvin: Temperature.
        near: Where the basin of small distances is, in σ.
        far: Where that of large distances is, in σ.
        barrier: Where the basins part, in σ.
        edges: Range of the profile in σ.
        centres: Centres of the windows in σ, ``[K]``.
        stiffness: Of the windows, kT/σ².
        dt: Time step in τ.
        friction: In 1/τ.
        planar: Whether the particles stay in the plane z = 0.
    """

    system: str
    atoms: tuple[int, int]
    sigma: float
    tau: float
    kelvin: float
    near: float
    far: float
    barrier: float
    edges: tuple[float, float]
    centres: np.ndarray
    stiffness: float
    dt: float
    friction: float
    planar: bool = False

    @property
    def share(self) -> np.ndarray:
        """Steps of every window relative to those between the basins ``[K]``: beyond the basins a quarter is enough for ΔF."""
        margin = 1.5 * float(self.centres[1] - self.centres[0])
        return np.where((self.centres > self.near - margin) & (self.centres < self.far + margin), 1.0, 0.25)

    @property
    def kt(self) -> float:
        """kT in kJ/mol."""
        return R_GAS * self.kelvin

    def load(self) -> tuple[openmm.System, np.ndarray]:
        """The System and its stored positions ``[n, 3]`` in nm."""
        folder = ROOT.parent / "systems" / self.system
        system = openmm.XmlSerializer.deserialize((folder / "system.xml").read_text())
        return system, app.PDBFile(str(folder / "topology.pdb")).getPositions(asNumpy=True)._value

    @property
    def edge(self) -> float:
        """Edge of the box in nm."""
        return float(self.load()[0].getDefaultPeriodicBoxVectors()[0][0]._value)

    def measure(self, context: openmm.Context) -> float:
        """The distance in σ; the two particles belong to one molecule, which is never split over images."""
        x = context.getState(positions=True).getPositions(asNumpy=True)._value
        return float(np.linalg.norm(x[self.atoms[0]] - x[self.atoms[1]])) / self.sigma

    def bias(self, r: np.ndarray, centre: np.ndarray) -> np.ndarray:
        """Energy of a window in kT."""
        return 0.5 * self.stiffness * (r - centre) ** 2


def _time_unit(sigma: float, kelvin_of_epsilon: float, mass: float) -> float:
    return float(np.sqrt(mass * sigma**2 / (R_GAS * kelvin_of_epsilon)))


POLYMER = Distance(
    system="polymer_in_solvent",
    atoms=(0, 8),
    sigma=0.34,
    tau=_time_unit(0.34, 300 / 1.3, 39.948),
    kelvin=300.0,
    near=3.55,
    far=5.7,
    barrier=4.62,
    edges=(2.8, 6.4),
    centres=np.linspace(2.9, 6.26, 25),
    stiffness=100.0,
    dt=0.012,
    friction=0.2,
)

R0 = 2 ** (1 / 6)

DIMER_2D = Distance(
    system="wca_dimer_2d",
    atoms=(0, 1),
    sigma=0.34,
    tau=_time_unit(0.34, 300, 39.948),
    kelvin=300.0,
    near=R0,
    far=R0 + 4,
    barrier=R0 + 2,
    edges=(0.0, 7.2),
    centres=np.linspace(0.2, 6.8, 20),
    stiffness=20.0,
    dt=0.015,
    friction=0.2,
    planar=True,
)

DIMER_3D = Distance(
    system="wca_dimer_3d",
    atoms=(0, 1),
    sigma=0.34,
    tau=_time_unit(0.34, 120, 39.9),
    kelvin=0.824 * 120,
    near=R0,
    far=2 * R0,
    barrier=1.5 * R0,
    edges=(0.7, 2.7),
    centres=np.linspace(0.85, 2.55, 21),
    stiffness=200.0,
    dt=0.008,
    friction=0.2,
)

#: By the name of their folder.
DISTANCES = {one.system: one for one in (POLYMER, DIMER_2D, DIMER_3D)}


@dataclass(frozen=True)
class Comparison:
    """How the methods of the comparison go along a distance.

    Attributes:
        dt: Time step of all of them, in τ.
        hill: Width of the Gaussians of metadynamics, in σ.
        gamma: Its bias factor.
        reach: Range from which steered paths draw before they have learned anything, in σ.
        peaks: Centres of the fixed proposal, in σ.
        peak_width: Its standard deviation about both, in σ.
        held: How tightly a path holds the distance: standard deviation, in σ.
        steps: Of a path from peak to peak.
    """

    dt: float
    hill: float
    gamma: float
    reach: tuple[float, float]
    peaks: tuple[float, float]
    peak_width: float
    held: float
    steps: int

    @property
    def way(self) -> float:
        """From peak to peak, in σ."""
        return self.peaks[1] - self.peaks[0]


#: By the name of the folder of the system.
COMPARISONS = {
    "polymer_in_solvent": Comparison(
        dt=0.015, hill=0.1, gamma=8, reach=(0.95 / 0.34, 2.2 / 0.34), peaks=(3.529, 5.651), peak_width=0.17, held=0.1, steps=500
    ),
    "wca_dimer_2d": Comparison(dt=0.02, hill=0.3, gamma=4, reach=(0.2, 6.8), peaks=(R0, R0 + 4), peak_width=0.8, held=0.2, steps=500),
    "wca_dimer_3d": Comparison(dt=0.01, hill=0.05, gamma=8, reach=(0.85, 2.55), peaks=(R0, 2 * R0), peak_width=0.1, held=0.05, steps=1000),
}


def langevin(distance: Distance, dt: float, seed: int) -> openmm.Integrator:
    """Langevin dynamics, "middle" scheme (BAOA): its configurational error is of second order and vanishes for springs.

    In the plane the same steps by hand, with noise along x and y only.
    """
    step, friction = dt * distance.tau, distance.friction / distance.tau
    if not distance.planar:
        integrator = openmm.LangevinMiddleIntegrator(distance.kelvin, friction, step)
        integrator.setRandomNumberSeed(seed)
        return integrator
    integrator = openmm.CustomIntegrator(step)
    integrator.setRandomNumberSeed(seed)
    integrator.addGlobalVariable("a", np.exp(-friction * step))
    integrator.addGlobalVariable("b", np.sqrt((1 - np.exp(-2 * friction * step)) * distance.kt))
    integrator.addPerDofVariable("free", 0)
    integrator.addComputePerDof("v", "v+free*dt*f/m")
    integrator.addComputePerDof("x", "x+0.5*dt*v")
    integrator.addComputePerDof("v", "a*v+free*b*gaussian/sqrt(m)")
    integrator.addComputePerDof("x", "x+0.5*dt*v")
    return integrator


def biased_context(distance: Distance, system: openmm.System, x: np.ndarray, *, dt: float, seed: int) -> openmm.Context:
    """A context with a window (parameters ``centre`` in nm, ``stiffness`` in kJ/mol/nm²), at first where the particles are."""
    system = copy.deepcopy(system)
    window = openmm.CustomBondForce("0.5*stiffness*(r-centre)^2")
    window.addGlobalParameter("stiffness", distance.stiffness * distance.kt / distance.sigma**2)
    window.addGlobalParameter("centre", float(np.linalg.norm(x[distance.atoms[0]] - x[distance.atoms[1]])))
    window.addBond(*distance.atoms, [])
    system.addForce(window)
    return thermal_context(distance, system, x, dt=dt, seed=seed)


def thermal_context(distance: Distance, system: openmm.System, x: np.ndarray, *, dt: float, seed: int) -> openmm.Context:
    """A context of one CPU thread at positions ``[n, 3]`` in nm, with Maxwell velocities."""
    integrator = langevin(distance, dt, seed)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("CPU"), {"Threads": "1"})
    start(distance, context, x, seed=seed)
    return context


def start(distance: Distance, context: openmm.Context, x: np.ndarray, *, seed: int) -> None:
    """Positions ``[n, 3]`` in nm and Maxwell velocities for a context of :func:`langevin`; in the plane both stay there."""
    context.setPositions(x)
    context.setVelocitiesToTemperature(distance.kelvin, seed)
    if distance.planar:
        v = context.getState(velocities=True).getVelocities(asNumpy=True)._value
        context.setVelocities(v * [1, 1, 0])
        context.getIntegrator().setPerDofVariableByName("free", [openmm.Vec3(1, 1, 0)] * len(x))


def trace(distance: Distance, context: openmm.Context, n_frames: int, stride: int) -> np.ndarray:
    """Distances in σ of frames ``stride`` steps apart, ``[n_frames]``."""
    out = np.empty(n_frames)
    for frame in range(n_frames):
        context.getIntegrator().step(stride)
        out[frame] = distance.measure(context)
    if not np.isfinite(out).all():
        raise RuntimeError(f"the distance became {out[~np.isfinite(out)][0]}: use a smaller time step than {distance.dt:g} tau")
    return out


def sweep(
    distance: Distance, context: openmm.Context, order: Iterable[int], *, n_frames: Sequence[int], stride: int, equilibration: int
) -> Iterator[tuple[int, np.ndarray]]:
    """The windows ``order`` one after the other, each from where the last ended: window and its distances ``[n_frames[k]]`` in σ."""
    for k in order:
        context.setParameter("centre", distance.centres[k] * distance.sigma)
        context.getIntegrator().step(equilibration)
        yield k, trace(distance, context, n_frames[k], stride)


@dataclass(frozen=True)
class Solved:
    """ΔF in kT, profile ``[bins]`` in kT (−ln density of the distance, its lowest value zero), overlap of the windows.

    ``probability`` is that of the bins of :func:`fine_edges`, of all distances.
    """

    delta_f: float
    profile: np.ndarray
    overlap: float
    probability: np.ndarray


def weighted(distance: Distance, r: dict[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray, float]:
    """MBAR over the windows ``r`` (window: distances in σ): distances, their log weights and the overlap; empty windows are left out.

    Distances of one window within 0.001 σ are one sample that counts several times: biases differ by less than 0.01 kT there.
    """
    windows = sorted(k for k in r if len(r[k]))
    cells = [np.unique(np.floor(1000 * r[k]), return_counts=True) for k in windows]
    values, c = np.concatenate([at for at, _ in cells]) / 1000 + 0.0005, np.concatenate([n for _, n in cells]).astype(np.float64)
    state, counts = np.repeat(np.arange(len(windows)), [len(n) for _, n in cells]), np.array([len(r[k]) for k in windows])
    u = distance.bias(values, distance.centres[windows][:, None])
    f = solve_mbar(u, state, c)
    log_d = log_mixture(u, counts.astype(np.float64), f)
    w = np.exp(f[:, None] - u - log_d)
    second = np.sort(np.linalg.eigvals((w * c) @ w.T * counts).real)[-2] if len(windows) > 1 else 0.0
    return values, np.log(c) - log_d, float(1 - second)


def solve(distance: Distance, r: dict[int, np.ndarray], bins: int) -> Solved:
    """MBAR over the windows ``r`` (window: distances in σ); windows without frames are left out."""
    values, log_w, overlap = weighted(distance, r)
    far = values > distance.barrier
    delta_f = float(logsumexp(log_w[~far]) - logsumexp(log_w[far])) if far.any() and not far.all() else float("nan")
    fine = np.histogram(values, bins=fine_edges(distance), weights=np.exp(log_w - logsumexp(log_w)))[0]
    return Solved(delta_f, profile(distance, values, log_w, bins), overlap, fine)


def fine_edges(distance: Distance) -> np.ndarray:
    """Edges 0.02 σ apart, a little beyond the range of the profile."""
    first, last = distance.edges[0] - 0.1, distance.edges[1] + 0.2
    return np.linspace(first, last, round((last - first) / 0.02) + 1)


def profile(distance: Distance, values: np.ndarray, log_w: np.ndarray, bins: int) -> np.ndarray:
    """−ln density of the distance in kT, with its lowest value zero, ``[bins]``; +inf where there is no frame."""
    p, edges = np.histogram(values, bins=bins, range=distance.edges, weights=np.exp(log_w))
    with np.errstate(divide="ignore"):
        f = -np.log(p / np.diff(edges))
    return np.asarray(f - f.min())


def start_below_the_barrier(distance: Distance, *, seed: int, steps_per_window: int = 400, relaxation: int = 5_000) -> np.ndarray:
    """A configuration ``[n, 3]`` in nm of the basin of small distances: pulled there from the stored one, then left free.

    Where it leaves the basin it is pulled back, and relaxes in the window of its middle instead.
    Every method of a comparison starts from it; making it is not counted.
    """
    system, x = distance.load()
    context = biased_context(distance, system, x, dt=distance.dt, seed=seed)
    stiffness = context.getParameter("stiffness")
    context.getIntegrator().step(relaxation)
    _pull_to_near(distance, context, steps_per_window)
    context.setParameter("stiffness", 0.0)
    context.getIntegrator().step(relaxation)
    if distance.measure(context) >= distance.barrier:
        context.setParameter("stiffness", stiffness)
        _pull_to_near(distance, context, steps_per_window)
        context.getIntegrator().step(relaxation)
    if distance.measure(context) >= distance.barrier:
        raise RuntimeError(f"the start left its basin for {distance.measure(context):.2f} sigma: take another seed than {seed}")
    return np.asarray(context.getState(positions=True).getPositions(asNumpy=True)._value)


def _pull_to_near(distance: Distance, context: openmm.Context, steps: int) -> None:
    """Window by window to the middle of the near basin, ``steps`` in each."""
    here, goal = (int(np.argmin(np.abs(distance.centres - r))) for r in (distance.measure(context), distance.near))
    for k in range(here, goal, -1 if here > goal else 1):
        context.setParameter("centre", distance.centres[k] * distance.sigma)
        context.getIntegrator().step(steps)
