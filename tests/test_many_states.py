"""Three states of a flexible triatomic molecule, sampled exactly, whose free energies are known by quadrature."""

from __future__ import annotations

import numpy as np
import pytest
from openmm import app, unit
from openmmtools import states
from scipy.integrate import quad

from boltzgen.config import Joining
from boltzgen.errors import EnergyError, InputError, NoOverlapError, TrainingDataError
from boltzgen.estimators.multistate import MultistateFreeEnergies
from boltzgen.md import target as openmm_target
from boltzgen.md.platforms import ResolvedPlatform
from boltzgen.units import thermal_energy
from boltzgen.workflows import multistate_analysis
from boltzgen.workflows.states import join_many_states, join_states
from tests.assertions import assert_z
from tests.test_tfep import A, B, system

KT = thermal_energy(300.0)
C = {"length": 0.095, "stretch": 90_000.0, "angle": 2.05, "bend": 200.0}
STATES = [A, B, C]


def densities(state: dict[str, float]) -> list[tuple[object, float, float]]:
    """Unnormalised density of a bond and of the angle, with limits: b² e^{−u} and sin θ e^{−u}."""
    return [
        (lambda b: b**2 * np.exp(-0.5 * state["stretch"] * (b - state["length"]) ** 2 / KT), 0.05, 0.16),
        (lambda t: np.sin(t) * np.exp(-0.5 * state["bend"] * (t - state["angle"]) ** 2 / KT), 0.0, np.pi),
    ]


def exact() -> np.ndarray:
    """F_k − F_0 = −ln Z_k/Z_0, Z = (∫ b² e^{−u} db)² ∫ sin θ e^{−u} dθ up to what all states share."""
    log_z = []
    for state in STATES:
        both = zip(densities(state), ("length", "angle"), strict=True)
        bond, angle = (quad(f, low, high, points=[state[key]])[0] for (f, low, high), key in both)
        log_z.append(2 * np.log(bond) + np.log(angle))
    return -(np.array(log_z) - log_z[0])


def drawn(state: dict[str, float], n: int, *, seed: int) -> np.ndarray:
    """Independent configurations ``[n, 3, 3]``, placed at random."""
    rng = np.random.default_rng(seed)

    def values(density: tuple, shape: tuple[int, ...]) -> np.ndarray:
        f, low, high = density
        grid = np.linspace(low, high, 20_001)[1:-1]
        cumulative = np.cumsum(f(grid))
        return np.interp(rng.random(shape), cumulative / cumulative[-1], grid)

    bond, angle = densities(state)
    b, theta = values(bond, (n, 2)), values(angle, (n,))
    x = np.zeros((n, 3, 3))
    x[:, 1, 0] = b[:, 0]
    x[:, 2, 0], x[:, 2, 1] = b[:, 1] * np.cos(theta), b[:, 1] * np.sin(theta)
    turn, _ = np.linalg.qr(rng.normal(size=(n, 3, 3)))
    return x @ turn + rng.normal(size=(n, 1, 3))


@pytest.fixture(autouse=True)
def reference_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    """No timing of platforms, which takes longer than the energies of three atoms."""
    monkeypatch.setattr(openmm_target, "choose_platform", lambda *_, **__: ResolvedPlatform("Reference", {}, 1))


@pytest.fixture(scope="module")
def topology() -> app.Topology:
    made = app.Topology()
    residue = made.addResidue("HOH", made.addChain())
    atoms = [made.addAtom(name, app.Element.getBySymbol(name[0]), residue) for name in ("O", "H1", "H2")]
    made.addBond(atoms[0], atoms[1])
    made.addBond(atoms[0], atoms[2])
    return made


@pytest.fixture(scope="module")
def thermodynamic() -> list[states.ThermodynamicState]:
    return [states.ThermodynamicState(system(state), temperature=300 * unit.kelvin) for state in STATES]


def settings(kind: str = "coupling", steps: int = 60) -> Joining:
    return Joining.model_validate(
        {"map": {"kind": kind, "stiff_layers": 1, "hidden": [8]}, "evaluation": {"n_bootstrap": 50},
         "training": {"steps": steps, "batch_size": 32, "learning_rate": 5e-3, "ema_decay": 0.9}}
    )  # fmt: skip


def check(found: MultistateFreeEnergies) -> None:
    for k, truth in enumerate(exact()[1:], start=1):
        assert_z(float(found.f[k]), float(truth), float(np.asarray(found.estimate.stderr)[k]), n_sigma=4)


def test_three_states_are_joined_by_maps_from_the_first(topology: app.Topology, thermodynamic: list) -> None:
    samples = [drawn(state, 2000, seed=k) for k, state in enumerate(STATES)]
    found = join_many_states(thermodynamic, samples=samples, topology=topology, settings=settings(), progress=False)
    check(found.free_energies)
    assert found.verdict.word == "reliable", found.verdict
    assert found.without_map is not None
    check(found.without_map)
    learned, plain = (np.asarray(one.estimate.stderr)[1:] for one in (found.free_energies, found.without_map))
    assert (learned < 0.7 * plain).all()
    assert found.diagnostics["overlap"] > 2 * found.diagnostics["without_map"]["overlap"]
    names = [estimate.name for estimate in found.estimates]
    assert names == ["F_1 - F_0", "F_2 - F_0", "F_1 - F_0, without maps, all data", "F_2 - F_0, without maps, all data"]
    assert sum(found.diagnostics["n_k"]) == 3000


def test_two_states_are_those_of_join_states(topology: app.Topology, thermodynamic: list) -> None:
    samples = [drawn(state, 400, seed=k) for k, state in enumerate(STATES[:2])]
    some = settings("affine")
    two = join_states(
        *thermodynamic[:2], samples_a=samples[0], samples_b=samples[1], topology=topology, settings=some, progress=False
    )  # fmt: skip
    many = join_many_states(thermodynamic[:2], samples=samples, topology=topology, settings=some, progress=False)
    assert float(many.estimates[0].value) == pytest.approx(float(two.estimates[0].value), abs=1e-8)
    assert many.diagnostics["overlap"] == pytest.approx(two.diagnostics["overlap"], abs=1e-8)
    plain = next(estimate for estimate in two.estimates if estimate.name.endswith("without a map, all data"))
    assert float(many.estimates[1].value) == pytest.approx(float(plain.value), abs=1e-8)


def test_frames_that_trained_are_refused(topology: app.Topology, thermodynamic: list, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [drawn(state, 200, seed=k) for k, state in enumerate(STATES)]
    honest = multistate_analysis.state_potentials

    def with_training_rows(ends, transforms, frames):
        return honest(ends, transforms, [ends[0].training, *frames[1:]])

    monkeypatch.setattr(multistate_analysis, "state_potentials", with_training_rows)
    with pytest.raises(TrainingDataError):
        join_many_states(thermodynamic, samples=samples, topology=topology, settings=settings("affine"), progress=False)


def test_samples_that_do_not_fit_are_refused(topology: app.Topology, thermodynamic: list) -> None:
    samples = [drawn(state, 100, seed=k) for k, state in enumerate(STATES)]
    with pytest.raises(InputError, match="got 3 states and samples of 2"):
        join_many_states(thermodynamic, samples=samples[:2], topology=topology)
    with pytest.raises(EnergyError, match="sample 0 of state 2 has the energy"):
        join_many_states(thermodynamic, samples=[*samples[:2], np.zeros((50, 3, 3))], topology=topology)
    rigid = states.ThermodynamicState(system(B, constrained=True), temperature=300 * unit.kelvin)
    with pytest.raises(InputError, match="constrain different bonds"):
        join_many_states([*thermodynamic[:2], rigid], samples=samples, topology=topology)


def test_states_without_any_overlap_are_told_so(topology: app.Topology) -> None:
    """Without maps there is no number; the comparison says so, and maps give one."""
    far = [A, A | {"length": 0.145, "stretch": 4e5, "angle": 1.2, "bend": 4000.0}]
    ends = [states.ThermodynamicState(system(state), temperature=300 * unit.kelvin) for state in far]
    samples = [drawn(state, 1200, seed=k) for k, state in enumerate(far)]
    with pytest.raises(NoOverlapError):
        join_many_states(ends, samples=samples, topology=topology, settings=settings("identity"), progress=False)
    found = join_many_states(ends, samples=samples, topology=topology, settings=settings("affine"), progress=False)
    assert found.without_map is None
    assert found.diagnostics["without_map"]["verdict"] == "low overlap"
    assert found.verdict.word == "reliable", found.verdict
