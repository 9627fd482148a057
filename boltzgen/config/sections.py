"""Types and sections that several configurations share: quantities with units, paths, the platform, the evaluation."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic as pd
from pydantic import Field

from boltzgen.errors import ConfigError
from boltzgen.units import parse_quantity


def quantity(unit_name: str) -> pd.BeforeValidator:
    """Validator of a positive quantity: keeps the user's text, turns an ``openmm.unit`` quantity into text."""

    def validate(given: Any) -> str:
        try:
            value = parse_quantity(given, unit_name)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        if value <= 0:
            raise ValueError(f"expected a positive quantity in {unit_name}, got {given!r}")
        return given.strip() if isinstance(given, str) else f"{value!r} {unit_name}"

    return pd.BeforeValidator(validate)


def limit(given: Any) -> tuple[float, str]:
    """A limit of a basin, of either sign, with its unit: an angle in radian, a length in nm, or dimensionless."""
    for unit_name in ("radian", "nanometer"):
        with suppress(ConfigError):
            return parse_quantity(given, unit_name), unit_name
    return parse_quantity(given, "dimensionless"), "dimensionless"


def _limit_text(given: Any) -> str:
    """The user's text of a limit of a basin."""
    try:
        value, unit_name = limit(given)
    except ConfigError:
        raise ValueError(
            f"expected an angle or a length with its unit, such as '2 radian' or '0.3 nanometer' (or '4 dimensionless' of a "
            f"coordination number), got {given!r}"
        ) from None
    return given.strip() if isinstance(given, str) else f"{value!r} {unit_name}"


def _resolved(path: Path, info: pd.ValidationInfo) -> Path:
    """The path, seen from the folder of the YAML file it stands in."""
    folder = (info.context or {}).get("folder")
    path = path.expanduser()
    return path if folder is None else Path(os.path.normpath(folder / path))


Temperature = Annotated[str, quantity("kelvin")]
Time = Annotated[str, quantity("picosecond")]
Rate = Annotated[str, quantity("1/picosecond")]
Mass = Annotated[str, quantity("dalton")]
Bound = Annotated[str, pd.BeforeValidator(_limit_text)]
InputPath = Annotated[Path, pd.AfterValidator(_resolved)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]


class Section(pd.BaseModel):
    """A part of a configuration: immutable, and with no unknown keys."""

    model_config = pd.ConfigDict(frozen=True, extra="forbid", validate_default=False, allow_inf_nan=False)


class PlatformConfig(Section):
    """Where OpenMM computes energies."""

    name: str | None = Field(None, description="OpenMM platform (Reference, CPU, CUDA, OpenCL, HIP); null times them on your system.")
    precision: Literal["single", "mixed", "double"] | None = Field(None, description="Precision, for platforms that have a choice.")
    device: str | None = Field(None, description="Index of the GPU, such as 0.", coerce_numbers_to_str=True)
    contexts: Count | None = Field(None, description="Energies computed side by side; null chooses by timing.")


class FrozenConfig(Section):
    """Sampling with everything frozen: what results rest on."""

    cycles: Count = Field(100, description="Cycles. A finished run goes on, with --resume, where this is raised.")
    discard: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="Share of them at the start that is left out, while walkers forget where they began."
    )
    save_interval: Count = Field(5, description="Cycles between stored configurations.")

    def n_discarded(self, n_cycles: int) -> int:
        """How many of the cycles that were done are left out; one remains."""
        return min(math.ceil(self.discard * n_cycles), n_cycles - 1)


class EvaluationConfig(Section):
    """Fresh samples of the trained flow."""

    n_samples: Annotated[int, Field(ge=100)] = Field(100_000, description="Fresh samples drawn and weighted at the end.")
    batch_size: Count = Field(10_000, description="Samples per batch; the effective sample size is the median over batches.")
    clip_fraction: Fraction = Field(0.002, description="Share of the largest weights that the clipped (biased) diagnostics cut off.")
    n_bootstrap: Annotated[int, Field(ge=20)] = Field(200, description="Bootstrap resamples behind every error bar.")
