"""The job of a molecule in Cartesian coordinates, small: complete, resumable, of the right hand, and clear about bad input."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
import openmm
import pytest
import torch

from boltzgen.chirality import Handedness, equal_hydrogens
from boltzgen.config import CartesianConfig, make_config
from boltzgen.core import Flow
from boltzgen.distributions import ParticleNormal
from boltzgen.errors import ConfigError, InputError, Interrupted, TopologyError
from boltzgen.md.loading import load
from boltzgen.md.platforms import PlatformChoice
from boltzgen.md.target import OpenMMTarget
from boltzgen.networks.embedded_field import EmbeddedField
from boltzgen.networks.pair_scales import PairStatistics
from boltzgen.transforms.continuous import ContinuousTransform, FixedStep
from boltzgen.transforms.volume import StepJacobian
from boltzgen.workflows import cartesian, continuous, matching
from boltzgen.workflows.cartesian import run_cartesian
from boltzgen.workflows.jobs import draw_more, make_report, require_usable
from boltzgen.workflows.run_folder import RunFolder
from tests.registry import noise, seeded

VACUUM = Path(__file__).parents[1] / "systems/alanine_dipeptide_vacuum"
NOTHING = Handedness(np.zeros((0, 4), dtype=np.int64), torch.zeros(0), np.zeros(0, dtype=bool))
TINY: dict[str, Any] = {
    "task": "cartesian",
    "topology": str(VACUUM / "topology.pdb"),
    "system": str(VACUUM / "system.xml"),
    "platform": {"name": "Reference", "contexts": 1},
    "data": {"steps_per_replica": 2000, "save_interval": 50, "chains": 2},
    "field": {
        "n_layers": 1,
        "hidden": 8,
        "n_radial": 8,
        "steps": 12,
        "training_steps": 2,
        "log_det_error": 0.01,
        "pair_scales": True,
        "late": True,
    },
    "training": {
        "steps": 40,
        "batch_size": 16,
        "learning_rate": 1e-3,
        "tuning_steps": 2,
        "tuning_batch_size": 4,
        "path_weight": 1.0,
        "reverse_weight": 1.0,
        "ema_decay": 0.5,
        "checkpoint_every": 10,
    },
    "evaluation": {"n_samples": 100, "batch_size": 50, "n_bootstrap": 20},
}


def tiny(**changes: Any) -> CartesianConfig:
    made = make_config({key: {**value, **changes.get(key, {})} if isinstance(value, dict) else value for key, value in TINY.items()})
    assert isinstance(made, CartesianConfig)
    return made


@pytest.fixture(autouse=True, scope="module")
def _few_samples() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "_LOOKED_AT", 20)
        patch.setattr(continuous, "_FIRST_LOOK", 4)
        patch.setattr(continuous, "_MEASURED", {"integral": 8, "steps": 8})
        yield


def run(path: Path, config: CartesianConfig, *, resume: bool = False) -> dict[str, Any]:
    with RunFolder.create(path, resume=resume) as folder:
        return run_cartesian(config, folder, progress=False).to_dict()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "cartesian"
    run(path, tiny())
    return path


def test_a_run_leaves_weights_profiles_and_a_report(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert results["task"] == "cartesian"
    assert results["verdict"] != "reliable"
    assert 0 < results["diagnostics"]["log_det_error"] <= 0.01
    assert all(results["diagnostics"]["energy_evaluations"][part] > 0 for part in ("data", "training", "evaluation"))
    for picture in ("energies", "profile_phi", "weights", "training", "ramachandran"):
        assert (finished / f"{picture}.png").stat().st_size > 5000
    assert make_report(RunFolder.read(finished)).exists()


def test_samples_have_the_hand_of_the_structure_and_their_own_energies(finished: Path) -> None:
    path = draw_more(RunFolder.read(finished), 40)
    drawn = mdtraj.load(str(path), top=str(VACUUM / "topology.pdb"))
    assert drawn.n_frames == 40
    loaded = load(VACUUM / "topology.pdb", VACUUM / "system.xml")
    hand = Handedness.of(loaded.molecule, torch.from_numpy(loaded.positions))
    x = torch.from_numpy(drawn.xyz.astype(np.float64))
    weights = np.load(path.with_suffix(".npz"))
    first = hand.centres[0]
    volume = torch.linalg.det(x[:, first[1:]] - x[:, first[:1]]) * hand.signs[0]
    assert float(volume.min()) > -1e-4  # nm³: XTC rounds, and this flow is hardly trained
    weighted = np.isfinite(weights["log_w"])
    assert (weighted == hand.contains(x).numpy()).mean() > 0.9
    np.testing.assert_allclose(weights["log_w"][weighted], (-weights["u"] - weights["log_q"])[weighted])


def test_densities_of_one_hand_are_those_of_the_flow_folded() -> None:
    loaded = load(VACUUM / "topology.pdb", VACUUM / "system.xml")
    target = OpenMMTarget.from_loaded(loaded, temperature_kelvin=300.0, platform=PlatformChoice(name="Reference"))
    x = torch.from_numpy(loaded.positions)
    hand = Handedness.of(loaded.molecule, x)
    field = EmbeddedField(22, 3, length=0.15, n_layers=1, hidden=8, n_radial=8, generator=seeded())
    flow = Flow(ParticleNormal.fitted(x + 0.01 * noise(500, 22, 3)), ContinuousTransform(field.double(), FixedStep(2)))
    density, restricted = cartesian.of_one_hand(flow, target, hand, is_mirrored=field.is_mirrored)
    drawn, log_q = density.sample(20, generator=seeded())
    torch.testing.assert_close(density.log_prob(drawn), log_q)
    torch.testing.assert_close(flow.log_prob(-drawn) + math.log(2), log_q)
    u, bare = restricted.reduced_potential(drawn), target.reduced_potential(drawn)
    assert torch.equal(torch.isfinite(u), hand.contains(drawn) & torch.isfinite(bare))
    assert torch.equal(restricted.reduced_potential(x[None]), target.reduced_potential(x[None]))
    torch.testing.assert_close(target.reduced_potential(-x[None]), target.reduced_potential(x[None]))
    assert float(restricted.reduced_potential(-x[None])) == math.inf
    assert cartesian.of_one_hand(flow, target, hand, is_mirrored=False)[0] is flow
    assert cartesian.of_one_hand(flow, target, NOTHING, is_mirrored=True)[0] is flow


def test_equal_hydrogens_are_equal_to_the_flow_and_other_numberings_are_folded() -> None:
    """Every one of the 16 images has the same density; without the labels of the equal atoms they do not."""
    loaded = load(VACUUM / "topology.pdb", VACUUM / "system.xml")
    target = OpenMMTarget.from_loaded(loaded, temperature_kelvin=300.0, platform=PlatformChoice(name="Reference"))
    x = torch.from_numpy(loaded.positions)
    frames = x + 0.01 * noise(300, 22, 3)
    labels = equal_hydrogens(loaded.molecule, target.reduced_potential, x)
    hand = Handedness.of(loaded.molecule, x, labels=labels)
    exchanged = hand.folded(-x[None], mirror=False)  # the mirror image with its methyl groups renumbered
    assert hand.agrees(exchanged).tolist() == [[True, False, True, True]]

    def density(labels: tuple[str, ...]) -> Flow:
        base = cartesian.make_base(tiny(), loaded.molecule, frames, length=0.12, labels=labels)
        kinds, statistics = [labels.index(label) for label in labels], PairStatistics.of(base.mean_squares, frames)
        sizes = {"n_layers": 1, "hidden": 8, "n_radial": 8}
        field = EmbeddedField(22, 3, length=0.12, labels=kinds, statistics=statistics, **sizes, generator=seeded()).double()
        with torch.no_grad():
            for parameter in field.parameters():
                parameter += 0.002 * torch.randn(parameter.shape, generator=seeded(), dtype=torch.float64)
        return Flow(base, ContinuousTransform(field, FixedStep(6, late=True), volume=StepJacobian()))

    flow = density(labels)
    torch.testing.assert_close(flow.log_prob(exchanged), flow.log_prob(x[None]), atol=1e-8, rtol=0)
    folded, restricted = cartesian.of_one_hand(flow, target, hand, is_mirrored=True)
    drawn, log_q = folded.sample(10, generator=seeded())
    assert bool(hand.contains(drawn).all())
    torch.testing.assert_close(flow.log_prob(drawn) + math.log(16), log_q, atol=1e-8, rtol=0)
    torch.testing.assert_close(folded.log_prob(drawn), log_q, atol=1e-8, rtol=0)
    assert float(folded.log_prob(exchanged)) == -math.inf
    assert float(restricted.reduced_potential(exchanged)) == math.inf
    told = density(loaded.molecule.names)
    assert float((told.log_prob(exchanged) - told.log_prob(x[None])).abs()) > 1e-3


def test_training_knows_the_hands_that_evaluation_gives_weight_to() -> None:
    """A methyl group numbered the other way round has the same energy and weight zero; the whole mirror image is folded back, or not."""
    loaded = load(VACUUM / "topology.pdb", VACUUM / "system.xml")
    target = OpenMMTarget.from_loaded(loaded, temperature_kelvin=300.0, platform=PlatformChoice(name="Reference"))
    x = torch.from_numpy(loaded.positions)
    hand, names = Handedness.of(loaded.molecule, x), loaded.molecule.names
    renumbered, (first, second) = x.clone(), [names.index(name) for name in ("ACE1-H1", "ACE1-H2")]
    renumbered[[first, second]] = renumbered[[second, first]]
    three = torch.stack([x, -x, renumbered])
    for is_mirrored, expected in ((True, [True, True, False]), (False, [True, False, False])):
        u = cartesian.allowed(target, hand, is_mirrored=is_mirrored).reduced_potential(three)
        assert torch.isfinite(u).tolist() == expected
    assert cartesian.allowed(target, NOTHING, is_mirrored=True) is target


def test_data_of_the_other_hand_are_refused(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    data = dict(np.load(tmp_path / "run" / "trajectory.npz"))
    data["x0"][3] *= -1
    np.savez(tmp_path / "run" / "trajectory.npz", **data)
    with pytest.raises(InputError, match=r"1 frames have another handedness than the structure, the first, frame 3, at ACE1-CH3"):
        run(tmp_path / "run", tiny(), resume=True)


def test_molecules_that_are_held_in_place_are_refused(tmp_path: Path) -> None:
    system = openmm.XmlSerializer.deserialize((VACUUM / "system.xml").read_text())
    force = openmm.CustomExternalForce("100 * (x^2 + y^2 + z^2)")
    force.addParticle(0, [])
    system.addForce(force)
    path = tmp_path / "system.xml"
    path.write_text(openmm.XmlSerializer.serialize(system))
    held = make_config({**TINY, "system": str(path)})
    assert isinstance(held, CartesianConfig)
    with pytest.raises(InputError, match="holds it in place"):
        run(tmp_path / "run", held)


def test_an_interrupted_run_ends_where_an_undisturbed_one_does(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(10_000))

    class StopOnce:
        def __enter__(self):  # type: ignore[no-untyped-def]
            return lambda: next(calls) == 25

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(cartesian, "stop_on_signal", StopOnce)
    with pytest.raises(Interrupted):
        run(tmp_path / "run", tiny())
    results = run(tmp_path / "run", tiny(), resume=True)
    ours, theirs = (np.load(path / "weights.npz")["log_q"] for path in (tmp_path / "run", finished))
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    undisturbed = json.loads((finished / "results.json").read_text())["diagnostics"]["energy_evaluations"]["training"]
    assert results["diagnostics"]["energy_evaluations"]["training"] >= undisturbed


def test_rigid_bonds_and_energies_alone_are_refused(tmp_path: Path) -> None:
    system = openmm.XmlSerializer.deserialize((VACUUM / "system.xml").read_text())
    loaded = load(VACUUM / "topology.pdb", VACUUM / "system.xml")
    for i, j in loaded.molecule.bonds:
        if "H" in (loaded.molecule.elements[i], loaded.molecule.elements[j]):
            system.addConstraint(int(i), int(j), float(np.linalg.norm(loaded.positions[i] - loaded.positions[j])))
    path = tmp_path / "system.xml"
    path.write_text(openmm.XmlSerializer.serialize(system))
    rigid = make_config({**TINY, "system": str(path)})
    assert isinstance(rigid, CartesianConfig)
    with pytest.raises(TopologyError, match="12 constrained bond lengths"):
        require_usable(rigid)
    with pytest.raises(TopologyError, match="12 constrained bond lengths"):
        run(tmp_path / "run", rigid)
    with pytest.raises(ConfigError, match="learns from its data"):
        tiny(training={"from_energies": True, "path_weight": 0.0})


def test_bases_come_from_the_data_or_the_bonds() -> None:
    loaded = load(VACUUM / "topology.pdb", VACUUM / "system.xml")
    x = torch.from_numpy(loaded.positions) + 0.02 * noise(500, 22, 3)
    bonds = torch.from_numpy(loaded.molecule.bonds)
    for base in ("fitted", "harmonic", "isotropic"):
        made = cartesian.make_base(tiny(field={"base": base, "scale": 0.2, "narrowest": 0.0}), loaded.molecule, x, length=0.12)
        drawn = made.sample(20_000, generator=seeded())[0]
        lengths = (drawn[:, bonds[:, 0]] - drawn[:, bonds[:, 1]]).square().sum(2).mean(0)
        if base == "fitted":
            expected = (x[:, bonds[:, 0]] - x[:, bonds[:, 1]]).square().sum(2).mean(0)
        else:
            expected = torch.full((len(bonds),), 0.12**2 if base == "harmonic" else 6 * 0.2**2, dtype=torch.float64)
        torch.testing.assert_close(lengths, expected, rtol=0.06, atol=0)
    assert float(cartesian.make_base(tiny(field={"narrowest": 0.0}), loaded.molecule, x, length=0.12).scales.min()) < 0.03
    assert float(cartesian.make_base(tiny(), loaded.molecule, x, length=0.12).scales.min()) == pytest.approx(0.15)


def test_a_finished_run_is_a_flow_move(finished: Path) -> None:
    from boltzgen.workflows.plugins.densities import FreeCentre
    from boltzgen.workflows.plugins.openmmtools import FlowMove

    density = FlowMove(finished).flow.load()
    assert isinstance(density.frame, FreeCentre)
    generator = torch.Generator().manual_seed(1)
    x, log_q = density.draw(4, generator=generator)
    known = ~torch.isnan(log_q)
    assert bool(known.any())
    placed = torch.stack([density.frame.place(y, x[0] + 0.7, generator=generator) for y in x])
    torch.testing.assert_close(placed.mean(1), torch.full((4, 3), 0.7, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(density.log_prob(placed)[known], log_q[known], atol=0.01, rtol=0)
