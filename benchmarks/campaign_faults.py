"""A campaign whose scheduler, workers and client are killed at random: its table must be that of an undisturbed one.

    python benchmarks/campaign_faults.py [--out benchmarks/results/campaign_faults.json]

Twelve runs of a flexible triatomic molecule, two workers. SIGKILL hits the scheduler, a worker, a leg or the client after random
times, while the campaign is unfinished; whatever is dead is started again, the client with ``--resume``.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import openmm
import yaml
from openmm import app, unit
from stored import out_path, store

SEED, WORKERS = 1, 2
#: Kills that are asked for, and after which the campaign is left alone to finish.
KILLS, MOST_KILLS = 20, 30
#: Seconds between kills.
BETWEEN = (4.0, 14.0)
STATES = {"a": (0.100, 60_000.0, 1.90, 300.0), "b": (0.108, 40_000.0, 1.75, 500.0), "c": (0.104, 50_000.0, 1.80, 400.0)}


def write_system(path: Path, length: float, stretch: float, angle: float, bend: float) -> None:
    system, bonds, angles = openmm.System(), openmm.HarmonicBondForce(), openmm.HarmonicAngleForce()
    for mass in (16.0, 1.0, 1.0):
        system.addParticle(mass)
    for hydrogen in (1, 2):
        bonds.addBond(0, hydrogen, length, stretch)
    angles.addAngle(1, 0, 2, angle, bend)
    system.addForce(bonds)
    system.addForce(angles)
    path.write_text(openmm.XmlSerializer.serialize(system))


def write_campaign(folder: Path) -> Path:
    topology = app.Topology()
    residue = topology.addResidue("HOH", topology.addChain())
    atoms = [topology.addAtom(name, app.Element.getBySymbol(name[0]), residue) for name in ("O", "H1", "H2")]
    topology.addBond(atoms[0], atoms[1])
    topology.addBond(atoms[0], atoms[2])
    with (folder / "topology.pdb").open("w") as file:
        app.PDBFile.writeFile(topology, np.array([[0, 0, 0], [0.1, 0, 0], [-0.03, 0.095, 0]]) * unit.nanometer, file)
    for name, state in STATES.items():
        write_system(folder / f"{name}.xml", *state)
    legs = {f"{x}_{y}": {"a": {"system": f"{x}.xml"}, "b": {"system": f"{y}.xml"}} for x, y in (("a", "b"), ("b", "c"), ("a", "c"))}
    content = {
        "task": "campaign", "legs": legs, "repeats": 4, "cycles": {"triangle": ["a_b", "b_c", "-a_c"]},
        "defaults": {
            "topology": "topology.pdb", "platform": {"name": "Reference"}, "map": {"stiff_layers": 1, "hidden": [8]},
            "data": {"source": "langevin", "steps_per_replica": 40_000, "save_interval": 10, "exchange_interval": 10,
                     "timestep": "0.5 femtosecond", "friction": "20/picosecond"},
            "training": {"steps": 300, "batch_size": 32, "learning_rate": 5e-3, "checkpoint_every": 20},
        },
    }  # fmt: skip
    path = folder / "campaign.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


class Cast:
    """The processes of a campaign on an existing scheduler."""

    def __init__(self, config: Path, out: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        content = yaml.safe_load(config.read_text()) | {"engine": {"kind": "scheduler", "address": self.address}}
        self.config, self.out = config.with_name("scheduled.yaml"), out
        self.config.write_text(yaml.safe_dump(content))
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def command(self, role: str) -> list[str]:
        dask = [sys.executable, "-m", "distributed.cli.dask_scheduler" if role == "scheduler" else "distributed.cli.dask_worker"]
        if role == "scheduler":
            return [*dask, "--host", "127.0.0.1", "--port", self.address.rpartition(":")[2], "--no-dashboard"]
        if role == "client":
            return [sys.executable, "-m", "boltzgen.cli", "campaign", str(self.config), "--out", str(self.out), "--resume"]
        return [*dask, self.address, "--nthreads", "1", "--no-nanny", "--no-dashboard", "--death-timeout", "60"]

    def keep_up(self) -> bool:
        """Start what is dead; whether the campaign is done."""
        for role in ("scheduler", *(f"worker {k}" for k in range(WORKERS)), "client"):
            process = self.processes.get(role)
            if process is None or process.poll() is not None:
                if role == "client" and process is not None and process.returncode == 0:
                    return True
                log = (self.out.parent / f"{role}.log").open("ab")
                self.processes[role] = subprocess.Popen(self.command(role), stdout=log, stderr=log)
        return False

    def kill(self, role: str) -> bool:
        """Whether there was something to kill."""
        if role == "leg":
            found = subprocess.run(
                ["pgrep", "-f", f"boltzgen.cli run {self.out}"], capture_output=True, text=True, check=False
            ).stdout.split()
            with contextlib.suppress(ProcessLookupError, IndexError):
                os.kill(int(random.choice(found)), signal.SIGKILL)
                return True
            return False
        alive = self.processes[role].poll() is None
        self.processes[role].kill()
        self.processes[role].wait()
        return alive

    def end(self) -> None:
        for process in self.processes.values():
            process.kill()


def table(out: Path) -> list[dict[str, object]]:
    return json.loads((out / "results.json").read_text())["estimates"]


def main() -> None:
    stored = out_path(__doc__)
    random.seed(SEED)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = write_campaign(folder)
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "boltzgen.cli", "campaign", str(config), "--out", str(folder / "calm")], check=True)
        calm = time.perf_counter() - start
        cast, start = Cast(config, folder / "disturbed"), time.perf_counter()
        kills = dict.fromkeys(("scheduler", "leg", "worker 0", "client", "worker 1"), 0)
        try:
            done = False
            while not done:
                done = cast.keep_up()
                if sum(kills.values()) < MOST_KILLS and not done:
                    time.sleep(random.uniform(*BETWEEN))
                    role = random.choice(list(kills))
                    if cast.kill(role):
                        kills[role] += 1
                        print(f"killed: {role}", flush=True)
                else:
                    time.sleep(1.0)
        finally:
            cast.end()
        disturbed = time.perf_counter() - start
        same = table(folder / "calm") == table(folder / "disturbed")
        print(f"{sum(kills.values())} kills, tables {'equal' if same else 'DIFFER'}; {calm:.0f} s undisturbed, {disturbed:.0f} s disturbed")
        store(stored, {
            "what": "a campaign of twelve runs on two workers under SIGKILL, beside the same undisturbed", "seed": SEED, "kills": kills,
            "tables_equal": same, "seconds_calm": calm, "seconds_disturbed": disturbed, "table": table(folder / "calm"),
        })  # fmt: skip
    sys.exit(not same or sum(kills.values()) < KILLS)


if __name__ == "__main__":
    main()
