"""The configuration of a continuous flow of one molecule over the Cartesian coordinates of all its atoms."""

from __future__ import annotations

from typing import Literal

import pydantic as pd
from pydantic import Field

from boltzgen.config.continuous import FieldConfig, MatchingConfig
from boltzgen.config.molecule import MoleculeConfig
from boltzgen.config.sections import EvaluationConfig


class CartesianConfig(MoleculeConfig):
    """Train a continuous flow over the Cartesian coordinates of a molecule and weight its samples."""

    task: Literal["cartesian"] = Field("cartesian", description="What to do.")
    field: FieldConfig = Field(FieldConfig(), description=FieldConfig.__doc__)
    training: MatchingConfig = Field(MatchingConfig(), description=MatchingConfig.__doc__)
    evaluation: EvaluationConfig = Field(EvaluationConfig(n_samples=10_000, batch_size=1000), description=EvaluationConfig.__doc__)

    @pd.model_validator(mode="after")
    def _learns_from_data(self) -> CartesianConfig:
        if self.training.from_energies:
            raise ValueError("training.from_energies is for clusters: a molecule of this task learns from its data, with their forces")
        return self
