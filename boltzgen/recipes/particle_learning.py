"""A continuous flow of particles that is learned again and again while its data grow."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from boltzgen.core import Distribution, Flow, Target
from boltzgen.errors import InputError, SolverError
from boltzgen.networks.field import ParticleField
from boltzgen.recipes.field import FieldSize, particle_field
from boltzgen.training.couplings import Aligned
from boltzgen.training.fit import FitSettings, fit
from boltzgen.training.flow_matching import FlowMatching
from boltzgen.transforms.continuous import MOST_REFINED, ContinuousTransform, FixedStep, measure_log_det_error, more_steps

#: Every which row is held out; rows that judge the flow and measure its error.
_HELD_OUT_EVERY, _MEASURED = 10, 256


@dataclass(frozen=True)
class MatchingSettings:
    """How a field is trained every time, and how exactly its flow is integrated.

    Attributes:
        steps: Optimiser steps of flow matching.
        batch_size: Pairs per step.
        learning_rate: Peak of the cosine schedule.
        most_rows: Most configurations that are learned from; more are thinned evenly.
        solver_steps: Runge–Kutta steps (order 4) of a density; up to eight times as many are taken until it is exact enough.
        log_det_error: Largest measured error of a log density in nats.
    """

    steps: int = 500
    batch_size: int = 256
    learning_rate: float = 3e-3
    most_rows: int = 20_000
    solver_steps: int = 8
    log_det_error: float = 1e-3

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.most_rows, self.solver_steps) < 1 or not 0 < self.log_det_error <= 0.01:
            raise InputError(f"expected positive numbers of steps and rows and an error of at most 0.01 nats, got {self}")


@dataclass(frozen=True)
class ParticleFlowRecipe:
    """How equivariant continuous flows of particles are learned from configurations of walkers, and made again.

    Which density a jump is accepted by: where the energy does not change under translation, the target is exp(−u) on the mean-free
    subspace Σ_i x_i = 0 with its natural volume, and so is the base, a :class:`~boltzgen.distributions.ParticleNormal` without a centre.
    The field moves no centre, so that samples stay in the subspace and ∫ ∇·v dt over all coordinates is the log determinant within it:
    −u and log q are densities over the same volume, and their ratio is that of the subspace, with nothing to correct. Local moves have to
    stay there too: ``HamiltonianMonteCarlo(mean_free=True)``. Where there is a trap, base and target are densities over all coordinates:
    give the base a ``centre_scale``, and no ``mean_free``. log q is the divergence integrated in fixed steps, exact to
    ``settings.log_det_error``, which is measured after every training, on samples and on held-out configurations.

    Equal particles are equal to the field: walkers jump between all labellings, and, but for a chiral field, between mirror images.

    Attributes:
        target: The particles; their labels say which are equal.
        base: What the flow starts from, in single precision; about as wide as the configurations.
        kind: Class of the field.
        size: Size of the field.
        settings: Training and integration.
        seed: Seed of the initial weights.

    References:
        Köhler, Klein & Noé, ICML 2020 (equivariant flows); Klein, Krämer & Noé, NeurIPS 2023 (equivariant flow matching).
    """

    target: Target
    base: Distribution
    kind: Callable[..., ParticleField]
    size: FieldSize
    settings: MatchingSettings = MatchingSettings()
    seed: int = 0

    def learned(self, x: Tensor, before: Distribution | None, *, generator: torch.Generator) -> tuple[Flow, Mapping[str, float]]:
        """A frozen flow matched to configurations ``[n, particles, d]`` in nm; its field begins where the last one ended.

        Raises:
            EnergyError: If training diverges.
            SolverError: If no number of steps up to eight times those asked for makes the density exact enough.
        """
        s = self.settings
        stride = -(-len(x) // s.most_rows)
        data = x[::stride].to(torch.float32)
        if getattr(self.base, "centre_scale", None) is None:
            data = data - data.mean(dim=1, keepdim=True)
        held_out = torch.arange(len(data)) % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
        flow = self._built(s.solver_steps)
        if before is not None:
            flow.load_state_dict(before.state_dict())
        self._match(flow, data[~held_out], generator=generator)
        judges = data[held_out] if bool(held_out.any()) else data
        judges = judges[torch.randperm(len(judges), generator=generator)[:_MEASURED]]
        flow = self._exact(flow, judges, generator=generator)
        with torch.no_grad():
            loss = -float(flow.log_prob(judges).mean())
        error, steps = flow.log_det_error, _solver(flow).n_steps
        assert error is not None
        return flow, {"held_out_loss": loss, "n_rows": float(len(data)), "log_det_error": error, "solver_steps": float(steps)}

    def described(self, flow: Distribution) -> Mapping[str, Any]:
        """Weights and number of steps of a flow, copied."""
        assert isinstance(flow, Flow)
        weights = {name: tensor.detach().clone() for name, tensor in flow.state_dict().items()}
        return {"steps": _solver(flow).n_steps, "weights": weights}

    def rebuilt(self, content: Mapping[str, Any]) -> Flow:
        """The flow with these weights in that many steps; its measured error is among the weights."""
        flow = self._built(int(content["steps"]))
        flow.load_state_dict(dict(content["weights"]))
        flow.requires_grad_(False)
        return flow.eval()

    def _built(self, steps: int) -> Flow:
        generator = torch.Generator().manual_seed(self.seed)
        field = particle_field(self.kind, self.target, size=self.size, generator=generator)
        return Flow(self.base, ContinuousTransform(field, FixedStep(steps)))

    def _match(self, flow: Flow, x: Tensor, *, generator: torch.Generator) -> None:
        """Train the field of a flow in place, with base samples turned and relabelled to lie close."""
        transform, s = flow.transform, self.settings
        assert isinstance(transform, ContinuousTransform)
        field = transform.field
        labels = self.target.labels or tuple(map(str, range(self.target.event_shape[0])))
        coupling = Aligned(labels, reflections=bool(field.is_mirrored))
        objective = FlowMatching(field, self.base, x, batch_size=min(s.batch_size, len(x)), coupling=coupling)
        chosen = FitSettings(
            steps=s.steps, learning_rate=s.learning_rate, gradient_clip=10.0, ema_decay=0.99, checkpoint_every=s.steps,
            evaluate_every=s.steps,
        )  # fmt: skip
        flow.train()
        fit(flow, objective, settings=chosen, generator=generator, progress=False)

    def _exact(self, trained: Flow, data: Tensor, *, generator: torch.Generator) -> Flow:
        """The frozen flow with as many steps as its density asks for; it carries the measured error."""
        s, steps = self.settings, self.settings.solver_steps
        weights = self.described(trained)["weights"]
        while True:
            flow = self.rebuilt({"steps": steps, "weights": weights})
            try:
                error = measure_log_det_error(flow, n=_MEASURED, data=data, generator=generator)
            except SolverError:
                error = math.inf
            if error <= s.log_det_error:
                return flow
            most = MOST_REFINED * s.solver_steps
            if steps == most:
                raise SolverError(
                    f"with {steps} steps the log density is known to {error:.2g} nats only, above {s.log_det_error:g}: take more solver "
                    "steps, or train longer or with a smaller learning rate for a smoother field"
                )
            steps = min(more_steps(steps, error / s.log_det_error), most)


def _solver(flow: Flow) -> FixedStep:
    """The solver of a flow of this recipe."""
    assert isinstance(flow.transform, ContinuousTransform)
    assert isinstance(flow.transform.solver, FixedStep)
    return flow.transform.solver
