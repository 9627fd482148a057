"""The job for clusters from its configuration to its report, small."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from boltzgen.config import ParticlesConfig, load_config, make_config
from boltzgen.core import Context, Flow, Target, WeightedSamples
from boltzgen.distributions import ParticleNormal
from boltzgen.errors import CheckpointError, ConfigError, InputError, Interrupted, PlatformError, ShapeError, SolverError
from boltzgen.networks.compiled import CompiledField
from boltzgen.networks.embedded_field import EmbeddedField
from boltzgen.networks.field import ParticleField, along_directions
from boltzgen.networks.radial_field import RadialField
from boltzgen.recipes import FieldSize, particle_field
from boltzgen.sampling.importance import importance_sample
from boltzgen.targets.clusters import CoulombGas, LennardJonesCluster
from boltzgen.training.annealing import tempered_exponent
from boltzgen.transforms.continuous import more_steps
from boltzgen.workflows import continuous, particles
from boltzgen.workflows.jobs import draw_more, make_report, require_usable
from boltzgen.workflows.particles import run_particles
from boltzgen.workflows.particles_report import pair_distances
from boltzgen.workflows.run_folder import RunFolder
from tests.assertions import assert_z
from tests.registry import noise, seeded

VALUES = {
    "task": "particles",
    "system": {"kind": "coulomb", "n_particles": 3, "n_dimensions": 2, "beta": 2.0},
    "walkers": {"n_walkers": 60, "n_times": 30, "thin": 2, "burn_in": 50, "spread": 0.7, "step_size": 0.1},
    "field": {"length": 1.0, "hidden": 12, "n_radial": 10, "steps": 6, "training_steps": 3, "log_det_error": 0.01},
    "training": {"steps": 250, "batch_size": 256, "learning_rate": 5e-3, "tuning_steps": 3, "tuning_batch_size": 16, "ema_decay": 0.9},
    "evaluation": {"n_samples": 400, "batch_size": 200, "n_bootstrap": 20},
}


def config(**changes: dict[str, object]) -> ParticlesConfig:
    made = make_config({key: {**value, **changes.get(key, {})} if isinstance(value, dict) else value for key, value in VALUES.items()})
    assert isinstance(made, ParticlesConfig)
    return made


def run(path: Path, settings: ParticlesConfig, *, resume: bool = False) -> dict:
    with RunFolder.create(path, resume=resume) as folder:
        return run_particles(settings, folder, progress=False).to_dict()


@pytest.fixture(autouse=True, scope="module")
def _few_samples() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continuous, "_FIRST_LOOK", 4)
        patch.setattr(continuous, "_MEASURED", {"integral": 64, "steps": 8})
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "gas"
    run(path, config())
    return path


def test_a_run_leaves_numbers_with_errors_and_a_report(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert results["task"] == "particles"
    estimates = {estimate["name"]: estimate for estimate in results["estimates"]}
    free, bound = estimates["F = -ln Z / beta"], estimates["F, variational"]
    assert bound["value"] > free["value"] - 3 * free["stderr"]
    walkers, flow = estimates["mean reduced potential, walkers alone"], estimates["mean reduced potential"]
    assert abs(walkers["value"] - flow["value"]) < 4.5 * np.hypot(walkers["stderr"], flow["stderr"])
    diagnostics = results["diagnostics"]
    assert diagnostics["ess_raw"] > 0.3
    assert 0 < diagnostics["log_det_error"] <= 0.01
    assert diagnostics["field_evaluations"] == 4 * diagnostics["solver_steps"]
    assert all(diagnostics["energy_evaluations"][part] > 0 for part in ("data", "training", "evaluation"))
    for picture in ("energies", "distances", "weights", "training"):
        assert (finished / f"{picture}.png").stat().st_size > 5000
    assert "Distances" in (finished / "report.html").read_text()


class WithoutCentre(ParticleNormal):
    """Mutant: forgets that the volume of centre and rest is n^{d/2} times that of the coordinates."""

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        n, d = self.event_shape
        return super().log_prob(x) + 0.5 * d * math.log(n)


@pytest.mark.parametrize("mutant", [False, True])
def test_two_charges_get_their_free_energy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant: bool) -> None:
    """F = 1.576789 at beta = 10 by quadrature (test_clusters.py)."""
    if mutant:
        monkeypatch.setattr(particles, "ParticleNormal", WithoutCentre)
    charges = {"n_particles": 2, "n_dimensions": 2, "beta": 10.0}
    settings = config(system=charges, walkers={"step_size": 0.05}, training={"steps": 150, "tuning_steps": 0})
    estimates = {estimate["name"]: estimate for estimate in run(tmp_path / "run", settings)["estimates"]}
    found = estimates["F = -ln Z / beta"]
    assert found["stderr"] < 0.01
    if mutant:
        with pytest.raises(AssertionError):
            assert_z(found["value"], 1.576789, found["stderr"])
    else:
        assert_z(found["value"], 1.576789, found["stderr"])


def test_pair_distances_and_their_histogram() -> None:
    x = np.array([[[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]]])
    np.testing.assert_allclose(pair_distances(x), [[5.0, 1.0, math.sqrt(18)]])


def test_more_samples_and_the_report_come_from_the_folder_alone(finished: Path) -> None:
    drawn = np.load(draw_more(RunFolder.read(finished), 50))
    assert drawn["x"].shape == (50, 3, 2)
    assert np.isfinite(drawn["log_w"]).all()
    first = np.load(finished / "weights.npz")["log_w"]
    assert abs(drawn["log_w"].mean() - first.mean()) < 4.5 * first.std() / 50**0.5
    assert make_report(RunFolder.read(finished)).exists()


def test_judges_are_one_row_of_every_held_out_walker() -> None:
    chain = np.tile(np.arange(7), 40)  # all walkers of one time after another
    chosen = chain < 3
    rows = particles.one_of_each(chain, chosen, generator=seeded())
    assert chain[rows].tolist() == [0, 1, 2]
    assert len({int(row) // 7 for row in rows}) > 1


def test_foreign_weights_are_refused(finished: Path, tmp_path: Path) -> None:
    changed = (finished / "config.yaml").read_text().replace("beta: 2.0", "beta: 3.0")
    for file in finished.iterdir():
        if file.is_file() and file.suffix != ".lock":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.yaml").write_text(changed)
    with pytest.raises(CheckpointError):
        draw_more(RunFolder.read(tmp_path), 5)


def test_an_interrupted_run_ends_where_an_undisturbed_one_does(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(10_000))

    class StopOnce:
        def __enter__(self):  # type: ignore[no-untyped-def]
            return lambda: next(calls) == 100

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(particles, "stop_on_signal", StopOnce)
    with pytest.raises(Interrupted):
        run(tmp_path / "run", config())
    run(tmp_path / "run", config(), resume=True)
    ours, theirs = (np.load(path / "weights.npz")["log_w"] for path in (tmp_path / "run", finished))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_run_goes_on_from_the_weights_of_another(finished: Path, tmp_path: Path) -> None:
    weights = finished / "flow.safetensors"
    untrained = {"steps": 0, "tuning_steps": 0}
    run(tmp_path / "same", config(training={**untrained, "start_from": weights}))
    run(tmp_path / "longer", config(training={"steps": 60, "tuning_steps": 0, "start_from": weights}))
    run(tmp_path / "new", config(training=untrained))
    theirs, same, longer, new = (
        np.load(path / "weights.npz")["log_w"] for path in (finished, *(tmp_path / n for n in ("same", "longer", "new")))
    )
    np.testing.assert_array_equal(same, theirs)
    assert 0 < np.abs(longer - theirs).mean() < np.abs(new - theirs).mean()


def test_weights_to_start_from_must_be_those_of_the_same_field(finished: Path, tmp_path: Path) -> None:
    start = {"start_from": finished / "flow.safetensors"}
    with pytest.raises(CheckpointError, match="belong to another flow"):
        run(tmp_path / "wider", config(training=start, field={"hidden": 16}))
    with pytest.raises(CheckpointError, match=r"training\.start_from.*finished run"):
        run(tmp_path / "missing", config(training={"start_from": tmp_path / "nowhere.safetensors"}))
    changed = tmp_path / "changed.safetensors"
    changed.write_bytes((finished / "flow.safetensors").read_bytes()[:-1] + b"0")
    prints = {particles._fingerprint(config(training=training)) for training in ({}, start, {"start_from": changed})}
    assert len(prints) == 3


def test_energies_alone_lead_to_the_target(tmp_path: Path) -> None:
    alone = {"from_energies": True, "rounds": 3, "round_samples": 1000, "steps": 240, "tuning_steps": 2, "reverse_weight": 1.0}
    results = run(tmp_path / "run", config(training=alone, field={"base": "isotropic", "scale": 0.8}))
    estimates = {estimate["name"]: estimate for estimate in results["estimates"]}
    walkers, flow = estimates["mean reduced potential, walkers alone"], estimates["mean reduced potential"]
    assert abs(walkers["value"] - flow["value"]) < 4.5 * np.hypot(walkers["stderr"], flow["stderr"])
    rows = [json.loads(line) for line in (tmp_path / "run" / "training.jsonl").read_text().splitlines()]
    exponents = [row["exponent"] for row in rows if row["stage"] == "resampling"]
    assert len(exponents) == 3
    assert exponents[-1] == 1.0


def test_a_run_by_the_log_det_of_few_steps_is_exact_to_rounding_and_draws_more(tmp_path: Path) -> None:
    settings = config(field={"log_det": "steps", "late": True, "steps": 3}, training={"tuning_steps": 2})
    results = run(tmp_path / "run", settings)
    assert results["diagnostics"]["solver_steps"] == 3
    assert results["diagnostics"]["log_det_error"] < 1e-6  # walkers are stored in single precision
    with np.load(draw_more(RunFolder.read(tmp_path / "run"), 30)) as more:
        assert np.isfinite(more["log_w"]).all()


def test_steps_are_added_as_the_order_of_the_solver_says() -> None:
    assert more_steps(12, 16.0) == 24
    assert more_steps(12, 4.0) == 19  # 12 · 1.1 · √2
    assert more_steps(12, 1.01) == 14
    assert more_steps(1, 1.01) == 2
    assert more_steps(12, 1e9) == more_steps(12, float("inf")) == 24


def test_steps_that_fail_are_given_up_for_more() -> None:
    settings = config(field={"log_det": "steps", "steps": 3}).field
    field = RadialField(3, 2, length=1.0, n_radial=4)
    pieces = continuous.FieldFlow(ParticleNormal.isotropic(3, 2), field.double(), settings)
    taken, data = list[int](), noise(5, 3, 2)

    def draw(flow: Flow, enough: int = 12) -> WeightedSamples:
        taken.append(flow.transform.solver.n_steps)  # type: ignore[union-attr, arg-type]
        if taken[-1] < enough:
            raise SolverError("not finite")
        return importance_sample(flow, LennardJonesCluster(3, 2), n=4, generator=seeded(), progress=False)

    flow, samples, exactness = pieces.weighted(draw, data=data, generator=seeded())
    assert taken == [3, 6, 12]
    assert exactness["solver_steps"] == flow.transform.solver.n_steps == 12  # type: ignore[union-attr]
    assert exactness["log_det_error"] < 1e-10
    samples.require_exact()
    with pytest.raises(SolverError, match="with 24 steps not finite: take more"):
        pieces.weighted(functools.partial(draw, enough=100), data=data, generator=seeded())


def test_densities_that_stay_rough_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(SolverError, match="log density is still known to"):
        run(
            tmp_path / "run",
            config(field={"log_det_error": 1e-12, "steps": 1}, training={"steps": 5, "tuning_steps": 0}, walkers={"n_times": 2}),
        )


def test_configurations_that_cannot_work_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lives in three dimensions"):
        config(field={"kind": "tensor"})
    with pytest.raises(ConfigError, match="knows no data; set"):
        config(training={"from_energies": True, "tuning_steps": 0})
    with pytest.raises(ConfigError, match="tuning_steps need an objective"):
        config(training={"variance_weight": 0.0})
    with pytest.raises(ConfigError, match="only the embedded field is compiled"):
        config(field={"kind": "egnn", "compile": True})
    with pytest.raises(ConfigError, match="path_weight is for data"):
        config(training={"from_energies": True, "path_weight": 1.0}, field={"base": "isotropic"})
    with pytest.raises(ConfigError, match=r"training\.stepps: unknown key; did you mean 'steps'"):
        config(training={"stepps": 3})
    with pytest.raises(ConfigError, match="expected one of generator, cartesian, particles, tfep, paths, jumps, campaign, got 'clusters'"):
        make_config({"task": "clusters"})


@pytest.mark.parametrize("name", ["dw4", "lj13", "lj55", "coulomb_6_2", "coulomb_20_2"])
def test_stored_configurations_load(name: str) -> None:
    for path in (Path(__file__).parents[1] / "systems" / name).glob("*.yaml"):
        assert isinstance(load_config(path), ParticlesConfig)


class Boxed(LennardJonesCluster):
    box = torch.eye(3)


class Mislabelled(LennardJonesCluster):
    labels = ("A", "B")

    def __init__(self) -> None:
        super().__init__(4)
        self.labels = ("A", "B")


@pytest.mark.parametrize(("target", "error", "message"), [(Boxed(4), InputError, "periodic"), (Mislabelled(), ShapeError, "2 labels")])
def test_fields_that_do_not_fit_their_target_are_refused(target: Target, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        particle_field(EmbeddedField, target, size=FieldSize(length=1.0), generator=seeded())


def test_fields_are_made_for_their_target() -> None:
    for kind in (EmbeddedField, RadialField):
        made = particle_field(kind, CoulombGas(5, 2), size=FieldSize(length=1.0, n_radial=8), generator=seeded())
        assert made(torch.tensor(0.5), noise(2, 5, 2).float()).shape == (2, 5, 2)


def test_devices_that_are_not_there_are_refused() -> None:
    require_usable(config())
    with pytest.raises(PlatformError, match=r"field\.device: 'cuda:99' cannot be used .*; cpu always can"):
        require_usable(config(field={"device": "cuda:99"}))


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"from_energies": True, "rounds": 3, "round_samples": 1000, "reverse_weight": 1.0}])
def test_a_gpu_gives_the_same_physics(tmp_path: Path, changes: dict[str, object]) -> None:
    base = {"base": "isotropic", "scale": 0.8}
    results = run(tmp_path / "run", config(field={"device": "cuda", **base}, training=changes))
    estimates = {estimate["name"]: estimate for estimate in results["estimates"]}
    walkers, flow = estimates["mean reduced potential, walkers alone"], estimates["mean reduced potential"]
    assert abs(walkers["value"] - flow["value"]) < 4.5 * np.hypot(walkers["stderr"], flow["stderr"])
    assert results["diagnostics"]["ess_raw"] > 0.3


@pytest.mark.slow
def test_compiled_fields_are_the_same() -> None:
    field = EmbeddedField(4, 2, length=1.0, generator=seeded())
    with torch.no_grad():
        for parameter in field.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=seeded())
    compiled, t, x = CompiledField(field), torch.tensor(0.3), noise(6, 4, 2).float()
    torch.testing.assert_close(compiled(t, x), field(t, x), atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(compiled.divergence(t, x), field.divergence(t, x), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)

    def gradients(of: ParticleField) -> list[torch.Tensor]:
        v, divergence = of.divergence(t, x)
        loss = (v * noise(*v.shape).float()).sum() + (divergence * noise(len(x)).float()).sum()
        return list(torch.autograd.grad(loss, list(field.parameters())))

    for ours, theirs in zip(gradients(compiled), gradients(field), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
    ours, theirs = (along_directions(lambda y: of(t, y), (x,), (x.flip(0),))[1] for of in (compiled, field))  # noqa: B023
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_the_exponent_of_weights_keeps_the_effective_sample_size() -> None:
    log_w = 3.0 * torch.randn(20_000, generator=seeded(), dtype=torch.float64)
    exponent = tempered_exponent(log_w, minimum_ess=0.3)
    weights = torch.softmax(exponent * log_w, dim=0)
    assert 1 / float(weights.square().sum() * len(weights)) == pytest.approx(0.3, abs=0.01)
    assert tempered_exponent(0.01 * log_w, minimum_ess=0.3) == 1.0
    with pytest.raises(InputError, match="between 0 and 1"):
        tempered_exponent(log_w, minimum_ess=1.0)
