"""Named, tested architectures: the only place where networks, transforms and bases are put together."""

from boltzgen.recipes.ensemble_flow import EnsembleFlowSize, ensemble_flow_map
from boltzgen.recipes.field import FieldSize, particle_field
from boltzgen.recipes.molecule import CouplingSize, InternalCoordinateFlow, internal_coordinate_flow, learn_domains, spread_torsions
from boltzgen.recipes.proposals import normal_mixture
from boltzgen.recipes.state_maps import (
    SolventSize,
    StateMap,
    internal_coordinate_map,
    low_rank_map,
    matched_domains,
    radial_solvent_map,
    solvent_flow_map,
    turn_between,
)
from boltzgen.recipes.surroundings import SurroundingsSize, surroundings_layers

__all__ = [
    "CouplingSize",
    "EnsembleFlowSize",
    "FieldSize",
    "InternalCoordinateFlow",
    "SolventSize",
    "StateMap",
    "SurroundingsSize",
    "ensemble_flow_map",
    "internal_coordinate_flow",
    "internal_coordinate_map",
    "learn_domains",
    "low_rank_map",
    "matched_domains",
    "normal_mixture",
    "particle_field",
    "radial_solvent_map",
    "solvent_flow_map",
    "spread_torsions",
    "surroundings_layers",
    "turn_between",
]
