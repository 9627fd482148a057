"""The proposals of a configuration of steered paths: of the whole range, fixed, learned, and as a finished run stored it."""

from __future__ import annotations

from pathlib import Path

import torch

from boltzgen.config import PathsConfig
from boltzgen.config.sections import limit
from boltzgen.core import Distribution
from boltzgen.distributions import NormalMixture
from boltzgen.mixtures import Flat, Mixture
from boltzgen.paths import Periods
from boltzgen.recipes.continuous_cv_flow import ContinuousCVFlowSize, ContinuousCVRecipe
from boltzgen.recipes.cv_flow import CVFlowRecipe, CVFlowSize, CVRecipe
from boltzgen.training.checkpoints import load_weights

#: The file in which a run stores the proposal of its production.
PROPOSAL = "proposal.safetensors"


def broad_proposal(config: PathsConfig) -> Flat:
    """The whole range."""
    low, high = zip(*config.limits, strict=True)
    return Flat(low, high)


def fixed_proposal(config: PathsConfig, periods: Periods) -> Distribution:
    """The peaks of a configuration, or the whole range without any."""
    if not config.proposal.peaks:
        return broad_proposal(config)
    centres, widths = (
        torch.tensor([[limit(values[name])[0] for name in config.names] for values in rows], dtype=torch.float64)
        for rows in ([peak.centre for peak in config.proposal.peaks], [peak.width for peak in config.proposal.peaks])
    )
    weights = torch.tensor([peak.weight for peak in config.proposal.peaks], dtype=torch.float64)
    peaks, share = NormalMixture(centres, widths, weights=weights, periods=periods), config.proposal.defensive
    return Mixture([peaks, broad_proposal(config)], [1 - share, share]) if share > 0 else peaks


def flow_recipe(config: PathsConfig, periods: Periods) -> CVRecipe:
    """How a density is learned."""
    p = config.proposal
    if p.flow == "continuous":
        return ContinuousCVRecipe(periods, ContinuousCVFlowSize(hidden=p.field_hidden, steps=p.matching_steps))
    return CVFlowRecipe(periods, CVFlowSize(layers=p.layers, bins=p.bins, hidden=p.hidden, steps=p.training_steps))


def stored_proposal(config: PathsConfig, folder: Path) -> Distribution:
    """The proposal of the production of a finished run.

    Raises:
        CheckpointError: If its file is missing, corrupt or of another configuration.
    """
    periods, share = config.periods, config.proposal.defensive
    if config.proposal.kind == "fixed":
        return fixed_proposal(config, periods)
    recipe = flow_recipe(config, periods)
    flow = recipe.untrained()
    if share == 0:
        load_weights(flow, folder / PROPOSAL, fingerprint=None)
        return recipe.rebuilt(flow.state_dict())
    proposal = Mixture([flow, broad_proposal(config)], [1 - share, share])
    load_weights(proposal, folder / PROPOSAL, fingerprint=None)
    proposal.parts[0] = recipe.rebuilt(flow.state_dict())
    return proposal
