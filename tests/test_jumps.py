"""Jumps to proposals of a flow over all coordinates: exact with production frozen, biased where learning goes on; the job, and resuming."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from assertions import assert_z, z_score
from torch import Tensor

from boltzgen.config import JumpsConfig, default_config_text, make_config
from boltzgen.core import Distribution
from boltzgen.cvs import CollectiveVariables, Dihedral
from boltzgen.distributions import NormalMixture
from boltzgen.errors import CheckpointError, ConfigError, InputError, Interrupted, TopologyError
from boltzgen.estimators.reweighting import free_energy_difference
from boltzgen.mixtures import Flat, Mixture
from boltzgen.sampling.adaptive import AdaptiveSampler, Cycle, Plan
from boltzgen.sampling.chains import ProposalInfo
from boltzgen.sampling.coordinate_learner import CoordinateLearner, FlowJump
from boltzgen.sampling.hamiltonian import HamiltonianMonteCarlo
from boltzgen.targets.analytic import DoubleWell
from boltzgen.workflows import jumps
from boltzgen.workflows.jobs import draw_more, make_report, require_usable
from boltzgen.workflows.jump_analysis import analyse_jumps, jump_acceptance, recycled_samples, round_trips, walker_samples
from boltzgen.workflows.jump_records import JumpHistory
from boltzgen.workflows.run_folder import Results, RunFolder

SYSTEM = Path(__file__).parent.parent / "systems/alanine_dipeptide_vacuum"
#: A barrier of 12 kT that local moves do not cross; 12 % of the density is on the right.
WELL = DoubleWell(3, barrier=12.0, tilt=1.0)
RIGHT = 1 / (1 + np.exp(WELL.free_energy_difference))
N_WALKERS = 40


def peak(centre: Tensor, width: Tensor) -> NormalMixture:
    """One normal."""
    return NormalMixture(centre[None], width[None])


class TwoPeaks:
    """A normal peak for the data on either side, twice as wide as them, weighted as they are: learned in closed form."""

    def learned(self, x: Tensor, before: Distribution | None, *, generator: torch.Generator) -> tuple[Distribution, Mapping[str, float]]:
        sides = [rows for rows in (x[x[:, 0] < 0], x[x[:, 0] > 0]) if len(rows)]
        peaks = [peak(rows.mean(0), 2 * rows.std(0, correction=0) + 0.02) for rows in sides]
        return Mixture(peaks, [float(len(rows)) for rows in sides]), {"n_rows": float(len(x))}

    def described(self, flow: Distribution) -> Mapping[str, Any]:
        assert isinstance(flow, Mixture)
        return {"centres": [p.means[0] for p in flow.parts], "widths": [p.widths[0] for p in flow.parts], "weights": flow.weights}

    def rebuilt(self, content: Mapping[str, Any]) -> Distribution:
        peaks = [peak(torch.as_tensor(c), torch.as_tensor(s)) for c, s in zip(content["centres"], content["widths"], strict=True)]
        return Mixture(peaks, content["weights"].tolist())


class NeverFrozen(AdaptiveSampler):
    """Wrong: proposes from where the walkers are now, to the end."""

    @property
    def stage(self) -> str:  # type: ignore[override]
        return "adaptation"

    def advance(self) -> Cycle:
        cycle = super().advance()
        self.learner.observed = self.learner.observed[-1:]  # type: ignore[attr-defined]
        self.learner.learn(generator=self.generator)
        return cycle


def two_starts() -> Tensor:
    """One configuration of each basin, in turn; no other data."""
    x = torch.zeros(N_WALKERS, 3, dtype=torch.float64)
    x[:, 0] = torch.tensor([-1.0, 1.0]).repeat(N_WALKERS // 2)
    return x


def sampler(seed: int, *, kind: type[AdaptiveSampler] = AdaptiveSampler, n_production: int = 1500) -> AdaptiveSampler:
    local = HamiltonianMonteCarlo(WELL, step_size=0.12, n_leapfrog=1)  # MALA
    plan = Plan(n_local=3, n_rounds=4, n_cycles=25, n_production=n_production)
    generator = torch.Generator().manual_seed(seed)
    return kind(local, CoordinateLearner(WELL, TwoPeaks()), plan=plan, state=local.init(two_starts()), generator=generator)


def cycles_of(loop: AdaptiveSampler) -> list[Cycle]:
    cycles: list[Cycle] = []
    loop.run(lambda cycle: cycles.append(cycle) or True)  # type: ignore[func-returns-value]
    return cycles


def by_pair(cycles: list[Cycle], observable: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """Mean of an observable, and its error from the scatter of pairs of walkers, one from either start."""
    means = torch.stack([observable(cycle.state.x) for cycle in cycles]).mean(0).reshape(-1, 2).mean(1)
    return float(means.mean()), float(means.std() / len(means) ** 0.5)


def on_the_right(x: Tensor) -> Tensor:
    return (x[:, 0] > 0).double()


def history(cycles: list[Cycle]) -> JumpHistory:
    """Cycles with jumps, their coordinates taken for variables."""
    infos = [cycle.jump for cycle in cycles if isinstance(cycle.jump, ProposalInfo)]
    assert len(infos) == len(cycles)
    c, empty = len(cycles), np.zeros((0, N_WALKERS, 3))
    return JumpHistory(
        xi=np.stack([cycle.state.x for cycle in cycles]), u=np.stack([cycle.state.u for cycle in cycles]),
        xi_between=np.stack([cycle.before.x for cycle in cycles]), u_between=np.stack([info.u_before for info in infos]),
        xi_proposed=np.stack([info.x for info in infos]), u_proposed=np.stack([info.u for info in infos]),
        log_ratio=np.stack([info.log_ratio for info in infos]), accepted=np.stack([info.accepted for info in infos]),
        round=np.array([cycle.round for cycle in cycles]), local_acceptance=np.ones(c), loss=np.full(c, np.nan), n_learned=np.zeros(c),
        x=empty, x_cycle=np.zeros(0),
    )  # fmt: skip


@pytest.fixture(scope="module")
def frozen() -> list[Cycle]:
    return cycles_of(sampler(1))


def test_frozen_production_is_exact_and_finds_both_basins_from_one_configuration_each(frozen: list[Cycle]) -> None:
    production = [cycle for cycle in frozen if cycle.stage == "production"][100:]
    assert_z(*_against(production, on_the_right, RIGHT))
    assert_z(*_against(production, lambda x: x[:, 1] ** 2, 1.0))
    assert jump_acceptance(history(production))[-1] > 0.2
    trips = round_trips(np.stack([cycle.state.x[:, 0].numpy() > 0 for cycle in production]))
    assert trips > 100


def test_local_moves_alone_stay_where_they_started() -> None:
    loop = sampler(2, n_production=20)
    loop.learner = _Nothing(WELL, TwoPeaks())
    share, _ = by_pair(cycles_of(loop), on_the_right)
    assert share == 0.5


def test_counting_adaptation_is_biased(frozen: list[Cycle]) -> None:
    value, error = by_pair(frozen[:100], on_the_right)  # the walkers of the first round are half and half
    assert z_score(value, RIGHT, error) > 8


def test_learning_on_in_production_is_biased() -> None:
    cycles = cycles_of(sampler(3, kind=NeverFrozen, n_production=200))[100:]
    value, error = by_pair(cycles, on_the_right)
    assert abs(value - RIGHT) > 8 * error


def test_recycled_proposals_agree_with_quadrature_and_have_the_smaller_error(frozen: list[Cycle]) -> None:
    done = history([cycle for cycle in frozen if cycle.stage == "production"])
    found = {}
    for name, source in (("recycled", recycled_samples(done, 100)), ("walkers", walker_samples(done, 100))):
        right = torch.from_numpy(source.xi[:, 0] > 0)
        found[name] = free_energy_difference(source.samples, ~right, right, seed=1)
        assert_z(float(found[name].value), WELL.free_energy_difference, float(found[name].stderr))
    assert found["recycled"].stderr < found["walkers"].stderr
    unweighted = replace(recycled_samples(done, 100).samples, log_w=torch.zeros(2 * done.u[100:].size, dtype=torch.float64))
    right = torch.from_numpy(recycled_samples(done, 100).xi[:, 0] > 0)
    wrong = free_energy_difference(unweighted, ~right, right, seed=1)
    assert abs(z_score(float(wrong.value), WELL.free_energy_difference, float(wrong.stderr))) > 8


def test_the_loop_goes_on_from_a_snapshot_as_if_never_stopped() -> None:
    whole = sampler(4, n_production=30)
    cycles_of(whole)
    for stop in (40, 110):
        first, second = sampler(4, n_production=30), sampler(5, n_production=30)
        first.run(lambda cycle, stop=stop: cycle.number + 1 < stop)  # type: ignore[misc]
        second.restore(first.snapshot())
        second.run(lambda cycle: True)
        assert torch.equal(second.state.x, whole.state.x)


def test_production_carries_no_observations() -> None:
    """Checkpoints hold what the rest of the run needs."""
    loop, numbers = sampler(4, n_production=3), []
    loop.run(lambda cycle: numbers.append(len(loop.snapshot()["learner"]["observed"])) or True)  # type: ignore[func-returns-value]
    assert numbers == [*range(1, 100), 0, 0, 0, 0]


def test_a_walker_where_the_flow_has_no_density_stays(generator: torch.Generator) -> None:
    move = FlowJump(Flat([-2.0, -1.0, -1.0], [0.0, 1.0, 1.0]), WELL)
    state, info = move.step(move.init(two_starts()), generator=generator)
    assert not info.accepted[1::2].any()
    assert info.accepted[0::2].any()
    assert torch.equal(state.x[1::2], two_starts()[1::2])


def test_verdict_says_that_a_basin_was_never_left(frozen: list[Cycle]) -> None:
    production = history([cycle for cycle in frozen if cycle.stage == "production"])
    variables = CollectiveVariables([Dihedral(name, (0, 1, 2, 3)) for name in ("a", "b", "c")])
    config = make_config({"task": "jumps", "topology": "t.pdb", "system": "s.xml"})
    assert isinstance(config, JumpsConfig)
    basin = {"right": {"a": (0.0, 3.0)}}
    good = analyse_jumps(config, production, production, variables=variables, regions=basin)
    assert good.verdict.word == "reliable", good.verdict.reasons
    still = np.repeat(two_starts().numpy()[None], len(production), axis=0)
    stuck = replace(production, xi=still, xi_between=still, accepted=np.zeros_like(production.accepted))
    bad = analyse_jumps(config, stuck, stuck, variables=variables, regions=basin)
    assert bad.verdict.word == "missing modes"
    assert any("no walker ever left right" in reason for reason in bad.verdict.reasons)
    assert any("0 % of the jumps" in reason for reason in bad.verdict.reasons)
    nowhere = analyse_jumps(config, production, production, variables=variables, regions={"far": {"a": (3.0, 3.1)}})
    assert any("no walker ever was in far" in reason for reason in nowhere.verdict.reasons)


def _against(cycles: list[Cycle], observable: Callable[[Tensor], Tensor], exact: float) -> tuple[float, float, float]:
    value, error = by_pair(cycles, observable)
    return value, exact, error


class _Nothing(CoordinateLearner):
    """Learns and never proposes."""

    def move(self) -> None:
        return None


def tiny(**more: Any) -> JumpsConfig:
    """Alanine dipeptide from a configuration of each basin, far too short."""
    values: dict[str, Any] = {
        "task": "jumps", "topology": str(SYSTEM / "topology.pdb"), "system": str(SYSTEM / "system.xml"), "platform": {"name": "Reference"},
        "walkers": {"count": 4, "equilibration": 3, "files": [str(SYSTEM / "topology.pdb"), str(SYSTEM / "phi_positive.pdb")]},
        "local": {"steps": 5}, "flow": {"torsion_layers": 2, "stiff_layers": 1, "hidden": [8]},
        "learning": {"steps": 5, "batch_size": 32}, "adaptation": {"rounds": 2, "cycles": 12},
        "production": {"cycles": 20, "save_interval": 5},
    }  # fmt: skip
    config = make_config(values | more)
    assert isinstance(config, JumpsConfig)
    return config


def run(config: JumpsConfig, path: Path, *, resume: bool = False) -> Results:
    with RunFolder.create(path, resume=resume) as folder:
        return jumps.run_jumps(config, folder, progress=False)


def stopping_after(n: int) -> Callable[[], Any]:
    """A stand-in for signals that asks to stop after ``n`` cycles."""

    @contextmanager
    def stop() -> Iterator[Callable[[], bool]]:
        asked = iter(range(10**6))
        yield lambda: next(asked) >= n

    return stop


def test_the_job_writes_results_and_resumes_bitwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = run(tiny(), tmp_path / "whole").to_dict()
    names = [estimate["name"] for estimate in results["estimates"]]
    assert names[:2] == ["F(phi_positive) - F(rest)", "F(phi_positive) - F(rest), walkers alone"]
    assert results["verdict"] != "reliable"
    assert results["verdict_reasons"]
    evaluations = results["diagnostics"]["energy_evaluations"]
    assert [evaluations[name] for name in ("starts", "local moves", "proposals")] == [3 * 4 * 7, 44 * 4 * 7 + 4 * 32, 2 * 4 * 32]
    for name in ("acceptance.png", "walkers_phi.png", "jump_profile_phi.png", "samples.npz", "profiles.npz", "flow.safetensors"):
        assert (tmp_path / "whole" / name).exists(), name
    page = (tmp_path / "whole/report.html").read_text()
    assert all(text in page for text in ("Sampling by jumps", "Walkers along φ", "Acceptance", "Free-energy profile along φ"))
    with np.load(tmp_path / "whole/samples.npz") as samples:
        assert samples["cycle"].tolist() == [30, 35, 40]  # 25 is discarded
    for n in (15, 13):  # within the second round, and 13 cycles later in production
        monkeypatch.setattr(jumps, "stop_on_signal", stopping_after(n))
        with pytest.raises(Interrupted, match="resume to go on"):
            run(tiny(), tmp_path / "parts", resume=n == 13)
    monkeypatch.undo()
    run(tiny(), tmp_path / "parts", resume=True)
    with np.load(tmp_path / "whole/samples.npz") as whole, np.load(tmp_path / "parts/samples.npz") as parts:
        assert all(np.array_equal(whole[name], parts[name]) for name in whole.files)
    folders = [RunFolder.read(tmp_path / name) for name in ("whole", "parts")]
    stages = [[jumps.JumpRecorder(folder, 5).joined(stage) for folder in folders] for stage in ("adaptation", "production")]
    for one, other in stages:
        assert all(np.array_equal(one[name], other[name], equal_nan=True) for name in one)
    assert make_report(folders[0]).exists()
    with pytest.raises(InputError, match=r"samples\.npz"):
        draw_more(folders[0], 10)
    with pytest.raises(CheckpointError, match="local"):
        run(tiny(local={"steps": 6}), tmp_path / "parts", resume=True)


def test_a_finished_run_made_longer_is_the_longer_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jumps, "build_jumps_report", lambda *arguments, **options: None)
    few = {"adaptation": {"rounds": 1, "cycles": 12}, "learning": {"steps": 2, "batch_size": 32}}
    production = [{"cycles": n, "save_interval": 5} for n in (10, 14)]
    run(tiny(**few, production=production[0]), tmp_path / "parts")
    results = [
        run(tiny(**few, production=production[1]), tmp_path / name, resume=resume).to_dict()
        for name, resume in (("parts", True), ("whole", False))
    ]
    assert results[0]["estimates"] == results[1]["estimates"]
    assert results[0]["diagnostics"] == results[1]["diagnostics"]


def test_walkers_of_another_system_are_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped between the starts and the first checkpoint, and the system changed."""
    system = tmp_path / "system.xml"
    system.write_bytes((SYSTEM / "system.xml").read_bytes())
    config = tiny(system=str(system))
    with monkeypatch.context() as patch:
        patch.setattr(jumps, "run_cycles", _power_cut)
        with pytest.raises(RuntimeError, match="power cut"):
            run(config, tmp_path / "run")
    system.write_bytes((SYSTEM / "system.xml").read_bytes() + b"\n")
    with pytest.raises(CheckpointError, match=r"starts\.npz belong to another system or configuration; start again with --overwrite"):
        run(config, tmp_path / "run", resume=True)


def _power_cut(*arguments: Any, **options: Any) -> None:
    raise RuntimeError("power cut")


def test_hamiltonian_local_moves_find_their_step(tmp_path: Path) -> None:
    config = tiny(local={"kind": "hmc", "steps": 3}, adaptation={"rounds": 1, "cycles": 10}, production={"cycles": 10})
    results = run(config, tmp_path / "run").to_dict()
    assert 0.2 < results["diagnostics"]["local_acceptance"] <= 1.0


def test_starts_that_cannot_work_are_refused(tmp_path: Path) -> None:
    mirrored = tmp_path / "mirrored.pdb"
    lines = (SYSTEM / "phi_positive.pdb").read_text().splitlines()
    turned = [f"{line[:30]}{-float(line[30:38]):8.3f}{line[38:]}" if line.startswith(("ATOM", "HETATM")) else line for line in lines]
    mirrored.write_text("\n".join(turned) + "\n")
    starts = {"count": 4, "files": [str(SYSTEM / "topology.pdb"), str(mirrored)]}
    with pytest.raises(TopologyError, match="one mirror image"):
        require_usable(tiny(walkers=starts))
    other = SYSTEM.parent / "capped_valine/topology.pdb"
    with pytest.raises(InputError, match=r"walkers\.files: expected positions of 22 atoms"):
        require_usable(tiny(walkers={"count": 4, "files": [str(other)]}))
    with pytest.raises(ConfigError, match=r"walkers\.count: expected at least one walker for each of the 3"):
        tiny(walkers={"count": 2, "files": ["a.pdb", "b.pdb", "c.pdb"]})


def test_the_default_configuration_is_one() -> None:
    text = default_config_text("jumps")
    assert "walkers:" in text
    assert make_config(yaml.safe_load(text)) == make_config({"task": "jumps", "topology": "topology.pdb", "system": "system.xml"})
