"""The configuration of a continuous flow of a cluster of particles."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic as pd
from pydantic import Field

from boltzgen.config.continuous import FieldConfig, MatchingConfig
from boltzgen.config.sections import Count, EvaluationConfig, Positive, Section


class ParticleSystemConfig(Section):
    """Particles with an analytic energy; lengths are read as nm, energies are in kT."""

    kind: Literal["double_well", "lennard_jones", "coulomb"] = Field(
        description="double_well: DW4 and its like. lennard_jones: a cluster held by a harmonic trap. coulomb: equal charges in a trap."
    )
    n_particles: Annotated[int, Field(ge=2)] = Field(description="Number of particles.")
    n_dimensions: Annotated[int, Field(ge=1)] = Field(3, description="Dimensions of space.")
    beta: Positive = Field(10.0, description="Inverse temperature of the Coulomb gas; the other energies are in kT already.")


class WalkersConfig(Section):
    """Reference configurations by Hamiltonian Monte Carlo of many walkers: to learn from, and to judge by."""

    n_walkers: Annotated[int, Field(ge=20)] = Field(1000, description="Walkers, each an independent chain; a fifth of them is held out.")
    n_times: Count = Field(100, description="Configurations that every walker stores.")
    thin: Count = Field(10, description="Moves between stored configurations.")
    burn_in: Annotated[int, Field(ge=50)] = Field(1000, description="Moves before the first, in which the step is tuned.")
    n_leapfrog: Count = Field(10, description="Leapfrog steps of a move.")
    step_size: Positive = Field(0.03, description="Leapfrog step to start tuning from, in nm.")
    spread: Positive = Field(0.6, description="Standard deviation of the coordinates that walkers start from, in nm.")


class ParticlesConfig(Section):
    """Train a continuous flow of particles and weight its samples."""

    task: Literal["particles"] = Field("particles", description="What to do.")
    system: ParticleSystemConfig = Field(
        description=ParticleSystemConfig.__doc__, examples=[ParticleSystemConfig(kind="lennard_jones", n_particles=13)]
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(1, description="Seed of everything random.")
    walkers: WalkersConfig = Field(WalkersConfig(), description=WalkersConfig.__doc__)
    field: FieldConfig = Field(FieldConfig(), description=FieldConfig.__doc__)
    training: MatchingConfig = Field(MatchingConfig(), description=MatchingConfig.__doc__)
    evaluation: EvaluationConfig = Field(EvaluationConfig(n_samples=10_000, batch_size=1000), description=EvaluationConfig.__doc__)

    @pd.model_validator(mode="after")
    def _dimensions_fit(self) -> ParticlesConfig:
        if self.field.kind in ("tensor", "chiral_tensor") and self.system.n_dimensions != 3:
            raise ValueError(
                f"field.kind: {self.field.kind} lives in three dimensions, the system in {self.system.n_dimensions}; take embedded"
            )
        if self.field.base == "harmonic":
            raise ValueError("field.base: harmonic is for molecules, whose bonds are known; take fitted or isotropic")
        if self.field.pair_scales:
            raise ValueError("field.pair_scales is for molecules, whose pairs differ; all pairs here are alike")
        if self.training.from_energies and (self.field.base == "fitted" or self.field.length is None):
            raise ValueError("training.from_energies knows no data; set field.length, field.base: isotropic and field.scale")
        return self
