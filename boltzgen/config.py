"""Validated configuration objects, read from and written to YAML; units are strings and are checked on loading."""

from __future__ import annotations

import difflib
import itertools
import os
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pydantic as pd
import yaml
from pydantic import Field

from boltzgen.errors import ConfigError
from boltzgen.units import parse_quantity

#: Ratio of neighbouring rungs, and number of rungs, of a temperature ladder that was not written out.
LADDER_RATIO, LADDER_RUNGS = 1.25, 4

_CV_UNITS = {"distance": "nanometer", "angle": "radian", "dihedral": "radian"}


def _quantity(unit_name: str) -> pd.BeforeValidator:
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


def _limit(given: Any) -> tuple[float, str]:
    """A limit of a basin, of either sign, with its unit: an angle in radian or a length in nm."""
    try:
        return parse_quantity(given, "radian"), "radian"
    except ConfigError:
        return parse_quantity(given, "nanometer"), "nanometer"


def _limit_text(given: Any) -> str:
    """The user's text of a limit of a basin."""
    try:
        value, unit_name = _limit(given)
    except ConfigError:
        raise ValueError(f"expected an angle or a length with its unit, such as '2 radian' or '0.3 nanometer', got {given!r}") from None
    return given.strip() if isinstance(given, str) else f"{value!r} {unit_name}"


def _resolved(path: Path, info: pd.ValidationInfo) -> Path:
    """The path, seen from the folder of the YAML file it stands in."""
    folder = (info.context or {}).get("folder")
    path = path.expanduser()
    return path if folder is None else Path(os.path.normpath(folder / path))


Temperature = Annotated[str, _quantity("kelvin")]
Time = Annotated[str, _quantity("picosecond")]
Rate = Annotated[str, _quantity("1/picosecond")]
Bound = Annotated[str, pd.BeforeValidator(_limit_text)]
InputPath = Annotated[Path, pd.AfterValidator(_resolved)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class _Section(pd.BaseModel):
    """A part of a configuration: immutable, and with no unknown keys."""

    model_config = pd.ConfigDict(frozen=True, extra="forbid", validate_default=False, allow_inf_nan=False)


class PlatformConfig(_Section):
    """Where OpenMM computes energies."""

    name: str | None = Field(None, description="OpenMM platform (Reference, CPU, CUDA, OpenCL, HIP); null times them on your system.")
    precision: Literal["single", "mixed", "double"] | None = Field(None, description="Precision, for platforms that have a choice.")
    device: str | None = Field(None, description="Index of the GPU, such as 0.", coerce_numbers_to_str=True)
    contexts: Count | None = Field(None, description="Energies computed side by side; null chooses by timing.")


class DataConfig(_Section):
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


class FlowConfig(_Section):
    """The network."""

    torsion_layers: Count = Field(6, description="Coupling layers over the torsions.")
    torsion_bins: Annotated[int, Field(ge=2)] = Field(16, description="Spline bins per torsion.")
    stiff_layers: Count = Field(4, description="Coupling layers over bonds and angles, given the torsions.")
    stiff_bins: Annotated[int, Field(ge=2)] = Field(8, description="Spline bins per bond or angle.")
    hidden: tuple[Count, ...] = Field((96,), description="Widths of the hidden layers of every conditioner.")
    compile: bool | None = Field(
        None, description="Compile the splines: 1.4 times faster after one or two minutes of compiling. Empty: where training is long."
    )


class AnnealingConfig(_Section):
    """Training from hot to cold."""

    enabled: bool = Field(False, description="Start at the hottest rung and cool down to the target temperature.")
    minimum_ess: Fraction = Field(0.3, description="Effective sample size that the next temperature must keep.")
    steps_per_temperature: Count = Field(1_000, description="Optimiser steps at every temperature on the way.")


class TrainingConfig(_Section):
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


class EvaluationConfig(_Section):
    """Fresh samples of the trained flow."""

    n_samples: Annotated[int, Field(ge=100)] = Field(100_000, description="Fresh samples drawn and weighted at the end.")
    batch_size: Count = Field(10_000, description="Samples per batch; the effective sample size is the median over batches.")
    clip_fraction: Fraction = Field(0.002, description="Share of the largest weights that the clipped (biased) diagnostics cut off.")
    n_bootstrap: Annotated[int, Field(ge=20)] = Field(200, description="Bootstrap resamples behind every error bar.")


class CollectiveVariableConfig(_Section):
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


class GeneratorConfig(_Section):
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
        return {name: {cv: (_limit(low)[0], _limit(high)[0]) for cv, (low, high) in box.items()} for name, box in self.basins.items()}

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


def make_config(values: Mapping[str, Any], *, folder: Path | None = None) -> GeneratorConfig:
    """Validate plain values.

    Args:
        values: What the YAML file holds: key → value.
        folder: Relative paths are seen from here; left as they are by default.

    Returns:
        The configuration with defaults filled in.

    Raises:
        ConfigError: For every wrong key or value, with its key path.

    Example:
        >>> config = make_config({"topology": "a.pdb", "system": "a.xml", "temperature": "320 kelvin"})
        >>> config.data.temperatures
        ('320 kelvin', '400 kelvin', '500 kelvin', '625 kelvin')
    """
    try:
        return GeneratorConfig.model_validate(dict(values), context={"folder": folder})
    except pd.ValidationError as error:
        lines = [_explain(item) for item in error.errors()]
        raise ConfigError("; ".join(lines) if len(lines) == 1 else "\n".join(["", *(f"  {line}" for line in lines)])) from None


def load_config(path: Path) -> GeneratorConfig:
    """Read a configuration.

    Args:
        path: YAML file; relative paths in it are seen from its folder.

    Returns:
        The configuration with defaults filled in.

    Raises:
        ConfigError: If the file cannot be read, or names every wrong key or value in it.
    """
    path = Path(path)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys and values; 'boltzgen config generator' prints a commented example")
    try:
        return make_config(values, folder=path.resolve().parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def dump_config(config: GeneratorConfig, path: Path) -> None:
    """Write a configuration, complete with defaults and comments; loading it gives an equal one."""
    Path(path).write_text(config_text(config), encoding="utf-8")


def default_config_text() -> str:
    """A commented configuration with every default, ready to be edited."""
    fields = GeneratorConfig.model_fields.items()
    required = {name: field.examples[0] for name, field in fields if field.is_required() and field.examples}
    return config_text(GeneratorConfig(**required))


def config_text(config: GeneratorConfig) -> str:
    """The configuration as commented YAML; the comments are the fields' descriptions."""
    return f"# {GeneratorConfig.__doc__}\n" + _section_text(config, indent=0)


def _section_text(section: _Section, *, indent: int) -> str:
    margin, lines = "  " * indent, []
    dumped = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if indent == 0:
            lines.append("")
        comment = field.description or ""
        if field.examples and not field.is_required() and not value:
            comment += f" Example: {yaml.safe_dump(field.examples[0], default_flow_style=True, width=1000).strip()}"
        lines += [f"{margin}# {line}" for line in textwrap.wrap(comment, 110)]
        if isinstance(value, _Section):
            lines += [f"{margin}{name}:", _section_text(value, indent=indent + 1)]
        else:
            style = None if isinstance(dumped[name], (dict, list)) else False  # None: innermost lists on one line
            text = yaml.safe_dump({name: dumped[name]}, default_flow_style=style, sort_keys=False, width=120)
            lines.append(textwrap.indent(text.strip(), margin))
    return "\n".join(lines) + ("\n" if indent == 0 else "")


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML loader that refuses a key written twice instead of dropping the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


def _explain(item: Any) -> str:
    """One line for one wrong key or value."""
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = _keys_at(item["loc"][:-1])
        close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        return f"{where}: unknown key" + (f"; did you mean {close[0]!r}?" if close else f"; known keys are {', '.join(known)}")
    if item["type"] == "missing":
        return f"{where}: missing, and it has no default"
    message = item["msg"].removeprefix("Value error, ")
    got = "" if item["type"] == "value_error" else f", got {item['input']!r}"
    return f"{where}: {message}{got}" if where else f"{message}{got}"


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    """Keys of the section at a location."""
    annotation: Any = GeneratorConfig
    for part in location:
        inside_dict = get_origin(annotation) is dict
        annotation = get_args(annotation)[1] if inside_dict else annotation.model_fields[part].annotation
    return list(annotation.model_fields)
