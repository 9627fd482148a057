"""What every configuration of a continuous flow has: the field and how it is trained."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic as pd
from pydantic import Field

from boltzgen.config.sections import Count, Fraction, InputPath, Positive, Section

Steps = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0)]


class FieldConfig(Section):
    """The velocity field and how it is integrated."""

    kind: Literal["embedded", "egnn", "tensor", "chiral_tensor", "gradient", "hollow", "radial"] = Field(
        "embedded",
        description="Network: embedded is cheap; chiral_tensor tells mirror images apart; docs/continuous_flows.md describes them all.",
    )
    length: Positive | None = Field(None, description="Typical distance of neighbours in nm; null takes the data's median.")
    n_layers: Count = Field(2, description="Layers of messages; gradient and radial fields have one of their own.")
    hidden: Count = Field(64, description="Width of the hidden layers.")
    n_radial: Annotated[int, Field(ge=4)] = Field(16, description="Radial functions.")
    pair_scales: bool = Field(
        False,
        description="Also radial functions around the own distance of every pair of atoms, as wide as it varies: for the stiff bonds of "
        "molecules. Embedded only.",
    )
    base: Literal["fitted", "harmonic", "isotropic"] = Field(
        "fitted",
        description="fitted: the normal distribution with the data's mean squared distances, widened to the narrowest below. harmonic: "
        "springs along the bonds, of the length above, for molecules. isotropic: with the scale below.",
    )
    narrowest: Annotated[float, Field(ge=0)] = Field(
        0.15, description="Least standard deviation of a molecule's fitted base in nm: a narrow one leaves the field no room for error."
    )
    scale: Positive = Field(1.0, description="Standard deviation of the isotropic base in nm.")
    steps: Count = Field(12, description="Runge-Kutta steps (order 4) for every reported density; more are taken until it is exact enough.")
    log_det_error: Annotated[float, Field(gt=0, le=0.01)] = Field(1e-3, description="Largest error of a reported log density in nats.")
    late: bool = Field(
        False, description="Shorter steps, and half of the pairs of flow matching, towards the end of the path, where bonds take shape."
    )
    log_det: Literal["steps", "integral"] = Field(
        "integral",
        description="integral: of the divergence over time, right to the error of the steps. steps: the log determinant of the Runge-Kutta "
        "steps themselves, exact to rounding however few they are: for stiff molecules, where the integral needs many.",
    )
    training_steps: Count = Field(10, description="Runge-Kutta steps where the training integrates.")
    compile: bool = Field(False, description="Compile the field: 1.6 to 2 times faster after some minutes of compiling. Embedded only.")

    device: str = Field("cpu", description="Where the network computes: cpu, or cuda for a GPU.")

    @pd.model_validator(mode="after")
    def _compiles(self) -> FieldConfig:
        if self.compile and self.kind != "embedded":
            raise ValueError(f"compile: only the embedded field is compiled, and this one is {self.kind}; set compile: false")
        if self.pair_scales and self.kind != "embedded":
            raise ValueError(f"pair_scales: only the embedded field has them, and this one is {self.kind}; set pair_scales: false")
        return self


class MatchingConfig(Section):
    """How the field is trained: flow matching, then fine-tuning with the exact density."""

    start_from: InputPath | None = Field(
        None, description="flow.safetensors of an earlier run with the same field, to train it longer; null starts from nothing."
    )
    from_energies: bool = Field(False, description="Never learn from the walkers: resample, match, sample, starting from the base alone.")
    rounds: Count = Field(12, description="Rounds of resampling, for from_energies.")
    round_samples: Annotated[int, Field(ge=100)] = Field(20_000, description="Samples, and energies, of every such round.")
    minimum_ess: Fraction = Field(0.3, description="Effective sample size that the target of every such round must keep.")
    steps: Steps = Field(20_000, description="Optimiser steps of flow matching, over all rounds.")
    batch_size: Count = Field(512, description="Pairs per step.")
    learning_rate: Positive = Field(3e-3, description="Peak learning rate; falls to zero along a cosine.")
    interpolant: Literal["straight", "variance_preserving"] = Field("straight", description="Paths from the base to the data.")
    coupling: Literal["aligned", "minibatch", "independent"] = Field(
        "aligned", description="Which base sample leads where. aligned: turned and relabelled to be close (equivariant optimal transport)."
    )
    tuning_steps: Steps = Field(300, description="Optimiser steps of fine-tuning with the exact density, by the sum of the three below.")
    tuning_batch_size: Annotated[int, Field(ge=4)] = Field(128, description="Configurations per such step.")
    tuning_learning_rate: Positive = Field(5e-4, description="Peak learning rate of these steps.")
    path_weight: Weight = Field(0.0, description="Weight of the forward KL on the data, by path gradients with their forces.")
    reverse_weight: Weight = Field(0.0, description="Weight of the reverse KL on the flow's own samples, by path gradients too.")
    variance_weight: Weight = Field(
        1.0, description="Weight of the log variance, on energies alone: half of the configurations are data, half the flow's own samples."
    )
    outlier_limit: Positive = Field(3.0, description="Longest path gradient of one configuration, in medians of its batch.")
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(0.999, description="Decay of the running average of the weights.")
    gradient_clip: Positive = Field(10.0, description="Largest norm of a gradient.")
    checkpoint_every: Count = Field(1000, description="Steps between checkpoints.")
    threads: Count = Field(1, description="Threads of PyTorch.")

    @pd.model_validator(mode="after")
    def _something_to_tune_by(self) -> MatchingConfig:
        if self.from_energies and self.path_weight:
            raise ValueError("path_weight is for data, which from_energies does not know; give reverse_weight or variance_weight instead")
        if self.tuning_steps and not self.path_weight + self.reverse_weight + self.variance_weight:
            raise ValueError("tuning_steps need an objective: give path_weight, reverse_weight or variance_weight, or set tuning_steps: 0")
        return self
