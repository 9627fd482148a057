"""The training stages of a continuous flow: flow matching on data or on reweighted samples, then fine-tuning with its density."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from boltzgen.config import MatchingConfig
from boltzgen.core import Flow, Objective, Target
from boltzgen.errors import CheckpointError, EnergyError, SolverError
from boltzgen.sampling.importance import importance_sample
from boltzgen.training.annealing import tempered_exponent
from boltzgen.training.checkpoints import CheckpointStore, load_weights
from boltzgen.training.couplings import Aligned, Coupling, independent, minibatch_transport
from boltzgen.training.fit import FitSettings, HeldOut, fit
from boltzgen.training.flow_matching import STRAIGHT, VARIANCE_PRESERVING, FlowMatching
from boltzgen.training.objectives import ForwardKL, LogVariance, ReverseKL, WeightedSum, batch_ess, path_gradient, truncated_log_weights
from boltzgen.workflows.continuous import FieldFlow
from boltzgen.workflows.run_folder import RunFolder
from boltzgen.workflows.seeds import stream

logger = logging.getLogger(__name__)

_INTERPOLANTS = {"straight": STRAIGHT, "variance_preserving": VARIANCE_PRESERVING}
#: Flow samples whose weights are looked at during training (fewer of more than 20 particles), and how many times in a stage.
_LOOKED_AT, _LOOKS = 250, 6
_ENERGY_ROWS = 5000


def started_from(settings: MatchingConfig) -> dict[str, str]:
    """What a fingerprint says of the weights that training starts from: their hash, nothing where there are none.

    Raises:
        CheckpointError: If they cannot be read.
    """
    if settings.start_from is None:
        return {}
    try:
        return {"start_from": hashlib.sha256(settings.start_from.read_bytes()).hexdigest()}
    except OSError as error:
        raise CheckpointError(f"cannot read training.start_from: {error}; give the flow.safetensors of a finished run") from error


@dataclass(eq=False)
class Matcher:
    """Trains the field of a flow in place.

    Attributes:
        settings: Settings.
        pieces: The field and its base.
        target: The exact target, with forces everywhere.
        allowed: The same with infinite energy where evaluation will give no weight; the target itself where it gives some everywhere.
        x: Data to learn from ``[m, n, d]``, float32, each with its centre at zero unless the base's is somewhere; empty when training
            knows energies only.
        seed: Seed of the run.
        folder: Run folder, for checkpoints and ``training.jsonl``.
        fingerprint: Hash that ties checkpoints to this run.
        should_stop: Asked after every step.
        progress: Whether to show progress bars.
    """

    settings: MatchingConfig
    pieces: FieldFlow
    target: Target
    allowed: Target
    x: Tensor
    seed: int
    folder: RunFolder
    fingerprint: str
    should_stop: Callable[[], bool]
    progress: bool
    rows: list[Mapping[str, object]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.x = self.x.to(self.pieces.settings.device)

    @functools.cached_property
    def flow(self) -> Flow:
        """The flow with the solver of training."""
        return self.pieces.flow(self.pieces.settings.training_steps, batch_size=self.settings.tuning_batch_size)

    def run(self) -> None:
        """All stages; writes ``training.jsonl`` and checkpoints.

        Raises:
            CheckpointError: If the weights to start from are missing, corrupt, or those of another field.
            Interrupted: If asked to stop; resumed by calling again.
        """
        if self.settings.start_from is not None:
            load_weights(self.flow, self.settings.start_from, fingerprint=None)
        if self.settings.from_energies:
            self.resample_and_match()
        else:
            self.match()
        self.fine_tune()
        self.folder.write_text("training.jsonl", "\n".join(json.dumps(row) for row in self.rows) + "\n")

    def match(self) -> None:
        """Flow matching on the data."""
        settings = self.settings
        if settings.steps:
            objective = self._matching(self.x, log_w=None)
            self._fit("matching", objective, steps=settings.steps, learning_rate=settings.learning_rate, index=2)

    def resample_and_match(self) -> None:
        """Flow matching on samples of the flow itself, weighted by their energies: no data are needed.

        In every round the target is q^{1−λ} p^λ, with the largest λ ≤ 1 that keeps the effective sample size asked for, so that the
        flow walks from its base to the target. Weights are cut at √n times their mean: training only.
        """
        settings = self.settings
        steps = max(1, settings.steps // settings.rounds)
        for k in range(settings.rounds):
            samples = importance_sample(
                self.flow, self.allowed, n=settings.round_samples, batch_size=_ENERGY_ROWS, generator=self._generator(100 + k),
                progress=self.progress, role="train",
            )  # fmt: skip
            exponent = tempered_exponent(samples.positive_log_w, minimum_ess=settings.minimum_ess)
            log_w = truncated_log_weights(exponent * samples.positive_log_w)
            logger.info("round %d: the samples carry %.3f of the way to the target", k + 1, exponent)
            self.rows.append({"stage": "resampling", "step": k + 1, "exponent": exponent})
            objective = self._matching(samples.x.to(self.x), log_w=log_w)
            self._fit(f"matching-{k + 1:02d}", objective, steps=steps, learning_rate=settings.learning_rate, index=300 + k)

    def fine_tune(self) -> None:
        """The objectives that need the exact density: the forward KL on data and the reverse KL on own samples, both with forces, and the
        log variance on both with energies."""
        settings = self.settings
        if not settings.tuning_steps:
            return
        known = self.x if settings.path_weight or settings.variance_weight else self.x[:0]
        found = [self.target.value_and_grad(rows) for rows in known.split(_ENERGY_ROWS) if len(rows)]
        batch, limit, terms = settings.tuning_batch_size, settings.outlier_limit, list[tuple[float, Objective[Flow]]]()
        if settings.path_weight and found:
            gradient = torch.cat([gradients for _, gradients in found]).to(self.x.dtype)
            forward = ForwardKL(self.x, batch_size=batch, u_gradient=gradient, outlier_limit=limit)
            terms.append((settings.path_weight, forward))
        if settings.reverse_weight:
            path = functools.partial(path_gradient, outlier_limit=limit)
            terms.append((settings.reverse_weight, ReverseKL(self.target, batch_size=batch, gradient=path)))
        if settings.variance_weight:
            log_p = -torch.cat([u for u, _ in found]) if found else self.x.new_zeros(0)
            terms.append((settings.variance_weight, LogVariance(self.x, log_p, batch_size=batch, target=self.allowed)))
        self._fit("tuning", WeightedSum(*terms), steps=settings.tuning_steps, learning_rate=settings.tuning_learning_rate, index=3)

    def _matching(self, x: Tensor, *, log_w: Tensor | None) -> FlowMatching:
        return FlowMatching(
            self.pieces.field, self.pieces.base, x, batch_size=self.settings.batch_size, log_w=log_w, coupling=self._coupling(),
            interpolant=_INTERPOLANTS[self.settings.interpolant], late=self.pieces.settings.late,
        )  # fmt: skip

    def _coupling(self) -> Coupling:
        labels = self.target.labels or tuple(map(str, range(self.target.event_shape[0])))
        couplings: dict[str, Coupling] = {
            "aligned": Aligned(labels, reflections=self.pieces.field.is_mirrored),
            "minibatch": minibatch_transport,
            "independent": independent,
        }
        return couplings[self.settings.coupling]

    def _fit(self, name: str, objective: Objective[Flow], *, steps: int, learning_rate: float, index: int) -> None:
        settings = self.settings
        chosen = FitSettings(
            steps=steps,
            learning_rate=learning_rate,
            gradient_clip=settings.gradient_clip,
            ema_decay=min(settings.ema_decay, 1 - 10 / max(steps, 20)),
            checkpoint_every=settings.checkpoint_every,
            evaluate_every=math.ceil(steps / _LOOKS),
        )
        store = CheckpointStore(self.folder.checkpoints / name, fingerprint=self.fingerprint)
        result = fit(
            self.flow, objective, settings=chosen, generator=self._generator(index), held_out=self._look(), store=store,
            should_stop=self.should_stop, label=name, progress=self.progress,
        )  # fmt: skip
        self.rows += [{"stage": name, **row} for row in result.history]
        logger.info("%s: %d steps, %d skipped", name, result.steps, result.skipped)

    def _look(self) -> HeldOut:
        """Effective sample size of a few samples of the flow."""
        n = math.ceil(_LOOKED_AT * min(1.0, 20 / self.target.event_shape[0]))

        def look(flow: Flow) -> Mapping[str, float]:
            try:
                samples = importance_sample(flow, self.allowed, n=n, generator=self._generator(4), progress=False, role="train")
            except (SolverError, EnergyError) as error:
                logger.info("the flow cannot be sampled yet: %s", error)
                return {"ess": 0.0}
            return {"ess": batch_ess(samples.positive_log_w)}

        return look

    def _generator(self, index: int) -> torch.Generator:
        return stream(self.seed, 100 + index)
