"""A flow over a molecule's internal coordinates that is learned again and again while its data grow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from boltzgen.core import Context, Distribution, Flow, Molecule, Objective, Target
from boltzgen.recipes.molecule import CouplingSize, InternalCoordinateFlow, internal_coordinate_flow, learn_domains
from boltzgen.targets.pulled_back import PulledBack
from boltzgen.training.fit import FitSettings, fit
from boltzgen.training.objectives import ForwardKL, OfPart, WeightedSum
from boltzgen.transforms.domains import Domains

#: Rows of one call for energies; every which row is held out; longest path gradient in medians of its batch.
_ENERGY_ROWS, _HELD_OUT_EVERY, _OUTLIER_LIMIT = 10_000, 10, 3.0


class MoleculeFlow(Distribution):
    """The density of an internal-coordinate flow over configurations, with the parts that training needs.

    Args:
        pieces: The flow and its parts.
    """

    def __init__(self, pieces: InternalCoordinateFlow) -> None:
        super().__init__()
        self.flow, self.pieces, self.event_shape = pieces.flow, pieces, pieces.flow.event_shape

    @property
    def log_det_error(self) -> float | None:
        return self.flow.log_det_error

    def sample(self, n: int, *, generator: torch.Generator, context: Context | None = None) -> tuple[Tensor, Tensor]:
        return self.flow.sample(n, generator=generator, context=context)

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        return self.flow.log_prob(x, context)


@dataclass(frozen=True)
class LearningSettings:
    """How a flow is trained every time.

    Attributes:
        steps: Optimiser steps.
        batch_size: Configurations per step.
        learning_rate: Peak of the cosine schedule.
        use_forces: Fit the configurations with their forces (one energy evaluation each), which needs far fewer of them.
        most_rows: Most configurations that are learned from; more are thinned evenly.
    """

    steps: int = 300
    batch_size: int = 256
    learning_rate: float = 2e-3
    use_forces: bool = True
    most_rows: int = 20_000


@dataclass(frozen=True)
class MoleculeFlowRecipe:
    """How flows over one molecule are learned from configurations of walkers, and made again.

    Attributes:
        molecule: The molecule.
        target: What the configurations are samples of; asked for forces only.
        size: Size of the flow.
        settings: Training of the flow.
        seed: Seed of the initial weights and of the splits between the layers.
    """

    molecule: Molecule
    target: Target
    size: CouplingSize
    settings: LearningSettings = LearningSettings()
    seed: int = 0

    def learned(self, x: Tensor, before: Distribution | None, *, generator: torch.Generator) -> tuple[MoleculeFlow, Mapping[str, float]]:
        """A frozen flow trained on configurations ``[n, n_atoms, 3]``; it begins where the last one ended, unless a torsion
        changed its kind.

        Raises:
            TopologyError: If the configurations hold two mirror images, or two labellings of equivalent hydrogens.
            EnergyError: If training diverges.
        """
        stride = -(-len(x) // self.settings.most_rows)
        data = x[::stride].to(torch.float64).numpy()
        domains = learn_domains(self.molecule, data)
        if isinstance(before, MoleculeFlow) and _same_kinds(before.pieces.domains, domains):
            pieces = self.rebuilt(self.described(before)).pieces
            pieces.flow.requires_grad_(True)
        else:
            pieces = self._built(domains, data)
        y = pieces.to_latent(data[pieces.in_sector(data)])
        held_out = torch.arange(len(y)) % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
        objective, n_energies = self._objective(pieces, y[~held_out])
        s = self.settings
        chosen = FitSettings(
            steps=s.steps,
            learning_rate=s.learning_rate,
            gradient_clip=10.0,
            ema_decay=0.99,
            checkpoint_every=s.steps,
            evaluate_every=s.steps,
        )
        pieces.latent.train()
        fit(pieces.latent, objective, settings=chosen, generator=generator, progress=False)
        with torch.no_grad():
            loss = -float(pieces.latent.log_prob(y[held_out]).mean()) if bool(held_out.any()) else float("nan")
        flow = self.rebuilt(self.described(MoleculeFlow(pieces)))  # one layout in memory, as after a resumption: equal to the last bit
        return flow, {"held_out_loss": loss, "n_rows": float(len(y)), "n_energies": float(n_energies)}

    def described(self, flow: Distribution) -> Mapping[str, Any]:
        """Domains and weights of a flow, copied."""
        assert isinstance(flow, MoleculeFlow)
        weights = {name: tensor.detach().clone() for name, tensor in flow.pieces.flow.state_dict().items()}
        return {"domains": flow.pieces.domains.to_dict(), "weights": weights}

    def rebuilt(self, content: Mapping[str, Any]) -> MoleculeFlow:
        """The flow with these domains and weights."""
        pieces = self._built(Domains.from_dict(content["domains"]), None)
        pieces.flow.load_state_dict(dict(content["weights"]))
        flow = MoleculeFlow(pieces)
        flow.requires_grad_(False)
        return flow.eval()

    def _built(self, domains: Domains, data: np.ndarray | None) -> InternalCoordinateFlow:
        generator = torch.Generator().manual_seed(self.seed)
        return internal_coordinate_flow(self.molecule, domains, size=self.size, data=data, generator=generator)

    def _objective(self, pieces: InternalCoordinateFlow, y: Tensor) -> tuple[Objective[Flow], int]:
        """Likelihood of standardised coordinates ``[n, d]``, by their forces where wanted, and the energies that took."""
        batch = min(self.settings.batch_size, len(y))
        if not self.settings.use_forces:
            return ForwardKL(y, batch_size=batch), 0
        target = PulledBack(self.target, pieces.fixed, event_shape=pieces.latent.event_shape)
        gradient = torch.cat([target.value_and_grad(rows.to(torch.float64))[1] for rows in y.split(_ENERGY_ROWS)]).to(y.dtype)
        forces = ForwardKL(y, batch_size=batch, u_gradient=gradient, outlier_limit=_OUTLIER_LIMIT)
        if pieces.torsions is None:
            return forces, len(y)
        torsions = ForwardKL(y[:, : pieces.domains.n_soft], batch_size=batch)
        return WeightedSum((1.0, forces), (1.0, OfPart(pieces.torsions, torsions, name="torsions"))), len(y)


def _same_kinds(a: Domains, b: Domains) -> bool:
    """Whether the same torsions are soft in both, and the mirror image is the same."""
    if not (np.array_equal(a.soft, b.soft) and np.array_equal(a.intervals, b.intervals)):
        return False
    apart = np.abs(np.angle(np.exp(1j * (a.low - b.low))))
    return bool((apart < 1.0).all())
