"""OpenMMTarget: energies of a bare context, exact gradients, and failures that name their row."""

from __future__ import annotations

import copy
import pickle
import time
from collections.abc import Callable, Iterator

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit
from openmmtools import states, testsystems
from torch import Tensor

from boltzgen.core import Target
from boltzgen.errors import ConfigError, EnergyError, InputError, PlatformError, ShapeError
from boltzgen.md.contexts import ContextPool
from boltzgen.md.loading import load_objects
from boltzgen.md.platforms import PlatformChoice, available_platforms, choose_platform
from boltzgen.md.target import OpenMMTarget
from boltzgen.units import thermal_energy

REFERENCE = PlatformChoice(name="Reference", contexts=1)
POOL = PlatformChoice(name="Reference", contexts=3)


@pytest.fixture(scope="module")
def dipeptide() -> testsystems.AlanineDipeptideVacuum:
    return testsystems.AlanineDipeptideVacuum(constraints=None)


@pytest.fixture(scope="module")
def target(dipeptide: testsystems.AlanineDipeptideVacuum) -> Iterator[OpenMMTarget]:
    made = OpenMMTarget(dipeptide.system, temperature_kelvin=300.0, positions=_nm(dipeptide), platform=POOL)
    yield made
    made.close()


def _nm(system: testsystems.TestSystem) -> np.ndarray:
    return np.array(system.positions.value_in_unit(unit.nanometer))


def _rows(system: testsystems.TestSystem, n: int) -> Tensor:
    noise = torch.randn((n, *_nm(system).shape), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return torch.tensor(_nm(system)) + 0.003 * noise


def _bare(system: openmm.System, x: Tensor, parameters: dict[str, float] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Energies in kJ/mol and forces in kJ/mol/nm by the plain loop that users write."""
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    for name, value in (parameters or {}).items():
        context.setParameter(name, value)
    energies, forces = [], []
    for row in x.numpy():
        context.setPositions(row * unit.nanometer)
        state = context.getState(getEnergy=True, getForces=True)
        energies.append(state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole))
        forces.append(state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer))
    return np.array(energies), np.array(forces)


def test_bit_equal_to_a_bare_context_in_batch_order(dipeptide, target: OpenMMTarget) -> None:
    x = _rows(dipeptide, 101)
    u, gradient = target.value_and_grad(x)
    energies, forces = _bare(dipeptide.system, x)
    kt = thermal_energy(300.0)
    assert u.dtype == torch.float64
    np.testing.assert_array_equal(u.numpy(), energies / kt)
    np.testing.assert_array_equal(gradient.numpy(), -forces / kt)
    assert len(np.unique(energies)) == len(energies)  # a shifted row would show
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(5))
    assert torch.equal(target.reduced_potential(x[order]), u[order])
    assert torch.equal(target.reduced_potential(x[7:8]), u[7:8])


def check_gradient(reduced_potential: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Autograd against central differences in float64."""
    leaf = x.clone().requires_grad_(True)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((reduced_potential(leaf) * torch.arange(1, len(x) + 1)).sum(), leaf)
    step = 1e-6
    difference = (reduced_potential(x + step * direction) - reduced_potential(x - step * direction)) / (2 * step)
    along = (gradient * direction).sum(dim=(1, 2)) / torch.arange(1, len(x) + 1)
    assert torch.allclose(along, difference, rtol=1e-5, atol=1e-3), (along, difference)


class _Wrong(torch.autograd.Function):
    """The twin: forces in place of gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, target: OpenMMTarget) -> Tensor:
        u, gradient = target.value_and_grad(x)
        ctx.save_for_backward(-gradient)
        return u

    @staticmethod
    def backward(ctx, weight: Tensor) -> tuple[Tensor, None]:
        return weight[:, None, None] * ctx.saved_tensors[0], None


def test_gradient_by_finite_differences(dipeptide, target: OpenMMTarget) -> None:
    x = _rows(dipeptide, 5)
    check_gradient(target.reduced_potential, x)
    with pytest.raises(AssertionError):
        check_gradient(lambda y: _Wrong.apply(y, target), x)


def test_value_and_grad_agrees_with_autograd_in_float32(dipeptide, target: OpenMMTarget) -> None:
    x = _rows(dipeptide, 4).float()
    u, gradient = target.value_and_grad(x)
    by_autograd = Target.value_and_grad(target, x)
    assert (u.dtype, gradient.dtype) == (torch.float64, torch.float32)
    assert torch.equal(u, by_autograd[0])
    assert torch.equal(gradient, by_autograd[1])
    untouched = _rows(dipeptide, 4).float()
    assert torch.equal(x, untouched)


def test_temperatures_share_one_pool(dipeptide, target: OpenMMTarget) -> None:
    x = _rows(dipeptide, 3)
    before = target.n_evaluations
    hot = target.at(600.0)
    assert torch.allclose(hot.reduced_potential(x) * 2, target.reduced_potential(x), rtol=1e-14)
    assert target.n_evaluations == hot.n_evaluations == before + 6
    both = target.reduced_potentials(x, [300.0, 600.0])
    assert torch.equal(both, torch.stack([target.reduced_potential(x), hot.reduced_potential(x)]))
    assert target.n_evaluations == before + 15
    assert target.temperature_kelvin == 300.0
    with pytest.raises(ConfigError, match="positive temperature"):
        target.at(-1.0)


def test_empty_batch_and_wrong_shape(target: OpenMMTarget) -> None:
    assert target.reduced_potential(torch.zeros(0, 22, 3)).shape == (0,)
    with pytest.raises(ShapeError, match=r"expected configurations \[b, 22, 3\] in nm, got \[4, 66\]"):
        target.reduced_potential(torch.zeros(4, 66))
    with pytest.raises(ShapeError, match=r"expected positions \[2, 3\]"):
        OpenMMTarget(_pair(openmm.CustomExternalForce("x")), temperature_kelvin=300.0, positions=np.zeros((3, 3)))


def test_pickle_and_copy_are_refused(target: OpenMMTarget) -> None:
    for attempt in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="make it anew in every process"):
            attempt(target)


def _pair(*forces: openmm.Force) -> openmm.System:
    system = openmm.System()
    for _ in range(2):
        system.addParticle(1.0)
    for force in forces:
        for _ in range(2):
            if isinstance(force, openmm.NonbondedForce):
                force.addParticle(0.0, 0.3, 1.0)
            elif isinstance(force, openmm.CustomExternalForce):
                force.addParticle(force.getNumParticles(), [])
        system.addForce(force)
    return system


def _pair_rows(*separations: float) -> Tensor:
    x = torch.zeros(len(separations), 2, 3, dtype=torch.float64)
    x[:, 1, 0] = torch.tensor(separations)
    return x


def _pair_target(system: openmm.System, *, contexts: int = 1) -> OpenMMTarget:
    platform = PlatformChoice(name="Reference", contexts=contexts)
    return OpenMMTarget(system, temperature_kelvin=300.0, positions=_pair_rows(1.0)[0].numpy(), platform=platform)


def test_infinite_energy_has_zero_gradient_and_leaves_neighbours_alone() -> None:
    lennard_jones = _pair_target(_pair(openmm.NonbondedForce()))
    x = _pair_rows(0.35, 0.0, 0.4, 1e-40, 1e-3)
    leaf = x.clone().requires_grad_(True)
    u = lennard_jones.reduced_potential(leaf)
    (gradient,) = torch.autograd.grad(u.sum(), leaf)
    assert torch.isposinf(u[[1, 3]]).all()
    assert torch.isfinite(u[[0, 2, 4]]).all()
    assert (gradient[[1, 3]] == 0).all()
    assert torch.isfinite(gradient).all()
    assert gradient[0].abs().max() > 0
    assert torch.equal(u[[0, 2]], lennard_jones.reduced_potential(x[[0, 2]]))


def test_nan_of_coincident_atoms_is_infinite(dipeptide, target: OpenMMTarget) -> None:
    x = _rows(dipeptide, 3)
    x[1, 18] = x[1, 8]  # opposite charges: inf − inf on the Reference platform
    assert np.isnan(_bare(dipeptide.system, x)[0][1])
    u, gradient = target.value_and_grad(x)
    assert torch.isposinf(u[1])
    assert (gradient[1] == 0).all()
    assert torch.isfinite(u[[0, 2]]).all()


@pytest.mark.parametrize("platform", ["Reference", "CPU"])
def test_overlaps_of_flow_samples_give_huge_energies_and_finite_gradients(dipeptide, platform: str) -> None:
    overlapping = OpenMMTarget(
        dipeptide.system, temperature_kelvin=300.0, positions=_nm(dipeptide), platform=PlatformChoice(name=platform, contexts=2)
    )
    distances = 10.0 ** torch.linspace(-12, -1.5, 60, dtype=torch.float64)
    for i, j in ((0, 21), (1, 5), (4, 5), (8, 18), (6, 7)):
        x = torch.tensor(_nm(dipeptide)).repeat(len(distances), 1, 1)
        x[:, i] = x[:, j]
        x[:, i, 0] += distances
        u, gradient = overlapping.value_and_grad(x)
        assert (u > 1e2).all()
        assert not torch.isnan(u).any()
        assert torch.isfinite(gradient).all()
    overlapping.close()


def _external(expression: str) -> openmm.CustomExternalForce:
    return openmm.CustomExternalForce(expression)


def test_nan_names_the_row_and_the_context_recovers() -> None:
    root = _pair_target(_pair(_external("sqrt(1.5-x)")), contexts=2)
    x = _pair_rows(*[0.1] * 11, 2.0, *[0.2] * 8, 2.0)
    with pytest.raises(EnergyError, match=r"row 11: the energy is not a number although all coordinates are finite"):
        root.reduced_potential(x)
    good = _pair_rows(*np.linspace(0.1, 1.0, 40))
    expected = (np.sqrt(1.5) + np.sqrt(1.5 - good[:, 1, 0])) / thermal_energy(300.0)
    assert torch.allclose(root.reduced_potential(good), expected, rtol=1e-12)


def test_other_numbers_that_are_none() -> None:
    attraction = _pair_target(_pair(_external("-1/x^2")))
    with pytest.raises(EnergyError, match=r"row 1: the energy is -inf: .*without a repulsive core"):
        attraction.reduced_potential(_pair_rows(1.0, 1e-200) + torch.tensor([[[1.0, 0, 0], [0, 0, 0]]]))
    kink = _pair_target(_pair(_external("sqrt(x)")))  # finite at 0, its slope is not
    with pytest.raises(EnergyError, match="row 1: a force is not a number although the energy is 1 kJ/mol"):
        kink.reduced_potential(_pair_rows(1.0, 0.0) + torch.tensor([[[1.0, 0, 0], [0, 0, 0]]]))
    x = _pair_rows(1.0, 1.0, float("nan"), float("inf"))
    with pytest.raises(EnergyError, match=r"row 2 \(and 1 more\): the coordinates are not finite"):
        attraction.reduced_potential(x)


def _faulty(state: openmm.State) -> tuple[unit.Quantity, unit.Quantity]:
    """x of the second particle as energy; an exception where x > 5; slow where y > 0, so that rows finish out of order."""
    x = state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
    if x[1, 0] > 5:
        raise ValueError("injected fault")
    time.sleep(max(0.0, float(x[1, 1])))
    forces = np.zeros((2, 3))
    forces[1, 0] = -1.0
    return x[1, 0] * unit.kilojoule_per_mole, forces * unit.kilojoule_per_mole / unit.nanometer


@pytest.mark.parametrize("contexts", [1, 4])
def test_a_failing_context_names_its_row_and_neither_hangs_nor_shifts_results(contexts: int) -> None:
    faulty = _pair_target(_pair(openmm.PythonForce(_faulty)), contexts=contexts)
    x = _pair_rows(*np.linspace(0.0, 1.0, 64))
    x[::7, 1, 1] = 0.002
    expected = x[:, 1, 0] / thermal_energy(300.0)
    start = time.perf_counter()
    for _ in range(3):
        assert torch.allclose(faulty.reduced_potential(x), expected, rtol=1e-12)
        broken = x.clone()
        broken[[20, 41], 1, 0] = 6.0
        with pytest.raises(EnergyError, match=r"row 20 \(and 1 more\): OpenMM failed: .*injected fault"):
            faulty.reduced_potential(broken)
        broken[:, 1, 0] = 6.0
        with pytest.raises(EnergyError, match="injected fault"):
            faulty.reduced_potential(broken)
    u, gradient = faulty.value_and_grad(x)
    assert torch.allclose(u, expected, rtol=1e-12)
    assert torch.allclose(gradient[:, 1, 0], torch.full((64,), 1 / thermal_energy(300.0), dtype=torch.float64))
    assert time.perf_counter() - start < 10


def test_a_context_that_cannot_be_made_again_is_an_error_not_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    faulty = _pair_target(_pair(openmm.PythonForce(_faulty)), contexts=2)

    def fail(*_: object) -> None:
        raise openmm.OpenMMException("device lost")

    broken = _pair_rows(*[0.5] * 30, 6.0, *[0.5] * 30)
    with monkeypatch.context() as patch:
        patch.setattr(openmm, "Context", fail)
        for _ in range(3):
            with pytest.raises((EnergyError, PlatformError), match=r"injected fault|device lost"):
                faulty.reduced_potential(broken)
    assert torch.isfinite(faulty.reduced_potential(_pair_rows(0.1, 0.2))).all()


def test_closed_target_says_so() -> None:
    pair = _pair_target(_pair(openmm.NonbondedForce()), contexts=2)
    pair.close()
    with pytest.raises(PlatformError, match="was closed"):
        pair.at(400.0).reduced_potential(_pair_rows(0.4))


def test_results_are_not_cached() -> None:
    pair = _pair_target(_pair(openmm.NonbondedForce()))
    x = _pair_rows(0.4)
    first = pair.reduced_potential(x)
    x[0, 1, 0] = 0.5
    assert pair.reduced_potential(x) != first
    assert pair.n_evaluations == 2


def test_from_simulation_takes_parameters_box_and_temperature(dipeptide) -> None:
    system = copy.deepcopy(dipeptide.system)
    bias = openmm.CustomExternalForce("k*x^2")
    bias.addGlobalParameter("k", 0.0)
    bias.addParticle(3, [])
    system.addForce(bias)
    integrator = openmm.LangevinMiddleIntegrator(350.0, 1.0, 0.001)
    simulation = app.Simulation(dipeptide.topology, system, integrator, openmm.Platform.getPlatformByName("Reference"))
    simulation.context.setPositions(dipeptide.positions)
    simulation.context.setParameter("k", 500.0)
    made = OpenMMTarget.from_simulation(simulation, platform=REFERENCE)
    x = _rows(dipeptide, 4)
    expected = _bare(system, x, {"k": 500.0})[0] / thermal_energy(350.0)
    np.testing.assert_array_equal(made.reduced_potential(x).numpy(), expected)
    assert not np.allclose(expected, _bare(system, x)[0] / thermal_energy(350.0), atol=0.1)  # the twin: the default k
    plain = app.Simulation(dipeptide.topology, system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    plain.context.setPositions(dipeptide.positions)
    with pytest.raises(InputError, match="VerletIntegrator has no temperature; give temperature_kelvin"):
        OpenMMTarget.from_simulation(plain, platform=REFERENCE)


def test_from_thermodynamic_state(dipeptide) -> None:
    state = states.ThermodynamicState(dipeptide.system, temperature=310.0 * unit.kelvin)
    made = OpenMMTarget.from_thermodynamic_state(state, positions=dipeptide.positions, platform=REFERENCE)
    x = _rows(dipeptide, 3)
    context = state.create_context(openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    expected = []
    for row in x.numpy():
        context.setPositions(row)
        expected.append(state.reduced_potential(context))
    np.testing.assert_allclose(made.reduced_potential(x).numpy(), expected, rtol=1e-12)


def test_periodic_system_uses_the_box_given() -> None:
    box = testsystems.WaterBox(
        box_edge=1.9 * unit.nanometer, cutoff=0.8 * unit.nanometer, constrained=False, nonbondedMethod=app.CutoffPeriodic
    )
    loaded = load_objects(box.topology, box.system, box.positions)
    made = OpenMMTarget.from_loaded(loaded, temperature_kelvin=300.0, platform=REFERENCE)
    assert made.box is not None
    np.testing.assert_array_equal(made.box.numpy(), loaded.box)
    assert made.labels[0] == "HOH1-O"
    shifted = torch.tensor(loaded.positions)[None] + made.box[0]
    u, moved = made.reduced_potential(torch.tensor(loaded.positions)[None]), made.reduced_potential(shifted)
    assert torch.allclose(u, moved, rtol=1e-9)
    larger = OpenMMTarget(loaded.system, temperature_kelvin=300.0, positions=loaded.positions, platform=REFERENCE, box=1.1 * loaded.box)
    assert not torch.allclose(larger.reduced_potential(torch.tensor(loaded.positions)[None]), u, rtol=1e-4)


def test_timed_choice_and_explicit_choices(dipeptide) -> None:
    start = time.perf_counter()
    chosen = choose_platform(dipeptide.system, _nm(dipeptide))
    assert time.perf_counter() - start < 10
    assert chosen.name in {platform.name for platform in available_platforms() if platform.usable}
    two = choose_platform(dipeptide.system, _nm(dipeptide), choice=PlatformChoice(name="CPU", contexts=2))
    assert (two.name, two.contexts, dict(two.properties)) == ("CPU", 2, {"Threads": "1"})


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (PlatformChoice(name="Cuda"), r"platform 'Cuda' is unknown; available here: .*Reference"),
        (PlatformChoice(name="Reference", precision="double"), "Reference has no Precision, so 'double' cannot be obeyed"),
        (PlatformChoice(name="CPU", device="1"), "CPU has no DeviceIndex, so '1' cannot be obeyed"),
        (PlatformChoice(name="Reference", precision="half"), "expected a precision of single, mixed, double, got 'half'"),  # type: ignore[arg-type]
        (PlatformChoice(contexts=0), "at least one context"),
    ],
)
def test_choices_that_cannot_be_obeyed_are_refused(dipeptide, choice: PlatformChoice, message: str) -> None:
    with pytest.raises(PlatformError, match=message):
        OpenMMTarget(dipeptide.system, temperature_kelvin=300.0, positions=_nm(dipeptide), platform=choice)


def test_platform_that_cannot_compute_the_system_says_why() -> None:
    force = openmm.NonbondedForce()
    force.setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)
    force.setCutoffDistance(1.5)
    with pytest.raises(PlatformError, match=r"cutoff distance cannot be greater than half the periodic box"):
        _pair_target(_pair(force))


def test_cpu_pool_agrees_with_reference_to_single_precision(dipeptide, target: OpenMMTarget) -> None:
    cpu = OpenMMTarget(
        dipeptide.system, temperature_kelvin=300.0, positions=_nm(dipeptide), platform=PlatformChoice(name="CPU", contexts=3)
    )
    x = _rows(dipeptide, 20)
    assert torch.allclose(cpu.reduced_potential(x), target.reduced_potential(x), rtol=0, atol=5e-3)
    cpu.close()


def test_pool_serves_several_callers_at_once(dipeptide) -> None:
    from concurrent.futures import ThreadPoolExecutor

    pool = ContextPool(dipeptide.system, platform_name="Reference", properties={}, n_contexts=2)
    parts = [np.ascontiguousarray(_rows(dipeptide, 60).numpy()[i::6]) for i in range(6)]
    with ThreadPoolExecutor(6) as callers:
        found = list(callers.map(lambda part: pool.evaluate(part).energies, parts))
    for part, energies in zip(parts, found, strict=True):
        np.testing.assert_array_equal(energies, _bare(dipeptide.system, torch.from_numpy(part))[0])
    assert pool.n_evaluations == 60
    pool.close()
