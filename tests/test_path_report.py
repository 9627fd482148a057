"""The report of steered paths: every picture that there are data for, and no crash where there are none."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from scipy.stats import norm, vonmises

from boltzgen.config import PathsConfig, make_config
from boltzgen.core import Distribution, Estimate
from boltzgen.distributions import NormalMixture
from boltzgen.mixtures import Flat, Mixture
from boltzgen.paths import Looks, PathFilm, Paths
from boltzgen.recipes.cv_flow import CVFlowRecipe, CVFlowSize
from boltzgen.report.path_pictures import FilmedPath
from boltzgen.training.checkpoints import save_weights
from boltzgen.workflows.path_densities import Blur, rounds_of, some
from boltzgen.workflows.path_films import FILMS, Films, stored_films
from boltzgen.workflows.path_proposals import PROPOSAL, flow_recipe, stored_proposal
from boltzgen.workflows.path_records import History
from boltzgen.workflows.path_report import WORKS, build_paths_report, rebuild_paths_report, sent_between, work_arrays
from boltzgen.workflows.run_folder import Results, RunFolder, provenance

WALKERS, ROUNDS, CYCLES, PRODUCTION = 8, 6, 10, 120
FILES = {"topology": "/data/a.pdb", "system": "/data/a.xml"}
CHAIN = make_config(FILES | {
    "task": "paths", "collective_variables": {"end_to_end": {"kind": "distance", "atoms": [0, 8]}},
    "ranges": {"end_to_end": ["0.9 nanometer", "2.3 nanometer"]}, "adaptation": {"rounds": ROUNDS, "cycles": CYCLES},
    "basins": {"compact": {"end_to_end": ["0 nanometer", "1.57 nanometer"]},
               "stretched": {"end_to_end": ["1.57 nanometer", "3 nanometer"]}},
    "proposal": {"bins": 4}, "production": {"cycles": PRODUCTION},
})  # fmt: skip
PEPTIDE = make_config(FILES | {
    "task": "paths", "adaptation": {"rounds": ROUNDS, "cycles": CYCLES}, "production": {"cycles": PRODUCTION},
    "collective_variables": {"phi": {"kind": "dihedral", "atoms": [4, 6, 8, 14]}, "psi": {"kind": "dihedral", "atoms": [6, 8, 14, 16]}},
    "basins": {"left": {"phi": ["0 degree", "120 degree"]}, "right": {"phi": ["170 degree", "-10 degree"]}},
    "proposal": {"bins": 4},
})  # fmt: skip
CENTRES = {1: ([1.25], [1.95]), 2: ([-1.4, 2.4], [1.0, 0.6])}
SPREAD = {1: 0.07, 2: 0.35}


def learned(k: int, progress: float, config: PathsConfig) -> Distribution:
    """What a proposal may be after some share of the learning."""
    centres = torch.tensor(CENTRES[k], dtype=torch.float64)
    peaks = NormalMixture(centres, torch.full_like(centres, SPREAD[k] * 1.2), periods=config.periods)
    broad = Flat(*zip(*config.limits, strict=True))
    return Mixture([peaks, broad], [progress + 2e-9, 1 - 0.9 * progress])


def wandering(
    config: PathsConfig, *, rounds: np.ndarray, first: int, crossing: bool = True, failing: float = 0.01, seed: int = 0
) -> History:
    """Made-up cycles of walkers in two basins."""
    k, n, rng = len(config.names), len(rounds), np.random.default_rng(seed)
    period = np.array([p or np.inf for p in config.periods])
    generator = torch.Generator().manual_seed(seed)
    basin = np.arange(WALKERS) % 2 if crossing else np.zeros(WALKERS, dtype=int)
    xi, tables = np.zeros((n, WALKERS, k)), []

    def wrapped(values: np.ndarray) -> np.ndarray:
        return np.where(np.isfinite(period), values - np.where(np.isfinite(period), period, 0) * np.round(values / period), values)

    for cycle in range(n):
        progress = rounds[cycle] / ROUNDS
        before = wrapped(np.array(CENTRES[k])[basin] + SPREAD[k] * rng.normal(size=(WALKERS, k)))
        end = learned(k, progress, config).sample(WALKERS, generator=generator)[0].numpy()
        away = np.abs(wrapped(end[:, None] - np.array(CENTRES[k])[None]))[:, :, 0]
        target, distance = away.argmin(1), away.min(1) / SPREAD[k]
        work = 1.0 + 3 * distance + (1.5 + 3 * (1 - progress)) * rng.normal(size=WALKERS)
        failed = rng.random(WALKERS) < failing
        work[failed] = np.inf
        accepted = (rng.random(WALKERS) < np.exp(-np.clip(work, 0, 700))) & (crossing | (target == basin))
        basin = np.where(accepted, target, basin)
        arrived = np.where(failed[:, None], np.nan, end)
        tables.append(Paths(
            start=before, end=end, xi_start=before, xi_end=arrived, log_proposal_ratio=np.zeros(WALKERS), work=work, accepted=accepted,
            walker=np.arange(WALKERS), time=np.full(WALKERS, first + cycle), n_force=np.full(WALKERS, 502),
        ))  # fmt: skip
        xi[cycle] = np.where(accepted[:, None], end, before)
    return History(
        number=np.arange(first, first + n), xi=xi, xi_between=xi, xi_visited=xi[:, None], u=np.zeros((n, WALKERS)), round=rounds,
        local_acceptance=np.full(n, 0.9), n_force_local=np.full(n, 800), loss=np.full(n, np.nan),
        paths=Paths.joined(tables), looks=Looks.none(xi.shape[2]), x=np.zeros((0, WALKERS, 9, 3), np.float32),
        x_cycle=np.zeros(0, np.int64),
    )  # fmt: skip


def adaptation_of(config: PathsConfig, **how: Any) -> History:
    return wandering(config, rounds=np.repeat(np.arange(ROUNDS), CYCLES), first=0, **how)


def production_of(config: PathsConfig, **how: Any) -> History:
    return wandering(config, rounds=np.full(PRODUCTION, ROUNDS), first=ROUNDS * CYCLES, seed=1, **how)


def films(config: PathsConfig) -> Films:
    """A path that goes well, and one that fails halfway."""
    k, s, rng = len(config.names), np.linspace(0, 1, 81), np.random.default_rng(5)
    a, b = (np.array(centre) for centre in CENTRES[k])
    centre = a + s[:, None] * (b - a)
    noise = 0.3 * SPREAD[k] * rng.normal(size=centre.shape).cumsum(0) / 5
    good = PathFilm(s, centre, centre + noise, 9 * np.sin(math.pi * s) + 0.3 * rng.normal(size=81))
    bad = PathFilm(s[:50], centre[:50][:, ::-1], centre[:50][:, ::-1] - 2 * noise[:50], 30 * s[:50] ** 2, failure="not numbers")
    return Films((FilmedPath(good, w=0.8, accepted=True), FilmedPath(bad, w=math.inf, accepted=False)), 400)


def results_of(config: PathsConfig) -> dict[str, Any]:
    s = np.linspace(-math.pi, math.pi, 41) if config is PEPTIDE else np.linspace(0.9, 2.3, 41)
    centers = 0.5 * (s[1:] + s[:-1])
    heights = (
        4 + 4 * np.cos(2 * math.pi * (centers - 1.25) / 0.7) * (1 if config is CHAIN else 0) - 3 * np.cos(2 * centers) * (config is PEPTIDE)
    )
    free_energy = np.where(np.abs(centers) > 3.0, np.inf, heights - heights.min())
    profile = {
        "edges": s,
        "centers": centers,
        "free_energy": free_energy,
        "stderr": 0.05 + 0.02 * heights,
        "unit": "rad" if config is PEPTIDE else "nm",
    }
    diagnostics = {
        "acceptance": 0.31, "acceptance_between_basins": 0.284, "identity_z": 0.7, "round_trips": 61, "accepted_crossings": 140,
        "crossings_per_million": 410.2, "r_hat": dict.fromkeys(config.names, 1.012), "ess_cv": dict.fromkeys(config.names, 812.4),
        "failed_paths": 9, "n_paths": 960, "path_steps": 500, "bend": 0.0,
        "widths": dict(zip(config.names, config.width_values, strict=True)),
        "proposed": {"compact": 0.48, "stretched": 0.45}, "profiles": {config.names[0]: profile},
        "energy_evaluations": {"starts": 60_000, "tuning": 90_000, "local moves": 200_000, "accepted paths": 130_000, "total": 480_000},
    }  # fmt: skip
    estimates = (Estimate("F(stretched) − F(compact)", 1.234, 0.051, "kT", 140.0),)
    return Results(
        "paths", estimates, diagnostics, {"starts": 8.0, "tuning": 12.0, "sampling": 100.0, "total": 120.0}, "reliable",
        provenance(1, "Reference", sha256={}),
    ).to_dict()  # fmt: skip


def run(path: Path, config: PathsConfig, *, extras: bool = True) -> RunFolder:
    with RunFolder.create(path) as folder:
        folder.settle_config(config)
        if extras:
            rng = np.random.default_rng(2)
            pairs = {"compact to stretched": (rng.normal(3.2, 2, 260), rng.normal(0.8, 2, 240), 1.2)}
            folder.write_npz(WORKS, work_arrays(pairs))
            folder.write_npz(FILMS, films(config).arrays())
        return folder


@pytest.mark.parametrize("config", [CHAIN, PEPTIDE], ids=["one variable", "two variables"])
def test_a_report_holds_every_picture(config: PathsConfig, tmp_path: Path) -> None:
    folder = run(tmp_path / "run", config).path
    page = build_paths_report(
        folder, config, results_of(config), production_of(config), adaptation_of(config), proposal=learned(len(config.names), 1.0, config)
    )
    text = page.read_text()
    names = ("walkers", "proposal", "rounds", f"profile_{config.names[0]}", "works", "path")
    for name in names:
        size = (folder / f"{name}.png").stat().st_size
        assert 8_000 < size < 900_000, (name, size)
        height, width, _ = plt.imread(folder / f"{name}.png").shape
        assert min(height, width) > 400
    assert text.count("data:image/png;base64,") == len(names)
    for words in ("Sampling by steered paths", "Where the walkers go", "Proposed and sampled", "Acceptance and work", "A path",
                  "Works between basins",
                  "Free-energy profile along", "28.4%", "480,000", "local moves", "Round trips", "1.012", "paths.npz"):  # fmt: skip
        assert words in text, words
    assert "molecular dynamics" not in text
    assert not re.search(r"(?:src|href)=[\"'](?!data:)", text)


@pytest.mark.parametrize("config", [CHAIN, PEPTIDE], ids=["one variable", "two variables"])
def test_missing_data_leave_pictures_out(config: PathsConfig, tmp_path: Path) -> None:
    """No crossings, no adaptation, no works or films, all paths failed or none tried."""
    k = len(config.names)
    results = results_of(config)
    results["diagnostics"]["profiles"] = {
        config.names[0]: results["diagnostics"]["profiles"][config.names[0]] | {"free_energy": [None] * 40}
    }
    stuck = production_of(config, crossing=False, failing=1.0)
    none = History(**{**vars(stuck), "paths": stuck.paths.rows(np.zeros(0, dtype=np.int64))})
    for name, production, expected in (("failed", stuck, {"walkers", "proposal", "rounds"}), ("none", none, {"walkers"})):
        folder = run(tmp_path / name, config, extras=False).path
        build_paths_report(folder, config, results, production, None, proposal=learned(k, 0.0, config))
        assert {path.stem for path in folder.glob("*.png")} == expected
    assert not np.isfinite(stuck.paths.work).any()  # type: ignore[union-attr]
    free = config.model_copy(update={"basins": {}})
    folder = run(tmp_path / "free", free, extras=False).path
    del results["diagnostics"]["profiles"], results["diagnostics"]["widths"]
    build_paths_report(folder, free, results, production_of(free), adaptation_of(free, failing=1.0), proposal=learned(k, 1.0, free))
    assert {path.stem for path in folder.glob("*.png")} == {"walkers", "proposal", "rounds"}


def test_many_variables_show_their_margins(tmp_path: Path) -> None:
    names = [f"d{i}" for i in range(5)]
    config = make_config(FILES | {
        "task": "paths", "collective_variables": {n: {"kind": "distance", "atoms": [0, i + 1]} for i, n in enumerate(names)},
        "ranges": {n: ["0.1 nanometer", "1 nanometer"] for n in names}, "proposal": {"kind": "fixed"},
    })  # fmt: skip
    rng = np.random.default_rng(0)
    xi = rng.normal(0.5, 0.1, (30, WALKERS, 5))
    given = production_of(CHAIN)
    wide = np.repeat(given.paths.end, 5, axis=1) / 3  # type: ignore[union-attr]
    paths = Paths(**{**given.paths.arrays(), "start": wide, "end": wide, "xi_start": wide, "xi_end": wide})  # type: ignore[union-attr]
    folder = run(tmp_path / "run", config, extras=False).path
    results = results_of(CHAIN)
    del results["diagnostics"]["widths"], results["diagnostics"]["profiles"]
    build_paths_report(
        folder, config, results, History(**{**vars(given), "xi": xi, "paths": paths}), None, proposal=stored_proposal(config, folder)
    )
    assert (folder / "proposal.png").exists()


def test_a_report_can_be_made_again_from_the_folder(tmp_path: Path) -> None:
    """The pieces and the stored flow give the same densities and the same page."""
    generator = torch.Generator().manual_seed(3)
    flow = flow_recipe(PEPTIDE, PEPTIDE.periods).begun(torch.randn(50, 2, generator=generator), generator=generator)
    proposal = Mixture([flow, Flat(*zip(*PEPTIDE.limits, strict=True))], [0.9, 0.1])
    folder = run(tmp_path / "run", PEPTIDE)
    (folder.path / "paths").mkdir()
    stages = {"adaptation": adaptation_of(PEPTIDE), "production": production_of(PEPTIDE)}
    for stage, history in stages.items():
        columns = {name: value for name, value in vars(history).items() if name not in ("paths", "looks")}
        folder.write_npz(f"paths/{stage}-{len(history):08d}.npz", columns | {f"path_{n}": v for n, v in history.paths.arrays().items()})  # type: ignore[union-attr]
    save_weights(proposal, folder.path / PROPOSAL, fingerprint="any")
    results = results_of(PEPTIDE)
    first = build_paths_report(folder.path, PEPTIDE, results, stages["production"], stages["adaptation"], proposal=proposal).read_text()
    points = torch.randn(20, 2, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(stored_proposal(PEPTIDE, folder.path).log_prob(points), proposal.log_prob(points))
    again = rebuild_paths_report(folder, PEPTIDE, json.loads(json.dumps(results))).read_text()
    assert again == first


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_a_stored_flow_is_the_flow_that_was_trained(k: int) -> None:
    """Whatever generator it was made with: layers must not be drawn again."""
    periods = tuple(2 * math.pi if i % 2 else None for i in range(k))
    recipe = CVFlowRecipe(periods, CVFlowSize(steps=2, bins=4))
    points = torch.randn(30, k, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        trained, _ = recipe.learned(torch.randn(60, k, dtype=torch.float64, generator=generator), generator=generator)
        found = recipe.rebuilt(trained.state_dict())
        torch.testing.assert_close(found.log_prob(points), trained.log_prob(points))


def test_rounds_hold_their_own_paths_and_walkers() -> None:
    adaptation, production = adaptation_of(CHAIN), production_of(CHAIN)
    rounds = rounds_of(production, adaptation)
    assert [one.label for one in rounds] == [*"123456", "production"]
    assert rounds[2].paths is not None
    np.testing.assert_array_equal(np.unique(rounds[2].paths.time), np.arange(20, 30))
    np.testing.assert_array_equal(rounds[2].xi, adaptation.xi[20:30].reshape(-1, 1))
    assert [one.label for one in some(rounds)] == ["1", "3", "5", "production"]


def test_paths_between_basins_are_counted_by_where_they_are_sent() -> None:
    """A range through ±π, and a path that failed: it was sent, and did not arrive."""
    end = np.array([[1.0, 0.0], [-3.1, 0.0], [-3.1, 0.0], [3.1, 0.0], [-0.1, 0.0]])
    start = np.array([[-2.0, 0.0], [1.0, 0.0], [3.05, 0.0], [1.0, 0.0], [1.0, 0.0]])
    n, nothing = len(end), np.full((5, 2), np.nan)
    paths = Paths(
        start=start, end=end, xi_start=start, xi_end=nothing, log_proposal_ratio=np.zeros(n), work=np.full(n, np.inf),
        accepted=np.zeros(n, dtype=bool), walker=np.arange(n), time=np.zeros(n, dtype=int), n_force=np.ones(n, dtype=int),
    )  # fmt: skip
    assert sent_between(paths, PEPTIDE).tolist() == [True, True, False, True, False]


@pytest.mark.parametrize("period", [None, 2 * math.pi, 1.0])
def test_blurred_densities_are_densities(period: float | None) -> None:
    """They integrate to one, and blurring exact draws of λ − the restraint's own kernel − matches the closed form."""
    grid = np.linspace(-0.5, 0.5, 2001) * (period or 12.0)
    blur = Blur([0.1], (period,))
    values = np.array([[0.0], [0.45 * (period or 1.0)]])
    density = blur.density(values, grid, column=0)
    assert np.trapezoid(density, grid) == pytest.approx(1.0, abs=1e-6)
    turns = 1.0 if period is None else 2 * math.pi / period
    kernel = norm(scale=0.1) if period is None else vonmises((0.1 * turns) ** -2, scale=1 / turns)
    np.testing.assert_allclose(density, kernel.pdf(grid - values).mean(axis=0), rtol=1e-7, atol=1e-12)


def test_films_survive_the_file(tmp_path: Path) -> None:
    made = films(PEPTIDE)
    np.savez(tmp_path / "films.npz", allow_pickle=False, **made.arrays())
    with np.load(tmp_path / "films.npz") as file:
        found = stored_films({name: file[name] for name in file.files})
    for one, other in zip(found, made.paths, strict=True):
        np.testing.assert_array_equal(one.film.xi, other.film.xi)
        assert (one.w, one.accepted, one.film.failure) == (other.w, other.accepted, other.film.failure)
