"""Crossing between the basins of a chain of nine beads in 200 solvent particles with all its 21 internal coordinates as the CV.

    python benchmarks/solute_paths.py --work RUNFOLDER

One walker per basin (compact: R < 4.62 σ; stretched: above) gives chains by molecular dynamics. They train a flow over the chain's internal
coordinates and a small model of the solvent's mean force on the chain, by which draws of the flow are filtered. Then driven paths to
proposed chains are run from both walkers, K steps each. For every variant and K: the mean of min(1, e^{−w}) over proposals that cross, from
each basin (the acceptance), the mean of w in kT, force evaluations and seconds. Starts are separated by molecular dynamics that is taken
back where it leaves the basin; the moves are not applied. The acceptance of crossing proposals at stationarity is the harmonic mean of
those from either basin, as both fluxes are equal. A pilot sets the weights of the basins in the proposal; "talk" is the flow by itself,
without images and filter. The published talk has 25 % at K = 35,000. The energy and one path are first compared with OpenMM's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch
from polymer_liquid import KT, N_BEADS, SIGMA, CompiledDriving, PolymerLiquid, chain_potential
from scipy.optimize import brentq
from stored import store
from torch import Tensor

from boltzgen.core import Distribution
from boltzgen.cvs import CollectiveVariables, Distance
from boltzgen.md.driven import DrivenSteering
from boltzgen.md.loading import LoadedSystem, load
from boltzgen.md.platforms import PlatformChoice
from boltzgen.paths import Schedule
from boltzgen.recipes.molecule import CouplingSize, InternalCoordinateFlow, internal_coordinate_flow, learn_domains
from boltzgen.sampling.filtered import FilteredProposal
from boltzgen.sampling.solute import SoluteMove, Way, straight_way, superposed
from boltzgen.sampling.steered import chosen
from boltzgen.training.fit import FitSettings, fit
from boltzgen.training.objectives import ForwardKL
from boltzgen.transforms.internal import InternalCoordinates
from boltzgen.transforms.zmatrix import build_zmatrix
from boltzgen.units import thermal_energy

SYSTEM = Path(__file__).parent.parent / "systems" / "polymer_in_solvent"
TOP, BASINS = 4.62 * SIGMA, ("compact", "stretched")
ENDS = CollectiveVariables([Distance("end_to_end", (0, N_BEADS - 1))])
EVERY, STEP = 50, 0.012


@dataclass(frozen=True)
class Variant:
    """How paths are made."""

    filtered: bool = True
    images: bool = True
    bend: float = 0.0
    step: float = 0.015
    friction: float = 0.0
    way: Way = straight_way


def basin(x: Tensor) -> Tensor:
    """0 compact, 1 stretched."""
    return (ENDS(x)[:, 0] > TOP).long()


def images(x: Tensor) -> Tensor:
    """The chain, read backwards, and the mirror images of both, ``[4, w, 9, 3]``."""
    mirror = torch.tensor([1.0, 1.0, -1.0], dtype=x.dtype)
    return torch.stack([x, x.flip(1), x * mirror, x.flip(1) * mirror])


def check(loaded: LoadedSystem, liquid: PolymerLiquid) -> dict[str, float]:
    """Compare energy, forces and one driven path with OpenMM's."""
    context = openmm.Context(loaded.system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(loaded.positions)
    energy = context.getState(energy=True).getPotentialEnergy()._value
    scale, mass = thermal_energy(300.0) / KT, loaded.system.getParticleMass(0)._value
    tau = SIGMA * (mass / scale) ** 0.5
    x = torch.from_numpy(loaded.positions)[None]
    engine = DrivenSteering.from_loaded(loaded, range(N_BEADS), ENDS, temperature_kelvin=300.0, timestep_ps=0.01 * tau,
                                        platform=PlatformChoice(name="Reference", contexts=1))  # fmt: skip
    twin = CompiledDriving(liquid, ENDS, step=0.01)
    corners = straight_way(x[:, :N_BEADS], 0.98 * x[:, :N_BEADS])
    here, there = (
        one.drive(one.locate(x), corners, steps=torch.tensor([200]), schedule=Schedule(200), generator=torch.Generator().manual_seed(1))
        for one in (engine, twin)
    )
    found = {
        "energy": abs(energy - scale * liquid.potential(loaded.positions / SIGMA)[0]),
        "path_nm": float((here.x - there.x).abs().max()), "path_work_kT": float((here.work - there.work).abs().max()),
    }  # fmt: skip
    if found["energy"] > 1e-6 or found["path_nm"] > 1e-8 or found["path_work_kT"] > 1e-6:
        raise RuntimeError(f"the compiled code differs from OpenMM: {found}")
    return found


def gather(loaded: LoadedSystem, liquid: PolymerLiquid, folder: Path, *, n_pieces: int) -> tuple[np.ndarray, np.ndarray]:
    """Chains ``[n, 9, 3]`` in nm of both walkers, and the walkers ``[2, 209, 3]``; pieces already in the folder are used."""
    starts = folder / "starts.npz"
    if not starts.exists():
        found: dict[str, np.ndarray] = {}
        x, _ = liquid.run(loaded.positions / SIGMA, n_steps=2000, step=0.004, redraw=100, every=100, seed=1)
        for seed in range(1000):
            found.setdefault(BASINS[int(basin(torch.from_numpy(x)[None] * SIGMA))], x)
            if len(found) == len(BASINS):
                break
            x, _ = liquid.run(x, n_steps=2000, step=0.01, redraw=200, every=100, seed=seed)
        np.savez(starts, **found)
    at = dict(np.load(starts))
    chains = []
    for piece in range(n_pieces):
        for number, name in enumerate(BASINS):
            path = folder / f"chains_{name}_{piece}.npz"
            if not path.exists():
                end, c = liquid.run(at[name], n_steps=250_000, step=STEP, redraw=200, every=EVERY, seed=7 + 2 * piece + number)
                np.savez(path, c=c.astype(np.float32), x=end)
            stored = np.load(path)
            chains.append(stored["c"].astype(np.float64) * SIGMA)
            if int(basin(torch.from_numpy(stored["x"])[None] * SIGMA)) == number:  # a walker that left begins again where it was
                at[name] = stored["x"]
    return np.concatenate(chains), np.stack([at[name] for name in BASINS]) * SIGMA


def balanced(chains: np.ndarray, *, seed: int) -> np.ndarray:
    """All images of as many chains of either basin."""
    rng, which = np.random.default_rng(seed), basin(torch.from_numpy(chains)).numpy()
    n = max(np.bincount(which))
    rows = np.concatenate([rng.choice(np.flatnonzero(which == k), n, replace=bool((which == k).sum() < n)) for k in (0, 1)])
    return images(torch.from_numpy(chains[rows])).flatten(0, 1).numpy()


def learn(loaded: LoadedSystem, chains: np.ndarray, *, steps: int, seed: int) -> tuple[InternalCoordinateFlow, list[Any]]:
    """A flow over the chain's internal coordinates; every tenth piece in time is held out."""
    generator, molecule = torch.Generator().manual_seed(seed), loaded.molecule_of(np.arange(N_BEADS))
    held = (np.arange(len(chains)) // 500) % 10 == 9
    data, judged = balanced(chains[~held], seed=seed), balanced(chains[held], seed=seed)[::5]
    size = CouplingSize(torsion_layers=6, torsion_bins=8, stiff_layers=2, stiff_bins=6, hidden=(64, 64), compiled=False)
    pieces = internal_coordinate_flow(molecule, learn_domains(molecule, data), size=size, data=data, generator=generator)
    y, kept = pieces.to_latent(data), pieces.to_latent(judged)

    def held_out(flow: Any) -> dict[str, float]:
        with torch.no_grad():
            return {"held_out_loss": -float(flow.log_prob(kept).mean())}

    settings = FitSettings(steps=steps, learning_rate=4e-3, gradient_clip=10.0, ema_decay=0.99, checkpoint_every=10**9,
                           evaluate_every=max(1, steps // 12), patience=3)  # fmt: skip
    result = fit(pieces.latent, ForwardKL(y, batch_size=256), settings=settings, generator=generator, held_out=held_out, progress=False)
    return pieces, [dict(row) for row in result.history]


def mean_force_features(x: Tensor) -> Tensor:
    """Radial functions of pairs that are 2, 3, 4–5 and 6–8 bonds apart, and of the number of neighbours of beads, ``[b, f]``."""
    i, j = torch.triu_indices(N_BEADS, N_BEADS, offset=2)
    r, apart = (x[:, i] - x[:, j]).norm(dim=2) / SIGMA, j - i
    centres = torch.linspace(1.0, 3.4, 9, dtype=torch.float64)
    bumps = torch.exp(-0.5 * ((r[..., None] - centres) / 0.25).square())
    classes = [bumps[:, (apart >= low) & (apart <= high)].sum(1) for low, high in ((3, 3), (4, 5), (6, 8))]
    tight = torch.zeros(len(x), N_BEADS, dtype=torch.float64)
    contact = torch.sigmoid((1.6 - r) / 0.15)
    tight.index_add_(1, i, contact).index_add_(1, j, contact)
    size = (x - x.mean(1, keepdim=True)).square().sum((1, 2)) / (N_BEADS * SIGMA**2)
    ends = ENDS(x[:, [0, *range(1, N_BEADS)]])[:, 0] / SIGMA
    rows = [*classes, tight.square().sum(1, keepdim=True), tight.pow(3).sum(1, keepdim=True)]
    rows += [torch.stack([size, size.square(), ends, ends.square(), ends.pow(3), ends.pow(4)], 1)]
    return torch.cat(rows, 1)


def learn_solvent(chains: np.ndarray, proposal: Distribution, *, n: int, seed: int) -> tuple[Callable[[Tensor], Tensor], dict[str, float]]:
    """ln of the chain's density in solvent, −u_chain(x) + a·f(x), with a from telling chains from draws of the flow (logistic)."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.from_numpy(balanced(chains, seed=seed))
    data = data[torch.randperm(len(data), generator=generator)[:n]]
    with torch.no_grad():
        drawn = proposal.sample(n, generator=generator)[0]
        x = torch.cat([data, drawn])
        offset = -chain_potential(x) - proposal.log_prob(x)
    features = mean_force_features(x)
    mean, spread = features[:n].mean(0), features[:n].std(0)
    features = (features - mean) / spread
    label = torch.cat([torch.ones(n), torch.zeros(n)]).double()
    a = torch.zeros(features.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([a], max_iter=200, line_search_fn="strong_wolfe")
    shift = offset[:n].median()

    def loss() -> Tensor:
        optimiser.zero_grad()
        logit = (offset - shift).clamp(-60, 60) + features @ a[:-1] + a[-1]
        value = torch.nn.functional.binary_cross_entropy_with_logits(logit, label) + 1e-5 * a.square().sum()
        value.backward()
        return value

    optimiser.step(loss)  # type: ignore[arg-type]
    weights = a.detach()[:-1]

    def log_model(x: Tensor) -> Tensor:
        return -chain_potential(x) + ((mean_force_features(x) - mean) / spread) @ weights

    log_w = log_model(drawn) - proposal.log_prob(drawn).detach()
    shares = (log_w - log_w.max()).exp()
    return log_model, {"loss": float(loss().detach()), "ess_of_flow_for_model": float(shares.sum() ** 2 / shares.square().sum() / n)}


def filter_level(proposal: Distribution, log_model: Callable[[Tensor], Tensor], *, n: int, lowered: float, seed: int) -> float:
    """The level above which lies a share ``lowered`` of the model's weight."""
    with torch.no_grad():
        x, log_q = proposal.sample(n, generator=torch.Generator().manual_seed(seed))
        log_w = log_model(x) - log_q
    order = log_w.sort().values
    above = order.exp().flip(0).cumsum(0) / order.exp().sum()
    return float(order.flip(0)[int((above < lowered).sum())])


def internal_way(coordinates: InternalCoordinates, n_legs: int) -> Way:
    """Ways along which internal coordinates change linearly, torsions by the shortest arc; every corner superposed on the one before."""

    def way(start: Tensor, shape: Tensor) -> Tensor:
        q0, q1 = coordinates.inverse(start)[0], coordinates.inverse(shape)[0]
        change = q1 - q0
        turned = coordinates.torsion_columns
        change[:, turned] = torch.remainder(change[:, turned] + torch.pi, 2 * torch.pi) - torch.pi
        corners = [start]
        for k in range(1, n_legs + 1):
            corners.append(superposed(coordinates(q0 + change * (k / n_legs))[0], corners[-1]))
        return torch.stack(corners, 1)

    return way


def measure(
    move: SoluteMove, engine: CompiledDriving, walkers: Tensor, *, n_rounds: int, seconds: float, n_between: int, seed: int
) -> dict[str, Any]:
    """Proposals from both walkers, those that cross counted by where they start."""
    generator, state = torch.Generator().manual_seed(seed), engine.locate(walkers)
    w: list[list[float]] = [[], []]
    work: list[list[float]] = [[], []]
    distance, begun, cost, spent = [], time.monotonic(), 0, time.process_time()
    for _ in range(n_rounds):
        roamed = engine.roam(state, n_steps=n_between, generator=generator)
        state = chosen(basin(roamed.x) == basin(state.x), roamed, state)  # each stays in its basin
        cost += int(roamed.n_force.sum())
        _, info = move.step(state, generator=generator)
        cost += int(info.result.n_force.sum())
        here, there = basin(state.x), basin(info.result.x)
        for row in torch.nonzero(here != there).flatten().tolist():
            w[int(here[row])].append(-float(info.log_ratio[row]))
            work[int(here[row])].append(float(info.result.work[row]))
            distance.append(float(info.distance[row]) / SIGMA)
        if time.monotonic() - begun > seconds:
            break
    return _row(w, work) | {
        "rms_distance_sigma": float(np.mean(distance)) if distance else None, "force_evaluations": cost,
        "cpu_seconds": round(time.process_time() - spent, 1), "wall_seconds": round(time.monotonic() - begun, 1),
    }  # fmt: skip


def _row(w: list[list[float]], work: list[list[float]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    means, errors = [], []
    for name, values, works in zip(BASINS, w, work, strict=True):
        alpha = np.exp(-np.maximum(values, 0.0))
        averages = {"acceptance": alpha, "mean_w": values, "mean_work": works}
        row[f"from_{name}"] = {"n": len(values)} | {key: float(np.mean(v)) if len(v) else None for key, v in averages.items()}
        means.append(alpha.mean() if len(alpha) else np.nan)
        errors.append(alpha.std(ddof=1) / np.sqrt(len(alpha)) / alpha.mean() ** 2 if len(alpha) > 1 else np.nan)
    harmonic = 2 / sum(1 / mean for mean in means)
    return {"crossing_acceptance": harmonic, "stderr": float(0.5 * harmonic**2 * np.hypot(*errors)),
            "dissipated_kT": float(np.mean([np.mean(values) for values in w])), "w": w, **row}  # fmt: skip


def population_shift(w: list[list[float]]) -> float:
    """What to add to ln p of stretched chains so that crossings are as likely to be accepted either way: Bennett's estimate."""
    forward, backward = (np.array(values) for values in w)

    def surplus(shift: float) -> float:
        return float(np.mean(1 / (1 + np.exp(forward + shift))) - np.mean(1 / (1 + np.exp(backward - shift))))

    return float(brentq(surplus, -20.0, 20.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("solute_paths_run"), help="where chains and the flow are kept")
    parser.add_argument("--pieces", type=int, default=3, help="pieces of 250,000 steps per basin")
    parser.add_argument("--training-steps", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=120.0, help="at most, per row of the table")
    parser.add_argument("--rounds", type=int, default=100, help="proposals from each walker, at most")
    parser.add_argument("--rows", default="", help="only rows whose name contains this")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "solute_paths.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    loaded, liquid = load(SYSTEM / "topology.pdb", SYSTEM / "system.xml"), PolymerLiquid()
    checked = check(loaded, liquid)
    chains, walkers = gather(loaded, liquid, arguments.work, n_pieces=arguments.pieces)
    flow, log_model, learned = _learned(loaded, chains, arguments)
    results: dict[str, Any] = {"checked_against_openmm": checked, "data_force_evaluations": 2 * arguments.pieces * 250_000,
                               "learned": learned, "rows": []}  # fmt: skip
    coordinates = InternalCoordinates(build_zmatrix(loaded.molecule_of(np.arange(N_BEADS))))
    density = Proposals(flow, log_model)
    pilot = run_row(density, liquid, walkers, Variant(), 1000, arguments)
    density = replace(density, shift=population_shift(pilot.pop("w")))
    results |= {"pilot": pilot, "shift": density.shift}
    for name, variant, n_steps in rows(internal_way(coordinates, 40)):
        if arguments.rows not in name:
            continue
        row = run_row(density, liquid, walkers, variant, n_steps, arguments)
        row.pop("w")
        results["rows"].append({"name": name, "n_steps": n_steps} | row)
        print(name, n_steps, {key: value for key, value in row.items() if not isinstance(value, dict)}, flush=True)
        good = [r["n_steps"] for r in results["rows"] if r["crossing_acceptance"] >= 0.25]
        store(arguments.out, results | {"fewest_steps_with_a_quarter": min(good, default=None)})


@dataclass(frozen=True)
class Proposals:
    """The flow, the model by which it is filtered, and what is added to the model's ln of stretched chains."""

    flow: Distribution
    log_model: Callable[[Tensor], Tensor]
    shift: float = 0.0

    def shifted(self, x: Tensor) -> Tensor:
        """ln of the model with the shift."""
        return self.log_model(x) + self.shift * basin(x)

    def filtered(self) -> FilteredProposal:
        """The flow lowered to the model but for 2 % of the model's weight."""
        return FilteredProposal(self.flow, self.shifted, level=filter_level(self.flow, self.shifted, n=40_000, lowered=0.02, seed=5))


def run_row(
    density: Proposals, liquid: PolymerLiquid, walkers: np.ndarray, variant: Variant, n_steps: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """One row of the table."""
    engine = CompiledDriving(liquid, ENDS, step=variant.step, friction=variant.friction)
    proposal = density.filtered() if variant.filtered else density.flow
    move = SoluteMove(engine, proposal, schedule=Schedule(n_steps, bend=variant.bend), way=variant.way,
                      images=images if variant.images else None)  # fmt: skip
    row = measure(move, engine, torch.from_numpy(walkers), n_rounds=arguments.rounds, seconds=arguments.seconds, n_between=600, seed=11)
    return row | ({"kept_share": proposal.kept / proposal.drawn} if isinstance(proposal, FilteredProposal) else {})


def rows(internal: Way) -> list[tuple[str, Variant, int]]:
    """What is measured."""
    best = Variant()
    talk = Variant(filtered=False, images=False)
    table = [("best", best, n) for n in (1000, 3000, 500, 10_000)] + [("talk", talk, n) for n in (3000, 35_000)]
    table += [("flow alone", replace(best, filtered=False), 1000), ("no images", replace(best, images=False), 1000)]
    table += [("internal way", replace(best, way=internal), 1000), ("bend -1", replace(best, bend=-1.0), 1000)]
    table += [("friction 0.5", replace(best, friction=0.5), 1000), ("step 0.022", replace(best, step=0.022), 700)]
    table += [("best", best, 35_000)] + [("talk", talk, n) for n in (1000, 10_000)]
    return table


def _learned(loaded: LoadedSystem, chains: np.ndarray, arguments: argparse.Namespace):  # type: ignore[no-untyped-def]
    kept = arguments.work / f"flow_{len(chains)}_{arguments.training_steps}.pt"
    began = time.process_time()
    if kept.exists():
        pieces, history = torch.load(kept, weights_only=False)
    else:
        pieces, history = learn(loaded, chains, steps=arguments.training_steps, seed=3)
        torch.save((pieces, history), kept)
    flow = pieces.flow
    log_model, fitted = learn_solvent(chains, flow, n=10_000, seed=4)
    numbers = {"history": history, "solvent_model": fitted, "cpu_seconds": time.process_time() - began}
    print({key: value for key, value in numbers.items() if key != "history"}, [h["held_out_loss"] for h in history], flush=True)
    return flow, log_model, numbers


if __name__ == "__main__":
    main()
