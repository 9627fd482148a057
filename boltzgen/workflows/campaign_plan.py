"""What a campaign consists of: every leg at every temperature, as often as it is repeated, each in a folder named by its inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from boltzgen import __version__
from boltzgen.config import LADDER_RUNGS, CampaignConfig, TfepConfig, make_config
from boltzgen.config.tfep import LOOKED_AT, LOOKS, End
from boltzgen.errors import ConfigError, InputError
from boltzgen.md.loading import file_hash
from boltzgen.workflows.run_folder import RunFolder, fingerprint_of

TASKS, _SEAL = "legs", "sealed.json"


@dataclass(frozen=True)
class Task:
    """One run of one leg.

    Attributes:
        leg: Name of the leg.
        temperature: Temperature of both ends, or None for the leg's own.
        repeat: Number of the repeat, from 1.
        config: Its configuration, with its own seed.
        key: Hash of everything that its result depends on: settings, seed, contents of its input files, version of boltzgen.
    """

    leg: str
    temperature: str | None
    repeat: int
    config: TfepConfig
    key: str

    @property
    def label(self) -> str:
        """Name for people."""
        return f"{self.difference}, repeat {self.repeat}"

    @property
    def difference(self) -> str:
        """Name of the difference that its repeats share."""
        return named(self.leg, self.temperature)

    @property
    def n_evaluations(self) -> int:
        """Force evaluations it will need, roughly; those of the frames of given trajectories are not known before they are read."""
        training, total = self.config.training, 0
        for name in self.config.ENDS:
            data = self.config.end(name).data
            rungs = (len(data.temperatures) or LADDER_RUNGS) if data.source == "ladder" else 1.2
            if data.source != "trajectory":
                total += int(rungs * data.steps_per_replica * data.chains)
            frames = data.steps_per_replica * data.chains // data.save_interval
            total += 2 * frames
            if self.config.map.is_learned:
                total += (1 + training.cross_fitting) * (training.steps * training.batch_size + LOOKED_AT * LOOKS)
        return total

    def folder(self, out: Path) -> Path:
        """Its run folder in the folder of a campaign."""
        return out / TASKS / self.key

    def file(self, out: Path) -> Path:
        """Its configuration, which ``boltzgen run`` takes."""
        return out / TASKS / f"{self.key}.json"


def named(leg: str, temperature: str | None) -> str:
    """Name of a leg, or of a cycle, at a temperature of the campaign."""
    return f"{leg} at {temperature}" if temperature else leg


def plan(config: CampaignConfig) -> tuple[Task, ...]:
    """Every run of a campaign.

    Raises:
        InputError: If an input file cannot be read.
        ConfigError: If a leg cannot be at a temperature of the campaign.
    """
    tasks = []
    for name, leg in config.legs.items():
        for temperature in config.temperatures or (None,):
            for repeat in range(1, config.repeats + 1):
                tasks.append(_task(config, name, leg, temperature, repeat))
    return tuple(tasks)


def write_tasks(tasks: tuple[Task, ...], out: Path) -> None:
    """Write the configuration of every run, for ``boltzgen run`` and for job arrays, and the list of them all."""
    (out / TASKS).mkdir(parents=True, exist_ok=True)
    for task in tasks:
        RunFolder(out / TASKS).write_json(task.file(out).name, task.config.model_dump(mode="json"))
    rows = [{"leg": t.leg, "temperature": t.temperature, "repeat": t.repeat, "key": t.key} for t in tasks]
    RunFolder(out).write_json("plan.json", rows)


def earlier_keys(out: Path) -> set[str]:
    """Runs of the plan that the folder held before."""
    path = out / "plan.json"
    try:
        return {row["key"] for row in json.loads(path.read_text(encoding="utf-8"))} if path.exists() else set()
    except (OSError, ValueError, TypeError, KeyError):
        return set()


def adopt(folder: Path, config: TfepConfig) -> Mapping[str, Any] | None:
    """Seal the results of a run that has just finished, here or in a job of its own: remember their hash, to find out later changes.

    Results that were made from other input files than those that lie there now are removed.

    Returns:
        The results, or None where there are no sealed ones now.
    """
    path = folder / "results.json"
    if not (folder / _SEAL).exists() and path.exists():
        try:
            made_from = dict(json.loads(path.read_text(encoding="utf-8"))["provenance"]["sha256"])
        except (OSError, ValueError, TypeError, KeyError):
            return None
        recorded = {name: {digest for file, digest in made_from.items() if file.startswith(f"{name}: ")} for name in config.ENDS}
        if not all(input_hashes(config, name) <= recorded[name] for name in config.ENDS):
            path.unlink()
            return None
        RunFolder(folder).write_json(_SEAL, {"results.json": file_hash(path)})
    return sealed_results(folder)


def sealed_results(folder: Path) -> Mapping[str, Any] | None:
    """The results of a finished run, or None where there are none, or not those that were sealed."""
    try:
        sealed = json.loads((folder / _SEAL).read_text(encoding="utf-8"))["results.json"]
        if sealed != file_hash(folder / "results.json"):
            return None
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        return results if results["schema"] == 1 else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def discard_results(folder: Path) -> bool:
    """Remove results that are not those that were sealed, or cannot be read; whether there were such. Data and checkpoints stay."""
    found = (folder / "results.json").exists() and sealed_results(folder) is None
    if found:
        for name in ("results.json", _SEAL):
            (folder / name).unlink(missing_ok=True)
    return found


def _task(config: CampaignConfig, name: str, leg: TfepConfig, temperature: str | None, repeat: int) -> Task:
    values = leg.model_dump(mode="json")
    if temperature is not None:
        for end in leg.ENDS:
            values[end]["temperature"] = temperature
    values["training"]["threads"] = config.engine.threads
    identity = json.dumps([config.seed, leg.seed, name, temperature, repeat])
    values["seed"] = int.from_bytes(hashlib.sha256(identity.encode()).digest()[:4], "big") % (2**31 - 1)
    try:
        made = cast(TfepConfig, make_config(values))
    except ConfigError as error:
        raise ConfigError(f"legs.{name} at {temperature}: {error}") from None
    return Task(name, temperature, repeat, made, _key(made))


def _key(config: TfepConfig) -> str:
    """Hash of settings and contents of input files, wherever they lie."""

    def content(value: Any) -> Any:
        if isinstance(value, Path):
            try:
                return file_hash(value)
            except OSError as error:
                raise InputError(f"cannot read {value}: {error.strerror or error}") from None
        if isinstance(value, Mapping):
            return {key: content(item) for key, item in value.items() if key not in ("platform", "threads")}
        return [content(item) for item in value] if isinstance(value, (list, tuple)) else value

    return fingerprint_of({"boltzgen": __version__, "values": content(config.model_dump())})[:16]


def input_hashes(config: TfepConfig, name: End) -> set[str]:
    """Hashes of the input files of a state as they are now."""
    state = getattr(config, name)
    return {file_hash(path) for path in (config.topology, config.coordinates, state.system, *state.files) if path is not None}
