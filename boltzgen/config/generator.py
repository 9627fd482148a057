"""The configuration of a generator of one molecule over internal coordinates."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from boltzgen.config.molecule import MoleculeConfig
from boltzgen.config.sections import Count, Fraction, Section


class FlowConfig(Section):
    """The network."""

    torsion_layers: Count = Field(6, description="Coupling layers over the torsions.")
    torsion_bins: Annotated[int, Field(ge=2)] = Field(16, description="Spline bins per torsion.")
    stiff_layers: Count = Field(4, description="Coupling layers over bonds and angles, given the torsions.")
    stiff_bins: Annotated[int, Field(ge=2)] = Field(8, description="Spline bins per bond or angle.")
    hidden: tuple[Count, ...] = Field((96,), description="Widths of the hidden layers of every conditioner.")
    compile: bool | None = Field(
        None, description="Compile the splines: 1.4 times faster after one or two minutes of compiling. Empty: where training is long."
    )


class AnnealingConfig(Section):
    """Training from hot to cold."""

    enabled: bool = Field(False, description="Start at the hottest rung and cool down to the target temperature.")
    minimum_ess: Fraction = Field(0.3, description="Effective sample size that the next temperature must keep.")
    steps_per_temperature: Count = Field(1_000, description="Optimiser steps at every temperature on the way.")


class TrainingConfig(Section):
    """How the flow is trained."""

    forward_kl_steps: Annotated[int, Field(ge=0)] = Field(500, description="Steps of fitting the data.")
    reverse_kl_steps: Annotated[int, Field(ge=0)] = Field(1_000, description="Steps that also use energies of the flow's own samples.")
    population_rounds: Annotated[int, Field(ge=0, lt=10)] = Field(2, description="Rounds that refit the torsions to reweighted samples.")
    population_steps: Count = Field(500, description="Optimiser steps of every such round.")
    population_samples: Count = Field(30_000, description="Samples, and energies, of every such round.")
    population_batch_size: Count = Field(1024, description="Samples per step of every such round.")
    population_learning_rate: Annotated[float, Field(gt=0)] = Field(2e-3, description="Peak learning rate of every such round.")
    spread_share: Annotated[float, Field(ge=0, le=0.9)] = Field(
        0.3, description="Share of the samples whose torsions are spread evenly over all that were visited, for rare conformations."
    )
    batch_size: Count = Field(256, description="Configurations per step.")
    learning_rate: Annotated[float, Field(gt=0)] = Field(
        1e-3, description="Peak learning rate of the first stage; falls to zero along a cosine."
    )
    reverse_learning_rate: Annotated[float, Field(gt=0)] = Field(1e-3, description="Peak learning rate of the second stage.")
    forward_weight: Annotated[float, Field(ge=0)] = Field(0.3, description="Weight of the data's divergence in the second stage.")
    forward_share: Fraction = Field(0.25, description="Rows of data in the second stage, as a share of batch_size.")
    torsion_weight: Annotated[float, Field(ge=0)] = Field(
        1.0, description="Weight of the torsions' likelihood beside the forces; smaller for long, strongly correlated data."
    )
    use_forces: bool = Field(True, description="Fit the data with their forces too (path gradients): needs far fewer frames.")
    reverse_estimator: Literal["path", "score"] = Field("path", description="Gradient of the energies: path-wise or score function.")
    outlier_limit: Annotated[float, Field(gt=0)] = Field(
        3.0, description="Longest path gradient of one configuration, in medians of its batch; clashes would lead training astray."
    )
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(0.99, description="Decay of the running average of the weights.")
    threads: Count = Field(1, description="Threads of PyTorch: more hardly help networks of this size, and harm on a busy machine.")
    gradient_clip: Annotated[float, Field(gt=0)] = Field(10.0, description="Largest norm of a gradient.")
    checkpoint_every: Count = Field(500, description="Steps between checkpoints.")
    patience: Count = Field(3, description="Held-out evaluations without improvement before the likelihood stage stops early.")
    annealing: AnnealingConfig = Field(AnnealingConfig(), description="Cooling from hot data, for molecules with high barriers.")


class GeneratorConfig(MoleculeConfig):
    """Train a Boltzmann generator and weight its samples."""

    task: Literal["generator"] = Field("generator", description="What to do.")
    flow: FlowConfig = Field(FlowConfig(), description=FlowConfig.__doc__)
    training: TrainingConfig = Field(TrainingConfig(), description=TrainingConfig.__doc__)
