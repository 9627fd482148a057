"""The configuration of sampling by steered paths to proposed values of collective variables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations
from typing import Annotated, Any, Literal

import pydantic as pd
from pydantic import Field

from boltzgen.config.collective_variables import ForceConfig, VariableConfig
from boltzgen.config.molecule import SystemConfig
from boltzgen.config.sections import Bound, Count, FrozenConfig, InputPath, Positive, Section, Time, limit
from boltzgen.errors import ConfigError
from boltzgen.units import parse_quantity

NonNegative = Annotated[int, Field(ge=0)]

#: Width to which a variable is held where none is given: this share of its range, or of a whole circle (0.2 radian of a dihedral).
_WIDTH_SHARE, _WIDTH_OF_CIRCLE = 1 / 25, 0.2 / (2 * math.pi)


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
    looks: bool = Field(
        True,
        description="Look at paths of one variable whenever their centre has moved by its width: the profile then rests on all that paths "
        "pass, not on their ends alone. A look costs two force evaluations.",
    )
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


class ProductionConfig(FrozenConfig):
    """Sampling with everything frozen: what results rest on."""

    round_trips: NonNegative = Field(
        0, description="Stop early after this many round trips between basins of all walkers, asked after every 20 cycles; 0: never."
    )
    r_hat: Annotated[float, Field(gt=1)] = Field(
        1.05, description="... and when R-hat of every variable is below this and walkers are worth 100 independent draws."
    )


class PathsConfig(SystemConfig):
    """Sampling of a system whose slow coordinates are known, by steered paths that are accepted exactly."""

    task: Literal["paths"] = Field("paths", description="What to do.")
    topology: InputPath = Field(description="PDB, mmCIF, prmtop or top file of the molecule and its solvent.", examples=["topology.pdb"])
    collective_variables: dict[str, VariableConfig] = Field(
        description="Coordinates that paths are steered along.", examples=[{"end_to_end": {"kind": "distance", "atoms": [0, 8]}}]
    )
    basins: dict[str, dict[str, tuple[Bound, Bound]]] = Field(
        {},
        description="Named regions whose free energies are compared: a range of one or more variables. A dihedral range whose first limit "
        "is the larger one passes through 180 degrees. Fewer than two: both halves of the first variable's range.",
        examples=[{"compact": {"end_to_end": ["0 nanometer", "1.57 nanometer"]}}],
    )
    ranges: dict[str, tuple[Bound, Bound]] = Field(
        {}, description="Range of every variable that is no dihedral; values outside are not proposed from the whole range.",
        examples=[{"end_to_end": ["1 nanometer", "2.2 nanometer"]}],
    )  # fmt: skip
    widths: dict[str, Bound] = Field(
        {}, description="How tightly a path holds each variable: standard deviation about its centre; a 25th of the range by default."
    )
    dynamics: DynamicsConfig = Field(DynamicsConfig(), description=DynamicsConfig.__doc__)
    walkers: WalkerStartsConfig = Field(WalkerStartsConfig(), description=WalkerStartsConfig.__doc__)
    local: LocalMovesConfig = Field(LocalMovesConfig(), description=LocalMovesConfig.__doc__)
    paths: PathStepsConfig = Field(PathStepsConfig(), description=PathStepsConfig.__doc__)
    proposal: ProposalConfig = Field(ProposalConfig(), description=ProposalConfig.__doc__)
    adaptation: AdaptationConfig = Field(AdaptationConfig(), description=AdaptationConfig.__doc__)
    production: ProductionConfig = Field(ProductionConfig(), description=ProductionConfig.__doc__)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the variables, in order."""
        return tuple(self.collective_variables)

    @property
    def periods(self) -> tuple[float | None, ...]:
        """Period of every variable in its unit, None where it has none."""
        variables = self.collective_variables.values()
        return tuple((v.period if isinstance(v, ForceConfig) else 2 * math.pi) if v.is_periodic else None for v in variables)

    @property
    def limits(self) -> tuple[tuple[float, float], ...]:
        """Range of every variable in its unit; the whole circle of a periodic one without one."""
        circles = [(-0.5 * (period or 0.0), 0.5 * (period or 0.0)) for period in self.periods]
        return tuple(self._range(name) if name in self.ranges else circle for name, circle in zip(self.names, circles, strict=True))

    @property
    def width_values(self) -> tuple[float, ...]:
        """Width of every variable in its unit."""
        spans = (high - low for low, high in self.limits)
        shares = (_WIDTH_SHARE if name in self.ranges else _WIDTH_OF_CIRCLE for name in self.names)
        defaults = (share * span for share, span in zip(shares, spans, strict=True))
        return tuple(limit(self.widths[n])[0] if n in self.widths else d for n, d in zip(self.names, defaults, strict=True))

    @property
    def basin_ranges(self) -> dict[str, dict[str, tuple[float, float]]]:
        """Basin → variable → (low, high) in its unit, periodic ones in [−P/2, P/2]; low above high passes through P/2."""
        periods = dict(zip(self.names, self.periods, strict=True))
        return {
            name: {cv: _on_circle(limit(low)[0], limit(high)[0], periods[cv]) for cv, (low, high) in box.items()}
            for name, box in self.basins.items()
        }

    @pd.model_validator(mode="after")
    def _variables_fit(self) -> PathsConfig:
        if not self.collective_variables:
            raise ValueError("collective_variables: name at least one coordinate to steer along")
        mentioned: list[tuple[str, Mapping[str, Any]]] = [("ranges", self.ranges), ("widths", self.widths)]
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
            if name in self.ranges:
                _require_range(f"ranges.{name}", self.ranges[name])
                self._require_on_circle(name)
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

    @pd.model_validator(mode="after")
    def _basins_are_apart(self) -> PathsConfig:
        if len(self.basins) == 1:
            raise ValueError(f"basins: expected two or more to compare, or none, got {', '.join(self.basins)} alone")
        periods = dict(zip(self.names, self.periods, strict=True))
        for basin, box in self.basins.items():
            if not box:
                raise ValueError(f"basins.{basin}: expected a range of at least one variable, got none")
            for name, bounds in box.items():
                if periods[name] is None:
                    _require_range(f"basins.{basin}.{name}", bounds)
        for (a, one), (b, other) in combinations(self.basin_ranges.items(), 2):
            if all(_overlap(one[name], other[name], periods[name]) for name in one.keys() & other.keys()):
                raise ValueError(f"basins: {a} and {b} overlap; a configuration may lie in one of them only")
        return self

    def _range(self, name: str) -> tuple[float, float]:
        low, high = self.ranges[name]
        return limit(low)[0], limit(high)[0]

    def _require_on_circle(self, name: str) -> None:
        """Proposed values of a periodic variable lie in [−P/2, P/2]."""
        period, unit = self.periods[self.names.index(name)], self.collective_variables[name].unit
        if period is not None and max(map(abs, self._range(name))) > 0.5 * period * (1 + 1e-6):
            raise ValueError(f"ranges.{name}: expected limits from {-0.5 * period:.4g} to {0.5 * period:.4g} {unit} (it has a period), "
                             f"got {list(self.ranges[name])}; leave it out for the whole circle")  # fmt: skip

    def _require_unit(self, where: str, name: str, bounds: str | tuple[str, str]) -> None:
        unit = self.collective_variables[name].unit
        for bound in (bounds,) if isinstance(bounds, str) else bounds:
            try:
                parse_quantity(bound, unit)
            except ConfigError as error:
                raise ValueError(f"{where}.{name}: {error}") from None


def _require_range(where: str, bounds: tuple[str, str]) -> None:
    if not limit(bounds[0])[0] < limit(bounds[1])[0]:
        raise ValueError(f"{where}: expected a range [low, high], got {list(bounds)}")


def _on_circle(low: float, high: float, period: float | None) -> tuple[float, float]:
    """A range, with ends beyond [−P/2, P/2] one turn back."""
    if period is None:
        return low, high
    if high - low >= period:
        return -0.5 * period, 0.5 * period
    first, last = (end if abs(end) <= 0.5 * period else (end + 0.5 * period) % period - 0.5 * period for end in (low, high))
    return first, last


def _overlap(one: tuple[float, float], other: tuple[float, float], period: float | None) -> bool:
    """Whether two ranges share more than their ends."""
    pieces = [
        [(low, high)] if low <= high or period is None else [(low, 0.5 * period), (-0.5 * period, high)] for low, high in (one, other)
    ]
    return any(min(b, d) - max(a, c) > 1e-9 for a, b in pieces[0] for c, d in pieces[1])
