"""The configuration of sampling by steered paths to proposed values of collective variables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic as pd
from pydantic import Field

from boltzgen.config.collective_variables import VariableConfig
from boltzgen.config.sections import Bound, Count, InputPath, PlatformConfig, Positive, Section, Temperature, Time, limit
from boltzgen.errors import ConfigError
from boltzgen.units import parse_quantity

NonNegative = Annotated[int, Field(ge=0)]

#: Width to which a variable is held where none is given: this share of its range, or this many radians of a dihedral.
_WIDTH_SHARE, _WIDTH_RADIAN = 1 / 25, 0.2


class DynamicsConfig(Section):
    """The dynamics of local moves and of steered paths."""

    timestep: Time = Field("2 femtosecond", description="Time step. Moves are exact at any; a longer one costs acceptance.")
    friction: Annotated[str, pd.Field(description="Friction within paths; 0 is deterministic and usually best.")] = "0 /picosecond"
    planar: bool = Field(False, description="Whether the particles live in the plane z = 0 and must not leave it.")

    @pd.field_validator("friction")
    @classmethod
    def _not_negative(cls, given: str) -> str:
        try:
            value = parse_quantity(given, "1/picosecond")
        except ConfigError as error:
            raise ValueError(str(error)) from None
        if value < 0:
            raise ValueError(f"expected a friction of zero or more, got {given!r}")
        return given


class WalkerStartsConfig(Section):
    """How many walkers there are and where they start."""

    count: Count = Field(8, description="Walkers; each makes its own paths, side by side on the contexts.")
    files: tuple[InputPath, ...] = Field((), description="Structures to start from, in turn; empty: that of the topology.")
    pulled_to: tuple[dict[str, Bound], ...] = Field(
        (),
        description="Values of the variables to which walkers are pulled before they start, in turn: one per known basin.",
        examples=[({"end_to_end": "1.2 nanometer"},)],
    )
    pull_steps: Count = Field(5000, description="Steps of that pulling.")
    equilibration: NonNegative = Field(50, description="Local moves of every walker after it, not counted as data.")


class LocalMovesConfig(Section):
    """Moves within a basin."""

    kind: Literal["metropolised", "langevin"] = Field(
        "metropolised",
        description="metropolised: paths of MD from fresh velocities, accepted exactly (hybrid Monte Carlo; GHMC with friction). langevin: "
        "the same without the test, which has the error of the time step; results then say so.",
    )
    steps: Count = Field(50, description="MD steps of one local move.")
    per_cycle: NonNegative = Field(2, description="Local moves of every walker between two steered ones.")


class PathStepsConfig(Section):
    """How long steered paths are, and how their centre moves."""

    steps: Count = Field(500, description="MD steps of a path that goes all the way from one basin to another.")
    proportional: bool = Field(True, description="Whether shorter ways take proportionally fewer steps.")
    bend: Annotated[float, Field(ge=-1, le=1)] = Field(
        0.0, description="0: even pace. Negative: starts and ends slowly. Positive: slow halfway, where barriers are."
    )
    tune: bool = Field(True, description="Choose steps, widths and bend by pilot paths before production.")
    pilot_paths: Annotated[int, Field(ge=2)] = Field(4, description="Pilot paths of every walker and setting.")


class PeakConfig(Section):
    """One peak of a fixed proposal."""

    centre: dict[str, Bound] = Field(description="Its centre.", examples=[{"end_to_end": "1.2 nanometer"}])
    width: dict[str, Bound] = Field(description="Its standard deviation.", examples=[{"end_to_end": "0.06 nanometer"}])
    weight: Positive = Field(1.0, description="Its weight.")


class ProposalConfig(Section):
    """Where values are proposed from."""

    kind: Literal["learned", "fixed"] = Field(
        "learned", description="learned: a flow over the variables, trained while sampling. fixed: the peaks below, or the whole range."
    )
    peaks: tuple[PeakConfig, ...] = Field((), description="Peaks of a fixed proposal.")
    defensive: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="Share of proposals from the whole range, so that a learned density misses nothing."
    )
    flow: Literal["coupling", "continuous"] = Field(
        "coupling",
        description="coupling: spline couplings, fast to learn and to draw from. continuous: a velocity field trained by flow matching, "
        "smoother, solved with as many steps as its density needs.",
    )
    layers: Count = Field(4, description="Coupling layers of the flow.")
    bins: Annotated[int, Field(ge=2)] = Field(16, description="Spline bins.")
    hidden: tuple[Count, ...] = Field((48,), description="Widths of the hidden layers of its conditioners.")
    training_steps: Count = Field(300, description="Optimiser steps every time it is learned.")
    field_hidden: tuple[Count, ...] = Field((64, 64), description="Widths of the hidden layers of the velocity field of a continuous flow.")
    matching_steps: Count = Field(1000, description="Optimiser steps every time a continuous flow is learned.")


class AdaptationConfig(Section):
    """Learning while sampling; none of it enters a result."""

    rounds: NonNegative = Field(6, description="Rounds; the proposal is learned again after each.")
    cycles: Count = Field(10, description="Cycles (local moves, then one steered path of every walker) in a round.")


class ProductionConfig(Section):
    """Sampling with everything frozen."""

    cycles: Count = Field(100, description="Most cycles.")
    round_trips: NonNegative = Field(0, description="Stop early after this many round trips between basins of all walkers; 0: never.")
    r_hat: Annotated[float, Field(gt=1)] = Field(1.05, description="... and when the potential scale reduction is below this.")
    save_interval: Count = Field(5, description="Cycles between stored configurations.")


class PathsConfig(Section):
    """Sampling of a system whose slow coordinates are known, by steered paths that are accepted exactly."""

    task: Literal["paths"] = Field("paths", description="What to do.")
    topology: InputPath = Field(description="PDB, mmCIF, prmtop or top file.", examples=["topology.pdb"])
    system: InputPath = Field(description="OpenMM system.xml, made from the same topology.", examples=["system.xml"])
    coordinates: InputPath | None = Field(None, description="Starting coordinates, where the topology file has none (inpcrd, gro).")
    state: InputPath | None = Field(None, description="OpenMM state.xml with positions and box, used before the topology's.")
    trust_files: bool = Field(False, description="Allow a system.xml that can run code (PythonForce). Only for files that you made.")
    temperature: Temperature = Field("300 kelvin", description="Temperature of the ensemble.")
    parameters: dict[str, float] = Field({}, description="Global parameters of the forces that differ from system.xml.")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(1, description="Seed of everything random.")
    platform: PlatformConfig = Field(PlatformConfig(), description=PlatformConfig.__doc__)
    collective_variables: dict[str, VariableConfig] = Field(
        description="Coordinates that paths are steered along.", examples=[{"end_to_end": {"kind": "distance", "atoms": [0, 8]}}]
    )
    ranges: dict[str, tuple[Bound, Bound]] = Field(
        {}, description="Range of every variable that is no dihedral; values outside are not proposed from the whole range.",
        examples=[{"end_to_end": ["1 nanometer", "2.2 nanometer"]}],
    )  # fmt: skip
    widths: dict[str, Bound] = Field(
        {}, description="How tightly a path holds each variable: standard deviation about its centre; a 25th of the range by default."
    )
    basins: dict[str, dict[str, tuple[Bound, Bound]]] = Field(
        {},
        description="Named regions whose free energies are compared: a range of one or more variables. A dihedral range whose first limit "
        "is the larger one passes through 180 degrees.",
        examples=[{"compact": {"end_to_end": ["0 nanometer", "1.57 nanometer"]}}],
    )
    dynamics: DynamicsConfig = Field(DynamicsConfig(), description=DynamicsConfig.__doc__)
    walkers: WalkerStartsConfig = Field(WalkerStartsConfig(), description=WalkerStartsConfig.__doc__)
    local: LocalMovesConfig = Field(LocalMovesConfig(), description=LocalMovesConfig.__doc__)
    paths: PathStepsConfig = Field(PathStepsConfig(), description=PathStepsConfig.__doc__)
    proposal: ProposalConfig = Field(ProposalConfig(), description=ProposalConfig.__doc__)
    adaptation: AdaptationConfig = Field(AdaptationConfig(), description=AdaptationConfig.__doc__)
    production: ProductionConfig = Field(ProductionConfig(), description=ProductionConfig.__doc__)

    @property
    def temperature_kelvin(self) -> float:
        """Temperature of the ensemble in kelvin."""
        return parse_quantity(self.temperature, "kelvin")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the variables, in order."""
        return tuple(self.collective_variables)

    @property
    def limits(self) -> tuple[tuple[float, float], ...]:
        """Range of every variable in its unit; the whole circle of a dihedral without one."""
        circle = (-3.141592653589793, 3.141592653589793)
        return tuple(tuple(limit(end)[0] for end in self.ranges[name]) if name in self.ranges else circle for name in self.names)  # type: ignore[misc]

    @property
    def width_values(self) -> tuple[float, ...]:
        """Width of every variable in its unit."""
        spans = (high - low for low, high in self.limits)
        defaults = (_WIDTH_RADIAN if name not in self.ranges else _WIDTH_SHARE * span for name, span in zip(self.names, spans, strict=True))
        return tuple(limit(self.widths[n])[0] if n in self.widths else d for n, d in zip(self.names, defaults, strict=True))

    @property
    def basin_ranges(self) -> dict[str, dict[str, tuple[float, float]]]:
        """Basin → variable → (low, high) in its unit."""
        return {name: {cv: (limit(low)[0], limit(high)[0]) for cv, (low, high) in box.items()} for name, box in self.basins.items()}

    @pd.model_validator(mode="after")
    def _variables_fit(self) -> PathsConfig:
        if not self.collective_variables:
            raise ValueError("collective_variables: name at least one coordinate to steer along")
        mentioned: list[tuple[str, Mapping[str, Any]]] = [("ranges", self.ranges), ("widths", self.widths)]
        mentioned += [(f"basins.{basin}", box) for basin, box in self.basins.items()]
        mentioned += [("walkers.pulled_to", values) for values in self.walkers.pulled_to]
        mentioned += [("proposal.peaks", values) for peak in self.proposal.peaks for values in (peak.centre, peak.width)]
        for where, values in mentioned:
            for name, bounds in values.items():
                if name not in self.collective_variables:
                    raise ValueError(f"{where}: {name!r} is not among the collective_variables {', '.join(self.names)}")
                self._require_unit(where, name, bounds)
        for name, config in self.collective_variables.items():
            if not config.is_periodic and name not in self.ranges:
                raise ValueError(f"ranges: give the range [low, high] of {name}, which is not periodic")
            if name in self.ranges and not limit(self.ranges[name][0])[0] < limit(self.ranges[name][1])[0]:
                raise ValueError(f"ranges.{name}: expected a range [low, high], got {list(self.ranges[name])}")
        for name, value in self.widths.items():
            if limit(value)[0] <= 0:
                raise ValueError(f"widths.{name}: expected a positive width, got {value!r}")
        return self

    @pd.model_validator(mode="after")
    def _values_are_complete(self) -> PathsConfig:
        complete = [("walkers.pulled_to", values) for values in self.walkers.pulled_to]
        complete += [("proposal.peaks", values) for peak in self.proposal.peaks for values in (peak.centre, peak.width)]
        for where, values in complete:
            missing = [name for name in self.names if name not in values]
            if missing:
                raise ValueError(f"{where}: expected a value of every variable, {', '.join(missing)} has none")
        if self.proposal.kind == "learned" and self.proposal.peaks:
            raise ValueError("proposal.peaks are for kind: fixed")
        if self.proposal.kind == "learned" and not self.adaptation.rounds:
            raise ValueError("adaptation.rounds: a learned proposal needs at least one round; or take proposal.kind: fixed")
        return self

    def _require_unit(self, where: str, name: str, bounds: str | tuple[str, str]) -> None:
        unit = self.collective_variables[name].unit
        for bound in (bounds,) if isinstance(bounds, str) else bounds:
            try:
                parse_quantity(bound, unit)
            except ConfigError as error:
                raise ValueError(f"{where}.{name}: {error}") from None
