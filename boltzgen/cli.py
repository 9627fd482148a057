"""The command line: parse, call one workflow, print where the results are."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from boltzgen import __version__
from boltzgen.allocator import keep_freed_memory
from boltzgen.errors import BoltzgenError, ConfigError, Interrupted, OutputError

if TYPE_CHECKING:
    from boltzgen.config import CampaignConfig
    from boltzgen.workflows.run_folder import Results

_FILE = click.Path(dir_okay=False, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)


class _CleanErrors(click.Group):
    """Commands whose errors are one message, not a traceback."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except BoltzgenError as error:
            if ctx.params["debug"]:
                raise
            click.echo(f"{'stopped' if isinstance(error, Interrupted) else 'error'}: {error}", err=True)
            ctx.exit(error.exit_code)


@click.group(cls=_CleanErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def commands(debug: bool) -> None:
    """Train Boltzmann generators on OpenMM systems; get reweighted samples and free energies."""


@commands.command()
@click.argument("topology", type=_FILE)
@click.argument("system", type=_FILE, required=False)
@click.option("--coordinates", type=_FILE, help="Coordinates, where the topology file has none.")
@click.option("--state", type=_FILE, help="OpenMM state.xml with positions.")
@click.option("--trust", is_flag=True, help="Allow a system.xml that can run code. Only for files that you made.")
@click.pass_context
def check(ctx: click.Context, topology: Path, system: Path | None, coordinates: Path | None, state: Path | None, trust: bool) -> None:
    """Look at a system before training.

    Says what TOPOLOGY and SYSTEM hold, how fast energies are, and which flow fits.
    """
    from boltzgen.workflows.check import check_system

    found = check_system(topology, system, coordinates=coordinates, state=state, trust=trust)
    click.echo(str(found))
    ctx.exit(0 if found.usable else BoltzgenError.exit_code)


_Function = TypeVar("_Function", bound=Callable[..., object])


def _of_a_run(function: _Function) -> _Function:
    """The argument and the options of every command that runs a job."""
    for option in (
        click.option("--overwrite", is_flag=True, help="Delete the run that the folder holds."),
        click.option("--resume", is_flag=True, help="Go on with the run that the folder holds."),
        click.option("--out", type=_FOLDER, help="Folder of the run; runs/<name of CONFIG> by default, beside it for a JSON file."),
        click.argument("config", type=_FILE),
    ):
        function = option(function)
    return function


@commands.command()
@_of_a_run
def run(config: Path, out: Path | None, resume: bool, overwrite: bool) -> None:
    """Run the job of a CONFIG file.

    Makes data, trains, draws weighted samples, and writes free energies and a report into one folder.
    """
    _run(config, out, resume=resume, overwrite=overwrite)


@commands.command()
@_of_a_run
def tfep(config: Path, out: Path | None, resume: bool, overwrite: bool) -> None:
    """Free energy difference of two states by a learned map.

    Makes data of both states of CONFIG, trains a map between them, and writes the difference with errors and a report into one folder.
    """
    _run(config, out, resume=resume, overwrite=overwrite, task="tfep")


@commands.command()
@click.argument("forward", type=_FILE)
@click.argument("reverse", type=_FILE, required=False)
@click.option("--unit", type=click.Choice(["kT", "kJ/mol"]), required=True, help="Unit of the values.")
@click.option("--temperature", "kelvin", type=float, help="Temperature in kelvin, for kJ/mol.")
@click.option("--correlated", is_flag=True, help="Rows follow each other in time: errors rest on blocks longer than their memory.")
def works(forward: Path, reverse: Path | None, unit: str, kelvin: float | None, correlated: bool) -> None:
    """Free energy difference from files of work values.

    FORWARD holds works done on the way from A to B, one value in every line, REVERSE those of the way back, from any program.
    """
    from boltzgen.workflows.work_files import judge_work_files

    estimates, verdict = judge_work_files(
        forward, reverse, unit=unit, temperature_kelvin=kelvin, correlated=correlated  # type: ignore[arg-type]
    )  # fmt: skip
    for estimate in estimates:
        click.echo(str(estimate))
    if verdict is None:
        click.echo("verdict: none, as one direction cannot tell what it has not seen: give the works of the way back")
        return
    click.echo(f"verdict: {verdict.word}")
    for reason in verdict.reasons:
        click.echo(f"  {reason}")


@commands.command()
@click.argument("config", type=_FILE)
@click.option("--out", type=_FOLDER, help="Folder of the campaign; runs/<name of CONFIG> by default.")
@click.option("--plan", "only_plan", is_flag=True, help="Say what would be run and what it costs, and run nothing.")
@click.option("--tasks", "only_tasks", is_flag=True, help="Write the runs as files for boltzgen run, and run nothing: for job arrays.")
@click.option("--resume", is_flag=True, help="Go on with what is missing of the campaign that the folder holds.")
def campaign(config: Path, out: Path | None, only_plan: bool, only_tasks: bool, resume: bool) -> None:
    """Many free energy differences as one campaign.

    Runs the legs of CONFIG on workers and gathers them into one table. Stopped in any way, it goes on with --resume.
    """
    from boltzgen.workflows.campaign_plan import plan, sealed_results, write_tasks
    from boltzgen.workflows.interrupts import raise_on_termination

    settings, path = _campaign(config, out)
    tasks = plan(settings)
    if only_plan:
        for task in tasks:
            done = " (finished)" if sealed_results(task.folder(path)) is not None else ""
            click.echo(f"{task.key}  {task.n_evaluations / 1e6:8.2f} M force evaluations  {task.label}{done}")
        click.echo(f"{len(tasks)} runs, about {sum(task.n_evaluations for task in tasks) / 1e6:.1f} M force evaluations")
        return
    if only_tasks:
        write_tasks(tasks, path)
        click.echo(f"{len(tasks)} runs, for boltzgen run FILE --resume: {path / 'legs'}")
        return
    if (path / "plan.json").exists() and not resume:
        raise OutputError(f"{path} holds a campaign: use --resume to go on with it, or another --out")
    from boltzgen.workflows.campaign import run_campaign

    _log_to_terminal()
    try:
        with raise_on_termination():
            results = run_campaign(settings, path)
    except (Interrupted, KeyboardInterrupt):
        click.echo(f"go on with: {shlex.join(['boltzgen', 'campaign', str(config), '--out', str(path), '--resume'])}", err=True)
        raise
    _tell(results, path)


@commands.command()
@click.argument("config", type=_FILE)
@click.option("--out", type=_FOLDER, help="Folder of the campaign; runs/<name of CONFIG> by default.")
def gather(config: Path, out: Path | None) -> None:
    """Gather what a campaign has finished.

    Combines repeats, closes cycles and writes the table, also while legs of CONFIG are still running.
    """
    from boltzgen.workflows.campaign_gather import gather as gathered
    from boltzgen.workflows.campaign_plan import plan

    settings, path = _campaign(config, out)
    if not (path / "plan.json").exists():
        raise OutputError(f"{path} holds no campaign; begin with boltzgen campaign {config} --out {path}")
    _tell(gathered(settings, plan(settings), path), path)


def _campaign(config: Path, out: Path | None) -> tuple[CampaignConfig, Path]:
    from boltzgen.config import CampaignConfig, load_config

    settings = load_config(config)
    if not isinstance(settings, CampaignConfig):
        raise ConfigError(f"{config} is of task {settings.task}, not campaign: use boltzgen run")
    return settings, out or Path("runs") / config.stem


def _tell(results: Results, path: Path) -> None:
    for estimate in results.estimates:
        click.echo(str(estimate))
    click.echo(f"verdict: {results.verdict}")
    for reason in results.reasons:
        click.echo(f"  {reason}")
    click.echo(f"report: {path / 'report.html'}")


def _run(config: Path, out: Path | None, *, resume: bool, overwrite: bool, task: str | None = None) -> None:
    """Run the job of a configuration, of a given task where one is."""
    from boltzgen.config import load_job
    from boltzgen.workflows.run_folder import RunFolder

    settings = load_job(config)
    if task is not None and settings.task != task:
        raise ConfigError(f"{config} is of task {settings.task}, not {task}: use boltzgen run")
    path = out or (config.with_suffix("") if config.suffix == ".json" else Path("runs") / config.stem)  # a task lies beside its folder
    from boltzgen.workflows.interrupts import raise_on_termination
    from boltzgen.workflows.jobs import require_usable, run_job

    require_usable(settings)
    with RunFolder.create(path, resume=resume, overwrite=overwrite) as folder:
        folder.settle_config(settings)
        if folder.finished:
            click.echo(f"already finished: {folder.path / 'report.html'}")
            return
        _log_to_terminal()
        try:
            with raise_on_termination():
                results = run_job(settings, folder)
        except (Interrupted, KeyboardInterrupt):
            again = shlex.join(["boltzgen", "run", str(config), "--out", str(path), "--resume"])
            click.echo(f"go on with: {again}", err=True)
            raise
        _tell(results, folder.path)


@commands.command()
@click.argument("folder", metavar="RUN", type=_FOLDER)
@click.option("-n", "--number", type=click.IntRange(min=1), required=True, help="Number of samples.")
def sample(folder: Path, number: int) -> None:
    """Draw new samples from a finished RUN.

    Writes samples-NNN.xtc and, with their weights, samples-NNN.npz into its folder.
    """
    from boltzgen.workflows.jobs import draw_more
    from boltzgen.workflows.run_folder import RunFolder

    click.echo(f"samples: {draw_more(RunFolder.read(folder), number)}")


@commands.command()
@click.argument("folder", metavar="RUN", type=_FOLDER)
def report(folder: Path) -> None:
    """Make the report of a finished RUN again."""
    from boltzgen.workflows.jobs import make_report
    from boltzgen.workflows.run_folder import RunFolder

    click.echo(f"report: {make_report(RunFolder.read(folder))}")


@commands.group()
def config() -> None:
    """Print a commented configuration."""


@config.command("generator")
def config_generator() -> None:
    """A commented configuration of a molecule, with every default, ready to be edited."""
    from boltzgen.config import default_config_text

    click.echo(default_config_text(), nl=False)


@config.command("cartesian")
def config_cartesian() -> None:
    """A commented configuration of a molecule in Cartesian coordinates, with every default, ready to be edited."""
    from boltzgen.config import default_config_text

    click.echo(default_config_text("cartesian"), nl=False)


@config.command("tfep")
def config_tfep() -> None:
    """A commented configuration of two states of a molecule, with every default, ready to be edited."""
    from boltzgen.config import default_config_text

    click.echo(default_config_text("tfep"), nl=False)


@config.command("campaign")
def config_campaign() -> None:
    """A commented configuration of a campaign, with every default, ready to be edited."""
    from boltzgen.config import default_config_text

    click.echo(default_config_text("campaign"), nl=False)


@config.command("particles")
def config_particles() -> None:
    """A commented configuration of a cluster, with every default, ready to be edited."""
    from boltzgen.config import default_config_text

    click.echo(default_config_text("particles"), nl=False)


@config.command("jumps")
def config_jumps() -> None:
    """A commented configuration of sampling by local moves and jumps, with every default, ready to be edited."""
    from boltzgen.config import default_config_text

    click.echo(default_config_text("jumps"), nl=False)


@commands.command()
@click.pass_context
def platforms(ctx: click.Context) -> None:
    """Say which OpenMM platforms work here."""
    from boltzgen.md.platforms import available_platforms

    found = available_platforms()
    for platform in found:
        properties = ", ".join(name for name in platform.properties if name in ("DeviceIndex", "Precision", "Threads"))
        state = f"usable{f' ({properties})' if properties else ''}" if platform.usable else f"not usable: {platform.reason}"
        click.echo(f"{platform.name:<10} {state}")
    ctx.exit(0 if any(platform.usable for platform in found) else BoltzgenError.exit_code)


@commands.command()
@click.pass_context
def selftest(ctx: click.Context) -> None:
    """Check in a minute that numbers are exact here."""
    from boltzgen.workflows.selftest import run_selftest

    failed = 0
    for result in run_selftest():
        click.echo(str(result))
        failed += not result.ok
    click.echo("all checks passed" if not failed else f"{failed} checks failed", err=bool(failed))
    ctx.exit(1 if failed else 0)


def main() -> None:
    """Entry point of the ``boltzgen`` command."""
    keep_freed_memory()
    if "BOLTZGEN_PARENT" in os.environ:
        from boltzgen.workflows.interrupts import stop_with

        stop_with(int(os.environ.pop("BOLTZGEN_PARENT")))
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "30")  # a log file needs no bar that moves ten times a second
    try:
        code = commands.main(prog_name="boltzgen", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped: interrupted from the keyboard", err=True)
        sys.exit(128 + signal.SIGINT)


def _log_to_terminal() -> None:
    """Progress messages of the package on stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.getLogger("boltzgen").addHandler(handler)


if __name__ == "__main__":
    main()
