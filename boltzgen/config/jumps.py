"""The configuration of sampling one molecule by local moves and by jumps that a flow over all coordinates proposes."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic as pd
from pydantic import Field

from boltzgen.config.generator import FlowConfig
from boltzgen.config.molecule import SystemConfig
from boltzgen.config.sections import Count, FrozenConfig, InputPath, Section, Time
from boltzgen.units import parse_quantity

NonNegative = Annotated[int, Field(ge=0)]


class StartsConfig(Section):
    """How many walkers there are and where they start."""

    count: Annotated[int, Field(ge=2)] = Field(20, description="Walkers, side by side.")
    files: tuple[InputPath, ...] = Field(
        (), description="Structures to start from, in turn: one per known basin. Empty: that of the topology."
    )
    equilibration: NonNegative = Field(50, description="Local moves of every walker before anything is learned or counted.")


class LocalConfig(Section):
    """Moves within a basin, each accepted or refused exactly."""

    kind: Literal["md", "hmc", "mala"] = Field(
        "md",
        description="md: short MD from fresh velocities (hybrid Monte Carlo with the atoms' masses, run inside OpenMM). hmc: leapfrog "
        "with equal masses. mala: the same with one step. md is by far the fastest for molecules.",
    )
    steps: Count = Field(50, description="Steps of one local move of md or hmc.")
    timestep: Time = Field("1 femtosecond", description="Time step of md. Moves are exact at any; a longer one costs acceptance.")
    step_size: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Leapfrog step of hmc and mala in nm; empty: found before anything is counted, for 75 % (mala: 57 %) accepted."
    )
    per_cycle: Count = Field(1, description="Local moves of every walker between two jumps.")


class LearningConfig(Section):
    """How the flow is learned, again after every round, from where the walkers have been."""

    steps: Count = Field(300, description="Optimiser steps every time.")
    batch_size: Count = Field(256, description="Configurations per step.")
    learning_rate: Annotated[float, Field(gt=0)] = Field(2e-3, description="Peak learning rate; falls to zero along a cosine.")
    use_forces: bool = Field(True, description="Learn from forces too: one energy per configuration, far fewer configurations needed.")
    remembered: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Share of the latest observations that is learned from; 1 keeps rare basins among the proposals."
    )


class RoundsConfig(Section):
    """Learning while sampling; none of it enters a result."""

    rounds: Count = Field(6, description="Rounds; the flow is learned again after each.")
    cycles: Count = Field(50, description="Cycles (local moves, then one jump of every walker) in a round.")


class JumpsProductionConfig(FrozenConfig):
    """Sampling with the flow frozen: what results rest on."""

    cycles: Annotated[int, Field(ge=10)] = Field(1000, description=FrozenConfig.model_fields["cycles"].description)
    save_interval: Count = Field(10, description=FrozenConfig.model_fields["save_interval"].description)


class JumpsConfig(SystemConfig):
    """Sample one molecule by local moves and by jumps between basins that a flow over all its coordinates proposes."""

    task: Literal["jumps"] = Field("jumps", description="What to do.")
    walkers: StartsConfig = Field(StartsConfig(), description=StartsConfig.__doc__)
    local: LocalConfig = Field(LocalConfig(), description=LocalConfig.__doc__)
    flow: FlowConfig = Field(FlowConfig(torsion_layers=4, stiff_layers=2, compile=False), description=FlowConfig.__doc__)
    learning: LearningConfig = Field(LearningConfig(), description=LearningConfig.__doc__)
    adaptation: RoundsConfig = Field(RoundsConfig(), description=RoundsConfig.__doc__)
    production: JumpsProductionConfig = Field(JumpsProductionConfig(), description=JumpsProductionConfig.__doc__)

    @property
    def timestep_ps(self) -> float:
        """Time step of MD in ps."""
        return parse_quantity(self.local.timestep, "picosecond")

    @pd.model_validator(mode="after")
    def _every_start_is_used(self) -> JumpsConfig:
        if len(self.walkers.files) > self.walkers.count:
            raise ValueError(f"walkers.count: expected at least one walker for each of the {len(self.walkers.files)} files")
        return self
