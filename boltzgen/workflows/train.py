"""The training stages of a generator: likelihood of the data, optional annealing, then energies of the flow's own samples."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor

from boltzgen.config import GeneratorConfig
from boltzgen.core import Flow, Objective, Target
from boltzgen.estimators.weights import forward_effective_sample_size
from boltzgen.md.trajectory import Trajectory
from boltzgen.recipes import InternalCoordinateFlow
from boltzgen.targets.pulled_back import PulledBack
from boltzgen.targets.views import Regularised
from boltzgen.training.annealing import anneal
from boltzgen.training.checkpoints import CheckpointStore
from boltzgen.training.fit import FitResult, FitSettings, fit
from boltzgen.training.objectives import (
    ForwardKL,
    OfPart,
    ReverseGradient,
    ReverseKL,
    WeightedSum,
    path_gradient,
    score_gradient,
    truncated_log_weights,
)
from boltzgen.workflows.run_folder import RunFolder

logger = logging.getLogger(__name__)

#: Energies this far above the highest of the data, in kT, are flattened in training; and the length of the flattened range.
_CUT_ABOVE_DATA, _FLATTENED = 30.0, 100.0
#: Held-out rows that are looked at during training.
_HELD_OUT_ROWS = 2000
_EVALUATE_EVERY = 100


def train(
    config: GeneratorConfig,
    pieces: InternalCoordinateFlow,
    target: Target,
    *,
    training: Trajectory,
    held_out: Trajectory,
    folder: RunFolder,
    fingerprint: str,
    should_stop: Callable[[], bool],
    progress: bool,
) -> None:
    """Train the flow in place; writes ``training.jsonl`` and checkpoints.

    Args:
        config: Settings.
        pieces: The flow; only its learned layers change.
        target: The exact target.
        training: Data to learn from.
        held_out: Data to watch.
        folder: Run folder.
        fingerprint: Hash that ties checkpoints to this run.
        should_stop: Asked after every step.
        progress: Whether to show progress bars.

    Raises:
        Interrupted: If asked to stop; resumed by calling again.
    """
    stage = _Stages(config, pieces, target, training, held_out, folder, fingerprint, should_stop, progress)
    stage.likelihood()
    if config.training.annealing.enabled:
        stage.annealing()
    stage.energies()
    stage.populations()
    lines = [json.dumps(row) for row in stage.rows]
    folder.write_text("training.jsonl", "\n".join(lines) + "\n")


class _Stages:
    """What the stages share."""

    def __init__(
        self,
        config: GeneratorConfig,
        pieces: InternalCoordinateFlow,
        target: Target,
        training: Trajectory,
        held_out: Trajectory,
        folder: RunFolder,
        fingerprint: str,
        should_stop: Callable[[], bool],
        progress: bool,
    ) -> None:
        self.config, self.pieces, self.folder, self.fingerprint = config, pieces, folder, fingerprint
        self.should_stop, self.progress = should_stop, progress
        hottest = training.hot[-1] if config.training.annealing.enabled and training.hot else training
        self.start_kelvin = hottest.temperature_kelvin
        self.y = pieces.to_latent(hottest.x)
        self.cold_y = pieces.to_latent(training.x)
        cut = float(training.u.max()) + _CUT_ABOVE_DATA
        latent_shape = tuple(self.y.shape[1:])
        self.target = PulledBack(target, pieces.fixed, event_shape=latent_shape)
        self.regularised = PulledBack(Regularised(target, u_cut=cut, u_max=cut + _FLATTENED), pieces.fixed, event_shape=latent_shape)
        rows = np.linspace(0, len(held_out) - 1, min(_HELD_OUT_ROWS, len(held_out))).astype(int)
        self.watched = pieces.to_latent(held_out.x[rows])
        with torch.no_grad():
            _, log_det = pieces.fixed(self.watched)
        self.watched_u = torch.as_tensor(held_out.u[rows]) - log_det
        self.rows: list[Mapping[str, object]] = []

    def likelihood(self) -> None:
        """Maximum likelihood on the data, until the held-out likelihood stops improving."""
        settings = self.config.training
        objective = WeightedSum(*self._data_terms(self.y, self.start_kelvin, batch_size=settings.batch_size, weight=1.0))
        self._fit("likelihood", objective, self._settings(settings.forward_kl_steps, patience=settings.patience), index=0)

    def annealing(self) -> None:
        """Cool the flow from the hottest data to the target temperature by reweighting its own samples."""
        settings = self.config.training
        steps = anneal(
            self.pieces.latent, self.target, start_kelvin=self.start_kelvin, target_kelvin=self.config.temperature_kelvin,
            minimum_ess=settings.annealing.minimum_ess, n_samples=20 * settings.batch_size, batch_size=settings.batch_size,
            settings=self._settings(settings.annealing.steps_per_temperature), generator=self._generator(1),
            store_for=lambda k: self._store(f"annealing-{k:02d}"), should_stop=self.should_stop, progress=self.progress,
        )  # fmt: skip
        self.rows += [{"stage": "annealing", **asdict(step)} for step in steps]

    def energies(self) -> None:
        """Reverse KL on energies of the flow's own samples, mixed with the likelihood of the data."""
        settings = self.config.training
        path = functools.partial(path_gradient, outlier_limit=settings.outlier_limit)
        gradients: dict[str, ReverseGradient] = {"path": path, "score": score_gradient}
        reverse = ReverseKL(self.regularised, batch_size=settings.batch_size, gradient=gradients[settings.reverse_estimator])
        n = max(1, round(settings.batch_size * settings.forward_share))
        data = self._data_terms(self.cold_y, self.config.temperature_kelvin, batch_size=n, weight=settings.forward_weight)
        objective = WeightedSum((1.0, reverse), *data)
        self._fit("energies", objective, self._settings(settings.reverse_kl_steps, learning_rate=settings.reverse_learning_rate), index=2)

    def populations(self) -> None:
        """Relative weights of conformations, from reweighted samples of the flow itself: likelihood of their torsions.

        Path gradients compare forces, which say nothing about the relative weights of basins that no sample connects. Only the density
        of the torsions is refitted; what is stiff stays as it is, given the torsions.
        """
        settings, part = self.config.training, self.pieces.torsions
        if part is None:
            return
        for k in range(settings.population_rounds):
            generator = self._generator(10 + k)
            with torch.no_grad():
                y, log_q = self.pieces.latent.sample(settings.population_samples, generator=generator)
                u = torch.cat([self.target.reduced_potential(rows.to(torch.float64)) for rows in y.split(10_000)])
            torsions = y[:, : self.pieces.domains.n_soft]
            log_w = truncated_log_weights(-u - log_q)
            objective = OfPart(part, ForwardKL(torsions, batch_size=2 * settings.batch_size, log_w=log_w), name="torsions")
            chosen = self._settings(settings.population_steps, learning_rate=settings.reverse_learning_rate)
            self._fit(f"populations-{k + 1}", objective, chosen, index=20 + k)

    def _fit(self, name: str, objective: Objective, settings: FitSettings, *, index: int) -> None:
        if settings.steps == 0:
            return
        result: FitResult = fit(
            self.pieces.latent, objective, settings=settings, generator=self._generator(index),
            held_out=self._held_out, store=self._store(name), should_stop=self.should_stop, label=name, progress=self.progress,
        )  # fmt: skip
        self.rows += [{"stage": name, **row} for row in result.history]
        early = ", stopped early" if result.stopped_early else ""
        logger.info("%s: %d steps%s, %d skipped", name, result.steps, early, result.skipped)

    def _data_terms(self, y: Tensor, temperature_kelvin: float, *, batch_size: int, weight: float) -> list[tuple[float, Objective]]:
        """Forward KL on data of a temperature: with their forces if wanted, and then their torsions' likelihood beside it."""
        if weight == 0:
            return []
        if not self.config.training.use_forces:
            return [(weight, ForwardKL(y, batch_size=batch_size))]
        target = self.target if temperature_kelvin == self.config.temperature_kelvin else self.target.at(temperature_kelvin)
        gradients = torch.cat([target.value_and_grad(rows.to(torch.float64))[1] for rows in y.split(10_000)]).to(y.dtype)
        forces = ForwardKL(y, batch_size=batch_size, u_gradient=gradients, outlier_limit=self.config.training.outlier_limit)
        if self.pieces.torsions is None:
            return [(weight, forces)]
        torsions = ForwardKL(y[:, : self.pieces.domains.n_soft], batch_size=batch_size)
        share = weight * self.config.training.torsion_weight
        return [(weight, forces), (share, OfPart(self.pieces.torsions, torsions, name="torsions"))]

    def _held_out(self, flow: Flow) -> Mapping[str, float]:
        """Misfit and forward ESS of the flow on held-out data."""
        with torch.no_grad():
            log_q: Tensor = torch.cat([flow.log_prob(rows) for rows in self.watched.split(1000)])
        ratios = -self.watched_u - log_q
        return {"held_out_loss": -float(log_q.mean()), "forward_ess": forward_effective_sample_size(ratios), "eubo": float(ratios.mean())}

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
        seed = int(np.random.SeedSequence([self.config.seed, 100 + index]).generate_state(1)[0])
        return torch.Generator().manual_seed(seed)
