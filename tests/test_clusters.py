"""Clusters of equal particles: energies against plain loops and known numbers, symmetries, contact, and their twins in OpenMM."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from boltzgen.core import Target
from boltzgen.errors import EnergyError, InputError, ShapeError
from boltzgen.md.platforms import PlatformChoice
from boltzgen.md.target import OpenMMTarget
from boltzgen.targets.clusters import CoulombGas, DoubleWellCluster, LennardJonesCluster
from boltzgen.targets.views import Tempered
from tests.assertions import assert_z
from tests.registry import noise
from tests.test_systems import MAKE

SYSTEMS: dict[str, Callable[[], Target]] = {
    "dw4": DoubleWellCluster,
    "lj13": lambda: LennardJonesCluster(13),
    "lj55": lambda: LennardJonesCluster(55),
    "coulomb_6_2": lambda: CoulombGas(6, 2),
    "coulomb_20_2": lambda: CoulombGas(20, 2),
}
INVARIANT = ("dw4", "lj13", "lj55")


def apart(target: Target, b: int = 5) -> Tensor:
    """Particles spread out at random, so that no term swamps the others."""
    return noise(b, *target.event_shape, scale=2.0)


# ---------------------------------------------------------------- values


def double_well_loop(x: np.ndarray) -> float:
    u = 0.0
    for i in range(len(x)):
        for j in range(i):
            r = math.dist(x[i], x[j])
            u += 0.9 * (r - 4) ** 4 - 4 * (r - 4) ** 2
    return u


def lennard_jones_loop(x: np.ndarray) -> float:
    u = 0.5 * sum(math.dist(row, x.mean(axis=0)) ** 2 for row in x)
    for i in range(len(x)):
        for j in range(i):
            r = math.dist(x[i], x[j])
            u += (1 / r) ** 12 - 2 * (1 / r) ** 6
    return u


def coulomb_loop(x: np.ndarray) -> float:
    energy = sum(float(row @ row) for row in x)
    for i in range(len(x)):
        for j in range(i):
            energy += 1 / math.dist(x[i], x[j])
    return 10 * energy


LOOPS = {"dw": double_well_loop, "lj": lennard_jones_loop, "co": coulomb_loop}


def check_values(target: Target, loop: Callable[[np.ndarray], float]) -> None:
    x = apart(target)
    expected = torch.tensor([loop(row) for row in x.numpy()], dtype=torch.float64)
    torch.testing.assert_close(target.reduced_potential(x), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", SYSTEMS)
def test_energies_are_those_of_a_plain_loop(name: str) -> None:
    check_values(SYSTEMS[name](), LOOPS[name[:2]])


class EveryPairTwice(LennardJonesCluster):
    def _pair(self, square: Tensor) -> tuple[Tensor, Tensor]:
        energy, slope = super()._pair(square)
        return 2 * energy, 2 * slope


@pytest.mark.parametrize("mutant", [EveryPairTwice(13), LennardJonesCluster(13, depth=2.0), Tempered(LennardJonesCluster(13), factor=2.0)])
def test_wrong_prefactors_are_caught(mutant: Target) -> None:
    with pytest.raises(AssertionError):
        check_values(mutant, lennard_jones_loop)


@pytest.mark.parametrize(("n_shells", "minimum"), [(1, -44.326801), (2, -279.248470)])
def test_lennard_jones_minima_are_those_of_the_cambridge_cluster_database(n_shells: int, minimum: float) -> None:
    """Wales and Doye, J. Phys. Chem. A 101, 5111 (1997), table 1: the Mackay icosahedra, without trap."""
    start = torch.from_numpy(MAKE.icosahedron(n_shells))
    target = LennardJonesCluster(len(start))
    x = start.clone().requires_grad_(True)

    def without_trap(x: Tensor) -> Tensor:
        return target.reduced_potential(x[None])[0] - 0.5 * (x - x.mean(0)).square().sum()

    optimiser = torch.optim.LBFGS([x], max_iter=200, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        u = without_trap(x)
        u.backward()
        return u

    optimiser.step(closure)
    assert without_trap(x).item() == pytest.approx(minimum, abs=2e-6)


def test_many_rows_are_computed_in_pieces() -> None:
    target = LennardJonesCluster(13)
    x = apart(target, b=3000)
    u, gradient = target.value_and_grad(x)
    assert u.shape == (3000,)
    for row in (0, 419, 420, 421, 2999):
        alone = target.value_and_grad(x[row : row + 1])
        torch.testing.assert_close(u[row], alone[0][0], rtol=1e-14, atol=0)
        torch.testing.assert_close(gradient[row], alone[1][0], rtol=1e-13, atol=1e-13)
    assert target.reduced_potential(x[:0]).shape == (0,)


def test_single_precision_is_computed_in_double() -> None:
    target = DoubleWellCluster()
    x = apart(target).to(torch.float32)
    u, gradient = target.value_and_grad(x)
    expected, expected_gradient = target.value_and_grad(x.to(torch.float64))
    assert torch.equal(u, expected)
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, expected_gradient.to(torch.float32))


def test_energies_can_be_differentiated_twice() -> None:
    target = LennardJonesCluster(3)
    x = (apart(target, b=1) + 1.0).requires_grad_(True)
    (gradient,) = torch.autograd.grad(target.reduced_potential(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient[0, 0, 0], x)
    step = torch.zeros_like(x)
    step[0, 0, 0] = 1e-5
    above, below = (target.value_and_grad(x.detach() + sign * step)[1] for sign in (1, -1))
    torch.testing.assert_close(second, (above - below) / 2e-5, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- symmetries


def rotation(d: int) -> Tensor:
    q, r = torch.linalg.qr(noise(d, d))
    return q * r.diagonal().sign()


@pytest.mark.parametrize("name", SYSTEMS)
def test_rotation_reflection_and_relabelling_change_nothing(name: str) -> None:
    target = SYSTEMS[name]()
    x, (n, d) = apart(target), target.event_shape
    assert len(set(target.labels)) == 1
    u, gradient = target.value_and_grad(x)
    turn, order = rotation(d), torch.randperm(n, generator=torch.Generator().manual_seed(1))
    for linear in (turn, -turn):
        turned, turned_gradient = target.value_and_grad(x @ linear)
        torch.testing.assert_close(turned, u, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(turned_gradient, gradient @ linear, rtol=1e-9, atol=1e-9 * float(gradient.abs().max()))
    torch.testing.assert_close(target.reduced_potential(x[:, order]), u, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SYSTEMS)
def test_translation_changes_the_trapped_gas_only(name: str) -> None:
    target = SYSTEMS[name]()
    x = apart(target)
    n, d = target.event_shape
    shift = noise(d)
    difference = target.reduced_potential(x + shift) - target.reduced_potential(x)
    expected = torch.zeros(len(x), dtype=torch.float64)
    if name not in INVARIANT:
        expected = 10 * (2 * x.sum(1) @ shift + n * shift.square().sum())
    torch.testing.assert_close(difference, expected, rtol=1e-8, atol=1e-8)


# ---------------------------------------------------------------- contact, and far out


@pytest.mark.parametrize("gap", [0.0, 1e-30])
@pytest.mark.parametrize("name", ["lj13", "coulomb_6_2"])
def test_coinciding_particles_have_infinite_energy_and_harm_no_other_row(name: str, gap: float) -> None:
    target = SYSTEMS[name]()
    x = apart(target)
    healthy = target.value_and_grad(x)
    x[2, 0] = 0.0
    x[2, 3] = gap
    u, gradient = target.value_and_grad(x)
    assert torch.isposinf(u).tolist() == [False, False, True, False, False]
    assert (gradient[2] == 0).all()
    others = [0, 1, 3, 4]
    torch.testing.assert_close(u[others], healthy[0][others], rtol=1e-14, atol=0)
    torch.testing.assert_close(gradient[others], healthy[1][others], rtol=1e-12, atol=1e-12)
    leaf = x.clone().requires_grad_(True)
    energies = target.reduced_potential(leaf)
    assert torch.equal(energies.detach(), u)
    energies[others].sum().backward()
    torch.testing.assert_close(leaf.grad, gradient)


def test_double_wells_are_finite_at_contact() -> None:
    target = DoubleWellCluster(2)
    u, gradient = target.value_and_grad(torch.zeros(1, 2, 2))
    assert float(u[0]) == pytest.approx(0.9 * 4**4 - 4 * 4**2, rel=1e-14)
    assert (gradient == 0).all()


@pytest.mark.parametrize("name", SYSTEMS)
def test_no_distance_gives_a_number_that_is_none(name: str) -> None:
    """Particles from 1e-19 nm apart to 1e200 nm: energies finite or +inf, gradients finite."""
    target = SYSTEMS[name]()
    for scale in (1e-19, 1e-12, 1e-6, 1.0, 1e30, 1e76, 1e100, 1e200):
        u, gradient = target.value_and_grad(scale * apart(target))
        assert not torch.isnan(u).any()
        assert torch.isfinite(gradient).all()
        assert (gradient[torch.isposinf(u)] == 0).all()


def test_what_is_no_configuration_is_refused() -> None:
    x = apart(DoubleWellCluster())
    x[1, 2, 0] = math.nan
    x[3, 2, 0] = math.inf
    for evaluate in (DoubleWellCluster().reduced_potential, DoubleWellCluster().value_and_grad):
        with pytest.raises(EnergyError, match="row 1"):
            evaluate(x)
        with pytest.raises(ShapeError, match=r"expected configurations \[b, 4, 2\]"):
            evaluate(torch.zeros(3, 4, 3))


@pytest.mark.parametrize(
    "build",
    [
        lambda: LennardJonesCluster(1),
        lambda: LennardJonesCluster(3, 0),
        lambda: LennardJonesCluster(3, depth=0.0),
        lambda: DoubleWellCluster(quartic=0.0),
        lambda: DoubleWellCluster(quadratic=math.nan),
        lambda: CoulombGas(2, 2, beta=0.0),
        lambda: CoulombGas(2, 2, strength=-1.0),
    ],
)
def test_impossible_parameters_are_refused(build: Callable[[], Target]) -> None:
    with pytest.raises(InputError, match="expected"):
        build()


# ---------------------------------------------------------------- two charges, exactly


def two_charges(d: int, *, strength: float = 1.0) -> tuple[float, float, float]:
    """−ln Z/β, ⟨E⟩ and 2⟨Σx²⟩ − ⟨V_C⟩ of two charges at β = 10 by Gauss-Legendre quadrature over their distance r.

    With R the centre and r the difference, Σ|x|² = 2 R² + r²/2 and the Jacobian is 1; R is Gaussian with ⟨R²⟩ = d / (4β).
    """
    beta, reach = 10.0, 8.0
    target = CoulombGas(2, d, beta=beta, strength=strength)
    nodes, weights = np.polynomial.legendre.leggauss(400)
    r = torch.from_numpy(reach * (nodes + 1) / 2)
    x = torch.zeros(len(r), 2, d, dtype=torch.float64)
    x[:, 0, 0], x[:, 1, 0] = r / 2, -r / 2
    u = target.reduced_potential(x)
    sphere = {2: 2 * math.pi * r, 3: 4 * math.pi * r**2}[d]
    p = torch.from_numpy(reach * weights / 2) * sphere * torch.exp(-u)
    log_z = math.log(p.sum()) + 0.5 * d * math.log(math.pi / (2 * beta))
    p = p / p.sum()
    energy = float(p @ u) / beta + d / (2 * beta)
    squares = float(p @ (r**2 / 2)) + d / (2 * beta)
    return -log_z / beta, energy, 2 * squares - (energy - squares)


@pytest.mark.parametrize(("d", "free_energy", "energy"), [(2, 1.576789, 1.652604), (3, 1.593734, 1.708547)])
def test_two_charges_have_their_known_free_energy(d: int, free_energy: float, energy: float) -> None:
    found = two_charges(d)
    assert found[0] == pytest.approx(free_energy, abs=1e-6)
    assert found[1] == pytest.approx(energy, abs=1e-6)
    assert found[2] == pytest.approx(2 * d / 10, abs=1e-9)
    weaker = two_charges(d, strength=0.9)
    assert abs(weaker[0] - free_energy) > 0.05
    assert weaker[2] == pytest.approx(2 * d / 10, abs=1e-9)


@pytest.mark.parametrize("d", [2, 3])
def test_without_charges_the_gas_is_gaussian(d: int) -> None:
    log_z = CoulombGas(2, d, strength=0.0).log_z
    assert log_z == pytest.approx(-10 * two_charges(d, strength=0.0)[0], abs=1e-10)
    assert torch.isfinite(CoulombGas(2, d, strength=0.0).reduced_potential(torch.zeros(1, 2, d))).all()
    assert CoulombGas(2, d).log_z is None


def test_a_colder_gas_is_a_tempered_one() -> None:
    x = apart(CoulombGas(4, 3))
    cold = Tempered(CoulombGas(4, 3, beta=10.0), factor=2.0)
    torch.testing.assert_close(cold.reduced_potential(x), CoulombGas(4, 3, beta=20.0).reduced_potential(x))


# ---------------------------------------------------------------- the same systems in OpenMM


def openmm_twin(name: str) -> OpenMMTarget:
    folder = Path("systems") / name
    return OpenMMTarget.from_files(
        folder / "topology.pdb", folder / "system.xml", temperature_kelvin=300.0, platform=PlatformChoice(name="Reference")
    )


def stored_positions(name: str) -> Tensor:
    return torch.from_numpy(MAKE.app.PDBFile(str(Path("systems") / name / "topology.pdb")).getPositions(asNumpy=True)._value)


def check_twin(target: Target, twin: OpenMMTarget, near: Tensor) -> None:
    """Energies and forces agree to 1e-10, far apart and near the stored positions; 2-D systems lie in the plane z = 0."""
    n, d = target.event_shape
    x = torch.cat([apart(target), near[:, :d] + noise(5, n, d, scale=0.05)])
    padded = torch.nn.functional.pad(x, (0, 3 - d))
    u, gradient = twin.value_and_grad(padded)
    expected, expected_gradient = target.value_and_grad(x)
    torch.testing.assert_close(u, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient[..., :d], expected_gradient, rtol=1e-10, atol=1e-10 * float(expected_gradient.abs().max()))
    assert (gradient[..., d:] == 0).all()


@pytest.mark.parametrize("name", SYSTEMS)
def test_openmm_systems_are_the_analytic_ones(name: str) -> None:
    target, twin = SYSTEMS[name](), openmm_twin(name)
    check_twin(target, twin, stored_positions(name))
    with pytest.raises(AssertionError):
        check_twin(target, twin.at(301.0), stored_positions(name))


@pytest.mark.parametrize("name", ["dw4", "coulomb_6_2", "coulomb_20_2"])
def test_planar_systems_are_stored_in_their_plane(name: str) -> None:
    assert (stored_positions(name)[:, 2] == 0).all()
    assert "z = 0" in (Path("systems") / name / "README.md").read_text()


# ---------------------------------------------------------------- stored references


def stored_results(name: str) -> dict:
    return json.loads((Path("benchmarks/results") / f"reference_{name}.json").read_text())


@pytest.mark.parametrize(("name", "goal"), [("2_2", 0.002), ("2_3", 0.002), ("6_2", 0.002), ("20_2", 0.005)])
def test_stored_free_energies_meet_their_error_goal(name: str, goal: float) -> None:
    """Two charges agree with quadrature; ⟨E⟩ of larger gases agrees with long walks from other starts."""
    result = stored_results("coulomb")[name]
    assert result["free_energy_stderr"] < goal
    groups = result["free_energy_of_groups"]
    assert_z(result["free_energy"], float(np.mean(groups)), float(np.std(groups)) / math.sqrt(len(groups)))
    for quantity, exact in result["exact"].items():
        assert_z(result[quantity], exact, result[f"{quantity}_stderr"])
    walked = stored_results("clusters").get(f"coulomb_{name}")
    assert walked or result["exact"]
    if walked:
        u = walked["observables"]["u"]
        assert_z(result["energy"], u["mean"] / 10, math.hypot(result["energy_stderr"], u["stderr"] / 10))


def test_stored_samples_came_from_walkers_that_agree() -> None:
    for result in stored_results("clusters").values():
        assert result["acceptance_of_slowest_walker"] > 0.5
        seen = result["observables"]
        assert all(abs(numbers["starts_differ_by_sigma"]) < 4.5 for numbers in seen.values())
        for name, exact in (("virial", 0.0), ("centre", 1.0)):
            if name in seen:
                assert_z(seen[name]["mean"], exact, seen[name]["stderr"])
