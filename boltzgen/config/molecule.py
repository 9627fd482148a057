"""What every configuration of one molecule has: the system, its data, the coordinates that are looked along."""

from __future__ import annotations

import itertools
from typing import Annotated, Literal, Self

import pydantic as pd
from pydantic import Field

from boltzgen.config.collective_variables import DihedralConfig, VariableConfig
from boltzgen.config.sections import (
    Bound,
    Count,
    EvaluationConfig,
    InputPath,
    Mass,
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

#: What coordinates are that are found, not named.
_FOUND = DihedralConfig(atoms=(0, 1, 2, 3))


class SamplingConfig(Section):
    """How configurations of one state are made, and split."""

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
    hydrogen_mass: Mass | None = Field(
        None,
        description="Mass of hydrogens while configurations are made; null: as in system.xml. Masses do not enter the density of "
        "configurations of a system without constraints: with 4 dalton, steps may be twice as long.",
    )
    exchange_interval: Count = Field(50, description="MD steps between exchanges of replicas.")
    save_interval: Count = Field(50, description="MD steps between stored configurations; a multiple of exchange_interval on a ladder.")
    chains: Count = Field(2, description="Independent ladders or simulations, run in parallel.")
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

    @property
    def hydrogen_mass_dalton(self) -> float | None:
        """Mass of hydrogens in Da, None for that of the system."""
        return None if self.hydrogen_mass is None else parse_quantity(self.hydrogen_mass, "dalton")

    @pd.model_validator(mode="after")
    def _intervals_fit(self) -> Self:
        if self.source == "ladder" and self.save_interval % self.exchange_interval:
            raise ValueError(
                f"save_interval must be a multiple of exchange_interval on a ladder, got {self.save_interval} and {self.exchange_interval}"
            )
        if self.exchange_interval > self.steps_per_replica or self.save_interval > self.steps_per_replica:
            raise ValueError("exchange_interval and save_interval must not exceed steps_per_replica")
        return self


class DataConfig(SamplingConfig):
    """Configurations to learn from."""

    files: tuple[InputPath, ...] = Field((), description="Trajectory files (XTC, DCD, NetCDF, PDB), for source: trajectory.")

    @pd.model_validator(mode="after")
    def _files_belong_to_trajectories(self) -> DataConfig:
        if self.source == "trajectory" and not self.files:
            raise ValueError("source: trajectory needs files: [your.xtc]")
        if self.source != "trajectory" and self.files:
            raise ValueError(f"files are read for source: trajectory only, but source is {self.source}")
        return self


class SystemConfig(Section):
    """A molecule, and the coordinates that are looked along."""

    task: str = Field(description="What to do.")
    topology: InputPath = Field(description="PDB, mmCIF, prmtop or top file of one molecule.", examples=["topology.pdb"])
    system: InputPath = Field(description="OpenMM system.xml, made from the same topology.", examples=["system.xml"])
    coordinates: InputPath | None = Field(None, description="Starting coordinates, where the topology file has none (inpcrd, gro).")
    state: InputPath | None = Field(None, description="OpenMM state.xml with positions and box, used before the topology's.")
    trust_files: bool = Field(False, description="Allow a system.xml that can run code (PythonForce). Only for files that you made.")
    temperature: Temperature = Field("300 kelvin", description="Temperature of the ensemble.")
    parameters: dict[str, float] = Field(
        {}, description="Global parameters of the forces that differ from system.xml.", examples=[{"lambda_sterics": 0.5}]
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(1, description="Seed of everything random.")
    platform: PlatformConfig = Field(PlatformConfig(), description=PlatformConfig.__doc__)
    collective_variables: dict[str, VariableConfig] = Field(
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
        """Basin → coordinate → (low, high) in radian, nm or without a unit."""
        return {name: {cv: (limit(low)[0], limit(high)[0]) for cv, (low, high) in box.items()} for name, box in self.basins.items()}

    @pd.model_validator(mode="after")
    def _basins_fit_their_coordinates(self) -> Self:
        for basin, box in self.basins.items():
            for cv, bounds in box.items():
                if self.collective_variables and cv not in self.collective_variables:
                    raise ValueError(f"basins.{basin}: {cv!r} is not among the collective_variables {', '.join(self.collective_variables)}")
                known = self.collective_variables.get(cv, _FOUND)
                try:
                    low, high = (parse_quantity(bound, known.unit) for bound in bounds)
                except ConfigError as error:
                    raise ValueError(f"basins.{basin}.{cv}: {error}") from None
                if low == high or (low > high and not known.is_periodic):
                    raise ValueError(f"basins.{basin}.{cv}: expected a range [low, high] of the {known.kind}, got {list(bounds)}")
        return self


class MoleculeConfig(SystemConfig):
    """A molecule, its data and what is asked of them."""

    data: DataConfig = Field(DataConfig(), description=DataConfig.__doc__, validate_default=True)
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description=EvaluationConfig.__doc__)

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
