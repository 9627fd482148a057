"""Configurations from YAML files and to them: every wrong key named, every value commented."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pydantic as pd
import yaml

from boltzgen.config.campaign import CampaignConfig
from boltzgen.config.cartesian import CartesianConfig
from boltzgen.config.generator import GeneratorConfig
from boltzgen.config.jumps import JumpsConfig
from boltzgen.config.particles import ParticlesConfig
from boltzgen.config.paths import PathsConfig
from boltzgen.config.sections import Section
from boltzgen.config.tfep import TfepConfig
from boltzgen.errors import ConfigError

#: What one run does; a campaign is many of them.
JobConfig = GeneratorConfig | CartesianConfig | ParticlesConfig | TfepConfig | PathsConfig | JumpsConfig
Config = JobConfig | CampaignConfig

#: Value of ``task`` → what the file must hold.
TASKS: Mapping[str, type[Config]] = {
    "generator": GeneratorConfig, "cartesian": CartesianConfig, "particles": ParticlesConfig, "tfep": TfepConfig,
    "paths": PathsConfig, "jumps": JumpsConfig, "campaign": CampaignConfig,
}  # fmt: skip


def make_config(values: Mapping[str, Any], *, folder: Path | None = None) -> Config:
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
    task = values.get("task", "generator")
    if task not in TASKS:
        raise ConfigError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    try:
        return TASKS[task].model_validate(dict(values), context={"folder": folder})
    except pd.ValidationError as error:
        lines = [_explain(item, TASKS[task]) for item in error.errors()]
        raise ConfigError("; ".join(lines) if len(lines) == 1 else "\n".join(["", *(f"  {line}" for line in lines)])) from None


def load_config(path: Path) -> Config:
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


def load_job(path: Path) -> JobConfig:
    """Read the configuration of one run.

    Args:
        path: YAML or JSON file.

    Raises:
        ConfigError: As :func:`load_config`, and for a campaign.
    """
    config = load_config(path)
    if isinstance(config, CampaignConfig):
        raise ConfigError(f"{path} is a campaign of many runs: use boltzgen campaign {path}")
    return config


def dump_config(config: Config, path: Path) -> None:
    """Write a configuration, complete with defaults and comments; loading it gives an equal one."""
    Path(path).write_text(config_text(config), encoding="utf-8")


#: Fields that have a default and that the examples of others need.
_NEEDED = {"paths": ("ranges",)}


def default_config_text(task: str = "generator") -> str:
    """A commented configuration with every default, ready to be edited."""
    made = TASKS[task]
    shown = {name: field for name, field in made.model_fields.items() if field.is_required() or name in _NEEDED.get(task, ())}
    required = {name: field.examples[0] for name, field in shown.items() if field.examples}
    return config_text(made(**required))


def trained_by(config: Config) -> dict[str, Any]:
    """The plain values that what was trained depends on, and every cycle of a run of walkers.

    A resumed run may change the rest: how it is evaluated, how long its production is, where it computes, where its files lie (what they
    hold is hashed elsewhere).
    """
    left_out: dict[str, Any] = {
        "evaluation": True,
        "production": {"cycles", "discard", "round_trips", "r_hat"},
        "platform": True,
        "field": {"steps", "log_det_error", "device"},
        "training": {"threads", "start_from"},
    }
    return _without_places(config.model_dump(exclude=left_out))


def answered_by(config: Config) -> dict[str, Any]:
    """The plain values that the results of a run depend on."""
    return _without_places(config.model_dump(exclude={"platform"}))


def production_cycles(config: Config) -> int:
    """Cycles of production; 0 of a job that has none."""
    return config.production.cycles if isinstance(config, (PathsConfig, JumpsConfig)) else 0


def _without_places(values: Any) -> Any:
    """Plain values with no paths among them."""
    if isinstance(values, Mapping):
        return {key: _without_places(value) for key, value in values.items() if not isinstance(value, Path)}
    if isinstance(values, (list, tuple)):
        return [_without_places(value) for value in values if not isinstance(value, Path)]
    return values


def config_text(config: Config) -> str:
    """The configuration as commented YAML; the comments are the fields' descriptions."""
    return f"# {type(config).__doc__}\n" + _section_text(config, indent=0)


def _section_text(section: Section, *, indent: int) -> str:
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
        if isinstance(value, Section):
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


def _explain(item: Any, made: type[Section]) -> str:
    """One line for one wrong key or value."""
    where = ".".join(str(part) for part in _keys_of(item["loc"], made))
    if item["type"] == "extra_forbidden":
        known = list(_at(item["loc"][:-1], made).model_fields)
        close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        return f"{where}: unknown key" + (f"; did you mean {close[0]!r}?" if close else f"; known keys are {', '.join(known)}")
    if item["type"] == "missing":
        return f"{where}: missing, and it has no default"
    if item["type"].startswith("union_tag"):
        kinds = ", ".join(_kinds(_at(item["loc"], made)))
        got = item["input"].get("kind", "nothing") if isinstance(item["input"], Mapping) else item["input"]
        return f"{where}.kind: expected one of {kinds}, got {got!r}"
    message = item["msg"].removeprefix("Value error, ")
    got = "" if item["type"] == "value_error" else f", got {item['input']!r}"
    return f"{where}: {message}{got}" if where else f"{message}{got}"


def _keys_of(location: tuple[int | str, ...], made: type[Section]) -> list[int | str]:
    """The keys on the way to a location; pydantic's also names the kind of each section that has several."""
    return [part for k, part in enumerate(location) if not _kinds(_at(location[:k], made))]


def _at(location: tuple[int | str, ...], made: type[Section]) -> Any:
    """The type of what stands at a location."""
    annotation: Any = made
    for part in location:
        origin, arguments = get_origin(annotation), get_args(annotation)
        if kinds := _kinds(annotation):
            annotation = kinds[str(part)]
        elif origin is dict:
            annotation = arguments[1]
        elif origin is tuple:
            annotation = arguments[0 if arguments[-1] is ... else int(part)]
        elif isinstance(annotation, type) and issubclass(annotation, Section) and part in annotation.model_fields:
            annotation = annotation.model_fields[str(part)].annotation
        else:
            return None
    return annotation


def _kinds(annotation: Any) -> dict[str, type[Section]]:
    """The sections that may stand at one place, by their kind; empty where there is no choice."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else ()
    if not members or not all(isinstance(member, type) and issubclass(member, Section) for member in members):
        return {}
    return {member.model_fields["kind"].default: member for member in members}
