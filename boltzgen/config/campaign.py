"""The configuration of a campaign: many free energy differences, repeats of each, and where they run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import pydantic as pd
from pydantic import Field

from boltzgen.config.sections import Count, Section, Temperature
from boltzgen.config.tfep import TfepConfig


class SlurmConfig(Section):
    """Jobs of one worker each, through dask-jobqueue (pip install dask-jobqueue)."""

    queue: str | None = Field(None, description="Partition.")
    account: str | None = Field(None, description="Account.")
    walltime: str = Field("04:00:00", description="Longest time of a job; a leg that is cut off goes on in the next.")
    cores: Count = Field(2, description="Cores of a job.")
    memory: str = Field("4GB", description="Memory of a job.")
    directives: tuple[str, ...] = Field((), description="Further lines of the job script, such as --gres=gpu:1.")


class EngineConfig(Section):
    """Where legs run: Dask distributed."""

    kind: Literal["local", "scheduler", "slurm"] = Field(
        "local", description="local: workers on this machine. scheduler: an existing Dask scheduler. slurm: workers as Slurm jobs."
    )
    workers: Count = Field(2, description="Workers; each runs one leg at a time.")
    threads: Count = Field(1, description="Threads of a leg.")
    gpus: tuple[str, ...] = Field((), description="GPUs of this machine, one worker for each instead of the number above.")
    address: str | None = Field(None, description="Address of the scheduler, such as tcp://host:8786; a shared file system is assumed.")
    slurm: SlurmConfig = Field(SlurmConfig(), description=SlurmConfig.__doc__)

    @pd.model_validator(mode="after")
    def _address_belongs_to_a_scheduler(self) -> EngineConfig:
        if (self.kind == "scheduler") != (self.address is not None):
            raise ValueError("kind: scheduler and address belong together: give both or neither")
        if self.gpus and self.kind != "local":
            raise ValueError(f"gpus are those of this machine, for kind: local; workers of kind: {self.kind} bring their own")
        return self


class CampaignConfig(Section):
    """Many free energy differences, as one campaign."""

    task: Literal["campaign"] = Field("campaign", description="What to do.")
    legs: dict[str, TfepConfig] = Field(
        description="Leg → its configuration of task tfep.",
        examples=[{"solvation": {"topology": "a.pdb", "a": {"system": "a.xml"}, "b": {"system": "b.xml"}}}],
    )
    defaults: dict[str, Any] = Field({}, description="What all legs have in common, section by section; a leg's own values win.")
    repeats: Count = Field(1, description="Independent runs of every leg.")
    temperatures: tuple[Temperature, ...] = Field((), description="Every leg at each of these; empty: at its own.")
    cycles: dict[str, tuple[str, ...]] = Field(
        {},
        description="Cycle → legs around it; a leading - passes a leg backwards.",
        examples=[{"triangle": ["a_to_b", "b_to_c", "-a_to_c"]}],
    )
    seed: int = Field(1, ge=0, lt=2**31, description="Every leg and repeat has its own seed, made from this one and its name.")
    engine: EngineConfig = Field(EngineConfig(), description=EngineConfig.__doc__)

    @pd.model_validator(mode="before")
    @classmethod
    def _defaults_go_into_legs(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or not isinstance(values.get("legs"), Mapping):
            return values
        defaults = values.get("defaults") or {}
        legs = {
            name: _merged(defaults, {"task": "tfep", **leg}) if isinstance(leg, Mapping) else leg for name, leg in values["legs"].items()
        }
        return {**values, "legs": legs}

    @pd.model_validator(mode="after")
    def _names_are_known(self) -> CampaignConfig:
        if not self.legs:
            raise ValueError("legs: expected one leg or more")
        for name in self.legs:
            if not name or name.startswith("-") or name != name.strip():
                raise ValueError(f"legs: {name!r} cannot be the name of a leg: a leading - would pass it backwards in a cycle")
        for cycle, legs in self.cycles.items():
            unknown = [leg.removeprefix("-") for leg in legs if leg.removeprefix("-") not in self.legs]
            if unknown or not legs:
                raise ValueError(
                    f"cycles.{cycle}: there is no leg {', '.join(unknown) or '(none named)'}; there are {', '.join(self.legs)}"
                )
        self._require_own_data()
        if len(set(self.temperatures)) < len(self.temperatures):
            raise ValueError(f"temperatures: one stands twice in {', '.join(self.temperatures)}")
        return self

    def _require_own_data(self) -> None:
        """Repeats and the legs of a cycle must not share trajectories: their errors would not be independent."""
        files = {name: {*leg.a.files, *leg.b.files} for name, leg in self.legs.items()}
        if self.repeats > 1 and any(files.values()):
            shared = ", ".join(name for name, own in files.items() if own)
            raise ValueError(
                f"repeats: all repeats of {shared} would evaluate the same trajectories: set repeats: 1, or let the data be made"
            )
        for cycle, legs in self.cycles.items():
            names = [leg.removeprefix("-") for leg in legs]
            for k, name in enumerate(names):
                for other in names[k + 1 :]:
                    if files[name] & files[other]:
                        raise ValueError(
                            f"cycles.{cycle}: {name} and {other} rest on the same trajectory, so that their errors are not independent and "
                            "the cycle cannot be closed by them: give each its own"
                        )


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Values of ``above`` over those of ``below``, section by section."""
    both = dict(below)
    for key, value in above.items():
        both[key] = _merged(both[key], value) if isinstance(value, Mapping) and isinstance(both.get(key), Mapping) else value
    return both
