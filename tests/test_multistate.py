"""Free energies of several states, with maps and without, against harmonic oscillators: F_k = −(d/2) ln(2π/k) up to a constant."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.signal import lfilter

from boltzgen.core import Bridge, Chain, Transform
from boltzgen.errors import EnergyError, InexactDensityError, InputError, NoOverlapError, ShapeError, TrainingDataError
from boltzgen.estimators.mbar import mbar_free_energies
from boltzgen.estimators.mbar_equations import solve_mbar
from boltzgen.estimators.multistate import MultistateFreeEnergies, halves, multistate_free_energies, multistate_verdict
from boltzgen.estimators.perturbation import acceptance_ratio
from boltzgen.estimators.state_potentials import StatePotentials
from boltzgen.estimators.works import Works
from boltzgen.targets.analytic import Gaussian
from boltzgen.targets.mapped_states import MappedStates
from tests.assertions import assert_z
from tests.test_fit import affine_flow

CENTRES, WIDTHS = np.array([0.0, 1.0, 2.5, 4.0]), np.array([1.0, 0.6, 1.5, 0.8])
COUNTS = (400, 700, 300, 500)
EXACT = -np.log(WIDTHS / WIDTHS[0])


def made(u: list[np.ndarray], **more: object) -> StatePotentials:
    return StatePotentials.of(u, **{"role": "evaluate", "log_det_error": 0.0, **more})  # type: ignore[arg-type]


def oscillators(*, seed: int, counts: tuple[int, ...] = COUNTS) -> list[np.ndarray]:
    """u_k = (x − c_k)²/2w_k² of samples of every state: F_k − F_0 = −ln w_k/w_0."""
    rng = np.random.default_rng(seed)
    xs = [rng.normal(c, w, n) for c, w, n in zip(CENTRES, WIDTHS, counts, strict=True)]
    return [0.5 * ((x - CENTRES[:, None]) / WIDTHS[:, None]) ** 2 for x in xs]


def check(found: MultistateFreeEnergies, exact: np.ndarray = EXACT) -> None:
    for k in range(1, len(exact)):
        assert_z(float(found.f[k]), float(exact[k]), float(np.asarray(found.estimate.stderr)[k]), n_sigma=4)


def test_free_energies_are_those_of_pymbar_and_their_errors_too() -> None:
    rows = made(oscillators(seed=1))
    found, theirs = multistate_free_energies(rows, seed=1), mbar_free_energies(rows.u, rows.n_k)
    np.testing.assert_allclose(found.f, theirs.f, atol=1e-8)
    np.testing.assert_allclose(np.asarray(found.estimate.stderr)[1:], np.sqrt(np.diag(theirs.covariance))[1:], rtol=0.25)
    check(found)
    np.testing.assert_allclose(found.overlap_matrix.sum(axis=1), 1.0)
    assert 1 - np.sort(np.linalg.eigvals(found.overlap_matrix).real)[-2] == pytest.approx(theirs.overlap, abs=1e-8)
    assert {(pair.a, pair.b) for pair in found.neighbours} == {(0, 1), (1, 2), (2, 3)}
    assert found.overlap == min(pair.overlap for pair in found.neighbours)
    middle = found.between(1, 3)
    assert float(middle.value) == pytest.approx(found.f[3] - found.f[1])
    assert_z(float(middle.value), float(EXACT[3] - EXACT[1]), float(middle.stderr))
    assert multistate_verdict(found, drift=halves(rows, seed=1)).word == "reliable"
    with pytest.raises(AssertionError):
        check(multistate_free_energies(made([part[[0, 2, 1, 3]] for part in rows_of(rows)]), seed=1))


def rows_of(rows: StatePotentials) -> list[np.ndarray]:
    return [rows.u[:, rows.state == k] for k in range(len(rows.u))]


def test_counted_rows_are_rows_repeated() -> None:
    rows = made(oscillators(seed=2))
    counts = np.random.default_rng(3).integers(0, 4, len(rows))
    repeated = np.repeat(rows.u, counts, axis=1)
    theirs = mbar_free_energies(repeated, np.bincount(rows.state, weights=counts).astype(int))
    np.testing.assert_allclose(solve_mbar(rows.u, rows.state, counts.astype(float)), theirs.f, atol=1e-8)


def test_two_states_are_the_acceptance_ratio() -> None:
    rng = np.random.default_rng(4)
    w_f, w_r = rng.normal(1.3 + 1.125, 1.5, 800), rng.normal(-1.3 + 1.125, 1.5, 300)
    w_f[:7] = np.inf
    u = [np.stack([np.full(800, 5.0), w_f + 5]), np.stack([w_r - 3, np.full(300, -3.0)])]
    found = multistate_free_energies(made(u), seed=1)
    ratio = acceptance_ratio(*(Works.of(w, role="evaluate", log_det_error=0.0) for w in (w_f, w_r)), seed=1)
    (pair,) = found.neighbours
    assert float(found.f[1]) == pytest.approx(float(ratio.difference.value), abs=1e-8)
    assert float(np.asarray(found.estimate.stderr)[1]) == pytest.approx(float(ratio.difference.stderr), rel=1e-6)
    assert pair.overlap == pytest.approx(ratio.overlap, abs=1e-8)
    assert (pair.n_a, pair.n_b) == pytest.approx((ratio.n_forward, ratio.n_reverse), rel=1e-8)
    assert float(pair.mismatch.value) == pytest.approx(float(ratio.mismatch.value), abs=1e-8)
    assert float(pair.mismatch.stderr) == pytest.approx(float(ratio.mismatch.stderr), rel=1e-6)


def affine(shift: list[float], scale: list[float]) -> Transform:
    transform = affine_flow().transform
    with torch.no_grad():
        transform.shift.copy_(torch.tensor(shift))  # type: ignore[operator, union-attr]
        transform.log_scale.copy_(torch.tensor(scale).log())  # type: ignore[operator, union-attr]
    return transform


#: Three Gaussians in two dimensions: mean, width.
MEANS, SPREADS = [[0.0, 0.0], [4.0, -1.0], [-3.0, 2.0]], [[1.0, 1.0], [0.3, 2.0], [2.0, 0.5]]
EXACT_2D = -np.log(np.prod(SPREADS, axis=1))


def gaussians() -> list[Gaussian]:
    spreads = torch.tensor(SPREADS, dtype=torch.float64)
    return [Gaussian(torch.tensor(mean, dtype=torch.float64), covariance=s.square().diag()) for mean, s in zip(MEANS, spreads, strict=True)]


def mapped(transforms: list[Transform], *, seed: int, n: int = 600) -> list[np.ndarray]:
    """Pulled-back potentials of independent samples of the three Gaussians."""
    states, generator = MappedStates(gaussians(), transforms), torch.Generator().manual_seed(seed)
    assert states.is_exact
    assert states.log_det_error == 0.0
    noise = torch.randn(3, n, 2, dtype=torch.float64, generator=generator)
    xs = torch.tensor(MEANS, dtype=torch.float64)[:, None] + torch.tensor(SPREADS, dtype=torch.float64)[:, None] * noise
    with torch.no_grad():
        return [states.reduced_potentials(x, k).numpy() for k, x in enumerate(xs)]


def wrong_maps() -> list[Transform]:
    return [Chain(), affine([3.6, -0.7], [0.4, 1.7]), affine([-2.5, 1.8], [1.7, 0.6])]


def test_exact_maps_give_exact_free_energies() -> None:
    exact = [Chain(), *(affine(mean, spread) for mean, spread in zip(MEANS[1:], SPREADS[1:], strict=True))]
    found = multistate_free_energies(made(mapped(exact, seed=5)), n_bootstrap=20, seed=1)
    np.testing.assert_allclose(found.f, EXACT_2D, atol=1e-10)
    assert np.asarray(found.estimate.stderr).max() < 1e-9
    assert found.overlap == pytest.approx(1.0)
    np.testing.assert_allclose(found.overlap_matrix, 1 / 3, atol=1e-9)
    assert multistate_verdict(found).word == "reliable"


def test_wrong_maps_change_the_error_and_not_the_answer() -> None:
    found = multistate_free_energies(made(mapped(wrong_maps(), seed=6)), seed=1)
    check(found, EXACT_2D)
    plain = multistate_free_energies(made(mapped([Chain()] * 3, seed=6)), seed=1)
    assert (np.asarray(found.estimate.stderr)[1:] < 0.5 * np.asarray(plain.estimate.stderr)[1:]).all()
    assert plain.overlap < 0.5 * found.overlap


class WithoutJacobian(Chain):
    """A map whose log determinant is dropped."""

    def forward(self, z, context=None):
        x, log_det = super().forward(z, context)
        return x, 0 * log_det

    def inverse(self, x, context=None):
        z, log_det = super().inverse(x, context)
        return z, 0 * log_det


def test_a_map_without_its_log_determinant_is_caught() -> None:
    twin: list[Transform] = [Chain(), *(WithoutJacobian(transform) for transform in wrong_maps()[1:])]
    with pytest.raises(AssertionError):
        check(multistate_free_energies(made(mapped(twin, seed=6)), seed=1), EXACT_2D)


def test_potentials_of_two_mapped_states_are_works_of_their_bridge() -> None:
    a, b, _ = gaussians()
    states, bridge = MappedStates([a, b], [Chain(), wrong_maps()[1]]), Bridge(a, b, wrong_maps()[1])
    x = torch.randn(9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        forward, reverse = states.reduced_potentials(x, 0), states.reduced_potentials(x, 1)
        torch.testing.assert_close(forward[1] - forward[0], bridge.works(x), atol=1e-12, rtol=0)
        torch.testing.assert_close(reverse[0] - reverse[1], bridge.reverse_works(x), atol=1e-12, rtol=0)
    estimated = Chain()
    estimated.transforms.append(affine([0.0], [1.0]))
    estimated.transforms[0].log_det_error = None
    assert MappedStates([a, b], [Chain(), estimated]).log_det_error is None
    with pytest.raises(ShapeError, match="1 maps and 2 states"):
        MappedStates([a, b], [Chain()])


def test_a_state_without_samples_follows_by_reweighting() -> None:
    u = oscillators(seed=7)
    rows = made([u[0], u[1][:, :0], u[2], u[3]])
    found = multistate_free_energies(rows, seed=1)
    check(found)
    assert list(found.reweighted) == [1]
    assert found.f[1] == pytest.approx(mbar_free_energies(rows.u, rows.n_k).f[1], abs=1e-8)
    assert found.overlap_matrix.shape == (3, 3)
    far = [np.concatenate([part, part[:1] + 30 * np.sqrt(2 * part[:1])]) for part in rows_of(rows)] + [np.zeros((5, 0))]
    verdict = multistate_verdict(multistate_free_energies(made(far), n_bootstrap=20, seed=1))
    assert verdict.word == "not converged"
    assert "independent units carry state 4, which has no samples" in " ".join(verdict.reasons)


def test_infinite_energies_weigh_nothing() -> None:
    """State 1 is state 0 with a wall at x < 0: F_1 − F_0 = ln 2."""
    rng = np.random.default_rng(8)
    u = [np.stack([x * x / 2, np.where(x < 0, np.inf, x * x / 2)]) for x in (rng.normal(size=2000), np.abs(rng.normal(size=500)))]
    check(multistate_free_energies(made(u), seed=1), np.array([0.0, math.log(2)]))


def test_bad_potentials_are_named() -> None:
    u = oscillators(seed=9, counts=(2000, 2000, 2000, 2000))
    u[1][3, 7] = np.nan
    some = made(u)
    assert (len(some), some.n_nan) == (7999, 1)
    assert "1 rows with energies that were not a number" in multistate_free_energies(some, n_bootstrap=20, seed=1).estimate.note
    u[1][0, :4] = np.nan
    with pytest.raises(EnergyError, match=r"5 of 2000 samples of state 1 have energies that are NaN, rows \[0, 1, 2, 3, 7\]"):
        made(u)
    u = oscillators(seed=9)
    for k, value, match in ((0, -np.inf, "sample 3 of state 2 has an energy of -inf"), (2, np.inf, "sample 3 of state 2 has infinite")):
        spoilt = [part.copy() for part in u]
        spoilt[2][k, 3] = value
        with pytest.raises(EnergyError, match=match):
            made(spoilt)
    with pytest.raises(ShapeError, match=r"expected potentials \[2, n\] for each of 2 states"):
        made(u[:2])
    with pytest.raises(InputError, match="samples of state 0 and of another"):
        made([part[:, :0] for part in u])
    with pytest.raises(ShapeError, match="a chain and a time for every sample"):
        made(u, chain=[np.zeros(3)] * 4)


def test_rows_that_trained_and_inexact_maps_are_refused() -> None:
    u = oscillators(seed=10)
    for more, error in (
        ({"role": "train"}, TrainingDataError),
        ({"is_exact": False}, InexactDensityError),
        ({"log_det_error": None}, InexactDensityError),
        ({"log_det_error": 0.1}, InexactDensityError),
    ):
        with pytest.raises(error):
            multistate_free_energies(made(u, **more), seed=1)


def test_states_that_are_not_tied_together_have_no_number() -> None:
    apart = oscillators(seed=11)
    for k in range(4):
        apart[k][2:] = np.where(k < 2, np.inf, apart[k][2:])
        apart[k][:2] = np.where(k < 2, apart[k][:2], np.inf)
    with pytest.raises(NoOverlapError, match="states 0 and 2 are not tied together"):
        multistate_free_energies(made(apart), seed=1)
    far = [part + 1e4 * np.abs(np.arange(4) - k)[:, None] for k, part in enumerate(oscillators(seed=11))]
    with pytest.raises(NoOverlapError, match="no overlap that double precision can tell"):
        multistate_free_energies(made(far), seed=1)


def test_the_weakest_link_decides() -> None:
    """Far states without one between them, and few rows."""
    u = [part[[0, 3]] for k, part in enumerate(oscillators(seed=12)) if k in (0, 3)]
    weak = multistate_verdict(multistate_free_energies(made(u), n_bootstrap=50, seed=1))
    assert weak.word == "low overlap"
    assert "states 0 and 1 overlap by" in weak.reasons[0]
    few = multistate_verdict(multistate_free_energies(made([part[:, :40] for part in oscillators(seed=12)]), n_bootstrap=50, seed=1))
    assert few.word == "not converged"
    assert "tie them together, 50 of each are needed" in few.reasons[0]
    wrong = oscillators(seed=12)
    wrong[1][1] += 0.8 * (wrong[1][1] - wrong[1][1].mean())  # as if state 1 were evaluated at another temperature
    assert "contradict each other" in " ".join(multistate_verdict(multistate_free_energies(made(wrong), seed=1)).reasons)
    drifting = oscillators(seed=12)
    drifting[0][1:, :200] += 1.0
    doubts = multistate_verdict(
        multistate_free_energies(made(drifting), n_bootstrap=50, seed=1), drift=halves(made(drifting), seed=1), warnings=("look here",)
    )
    assert doubts.reasons[0] == "look here"
    assert "the halves of the data give" in doubts.reasons[-1]


def correlated(*, seed: int, memory: float, n: int, shared: float, chains: int = 2) -> tuple[list[np.ndarray], dict[str, object]]:
    """Three shifted oscillators of chains that remember their past, with ``shared`` of their noise in common as after exchanges."""
    rng, centres = np.random.default_rng(seed), np.array([0.0, 1.0, 2.0])
    noise = rng.normal(size=(3, chains, n + 300)) * np.sqrt(1 - shared) + rng.normal(size=(chains, n + 300)) * np.sqrt(shared)
    x = lfilter([1.0], [1.0, -memory], noise * np.sqrt(1 - memory**2), axis=2)[:, :, 300:].reshape(3, -1) + centres[:, None]
    u = [0.5 * (one - centres[:, None]) ** 2 for one in x]
    return u, {"chain": [np.repeat(np.arange(chains), n)] * 3}


def test_rows_that_exchanged_are_drawn_together() -> None:
    u, more = correlated(seed=13, memory=0.5, n=300, shared=0.9)
    alone, together = made(u, **more).blocked(), made(u, **more).blocked(together=True)
    assert len(alone.strata()) == 3
    assert len(together.strata()) == 1
    first = together.units[together.state == 0]
    assert np.array_equal(first, together.units[together.state == 2])
    assert len(np.unique(first)) == together.units.max() + 1
    assert len(np.unique(first[:300])) + len(np.unique(first[300:])) == len(np.unique(first))
    assert alone.statistical_inefficiencies() == pytest.approx(3.0, rel=0.5)
    with pytest.raises(InputError, match="samples of state 0 form one independent unit"):
        made([part[:, :300] for part in u]).blocked(at_least=[100.0, 1.0, 1.0])
    early, late = alone.halves()
    assert len(early) == len(late) == 900


def spread(treated: Callable[[StatePotentials], StatePotentials], *, repeats: int, **more: float) -> np.ndarray:
    """z of F_2 − F_0 = 0 in independent repeats."""
    z = []
    for seed in range(repeats):
        u, chains = correlated(seed=seed, **more)  # type: ignore[arg-type]
        found = multistate_free_energies(treated(made(u, **chains)), n_bootstrap=50, seed=seed)
        z.append(found.f[2] / np.asarray(found.estimate.stderr)[2])
    return np.array(z)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [0.0, 0.8])
def test_error_bars_hold_for_correlated_chains(shared: float) -> None:
    """Chains with noise in common as after exchanges, and without; a twin that takes every row by itself is caught."""
    more = {"memory": 0.8, "n": 400, "shared": shared}
    z = spread(lambda rows: rows.blocked(together=shared > 0), repeats=40, **more)
    assert 0.7 < np.std(z) < 1.4
    assert not 0.7 < np.std(spread(lambda rows: rows, repeats=40, **more)) < 1.4


@pytest.mark.slow
def test_intervals_cover() -> None:
    """95 % intervals in 200 repeats of mapped oscillators: 184 to 196 of them within three binomial errors."""
    z = []
    for seed in range(200):
        found = multistate_free_energies(made(mapped(wrong_maps(), seed=1000 + seed, n=200)), n_bootstrap=200, seed=seed)
        z.append((found.f[2] - EXACT_2D[2]) / np.asarray(found.estimate.stderr)[2])
    assert 0.90 <= float(np.mean(np.abs(z) < 1.96)) <= 0.99


def test_units_of_every_row_are_kept_by_rows() -> None:
    rows = made(oscillators(seed=14))
    some = rows.rows(rows.state != 1)
    assert some.n_k.tolist() == [400, 0, 300, 500]
    assert some.units.max() == 1199
    assert replace(some, units=some.units).note == ""
