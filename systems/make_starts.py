"""Make ``systems/alanine_dipeptide_vacuum/phi_positive.pdb``, one configuration of the basin φ > 0: ``python systems/make_starts.py``.

φ of ``topology.pdb`` is turned from −150 to 60 degrees in 22 steps by a harmonic restraint, minimising after each, and at last without it
(OpenMM's LocalEnergyMinimizer on the Reference platform, in the system's own force field). Nothing is sampled.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openmm
from openmm import app, unit

FOLDER = Path(__file__).parent / "alanine_dipeptide_vacuum"
PHI = (4, 6, 8, 14)
STIFFNESS = 1000.0  # kJ/mol/rad^2
REMARK = "REMARK   1 PHI OF TOPOLOGY.PDB TURNED TO 60 DEGREES, THEN MINIMISED WITHOUT RESTRAINT (SYSTEMS/MAKE_STARTS.PY)\n"


def phi_positive() -> tuple[app.Topology, unit.Quantity]:
    """The minimum of the basin φ > 0."""
    pdb = app.PDBFile(str(FOLDER / "topology.pdb"))
    system = openmm.XmlSerializer.deserialize((FOLDER / "system.xml").read_text())
    restraint = openmm.CustomTorsionForce(f"0.5*k*min(d, {2 * np.pi!r} - d)^2; d = abs(theta - centre)")
    restraint.addGlobalParameter("k", STIFFNESS)
    restraint.addGlobalParameter("centre", 0.0)
    restraint.addTorsion(*PHI, [])
    system.addForce(restraint)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(pdb.positions)
    for degrees in np.linspace(-150.0, 60.0, 22):
        context.setParameter("centre", float(np.radians(degrees)))
        openmm.LocalEnergyMinimizer.minimize(context, 1.0, 1000)
    context.setParameter("k", 0.0)
    openmm.LocalEnergyMinimizer.minimize(context, 0.1, 5000)
    return pdb.topology, context.getState(positions=True).getPositions()


if __name__ == "__main__":
    topology, positions = phi_positive()
    with open(FOLDER / "phi_positive.pdb", "w") as file:
        file.write(REMARK)
        app.PDBFile.writeModel(topology, positions, file)
        app.PDBFile.writeFooter(topology, file)
