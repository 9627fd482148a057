"""The training stages of a generator: likelihood of the data, optional annealing, then energies of the flow's own samples."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from boltzgen.config import GeneratorConfig
from boltzgen.core import Flow, Objective, Target
from boltzgen.distributions import GivenAngles
from boltzgen.errors import DomainError, EnergyError
from boltzgen.estimators.weights import forward_effective_sample_size
from boltzgen.md.trajectory import Trajectory
from boltzgen.recipes import InternalCoordinateFlow, spread_torsions
from boltzgen.targets.pulled_back import PulledBack
from boltzgen.targets.views import Regularised
from boltzgen.training.annealing import anneal
from boltzgen.training.checkpoints import CheckpointStore
from boltzgen.training.fit import FitResult, FitSettings, HeldOut, fit
from boltzgen.training.objectives import (
    ForwardKL,
    LogVariance,
    OfPart,
    ReverseGradient,
    ReverseKL,
    WeightedSum,
    path_gradient,
    score_gradient,
    truncated_log_weights,
)
from boltzgen.workflows.run_folder import RunFolder
from boltzgen.workflows.seeds import stream

logger = logging.getLogger(__name__)

#: Energies this far above the highest of the data, in kT, are flattened in training; scale of the logarithm, and where it ends.
_CUT_ABOVE_DATA, _FLATTENED, _HIGHEST = 30.0, 1000.0, 100_000.0
#: Held-out rows that are looked at during training.
_HELD_OUT_ROWS = 2000
_EVALUATE_EVERY = 100
#: Spread torsions that the energies are trained at; rows of one call for energies; weight of the log variance beside the likelihood.
_SPREAD_TORSIONS, _ENERGY_ROWS, _LOG_VARIANCE_WEIGHT = 100_000, 10_000, 0.3


@dataclass(eq=False)
class Trainer:
    """Trains a flow in place, stage by stage.

    Attributes:
        config: Settings.
        pieces: The flow; only its learned layers change.
        target: The exact target.
        training: Data to learn from.
        held_out: Data to watch.
        folder: Run folder, for checkpoints and ``training.jsonl``.
        fingerprint: Hash that ties checkpoints to this run.
        should_stop: Asked after every step.
        progress: Whether to show progress bars.
    """

    config: GeneratorConfig
    pieces: InternalCoordinateFlow
    target: Target
    training: Trajectory
    held_out: Trajectory
    folder: RunFolder
    fingerprint: str
    should_stop: Callable[[], bool]
    progress: bool

    def __post_init__(self) -> None:
        cut = float(self.training.u.max()) + _CUT_ABOVE_DATA
        self.latent_target = self._pulled_back(self.target)
        self.regularised = self._pulled_back(Regularised(self.target, u_cut=cut, u_max=cut + _HIGHEST, scale=_FLATTENED))
        self.y = [self.pieces.to_latent(part.x) for part in (self.training, *self.training.hot)]
        self.rows: list[Mapping[str, object]] = []

    def run(self) -> None:
        """All stages; writes ``training.jsonl`` and checkpoints.

        Raises:
            Interrupted: If asked to stop; resumed by calling again.
        """
        self.likelihood()
        if self.config.training.annealing.enabled:
            self.annealing()
        self.energies()
        self.populations()
        self.folder.write_text("training.jsonl", "\n".join(json.dumps(row) for row in self.rows) + "\n")

    def likelihood(self) -> None:
        """Maximum likelihood on the data, until the held-out likelihood stops improving."""
        settings = self.config.training
        objective = WeightedSum(*self._data_terms(hottest=settings.annealing.enabled, batch_size=settings.batch_size, weight=1.0))
        chosen = self._settings(settings.forward_kl_steps, patience=settings.patience)
        self._fit("likelihood", objective, chosen, index=0, hottest=settings.annealing.enabled)

    def annealing(self) -> None:
        """Cool the flow from the hottest data to the target temperature by reweighting its own samples."""
        settings = self.config.training
        hottest = (self.training, *self.training.hot)[-1]
        steps = anneal(
            self.pieces.latent, self.latent_target, start_kelvin=hottest.temperature_kelvin, target_kelvin=self.config.temperature_kelvin,
            minimum_ess=settings.annealing.minimum_ess, n_samples=20 * settings.batch_size, batch_size=settings.batch_size,
            settings=self._settings(settings.annealing.steps_per_temperature), generator=self._generator(1),
            store_for=lambda k: self._store(f"annealing-{k:02d}"), should_stop=self.should_stop, progress=self.progress,
        )  # fmt: skip
        self.rows += [{"stage": "annealing", **asdict(step)} for step in steps]

    def energies(self) -> None:
        """Reverse KL on energies of the flow's own samples, mixed with the likelihood of the data.

        A share of the samples gets torsions that are spread over all that were visited: given those torsions, the rest of the
        flow is trained in the same way, so that rare conformations are not left poor.
        """
        settings, part = self.config.training, self.pieces.torsions
        path = functools.partial(path_gradient, outlier_limit=settings.outlier_limit)
        gradients: dict[str, ReverseGradient] = {"path": path, "score": score_gradient}
        gradient = gradients[settings.reverse_estimator]
        n_spread = 0 if part is None else round(settings.spread_share * settings.batch_size)
        terms: list[tuple[float, Objective[Flow]]] = []
        if part is not None and n_spread:
            given = self.pieces.given(self._spread(part, _SPREAD_TORSIONS, generator=self._generator(3)))
            spread = ReverseKL(self.regularised, batch_size=n_spread, gradient=gradient)
            terms.append((n_spread / settings.batch_size, OfPart(given, spread, name="spread")))
        own = ReverseKL(self.regularised, batch_size=settings.batch_size - n_spread, gradient=gradient)
        terms.append((1 - n_spread / settings.batch_size, own))
        n = max(1, round(settings.batch_size * settings.forward_share))
        terms += self._data_terms(hottest=False, batch_size=n, weight=settings.forward_weight)
        chosen = self._settings(settings.reverse_kl_steps, learning_rate=settings.reverse_learning_rate)
        self._fit("energies", WeightedSum(*terms), chosen, index=2)

    def populations(self) -> None:
        """Relative weights of conformations, from energies of samples of the flow itself.

        Path gradients compare forces, which say nothing about the relative weights of basins that no sample connects. Here the density
        of the torsions alone is fitted to ln p̂(s) = −u(y) − ln q(y | s), y ~ q(· | s), whose exponential has the mean p(s): by likelihood
        on reweighted torsions of the flow, and by log variance on those and on spread ones (which carries the bias of ln p̂, KL(q(y | s) ‖
        p(y | s)), and has the smaller weight). Samples of all rounds are kept. Training only: no reported number rests on them.
        """
        settings, part = self.config.training, self.pieces.torsions
        if part is None:
            return
        n_spread = round(settings.spread_share * settings.population_samples)
        n_own = settings.population_samples - n_spread
        torsions, log_p, log_w = [], [], []
        for k in range(settings.population_rounds):
            generator = self._generator(10 + k)
            with torch.no_grad():
                own, log_q = part.sample(n_own, generator=generator)
            both = torch.cat([own, self._spread(part, n_spread, generator=generator)])
            estimate = self._log_marginal(both, generator=generator)
            torsions.append(both)
            log_p.append(estimate)
            log_w.append(torch.cat([estimate[:n_own] - log_q, torch.full((n_spread,), -torch.inf, dtype=torch.float64)]))
            points, batch = torch.cat(torsions), settings.population_batch_size
            likelihood = ForwardKL(points, batch_size=batch, log_w=truncated_log_weights(torch.cat(log_w)))
            shape = LogVariance(points, torch.cat(log_p), batch_size=batch)
            objective = OfPart(part, WeightedSum((1.0, likelihood), (_LOG_VARIANCE_WEIGHT, shape)), name="torsions")
            chosen = self._settings(settings.population_steps, learning_rate=settings.population_learning_rate)
            self._fit(f"populations-{k + 1}", objective, chosen, index=20 + k)

    def _spread(self, part: Flow, n: int, *, generator: torch.Generator) -> Tensor:
        """Soft torsions ``[n, n_soft]`` of the data of all temperatures and of the flow's ``part``, spread over all that were visited."""
        data = torch.cat([y[:, : self.pieces.domains.n_soft] for y in self.y])
        with torch.no_grad():
            own, _ = part.sample(len(data), generator=generator)
        return spread_torsions(torch.cat([data, own]), self.pieces.domains, n=n, generator=generator)

    def _log_marginal(self, torsions: Tensor, *, generator: torch.Generator) -> Tensor:
        """One-sample estimates of ln p ``[n]`` of soft torsions ``[n, n_soft]``, up to a constant.

        Their exponential is unbiased; they themselves are too low by KL(q(y | s) ‖ p(y | s)) on average.
        """
        estimates = []
        base = GivenAngles(torsions, self.pieces.domains.n_stiff)
        chunks = torsions.split(_ENERGY_ROWS)
        with torch.no_grad():
            for rows in tqdm(chunks, desc="energies at torsions", unit="chunk", disable=not self.progress):
                z, log_q = base.beside(rows, generator=generator)
                y, log_det = self.pieces.stiff(z)
                estimates.append(log_det - log_q - self._potential(y.to(torch.float64)))
        return torch.cat(estimates)

    def _potential(self, y: Tensor) -> Tensor:
        """Reduced potentials ``[n]``; +inf for rows so far out that they have no energy."""
        try:
            return self.latent_target.reduced_potential(y)
        except (DomainError, EnergyError):
            if len(y) == 1:
                return torch.full((1,), torch.inf, dtype=torch.float64)
            return torch.cat([self._potential(half) for half in y.chunk(2)])

    def _fit(self, name: str, objective: Objective[Flow], settings: FitSettings, *, index: int, hottest: bool = False) -> None:
        if settings.steps == 0:
            return
        result: FitResult = fit(
            self.pieces.latent, objective, settings=settings, generator=self._generator(index),
            held_out=self._judge(hottest=hottest), store=self._store(name), should_stop=self.should_stop, label=name,
            progress=self.progress,
        )  # fmt: skip
        self.rows += [{"stage": name, **row} for row in result.history]
        early = ", stopped early" if result.stopped_early else ""
        logger.info("%s: %d steps%s, %d skipped", name, result.steps, early, result.skipped)

    def _data_terms(self, *, hottest: bool, batch_size: int, weight: float) -> list[tuple[float, Objective[Flow]]]:
        """Forward KL on the coldest or hottest data: with their forces if wanted, and then their torsions' likelihood beside it."""
        if weight == 0:
            return []
        y = self.y[-1 if hottest else 0]
        if not self.config.training.use_forces:
            return [(weight, ForwardKL(y, batch_size=batch_size))]
        gradient = self._data_gradient(hottest)
        forces = ForwardKL(y, batch_size=batch_size, u_gradient=gradient, outlier_limit=self.config.training.outlier_limit)
        if self.pieces.torsions is None:
            return [(weight, forces)]
        torsions = ForwardKL(y[:, : self.pieces.domains.n_soft], batch_size=batch_size)
        share = weight * self.config.training.torsion_weight
        return [(weight, forces), (share, OfPart(self.pieces.torsions, torsions, name="torsions"))]

    @functools.cache  # noqa: B019 - lives as long as the training
    def _data_gradient(self, hottest: bool) -> Tensor:
        """Gradients of the reduced potential, at its own temperature, at the coldest or hottest data ``[n, d]``."""
        part = (self.training, *self.training.hot)[-1 if hottest else 0]
        cold = part.temperature_kelvin == self.config.temperature_kelvin
        target = self.latent_target if cold else self.latent_target.at(part.temperature_kelvin)
        y = self.y[-1 if hottest else 0]
        return torch.cat([target.value_and_grad(rows.to(torch.float64))[1] for rows in y.split(_ENERGY_ROWS)]).to(y.dtype)

    def _pulled_back(self, target: Target) -> PulledBack:
        return PulledBack(target, self.pieces.fixed, event_shape=self.pieces.latent.event_shape)

    def _judge(self, *, hottest: bool) -> HeldOut:
        """Misfit and forward ESS of a flow on held-out data of the lowest or highest temperature."""
        part = (self.held_out, *self.held_out.hot)[-1 if hottest else 0]
        rows = np.linspace(0, len(part) - 1, min(_HELD_OUT_ROWS, len(part))).astype(int)
        y = self.pieces.to_latent(part.x[rows])
        with torch.no_grad():
            _, log_det = self.pieces.fixed(y)
        u = torch.as_tensor(part.u[rows]) - log_det

        def judge(flow: Flow) -> Mapping[str, float]:
            with torch.no_grad():
                log_q = torch.cat([flow.log_prob(some) for some in y.split(1000)])
            ratios = -u - log_q
            return {
                "held_out_loss": -float(log_q.mean()), "forward_ess": forward_effective_sample_size(ratios), "eubo": float(ratios.mean())
            }  # fmt: skip

        return judge

    def _settings(self, steps: int, *, patience: int | None = None, learning_rate: float | None = None) -> FitSettings:
        settings = self.config.training
        return FitSettings(
            steps=steps, learning_rate=learning_rate or settings.learning_rate,
            gradient_clip=settings.gradient_clip, ema_decay=settings.ema_decay,
            checkpoint_every=settings.checkpoint_every, evaluate_every=_EVALUATE_EVERY, patience=patience,
        )  # fmt: skip

    def _store(self, name: str) -> CheckpointStore:
        return CheckpointStore(self.folder.checkpoints / name, fingerprint=self.fingerprint)

    def _generator(self, index: int) -> torch.Generator:
        return stream(self.config.seed, 100 + index)
