"""The job of a campaign: legs run by workers, each in a process of its own. The only door to Dask."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
from distributed import Client, KilledWorker, LocalCluster, Reschedule, as_completed
from tornado.ioloop import PeriodicCallback
from tqdm import tqdm

from boltzgen.config import CampaignConfig, EngineConfig, TfepConfig, load_job
from boltzgen.errors import ConfigError, InputError, InUseError
from boltzgen.workflows.campaign_gather import gather
from boltzgen.workflows.campaign_plan import Task, adopt, discard_results, earlier_keys, plan, sealed_results, write_tasks
from boltzgen.workflows.run_folder import Results, fingerprint_of, is_in_use

logger = logging.getLogger(__name__)

#: A worker that dies takes its leg with it, not the campaign: as often as this a leg is given to another one.
_LOST_WORKERS = 100
#: Seconds between looks at a folder that another process writes to, and lines of a failed leg's log that are shown.
_WAIT, _LINES = 1.0, 3
#: Seconds between looks at whether all Slurm jobs are there.
_KEPT_UP = 60.0
#: Exit codes of a leg that was told to stop: it goes on elsewhere.
_STOPPED = tuple(code for number in (signal.SIGINT, signal.SIGTERM) for code in (128 + number, -number))
#: How often a leg is started that crashes, or whose folder another process writes to.
_STARTS = 3


def run_campaign(config: CampaignConfig, out: Path, *, progress: bool = True) -> Results:
    """Run what is missing of a campaign, and gather it.

    Every leg is a process that stops cleanly when its worker dies and goes on from its checkpoints when it is started again, here or
    elsewhere: a campaign may be stopped in any way, and run again.

    Args:
        config: What to do.
        out: Folder of the campaign; finished legs found there are kept.
        progress: Whether to show a progress bar.

    Returns:
        The table, as written to ``results.json``.

    Raises:
        InputError: If an input file cannot be read, or a leg failed; the message names every one, and all others were finished.
        ConfigError: If the engine cannot be started.
        OutputError: If the folder cannot be written.
    """
    tasks = plan(config)
    missing = prepare(tasks, out)
    failed: dict[str, str] = {}
    if missing:
        with _client(config.engine) as client:
            place = fingerprint_of({"folder": str(out.resolve())})[:8]  # one scheduler may run two campaigns that have a leg in common
            by_key = {f"leg-{task.key}-{place}": task for task in missing}
            limits = {"leg": 1} if config.engine.kind == "local" else None
            futures = [
                client.submit(run_task, str(task.file(out).resolve()), str(task.folder(out).resolve()), config.engine.threads, pure=False,
                              key=key, resources=limits)
                for key, task in by_key.items()
            ]  # fmt: skip
            running = as_completed(futures)
            for future in tqdm(running, total=len(futures), desc="legs", unit="leg", disable=not progress):
                task = by_key[str(future.key)]
                if isinstance(future.exception(), KilledWorker):
                    future.retry()
                    running.add(future)
                    continue
                reason = future.result() if future.status == "finished" else str(future.exception())
                logger.info("%s: %s", "failed" if reason else "finished", task.label)
                if reason:
                    failed[task.label] = reason
    found = gather(config, tasks, out)
    if failed:
        listed = "\n".join(f"  {label}: {reason}" for label, reason in failed.items())
        raise InputError(f"{len(failed)} of {len(tasks)} legs failed; the others are finished and gathered in {out}:\n{listed}")
    return found


def prepare(tasks: Sequence[Task], out: Path) -> list[Task]:
    """Write the tasks of a campaign and say what an earlier plan, finished legs and broken results mean for it.

    Returns:
        What has to be run.
    """
    before, keys = earlier_keys(out), {task.key for task in tasks}
    write_tasks(tuple(tasks), out)
    missing = [task for task in tasks if adopt(task.folder(out), task.config) is None]
    for task in missing:
        if discard_results(task.folder(out)):
            logger.info("the results of %s were changed or broken after the run: they are made again", task.label)
    if before and before != keys:
        new, gone = len(keys - before), len(before - keys)
        logger.info("the campaign was changed: %d runs are new, %d are no longer part of it and are left alone", new, gone)
    logger.info("%d runs, %d of them finished", len(tasks), len(tasks) - len(missing))
    return missing


def run_task(file: str, folder: str, threads: int) -> str:
    """Run one leg in a process of its own, on the worker; an empty string, or why it failed.

    Where another process runs the same leg already, wait for it. A leg that was told to stop goes on elsewhere; one that crashes is
    started again twice.
    """
    path, config = Path(folder), load_job(Path(file))
    if not isinstance(config, TfepConfig):
        raise InputError(f"{file} is of task {config.task}, and campaigns are of tfep")
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads), "OPENMM_CPU_THREADS": str(threads), "TQDM_DISABLE": "1", "BOLTZGEN_PARENT": str(os.getpid())
    }  # fmt: skip
    command = [sys.executable, "-m", "boltzgen.cli", "run", file, "--out", folder, "--resume"]
    for _ in range(_STARTS):
        while is_in_use(path):
            time.sleep(_WAIT)
        if sealed_results(path) is not None:
            return ""
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return "" if adopt(path, config) is not None else "its input files were changed while it ran: start the campaign again"
        if done.returncode in _STOPPED:
            raise Reschedule
        if done.returncode > 0 and done.returncode != InUseError.exit_code:
            break
        time.sleep(_WAIT)
    said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    return " ".join(said[-_LINES:]) or f"exit code {done.returncode}"


@contextmanager
def _client(engine: EngineConfig) -> Iterator[Client]:
    """A client of the engine that a configuration names."""
    dask.config.set({"distributed.scheduler.allowed-failures": _LOST_WORKERS})
    if engine.kind == "scheduler":
        try:
            with Client(engine.address, timeout="30s") as client:
                yield client
        except OSError as error:
            raise ConfigError(f"engine.address: no scheduler answers at {engine.address} ({error})") from None
        return
    with _cluster(engine) as cluster, Client(cluster) as client:
        yield client


def _cluster(engine: EngineConfig) -> Any:
    if engine.kind == "slurm":
        try:
            from dask_jobqueue import SLURMCluster
        except ImportError:
            raise ConfigError("engine.kind: slurm needs dask-jobqueue: pip install dask-jobqueue") from None
        slurm = engine.slurm
        cluster = SLURMCluster(
            queue=slurm.queue, account=slurm.account, walltime=slurm.walltime, cores=1, job_cpu=slurm.cores, memory=slurm.memory,
            processes=1, job_extra_directives=list(slurm.directives),
        )  # fmt: skip
        cluster.scale(jobs=engine.workers)
        keeper = PeriodicCallback(lambda: cluster.scale(jobs=engine.workers), 1000 * _KEPT_UP)  # jobs that ran out of time are replaced
        cluster.loop.add_callback(keeper.start)  # type: ignore[union-attr]
        return cluster
    if engine.gpus:
        from distributed import Nanny, Scheduler, SpecCluster

        options = {"nthreads": 1, "resources": {"leg": 1}}
        workers = {k: {"cls": Nanny, "options": {**options, "env": {"CUDA_VISIBLE_DEVICES": gpu}}} for k, gpu in enumerate(engine.gpus)}
        return SpecCluster(workers=workers, scheduler={"cls": Scheduler, "options": {"dashboard": False}})
    return LocalCluster(n_workers=engine.workers, threads_per_worker=1, dashboard_address=None, resources={"leg": 1}, memory_limit=0)
