"""A state that is confined to a basin: what is simulated, what is trained on, and what is reported."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from boltzgen.config import MoleculeConfig
from boltzgen.config.tfep import BASIN
from boltzgen.cvs import Angle, CollectiveVariable, Dihedral, Distance
from boltzgen.errors import InputError
from boltzgen.md.loading import LoadedSystem
from boltzgen.md.target import OpenMMTarget
from boltzgen.md.trajectory import Trajectory
from boltzgen.md.walls import Wall, with_walls
from boltzgen.targets.views import Restricted
from boltzgen.workflows.coordinates import inside
from boltzgen.workflows.data import platform_choice
from boltzgen.workflows.molecule import Problem

logger = logging.getLogger(__name__)

#: Fewest frames of a simulation with walls that must lie inside them.
_FEWEST = 100


@dataclass(frozen=True)
class Confined:
    """A system and a basin of it.

    Attributes:
        loaded: The system with walls around the basin, which is simulated.
        walled: Its reduced potential: that of the system inside, finite outside; maps are trained on it.
        target: The reduced potential of the system, +inf outside: what numbers are reported of.
    """

    loaded: LoadedSystem
    walled: OpenMMTarget
    target: Restricted

    def inside(self, trajectory: Trajectory) -> Trajectory:
        """The frames inside the basin, which are samples of ``target``: there the walls are zero.

        Raises:
            InputError: If hardly any frame is.
        """
        rows = self.target.indicator(torch.as_tensor(trajectory.x, dtype=torch.float64))
        if int(rows.sum()) < min(_FEWEST, len(rows)):
            raise InputError(
                f"{int(rows.sum())} of {len(rows)} frames lie inside the basin: start from a configuration in it, or check its ranges"
            )
        logger.info("%d of %d frames lie inside the basin", int(rows.sum()), len(rows))
        return trajectory.rows(rows.numpy())


def confined(config: MoleculeConfig, problem: Problem) -> Confined:
    """The problem of a state, confined to the basin that its configuration names.

    Raises:
        InputError: If bonds are constrained, or the basin is a range of something else than a distance, angle or dihedral.
    """
    if not isinstance(problem.target, OpenMMTarget):
        raise InputError("a basin of a molecule with constrained bonds cannot be mapped: make the system with constraints=None")
    ranges, variables = problem.regions[BASIN], problem.variables
    by_name = {variable.name: variable for variable in variables}
    loaded = with_walls(problem.loaded, [_wall(by_name[name], limits) for name, limits in ranges.items()])
    choice = replace(platform_choice(config), name=problem.openmm_target.platform_name)
    walled = OpenMMTarget.from_loaded(loaded, temperature_kelvin=config.temperature_kelvin, platform=choice)

    def within(x: Tensor) -> Tensor:
        values = variables(x.detach())
        return inside(ranges, values.cpu().numpy(), variables).to(x.device)

    return Confined(loaded, walled, Restricted(problem.target, within))


def _wall(variable: CollectiveVariable, limits: tuple[float, float]) -> Wall:
    """The wall around a range of a variable."""
    is_plain = isinstance(variable, (Angle, Dihedral)) or (isinstance(variable, Distance) and variable.box is None)
    if not is_plain:
        raise InputError(f"a state can be confined to ranges of distances without minimum_image, angles and dihedrals, and "
                         f"{variable.name!r} is none of them")  # fmt: skip
    return Wall(variable.atoms, *limits)
