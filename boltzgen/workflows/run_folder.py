"""The folder of one run: refused when it is another's, checked before work starts, finished by one atomic rename."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import logging
import math
import os
import platform as machine
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import numpy as np

import boltzgen
from boltzgen.config import Config, answered_by, config_text, load_config, production_cycles, trained_by
from boltzgen.core import Estimate
from boltzgen.errors import CheckpointError, InUseError, OutputError
from boltzgen.files import written
from boltzgen.md.platforms import count_cores

#: Free space that a run must find before it starts, in bytes.
MINIMUM_FREE_BYTES = 500 * 2**20

_LOCK = ".boltzgen.lock"
#: Files that a run writes before its first data.
_BEFORE_WORK = ("config.yaml", "run.log", "timing.json", "platform.json")
_PROBE_BYTES = 2**20
_PACKAGES = ("torch", "openmm", "openmmtools", "nflows", "mdtraj", "pymbar", "numpy", "scipy")


@dataclass(frozen=True)
class Results:
    """What one run found, as written to ``results.json`` (schema 1).

    Attributes:
        task: Kind of job.
        estimates: Numbers with errors.
        diagnostics: Effective sample sizes, counts and bounds; fractions are 0–1.
        wall_seconds: Wall time of every stage.
        verdict: ``reliable`` or what is wrong, in two words.
        provenance: See :func:`provenance`.
        reasons: Why the verdict is what it is, one sentence each.
        notes: What a reader must know: what was left out of the target, normalisations, the box.
    """

    task: str
    estimates: tuple[Estimate, ...]
    diagnostics: Mapping[str, Any]
    wall_seconds: Mapping[str, float]
    verdict: str
    provenance: Mapping[str, Any]
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The content of ``results.json``; numbers that are not finite become null."""
        estimates = [
            {"name": e.name, "value": e.value, "stderr": e.stderr, "unit": e.unit, "n_effective": e.n_effective}
            | ({"note": e.note} if e.note else {})
            for e in self.estimates
        ]
        content = {"schema": 1, "task": self.task, "estimates": estimates, "diagnostics": self.diagnostics}
        content |= {"wall_seconds": self.wall_seconds, "verdict": self.verdict, "verdict_reasons": self.reasons, "notes": self.notes}
        return _plain(content | {"provenance": self.provenance})

    def to_csv(self) -> str:
        """One row per scalar estimate, each carrying what is needed to trust and to trace it."""
        out = io.StringIO()
        columns = ["name", "value", "stderr", "unit", "n_effective", "note", "verdict", "ess_raw", "versions", "seed", "platform", "sha256"]
        writer = csv.DictWriter(out, columns, lineterminator="\n")
        writer.writeheader()
        shared = {
            "verdict": self.verdict,
            "ess_raw": self.diagnostics.get("ess_raw"),
            "versions": _pairs(self.provenance.get("versions", {})),
            "seed": self.provenance.get("seed"),
            "platform": self.provenance.get("platform"),
            "sha256": _pairs(self.provenance.get("sha256", {})),
        }
        for e in self.estimates:
            if np.ndim(e.value) == 0:
                own = {"name": e.name, "value": e.value, "stderr": e.stderr, "unit": e.unit, "n_effective": e.n_effective, "note": e.note}
                writer.writerow(own | shared)
        return out.getvalue()


@dataclass
class RunFolder:
    """An open run folder, locked against a second process until it is closed.

    Attributes:
        path: The folder.
        resumed: Whether it already held this run when it was opened.
    """

    path: Path
    resumed: bool = False
    _lock: IO[str] | None = field(default=None, repr=False)
    _log: logging.Handler | None = field(default=None, repr=False)

    @classmethod
    def create(cls, path: Path, *, resume: bool = False, overwrite: bool = False) -> RunFolder:
        """Open a folder for a new run, or for going on with one.

        Args:
            path: Folder to write to; made if it does not exist.
            resume: Go on with the run it holds; a fresh run where there is none.
            overwrite: Delete the run it holds first. One that failed before it made any data is replaced without being told.

        Returns:
            The folder: writable, with enough space, locked, logging to ``run.log``.

        Raises:
            OutputError: If it holds another run or foreign files, is in use, cannot be written or is nearly full.
        """
        path = Path(path).resolve()
        if resume and overwrite:
            raise OutputError("--resume and --overwrite contradict each other: choose one")
        _make_writable(path)
        held = [entry for entry in path.iterdir() if entry.name != _LOCK]
        is_run = (path / _LOCK).exists()
        if held and not is_run:
            raise OutputError(f"{path} holds files that are not a boltzgen run; choose an empty or a new folder with --out")
        if held and not (resume or overwrite) and _holds_work(held):
            state = "finished" if (path / "results.json").exists() else "unfinished"
            raise OutputError(
                f"{path} holds another run ({state}); use --resume to go on with it, --overwrite to delete it, or another --out"
            )
        folder = cls(path, resumed=bool(held) and resume, _lock=_locked(path))
        if held and not resume:
            for entry in held:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        folder.checkpoints.mkdir(exist_ok=True)
        folder._start_log()
        return folder

    @classmethod
    def read(cls, path: Path) -> RunFolder:
        """Open the folder of a finished run for reading.

        Raises:
            OutputError: If there is no finished run.
        """
        path = Path(path).resolve()
        if not (path / "config.yaml").exists():
            raise OutputError(f"{path} is not the folder of a boltzgen run: it has no config.yaml")
        if not (path / "results.json").exists():
            raise OutputError(f"the run in {path} is not finished; go on with 'boltzgen run {path / 'config.yaml'} --out {path} --resume'")
        return cls(path, resumed=True)

    @property
    def config_path(self) -> Path:
        """The complete configuration."""
        return self.path / "config.yaml"

    @property
    def results_path(self) -> Path:
        """The results; exists only when the run is finished."""
        return self.path / "results.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def finished(self) -> bool:
        """Whether the run is finished."""
        return self.results_path.exists()

    def part(self, name: str) -> RunFolder:
        """A folder inside this one, for one of several states; it is locked by this one's lock."""
        (self.path / name).mkdir(exist_ok=True)
        return RunFolder(self.path / name, resumed=self.resumed)

    def settle_config(self, config: Config) -> None:
        """Write the complete configuration, or check that a resumed run trains with the one it began with.

        Its evaluation may change, and its production grow: a finished run of which more is asked is unfinished again.

        Raises:
            CheckpointError: If the resumed run was started with another configuration, whose keys it names, or with a longer production.
        """
        if self.resumed and self.config_path.exists():
            started = load_config(self.config_path)
            before, now = trained_by(started), trained_by(config)
            changed = [key for key in now if now[key] != before.get(key)]
            if changed:
                raise CheckpointError(
                    f"the run in {self.path} was started with other values of {', '.join(changed)}: "
                    "resume it with its own config.yaml, or start again with --overwrite"
                )
            begun, asked = production_cycles(started), production_cycles(config)
            if asked < begun:
                raise CheckpointError(
                    f"the run in {self.path} has production.cycles: {begun}, and {asked} are asked for: it can be made longer, not "
                    "shorter; start again with --overwrite for a shorter one"
                )
            if answered_by(config) != answered_by(started):
                self.results_path.unlink(missing_ok=True)
        self.write_text("config.yaml", config_text(config))

    def spent_in_training(self, now: int) -> int:
        """Energies spent in training, those of earlier parts of a resumed run included, which the folder remembers."""
        path = self.path / "evaluations.json"
        total = now + (json.loads(path.read_text())["training"] if path.exists() else 0)
        self.write_json("evaluations.json", {"training": total})
        return total

    def next_samples_number(self) -> int:
        """Number of the next set of samples drawn from a finished run."""
        numbers = [int(path.stem.removeprefix("samples-")) for path in self.path.glob("samples-[0-9]*.npz")]
        return max(numbers, default=0) + 1

    def write_text(self, name: str, text: str) -> Path:
        """Write a file atomically: it is there complete or not at all."""
        return self._write(name, lambda file: file.write(text.encode()))

    def write_json(self, name: str, content: Any) -> Path:
        """Write JSON atomically; numbers that are not finite become null."""
        return self.write_text(name, json.dumps(_plain(content), indent=2, allow_nan=False) + "\n")

    def write_npz(self, name: str, arrays: Mapping[str, np.ndarray]) -> Path:
        """Write named arrays atomically, compressed."""
        return self._write(name, lambda file: np.savez_compressed(file, allow_pickle=False, **arrays))

    def finish(self, results: Results) -> Path:
        """Write ``results.csv`` and then ``results.json``, which makes the run a finished one."""
        self.write_text("results.csv", results.to_csv())
        return self.write_json("results.json", results.to_dict())

    def close(self) -> None:
        """Stop the log and release the lock."""
        if self._log is not None:
            logging.getLogger("boltzgen").removeHandler(self._log)
            self._log.close()
            self._log = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if kind is not None and self._log is not None:
            record = logging.LogRecord("boltzgen", logging.ERROR, __file__, 0, "%s: %s", (kind.__name__, error), None)
            self._log.handle(record)
        self.close()

    def _start_log(self) -> None:
        self._log = logging.FileHandler(self.path / "run.log", encoding="utf-8")
        self._log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logger = logging.getLogger("boltzgen")
        logger.setLevel(logging.INFO)
        logger.addHandler(self._log)

    def _write(self, name: str, write: Callable[[IO[bytes]], object]) -> Path:
        target = self.path / name
        with written(target, remedy="free some space or choose another --out") as partial, partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        return target


def fingerprint_of(content: Mapping[str, Any]) -> str:
    """Hash of plain values, whatever their order: ties data and checkpoints to what they depend on."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def provenance(seed: int, platform: str, *, sha256: Mapping[str, str]) -> dict[str, Any]:
    """Where numbers come from.

    Args:
        seed: Seed of the run.
        platform: OpenMM platform that computed the energies.
        sha256: Input file → hash.

    Returns:
        Versions of the packages, seed, platform, input hashes, command line and machine.
    """
    versions = {"boltzgen": boltzgen.__version__, "python": machine.python_version()}
    versions |= {name: metadata.version(name) for name in _PACKAGES}
    computer = {"system": machine.platform(), "processor": _processor(), "cores": count_cores()}
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"versions": versions, "seed": seed, "platform": platform, "sha256": dict(sha256), "command": command, "machine": computer}


def _holds_work(entries: list[Path]) -> bool:
    """Whether anything would be lost with a run; nothing is lost with one that failed before it made data or a checkpoint."""
    return any(entry.name not in _BEFORE_WORK and not (entry.name == "checkpoints" and not any(entry.iterdir())) for entry in entries)


def _make_writable(path: Path) -> None:
    """Make the folder and prove that it can be written and has space."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path).free
        if free < MINIMUM_FREE_BYTES:
            raise OutputError(
                f"{path} has {free / 2**20:.0f} MB left and a run needs {MINIMUM_FREE_BYTES / 2**20:.0f} MB: "
                "free some space or choose another --out"
            )
        probe = path / f".probe.{os.getpid()}"
        try:
            with probe.open("wb") as file:
                file.write(bytes(_PROBE_BYTES))
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write to {path}: {error.strerror or error}; choose another folder with --out") from error


def is_in_use(path: Path) -> bool:
    """Whether a process is writing to a run folder."""
    if not (path / _LOCK).exists():
        return False
    with (path / _LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _locked(path: Path) -> IO[str]:
    """The lock file, held by this process until it is closed."""
    lock = (path / _LOCK).open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        lock.close()
        raise InUseError(f"another process (id {holder}) is writing to {path}; wait for it or choose another --out") from None
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()
    return lock


def _processor() -> str:
    """Model name of the processor."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else machine.processor()


def _pairs(values: Mapping[str, Any]) -> str:
    return ";".join(f"{name}={value}" for name, value in values.items())


def _plain(content: Any) -> Any:
    """JSON's own types; numbers that are not finite become None."""
    if isinstance(content, Mapping):
        return {str(key): _plain(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_plain(value) for value in content]
    if hasattr(content, "tolist"):
        return _plain(content.tolist())
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return str(content) if isinstance(content, Path) else content
