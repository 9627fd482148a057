"""What the jobs with continuous flows share: the field that a configuration names, and a density as exact as it asks for."""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from boltzgen.config import FieldConfig
from boltzgen.core import Distribution, Flow, Target, WeightedSamples
from boltzgen.distributions import ParticleNormal
from boltzgen.errors import PlatformError, SolverError
from boltzgen.networks.egnn import EGNN
from boltzgen.networks.embedded_field import EmbeddedField
from boltzgen.networks.field import ParticleField
from boltzgen.networks.gradient_field import GradientField
from boltzgen.networks.hollow_field import HollowField
from boltzgen.networks.pair_scales import PairStatistics
from boltzgen.networks.radial_field import RadialField
from boltzgen.networks.tensor_field import TensorField
from boltzgen.recipes import FieldSize, particle_field
from boltzgen.transforms.continuous import MOST_REFINED, ContinuousTransform, FixedStep, measure_log_det_error, more_steps
from boltzgen.transforms.volume import IntegratedDivergence, StepJacobian

logger = logging.getLogger(__name__)

FIELDS: Mapping[str, Callable[..., ParticleField]] = {
    "embedded": EmbeddedField,
    "egnn": EGNN,
    "tensor": TensorField,
    "chiral_tensor": functools.partial(TensorField, reflections=False),
    "gradient": GradientField,
    "hollow": HollowField,
    "radial": RadialField,
}

#: Evaluations of the field in a Runge-Kutta step of order four.
_STAGES = 4
#: Rows · particles² · hidden · layers · evaluations of a solution of the default field that is kept for the way back: about 6 GB.
_MOST_KEPT = 1e8
#: Samples that tell whether a number of steps is worth measuring well, and samples that measure it: fewer where only rounding is left.
_FIRST_LOOK, _MEASURED = 16, {"integral": 256, "steps": 32}


@dataclass(frozen=True)
class FieldFlow:
    """A field on its base, to be integrated in any number of steps.

    Attributes:
        base: Single-precision base.
        field: Velocity field.
        settings: Its configuration.
    """

    base: Distribution
    field: ParticleField
    settings: FieldConfig

    def __post_init__(self) -> None:
        self.base.to(self.settings.device)
        self.field.to(self.settings.device)

    def flow(self, steps: int, *, batch_size: int | None = None) -> Flow:
        """The flow in that many Runge-Kutta steps; it shares the weights.

        Args:
            steps: Number of steps.
            batch_size: Rows of a training step; solutions of small batches are kept for the way back instead of computed again.
        """
        solver = FixedStep(steps, late=self.settings.late)
        kept = (batch_size or math.inf) * self.field.n_particles**2 * self.settings.hidden * self.settings.n_layers * _STAGES * steps
        checkpointing = self.settings.kind != "embedded" or kept > _MOST_KEPT
        volume = StepJacobian() if self.settings.log_det == "steps" else IntegratedDivergence()
        return Flow(self.base, ContinuousTransform(self.field, solver, volume=volume, checkpointing=checkpointing))

    def reported(self, steps: int) -> Flow:
        """The flow in that many steps whose densities are reported: in double precision where they are those of the steps.

        With no error of discretisation left, rounding would be all: where a steep field contracts by 10⁴, single-precision
        positions say where they came from to 10⁻³ only (0.9 nats in one of 16 samples of alanine dipeptide).
        """
        flow = self.flow(steps)
        if self.settings.log_det == "steps":
            flow = copy.deepcopy(flow).double()
            if isinstance(flow.base, ParticleNormal):
                flow.base.dtype = torch.float64
        return flow

    def weighted(
        self, draw: Callable[[Flow], WeightedSamples], *, data: Tensor, generator: torch.Generator
    ) -> tuple[Flow, WeightedSamples, dict[str, Any]]:
        """The flow with as many steps as its density asks for, samples of it, and their error in nats, with the steps.

        Args:
            draw: Draws all samples of a flow.
            data: Held-out configurations ``[m, n, d]`` that judge the flow; its error is measured on them too.
            generator: Random numbers of the measurement.

        Raises:
            SolverError: If no number of steps up to eight times those asked for is enough.
        """
        steps = self.settings.steps
        while True:
            flow, error = self._measured(steps, data=data, generator=generator)
            reason = f"the log density is still known to {error:.2g} nats only, above field.log_det_error"
            if error <= self.settings.log_det_error:
                try:
                    return flow, draw(flow), {"log_det_error": error, "solver_steps": steps, "field_evaluations": _STAGES * steps}
                except SolverError as failure:
                    reason, error = str(failure), math.inf
                    logger.info("with %d steps: %s", steps, reason)
            if steps == MOST_REFINED * self.settings.steps:
                raise SolverError(
                    f"with {steps} steps {reason}: take more field.steps and --resume (training is kept), or train longer or with a "
                    "smaller learning rate for a smoother field"
                )
            steps = min(more_steps(steps, error / self.settings.log_det_error), MOST_REFINED * self.settings.steps)

    def _measured(self, steps: int, *, data: Tensor, generator: torch.Generator) -> tuple[Flow, float]:
        """The flow in that many steps, and the error of its log density in nats; infinite where a solve fails."""
        flow, n = self.reported(steps), _MEASURED[self.settings.log_det]
        try:
            error = measure_log_det_error(flow, n=_FIRST_LOOK, generator=generator)
            if error <= self.settings.log_det_error:
                error = measure_log_det_error(flow, n=n, data=data[:n], generator=generator)
        except SolverError as failure:
            logger.info("with %d steps: %s", steps, failure)
            return flow, math.inf
        logger.info("log densities are known to %.1e nats with %d steps", error, steps)
        return flow, error


def require_device(settings: FieldConfig) -> None:
    """Refuse a device that is not there.

    Raises:
        PlatformError: Saying why it cannot be used.
    """
    try:
        torch.zeros(1, device=settings.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise PlatformError(f"field.device: {settings.device!r} cannot be used ({reason}); cpu always can") from None


def make_field(
    settings: FieldConfig, target: Target, *, length: float, statistics: PairStatistics | None = None, generator: torch.Generator
) -> ParticleField:
    """The untrained field that a configuration names, for the particles of a target.

    Args:
        settings: What it names.
        target: The particles.
        length: Typical distance of neighbours in nm.
        statistics: Distances of all pairs in base and data, for a field with pair scales.
        generator: Source of the initial weights.
    """
    size = FieldSize(
        length=length, n_layers=settings.n_layers, hidden=settings.hidden, n_radial=settings.n_radial, compiled=settings.compile
    )
    return particle_field(FIELDS[settings.kind], target, size=size, statistics=statistics, generator=generator)


def root_mean_square(x: Tensor) -> float:
    """Standard deviation of the coordinates of configurations ``[m, n, d]`` around their centres: that of an isotropic normal base."""
    n, d = x.shape[1:]
    relative = x - x.mean(dim=1, keepdim=True)
    return float((relative.square().sum(dim=(1, 2)).double().mean() / (d * (n - 1))).sqrt())
