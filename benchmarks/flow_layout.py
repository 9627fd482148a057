"""Which layout of the flow learns fastest: torsions first, everything at once, or without the triangular layer; with or without forces.

    python benchmarks/flow_layout.py

Alanine dipeptide in vacuum; every variant learns from the same ladder for the same CPU time on one thread, from data only. Stored
in ``benchmarks/results/flow_layout.json``: optimiser steps done, raw ESS of 10,000 fresh samples, forward ESS on held-out data.
"""

from __future__ import annotations

import time
from pathlib import Path

import click
import numpy as np
import torch
from stored import store

from boltzgen.core import Chain, Flow
from boltzgen.distributions import TorusNormal
from boltzgen.estimators.weights import effective_sample_size, forward_effective_sample_size
from boltzgen.md.ladder import temperature_ladder
from boltzgen.md.loading import load
from boltzgen.md.simulate import DynamicsSettings
from boltzgen.md.target import OpenMMTarget
from boltzgen.md.trajectory import split_blocks
from boltzgen.recipes import CouplingSize, InternalCoordinateFlow, internal_coordinate_flow, learn_domains
from boltzgen.sampling.importance import importance_sample, log_ratios
from boltzgen.targets.pulled_back import PulledBack
from boltzgen.training.fit import FitSettings, fit
from boltzgen.training.objectives import ForwardKL
from boltzgen.transforms.coupling import BoundedSplineCoupling, CircularSplineCoupling

ROOT = Path(__file__).parent
SYSTEM = ROOT.parent / "systems" / "alanine_dipeptide_vacuum"
SIZE = CouplingSize(torsion_layers=4, torsion_bins=16, stiff_layers=2, stiff_bins=8, hidden=(96,), compiled=False)
OUTLIERS = 3.0


def everything_at_once(pieces: InternalCoordinateFlow, generator: torch.Generator) -> InternalCoordinateFlow:
    """The same number of layers of either kind, every one conditioned on all other coordinates; the same final affine map."""
    n, size = pieces.domains.n_soft, pieces.domains.n_soft + pieces.domains.n_stiff
    layers = []
    for k in range(SIZE.torsion_layers):
        half = torch.randperm(n, generator=generator).tolist()
        transformed, rest = half[: (n + 1) // 2], half[(n + 1) // 2 :]
        layers.append(
            CircularSplineCoupling(
                size,
                transformed=transformed,
                fold=pieces.domains.fold[transformed].tolist(),
                angles=rest,
                linear=range(n, size),
                bins=SIZE.torsion_bins,
                hidden=SIZE.hidden,
                generator=generator,
                compiled=False,
            )
        )
        if k % 2:
            stiff = (n + torch.randperm(size - n, generator=generator)).tolist()
            layers.append(
                BoundedSplineCoupling(
                    size,
                    transformed=stiff[: (size - n) // 2],
                    angles=range(n),
                    linear=stiff[(size - n) // 2 :],
                    bins=SIZE.stiff_bins,
                    hidden=SIZE.hidden,
                    generator=generator,
                    compiled=False,
                )
            )
    return with_layers(pieces, layers)


def without_triangular(pieces: InternalCoordinateFlow, _: torch.Generator) -> InternalCoordinateFlow:
    """Torsions first, splines only."""
    return with_layers(pieces, list(pieces.latent.transform.transforms)[:-1])  # type: ignore[union-attr]


def torsions_first(pieces: InternalCoordinateFlow, _: torch.Generator) -> InternalCoordinateFlow:
    """The layout of the package."""
    return pieces


def with_layers(pieces: InternalCoordinateFlow, layers: list) -> InternalCoordinateFlow:
    """The pieces with other learned layers; unconditional affine standardisation stays in the domains."""
    n, d = pieces.domains.n_soft, pieces.domains.n_stiff
    latent = Flow(TorusNormal(n, d, dtype=torch.float32), Chain(*layers))
    flow = Flow(TorusNormal(n, d), Chain(*layers, *pieces.fixed.transforms), event_shape=pieces.flow.event_shape)
    return InternalCoordinateFlow(flow=flow, latent=latent, torsions=None, stiff=Chain(*layers), fixed=pieces.fixed, domains=pieces.domains)


VARIANTS = {
    "torsions first, with forces": (torsions_first, True),
    "torsions first, likelihood only": (torsions_first, False),
    "splines only, with forces": (without_triangular, True),
    "everything at once, with forces": (everything_at_once, True),
}


@click.command()
@click.option("--seconds", default=60.0, help="CPU seconds of training per variant.")
@click.option("--steps-per-replica", default=400_000)
@click.option("--seed", default=1)
def main(seconds: float, steps_per_replica: int, seed: int) -> None:
    torch.set_num_threads(1)
    loaded = load(SYSTEM / "topology.pdb", SYSTEM / "system.xml")
    target = OpenMMTarget.from_loaded(loaded, temperature_kelvin=300.0)
    trajectory = temperature_ladder(
        loaded.system, loaded.positions, temperatures_kelvin=(300.0, 375.0, 468.75, 585.94), exchange_every=50,
        settings=DynamicsSettings(n_steps=steps_per_replica, save_every=50, timestep_ps=0.001, friction_per_ps=1.0, seed=seed),
    )  # fmt: skip
    training, held_out = split_blocks(trajectory)
    domains = learn_domains(loaded.molecule, np.concatenate([training.x, *(part.x for part in training.hot)]))
    rows = {}
    for name, (variant, forces) in VARIANTS.items():
        generator = torch.Generator().manual_seed(seed)
        pieces = internal_coordinate_flow(loaded.molecule, domains, size=SIZE, data=training.x, generator=generator)
        rows[name] = measured(variant(pieces, generator), target, training, held_out, seconds=seconds, forces=forces, generator=generator)
        print(f"{name:34s} {rows[name]}", flush=True)
    content = {
        "variants": rows,
        "cpu_seconds": seconds,
        "frames": len(training),
        "seed": seed,
    }
    store(ROOT / "results" / "flow_layout.json", content)


def measured(pieces, target, training, held_out, *, seconds, forces, generator) -> dict[str, float]:  # type: ignore[no-untyped-def]
    """Train for the given CPU time and judge."""
    training, held_out = (part.rows(pieces.in_sector(part.x)) for part in (training, held_out))
    y = pieces.to_latent(training.x)
    pulled = PulledBack(target, pieces.fixed, event_shape=tuple(y.shape[1:]))
    gradient = torch.cat([pulled.value_and_grad(part.double())[1] for part in y.split(5000)]).float() if forces else None
    objective = ForwardKL(y, batch_size=256, u_gradient=gradient, outlier_limit=OUTLIERS)
    settings = FitSettings(
        steps=100_000, learning_rate=2e-3, gradient_clip=10.0, ema_decay=0.99, checkpoint_every=100_000, evaluate_every=50
    )
    started, steps = time.process_time(), [0]

    def out_of_time() -> bool:
        steps[0] += 1
        return time.process_time() - started > seconds

    fit_until(pieces.latent, objective, settings, generator, out_of_time)
    samples = importance_sample(pieces.flow, target, n=10_000, generator=generator, progress=False)
    ratios = log_ratios(pieces.flow, torch.as_tensor(held_out.x), torch.as_tensor(held_out.u))
    return {
        "steps": steps[0],
        "ess_raw": round(effective_sample_size(samples), 4),
        "forward_ess": round(forward_effective_sample_size(ratios), 4),
        "eubo": round(float(ratios.mean()), 3),
    }


def fit_until(flow, objective, settings, generator, out_of_time) -> None:  # type: ignore[no-untyped-def]
    """Train until the time is up, and keep the averaged weights that the loop would keep."""
    from boltzgen.errors import Interrupted

    try:
        fit(flow, objective, settings=settings, generator=generator, should_stop=out_of_time, progress=False)
    except Interrupted:
        return


if __name__ == "__main__":
    main()
