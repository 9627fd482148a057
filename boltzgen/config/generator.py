"""The configuration of a generator of one molecule over internal coordinates."""

from __future__ import annotations

import itertools
from typing import Annotated, Literal

import pydantic as pd
from pydantic import Field

from boltzgen.config.sections import (
    Bound,
    Count,
    EvaluationConfig,
    Fraction,
    InputPath,
    PlatformConfig,
    Rate,
    Section,
    Temperature,
    Time,
    limit,
)
from boltzgen.errors import ConfigError
from boltzgen.units import parse_quantity

#: Ratio of neighbouring rungs, and number of rungs, of a temperature ladder that was not written out.
LADDER_RATIO, LADDER_RUNGS = 1.25, 4

_CV_UNITS = {"distance": "nanometer", "angle": "radian", "dihedral": "radian"}


class DataConfig(Section):
    """Configurations to learn from."""

    source: Literal["ladder", "langevin", "trajectory"] = Field(
        "ladder",
        description="ladder: replica exchange over temperatures, made here. langevin: plain MD at the target temperature, made here "
        "(misses what lies behind barriers). trajectory: your own files.",
    )
    temperatures: tuple[Temperature, ...] = Field(
        (), description="Rungs of the ladder; the first is the target temperature. Empty: four rungs, each 1.25 times the last."
    )
    steps_per_replica: Count = Field(600_000, description="MD steps of every replica.")
    timestep: Time = Field("1 femtosecond", description="Integration step.")
    friction: Rate = Field("1/picosecond", description="Friction of the Langevin thermostat.")
    exchange_interval: Count = Field(50, description="MD steps between exchanges of replicas.")
    save_interval: Count = Field(50, description="MD steps between stored configurations; a multiple of exchange_interval on a ladder.")
    chains: Count = Field(2, description="Independent ladders or simulations, run in parallel.")
    files: tuple[InputPath, ...] = Field((), description="Trajectory files (XTC, DCD, NetCDF, PDB), for source: trajectory.")
    evaluate_fraction: Annotated[float, Field(gt=0, le=0.5)] = Field(
        0.2, description="Share of the data, in whole time blocks, kept for evaluation."
    )

    @property
    def temperatures_kelvin(self) -> tuple[float, ...]:
        """Rungs of the ladder in kelvin, the target first."""
        return tuple(parse_quantity(text, "kelvin") for text in self.temperatures)

    @property
    def timestep_ps(self) -> float:
        """Integration step in ps."""
        return parse_quantity(self.timestep, "picosecond")

    @property
    def friction_per_ps(self) -> float:
        """Friction in 1/ps."""
        return parse_quantity(self.friction, "1/picosecond")

    @pd.model_validator(mode="after")
    def _files_belong_to_trajectories(self) -> DataConfig:
        if self.source == "trajectory" and not self.files:
            raise ValueError("source: trajectory needs files: [your.xtc]")
        if self.source != "trajectory" and self.files:
            raise ValueError(f"files are read for source: trajectory only, but source is {self.source}")
        if self.source == "ladder" and self.save_interval % self.exchange_interval:
            raise ValueError(
                f"save_interval must be a multiple of exchange_interval on a ladder, got {self.save_interval} and {self.exchange_interval}"
            )
        if self.exchange_interval > self.steps_per_replica or self.save_interval > self.steps_per_replica:
            raise ValueError("exchange_interval and save_interval must not exceed steps_per_replica")
        return self


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


class CollectiveVariableConfig(Section):
    """A coordinate to look along."""

    kind: Literal["distance", "angle", "dihedral"] = Field(description="What it is.")
    atoms: tuple[Annotated[int, Field(ge=0)], ...] = Field(description="Atom indices, from 0: 2 for a distance, 3 or 4.")

    @property
    def unit(self) -> str:
        """Unit of its values."""
        return _CV_UNITS[self.kind]

    @pd.model_validator(mode="after")
    def _as_many_atoms_as_the_kind_needs(self) -> CollectiveVariableConfig:
        n = {"distance": 2, "angle": 3, "dihedral": 4}[self.kind]
        if len(self.atoms) != n or len(set(self.atoms)) != n:
            raise ValueError(f"expected {n} different atoms for a {self.kind}, got {list(self.atoms)}")
        return self


class GeneratorConfig(Section):
    """Train a Boltzmann generator and weight its samples."""

    task: Literal["generator"] = Field("generator", description="What to do.")
    topology: InputPath = Field(description="PDB, mmCIF, prmtop or top file of one molecule.", examples=["topology.pdb"])
    system: InputPath = Field(description="OpenMM system.xml, made from the same topology.", examples=["system.xml"])
    coordinates: InputPath | None = Field(None, description="Starting coordinates, where the topology file has none (inpcrd, gro).")
    state: InputPath | None = Field(None, description="OpenMM state.xml with positions and box, used before the topology's.")
    trust_files: bool = Field(False, description="Allow a system.xml that can run code (PythonForce). Only for files that you made.")
    temperature: Temperature = Field("300 kelvin", description="Temperature of the ensemble.")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(1, description="Seed of everything random.")
    platform: PlatformConfig = Field(PlatformConfig(), description=PlatformConfig.__doc__)
    data: DataConfig = Field(DataConfig(), description=DataConfig.__doc__, validate_default=True)
    flow: FlowConfig = Field(FlowConfig(), description=FlowConfig.__doc__)
    training: TrainingConfig = Field(TrainingConfig(), description=TrainingConfig.__doc__)
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description=EvaluationConfig.__doc__)
    collective_variables: dict[str, CollectiveVariableConfig] = Field(
        {},
        description="Coordinates of the profiles and basins. Empty: backbone dihedrals, or else the softest torsions, are found.",
        examples=[{"phi": {"kind": "dihedral", "atoms": [4, 6, 8, 14]}}],
    )
    basins: dict[str, dict[str, tuple[Bound, Bound]]] = Field(
        {},
        description="Named regions whose free energies are compared: a range of one or more coordinates. "
        "A dihedral range whose first limit is the larger one passes through 180 degrees.",
        examples=[{"left_handed": {"phi": ["0 radian", "2 radian"]}}],
    )

    @property
    def temperature_kelvin(self) -> float:
        """Temperature of the ensemble in kelvin."""
        return parse_quantity(self.temperature, "kelvin")

    @property
    def basin_ranges(self) -> dict[str, dict[str, tuple[float, float]]]:
        """Basin → coordinate → (low, high) in radian or nm."""
        return {name: {cv: (limit(low)[0], limit(high)[0]) for cv, (low, high) in box.items()} for name, box in self.basins.items()}

    @pd.field_validator("data", mode="after")
    @classmethod
    def _ladder_starts_at_the_target(cls, data: DataConfig, info: pd.ValidationInfo) -> DataConfig:
        if "temperature" not in info.data:
            return data
        target = parse_quantity(info.data["temperature"], "kelvin")
        if not data.temperatures:
            rungs = tuple(f"{target * LADDER_RATIO**rung:.6g} kelvin" for rung in range(LADDER_RUNGS))
            return data.model_copy(update={"temperatures": rungs})
        ladder = data.temperatures_kelvin
        if abs(ladder[0] - target) > 1e-4 * target or any(high <= low for low, high in itertools.pairwise(ladder)):
            raise ValueError(
                f"temperatures must rise from the target's {info.data['temperature']}, got {', '.join(data.temperatures)}; "
                "temperatures: [] makes four rungs from the target"
            )
        return data

    @pd.model_validator(mode="after")
    def _basins_fit_their_coordinates(self) -> GeneratorConfig:
        for basin, box in self.basins.items():
            for cv, bounds in box.items():
                if self.collective_variables and cv not in self.collective_variables:
                    raise ValueError(f"basins.{basin}: {cv!r} is not among the collective_variables {', '.join(self.collective_variables)}")
                kind = self.collective_variables[cv].kind if cv in self.collective_variables else "dihedral"
                try:
                    low, high = (parse_quantity(bound, _CV_UNITS[kind]) for bound in bounds)
                except ConfigError as error:
                    raise ValueError(f"basins.{basin}.{cv}: {error}") from None
                if low == high or (kind != "dihedral" and low > high):
                    raise ValueError(f"basins.{basin}.{cv}: expected a range [low, high] of the {kind}, got {list(bounds)}")
        return self
