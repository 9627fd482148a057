"""Named, tested architectures: the only place where networks, transforms and bases are put together."""

from boltzgen.recipes.ensemble_flow import EnsembleFlowSize, ensemble_flow_map
from boltzgen.recipes.field import FieldSize, particle_field
from boltzgen.recipes.molecule import CouplingSize, InternalCoordinateFlow, internal_coordinate_flow, learn_domains, spread_torsions
from boltzgen.recipes.state_maps import (
    SolventSize,
    StateMap,
    internal_coordinate_map,
    matched_domains,
    radial_solvent_map,
    solvent_flow_map,
    turn_between,
)

__all__ = [
    "CouplingSize",
    "EnsembleFlowSize",
    "FieldSize",
    "InternalCoordinateFlow",
    "SolventSize",
    "StateMap",
    "ensemble_flow_map",
    "internal_coordinate_flow",
    "internal_coordinate_map",
    "learn_domains",
    "matched_domains",
    "particle_field",
    "radial_solvent_map",
    "solvent_flow_map",
    "spread_torsions",
    "turn_between",
]
