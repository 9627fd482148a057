"""An OpenMM reporter of collective variables and of the log weights of a flow along any simulation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from openmm import app, unit

from boltzgen.cvs import CollectiveVariable, CollectiveVariables
from boltzgen.errors import InputError
from boltzgen.md.colvar import Colvar, read_colvar, write_colvar
from boltzgen.units import thermal_energy
from boltzgen.workflows.plugins.densities import FlowSource, MoleculeDensity, flow_source_of, positions_tensor
from boltzgen.workflows.plugins.descriptions import in_box
from boltzgen.workflows.plugins.distributions import DistributionSource

_LOG_WEIGHT = "log_weight"


class CollectiveVariableReporter:
    """Write collective variables along a simulation to a PLUMED COLVAR file, and log weights −u(x) − ln q(x) where a flow is given.

    Periodic variables have their bounds in the header. Positions are taken as they are in the context, unwrapped; variables with a box
    take that of the frame, and nearest images. A log weight is +inf where the flow makes no such configuration. Frames of a simulation
    follow exp(−u)/Z, so that it is e^{−log w} whose mean is known: 1/Z, where the flow makes all of them.

    Args:
        file: The COLVAR file. Every line is written through at once.
        interval: Steps between frames.
        cvs: The variables.
        flow: Folder of a finished run, or a saved or written-down distribution over all coordinates of the molecule.
        append: Go on with the file where it exists; it must have the same columns.
        temperature: An OpenMM quantity, of u; that of the integrator by default.

    Raises:
        InputError: If ``interval`` is not positive, the file to go on with has other columns, or there is no flow.
    """

    def __init__(
        self,
        file: str | Path,
        interval: int,
        cvs: Sequence[CollectiveVariable],
        *,
        flow: FlowSource | DistributionSource | str | Path | None = None,
        append: bool = False,
        temperature: unit.Quantity | None = None,
    ) -> None:
        if interval < 1:
            raise InputError(f"expected an interval of one step or more, got {interval}")
        self.interval, self.cvs, self.path = int(interval), CollectiveVariables(cvs), Path(file)
        self._density: MoleculeDensity | None = None if flow is None else flow_source_of(flow).load()
        self._temperature = temperature
        header = Colvar.of(self.cvs, np.zeros((0, len(self.cvs))), time_ps=np.zeros(0))
        if self._density is not None:
            header = Colvar((*header.fields, _LOG_WEIGHT), np.zeros((0, len(header.fields) + 1)), header.bounds)
        if append and self.path.exists():
            _require_same_columns(read_colvar(self.path), header, self.path)
        else:
            write_colvar(header, self.path)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the simulation runs

    def describeNextReport(self, simulation: app.Simulation) -> dict[str, Any]:
        """When the next frame is due, and what it needs."""
        steps = self.interval - simulation.currentStep % self.interval
        needs = ["positions"] if self._density is None else ["positions", "energy"]
        return {"steps": steps, "periodic": False, "include": needs}

    def report(self, simulation: app.Simulation, state: openmm.State) -> None:
        """Write one frame.

        Raises:
            InputError: If the flow does not describe the system, or no temperature is known.
        """
        x = positions_tensor(state)
        periodic = simulation.system.usesPeriodicBoundaryConditions()
        cvs = in_box(self.cvs, state.getPeriodicBoxVectors(asNumpy=True)._value) if periodic else self.cvs
        row = [float(state.getTime().value_in_unit(unit.picosecond)), *cvs(x)[0].tolist()]
        if self._density is not None:
            self._density.require_fits(simulation.system)
            u = state.getPotentialEnergy().value_in_unit(unit.kilojoules_per_mole) / thermal_energy(self._kelvin(simulation))
            row.append(-u - float(self._density.metric_potential(x)) - float(self._density.log_prob(x)))
        self._file.write(" " + " ".join(map(repr, row)) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _kelvin(self, simulation: app.Simulation) -> float:
        if self._temperature is not None:
            return float(self._temperature.value_in_unit(unit.kelvin))
        if not hasattr(simulation.integrator, "getTemperature"):
            raise InputError(f"a {type(simulation.integrator).__name__} has no temperature; give the reporter a temperature")
        return float(simulation.integrator.getTemperature().value_in_unit(unit.kelvin))


def _require_same_columns(before: Colvar, now: Colvar, path: Path) -> None:
    if before.fields != now.fields or dict(before.bounds) != dict(now.bounds):
        raise InputError(f"{path} has the columns {', '.join(before.fields)} and this reporter writes {', '.join(now.fields)}, or with "
                         f"other bounds: write to another file, or with append=False")  # fmt: skip
