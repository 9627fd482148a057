"""Which workflow does the job of a configuration."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from boltzgen.config import CartesianConfig, JobConfig, JumpsConfig, ParticlesConfig, PathsConfig, TfepConfig, load_job
from boltzgen.errors import InputError
from boltzgen.workflows.run_folder import Results, RunFolder

logger = logging.getLogger(__name__)


def require_usable(config: JobConfig) -> None:
    """Read every input and refuse what cannot work, before a folder is made or an old run deleted."""
    if isinstance(config, TfepConfig):
        from boltzgen.workflows.tfep import require_usable as require_tfep

        return require_tfep(config)
    if isinstance(config, PathsConfig):
        from boltzgen.workflows.paths import require_usable as require_paths

        return require_paths(config)
    if isinstance(config, JumpsConfig):
        from boltzgen.workflows.jumps import require_usable as require_jumps

        return require_jumps(config)
    if isinstance(config, (ParticlesConfig, CartesianConfig)):
        from boltzgen.workflows.continuous import require_device

        require_device(config.field)
    if not isinstance(config, ParticlesConfig):
        from boltzgen.workflows.molecule import require_usable as require

        require(config)


def run_job(config: JobConfig, folder: RunFolder) -> Results:
    """Do the job of a configuration in an open folder; see the workflow for what it raises."""
    if folder.resumed:
        logger.info("going on with the run in %s", folder.path)
    if isinstance(config, ParticlesConfig):
        from boltzgen.workflows.particles import run_particles

        return run_particles(config, folder)
    if isinstance(config, TfepConfig):
        from boltzgen.workflows.tfep import run_tfep

        return run_tfep(config, folder)
    if isinstance(config, PathsConfig):
        from boltzgen.workflows.paths import run_paths

        return run_paths(config, folder)
    if isinstance(config, JumpsConfig):
        from boltzgen.workflows.jumps import run_jumps

        return run_jumps(config, folder)
    if isinstance(config, CartesianConfig):
        from boltzgen.workflows.cartesian import run_cartesian

        return run_cartesian(config, folder)
    from boltzgen.workflows.generator import run_generator

    return run_generator(config, folder)


def draw_more(folder: RunFolder, n: int) -> Path:
    """Fresh weighted samples of the flow of a finished run; the file with their configurations."""
    config = load_job(folder.config_path)
    if isinstance(config, ParticlesConfig):
        from boltzgen.workflows.particles import draw_particles

        return draw_particles(folder, config, n)
    if isinstance(config, TfepConfig):
        raise InputError(f"the run in {folder.path} compares two states: it has a map between them and no samples to draw")
    if isinstance(config, (PathsConfig, JumpsConfig)):
        raise InputError(f"the run in {folder.path} sampled with walkers: its configurations are in samples.npz; run it longer for more")
    if isinstance(config, CartesianConfig):
        from boltzgen.workflows.cartesian import draw_cartesian

        return draw_cartesian(folder, config, n)
    from boltzgen.workflows.generator import draw_samples

    return draw_samples(folder, config, n)


def make_report(folder: RunFolder) -> Path:
    """The report of a finished run, made again."""
    config = load_job(folder.config_path)
    results = json.loads(folder.results_path.read_text(encoding="utf-8"))
    if isinstance(config, ParticlesConfig):
        from boltzgen.workflows.particles_report import build_particles_report

        return build_particles_report(folder.path, config, results)
    if isinstance(config, TfepConfig):
        from boltzgen.workflows.tfep_report import build_tfep_report

        return build_tfep_report(folder.path, results)
    if isinstance(config, PathsConfig):
        from boltzgen.workflows.path_report import rebuild_paths_report

        return rebuild_paths_report(folder, config, results)
    if isinstance(config, JumpsConfig):
        from boltzgen.workflows.jump_report import rebuild_jumps_report

        return rebuild_jumps_report(folder, config, results)
    from boltzgen.workflows.report import build_report

    return build_report(folder.path, config, results)
