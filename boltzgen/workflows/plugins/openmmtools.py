"""Steered paths and flow proposals as openmmtools moves, which work in its samplers and are stored and resumed by them."""

from __future__ import annotations

from typing import Any

from openmm import unit
from openmmtools import mcmc

from boltzgen.workflows.plugins.context_moves import ContextMove, FlowProposal, SteeredPath
from boltzgen.workflows.plugins.distributions import normal_mixture, save_distribution

__all__ = ["FlowMove", "SteeredPathMove", "normal_mixture", "save_distribution"]


class SteeredPathMove(SteeredPath, mcmc.MCMCMove):
    """:class:`~boltzgen.workflows.plugins.context_moves.SteeredPath` as an openmmtools move, with the same arguments."""

    def apply(self, thermodynamic_state: Any, sampler_state: Any, context_cache: Any = None) -> None:
        """One path at the temperature, the parameters and the present box of the states; ``sampler_state`` is changed."""
        _apply(self, thermodynamic_state, sampler_state, context_cache)


class FlowMove(FlowProposal, mcmc.MCMCMove):
    """:class:`~boltzgen.workflows.plugins.context_moves.FlowProposal` as an openmmtools move, with the same arguments."""

    def apply(self, thermodynamic_state: Any, sampler_state: Any, context_cache: Any = None) -> None:
        """Proposals at the temperature and the parameters of the thermodynamic state; ``sampler_state`` is changed."""
        _apply(self, thermodynamic_state, sampler_state, context_cache)


def _apply(move: ContextMove, thermodynamic_state: Any, sampler_state: Any, context_cache: Any) -> None:
    """A move in a context of the cache, which holds the Hamiltonian of the thermodynamic state."""
    context, _ = mcmc.MCMCMove._get_context_cache(context_cache).get_context(thermodynamic_state)
    sampler_state.apply_to_context(context, ignore_velocities=True)
    moved = move.move(context, float(thermodynamic_state.temperature.value_in_unit(unit.kelvin)))
    sampler_state.update_from_context(context, ignore_positions=not moved, ignore_collective_variables=not moved)
