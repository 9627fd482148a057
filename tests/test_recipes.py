"""The assembled flow over all atoms, and the coordinates and basins that a run looks at by default."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mdtraj
import numpy as np
import pytest
import torch
from torch import Tensor

from boltzgen.config import make_config
from boltzgen.core import Chain, Distribution, Molecule
from boltzgen.errors import ConfigError, TopologyError
from boltzgen.md.loading import load
from boltzgen.recipes import (
    CouplingSize,
    InternalCoordinateFlow,
    internal_coordinate_flow,
    learn_domains,
    low_rank_map,
    spread_torsions,
)
from boltzgen.recipes.molecule import halves
from boltzgen.transforms.coupling import CircularSplineCoupling, wrap
from boltzgen.transforms.domains import Domains
from boltzgen.workflows.coordinates import basins, found_variables, inside
from tests import molecules

SYSTEMS = Path(__file__).parents[1] / "systems"
SIZE = CouplingSize(torsion_layers=4, torsion_bins=6, stiff_layers=2, stiff_bins=4, hidden=(12,), compiled=False)
NAMES = ["alanine_dipeptide_vacuum", "capped_valine", "capped_proline", "water"]


def molecule_and_data(name: str, *, n: int = 200) -> tuple[Molecule, np.ndarray]:
    """A molecule, and its coordinates shaken by 0.002 nm."""
    if name == "water":
        molecule, x = molecules.water(), np.array([[0.0, 0.0, 0.0], [0.0957, 0.0, 0.0], [-0.024, 0.0927, 0.0]])
    else:
        loaded = load(SYSTEMS / name / "topology.pdb", SYSTEMS / name / "system.xml")
        molecule, x = loaded.molecule, loaded.positions
    return molecule, x + 0.002 * np.random.default_rng(0).normal(size=(n, *x.shape))


def assembled(name: str) -> tuple[InternalCoordinateFlow, np.ndarray]:
    """A flow with random weights in every layer."""
    torch.set_num_threads(1)
    molecule, data = molecule_and_data(name)
    generator = torch.Generator().manual_seed(2)
    pieces = internal_coordinate_flow(molecule, learn_domains(molecule, data), size=SIZE, data=data, generator=generator)
    with torch.no_grad():
        for parameter in pieces.flow.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return pieces, data


class _WithoutFixedJacobian(Distribution):
    """A wrong twin: the log_det of the internal coordinates is forgotten."""

    def __init__(self, pieces: InternalCoordinateFlow) -> None:
        super().__init__()
        self.pieces, self.event_shape = pieces, pieces.flow.event_shape

    def sample(self, n: int, *, generator: torch.Generator, context: object = None) -> tuple[Tensor, Tensor]:
        return self.pieces.flow.sample(n, generator=generator)

    def log_prob(self, x: Tensor, context: object = None) -> Tensor:
        _, log_det = self.pieces.fixed.inverse(x)
        return self.pieces.flow.log_prob(x) - log_det


def same_density(flow: Distribution) -> None:
    """The density that a sample is drawn with is the one that is computed at it."""
    with torch.no_grad():
        x, log_q = flow.sample(50, generator=torch.Generator().manual_seed(5))
        again = flow.log_prob(x)
    assert log_q.dtype == again.dtype == torch.float64
    assert torch.isfinite(log_q).all()
    torch.testing.assert_close(again, log_q, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_samples_know_their_density(name: str) -> None:
    pieces, _ = assembled(name)
    same_density(pieces.flow)
    with pytest.raises(AssertionError):
        same_density(_WithoutFixedJacobian(pieces))


@pytest.mark.parametrize("name", NAMES)
def test_latent_coordinates_lead_back(name: str) -> None:
    pieces, data = assembled(name)
    y = pieces.to_latent(data)
    assert y.dtype == torch.float32
    with torch.no_grad():
        x, _ = pieces.fixed(y.to(torch.float64))
        log_q, log_q_latent = pieces.flow.log_prob(x), pieces.latent.log_prob(y)
        _, log_det = pieces.fixed(y.to(torch.float64))

    def distances(x: np.ndarray) -> np.ndarray:
        return np.linalg.norm(x[:, :, None] - x[:, None], axis=-1)

    np.testing.assert_allclose(distances(x.numpy()), distances(data), atol=2e-6)
    torch.testing.assert_close(log_q, log_q_latent - log_det, atol=2e-2, rtol=1e-4)  # the latent flow computes in single precision


def test_the_density_is_that_of_the_torsions_times_that_of_the_rest_given_them() -> None:
    pieces, data = assembled("alanine_dipeptide_vacuum")
    y = pieces.to_latent(data)
    torsions = y[:, : pieces.domains.n_soft]
    given = pieces.given(torsions)
    assert pieces.torsions is not None
    with torch.no_grad():
        torch.testing.assert_close(pieces.torsions.log_prob(torsions) + given.log_prob(y), pieces.latent.log_prob(y), atol=1e-4, rtol=1e-5)
        drawn, log_q = given.sample(30, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(given.log_prob(drawn), log_q, atol=1e-3, rtol=1e-5)
    apart = (drawn[:, None, : pieces.domains.n_soft] - torsions).abs().amax(-1).amin(1)
    assert float(apart.max()) == 0.0  # the torsions are rows of the given set


def test_spread_torsions_make_rare_conformations_common() -> None:
    pieces, _ = assembled("alanine_dipeptide_vacuum")
    domains = replace(pieces.domains, fold=np.array([1, 1, 3]))
    generator = torch.Generator().manual_seed(3)
    frequent = 0.05 * torch.randn(20_000, 3, generator=generator)
    both = torch.cat([frequent, frequent[:400] + torch.tensor([1.0, 0.0, 0.0])])

    def rare_share(domains: Domains) -> float:
        spread = spread_torsions(both, domains, n=5000, generator=generator)
        assert {tuple(row) for row in spread[:50].tolist()} <= {tuple(row) for row in both.tolist()}
        return float((spread[:, 0] > 0.5).double().mean())

    assert 0.15 < rare_share(domains) < 0.6
    assert rare_share(replace(domains, fold=np.array([3, 3, 3]))) == pytest.approx(400 / 20_400, abs=0.01)


def test_dimensions_and_kinds_follow_the_molecule() -> None:
    soft = {}
    for name in NAMES:
        molecule, data = molecule_and_data(name)
        domains = learn_domains(molecule, data)
        assert domains.n_soft + domains.n_stiff == 3 * molecule.n_atoms - 6
        soft[name] = domains.n_soft
    assert soft["water"] == 0


@pytest.mark.parametrize(("name", "methyls"), [("alanine_dipeptide_vacuum", 3), ("capped_valine", 4), ("capped_proline", 2), ("water", 0)])
def test_methyl_groups_are_rotors_of_three(name: str, methyls: int) -> None:
    """ACE, NME and the side chain: a turn by a third only relabels hydrogens."""
    molecule, data = molecule_and_data(name)
    assert learn_domains(molecule, data).fold.tolist().count(3) == methyls


def test_both_mirror_images_in_the_data_are_refused() -> None:
    molecule, data = molecule_and_data("alanine_dipeptide_vacuum")
    mirrored = data * np.array([1.0, 1.0, -1.0])
    with pytest.raises(TopologyError, match="expected one mirror image"):
        learn_domains(molecule, np.concatenate([data, mirrored]))


CONFIG = make_config({"topology": "a.pdb", "system": "a.xml"})


def test_backbone_dihedrals_are_found() -> None:
    molecule, data = molecule_and_data("alanine_dipeptide_vacuum")
    variables = found_variables(molecule)
    assert {v.name: v.atoms for v in variables} == {"phi": (4, 6, 8, 14), "psi": (6, 8, 14, 16)}
    frames = mdtraj.Trajectory(data, mdtraj.load(str(SYSTEMS / "alanine_dipeptide_vacuum/topology.pdb")).topology)
    for variable, compute in zip(variables, (mdtraj.compute_phi, mdtraj.compute_psi), strict=True):
        np.testing.assert_allclose(variable(torch.from_numpy(data)).numpy(), compute(frames)[1][:, 0], atol=1e-3)
    assert basins(CONFIG, variables) == {"phi_positive": {"phi": (0.0, 2.0)}}


@pytest.mark.parametrize("name", ["capped_valine", "capped_proline", "capped_serine", "capped_phenylalanine"])
def test_every_capped_amino_acid_has_phi_and_psi(name: str) -> None:
    molecule, _ = molecule_and_data(name, n=1)
    assert [v.name for v in found_variables(molecule)] == ["phi", "psi"]


def test_without_a_backbone_torsions_are_looked_at() -> None:
    hydrogens = [(0, 4), (0, 5), (0, 6), (1, 7), (1, 8), (2, 9), (2, 10), (3, 11), (3, 12), (3, 13)]
    butane = molecules.graph("CCCC" + "H" * 10, [(0, 1), (1, 2), (2, 3), *hydrogens])
    (variable,) = found_variables(butane)
    assert set(variable.atoms) == {0, 1, 2, 3}
    assert len(found_variables(molecules.water())) == 0
    assert basins(CONFIG, ()) == {}


def test_basins_go_around_the_circle() -> None:
    molecule, _ = molecule_and_data("alanine_dipeptide_vacuum", n=1)
    variables = found_variables(molecule)
    values = np.array([[3.0, 0.0], [-3.0, 0.0], [0.0, 0.0], [2.5, 2.0]])
    assert inside({"phi": (2.8, -2.8)}, values, variables).tolist() == [True, True, False, False]
    assert inside({"phi": (-2.8, 2.8)}, values, variables).tolist() == [False, False, True, True]
    assert inside({"phi": (-2.8, 2.8), "psi": (1.0, 3.0)}, values, variables).tolist() == [False, False, False, True]


def test_a_basin_of_an_unknown_coordinate_is_refused() -> None:
    molecule, _ = molecule_and_data("alanine_dipeptide_vacuum", n=1)
    config = make_config({"topology": "a.pdb", "system": "a.xml", "basins": {"b": {"omega": ["0 radian", "1 radian"]}}})
    with pytest.raises(ConfigError, match=r"found: phi, psi\), got 'omega'"):
        basins(config, found_variables(molecule))


def threefold(pieces: InternalCoordinateFlow) -> None:
    """The density of the soft torsions does not change when a methyl group turns by a third."""
    layers = [layer for layer in pieces.latent.transform.transforms if isinstance(layer, CircularSplineCoupling)]
    chain, n, d = Chain(*layers), pieces.domains.n_soft, pieces.domains.n_stiff
    x = torch.cat(
        [wrap(torch.randn(40, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2), torch.zeros(40, d)], dim=1
    )
    with torch.no_grad():
        _, before = chain.inverse(x)
        for rotor in np.flatnonzero(pieces.domains.fold == 3):
            turned = x.clone()
            turned[:, rotor] = wrap(x[:, rotor] + 2 * torch.pi / 3)
            torch.testing.assert_close(chain.inverse(turned)[1], before, atol=1e-6, rtol=0)


def test_methyl_rotors_are_threefold_among_all_torsions() -> None:
    pieces, _ = assembled("alanine_dipeptide_vacuum")
    assert (pieces.domains.fold == 3).sum() == 3
    threefold(pieces)
    for layer in pieces.latent.transform.transforms:
        if isinstance(layer, CircularSplineCoupling):
            layer.multiples.fill_(1)
    with pytest.raises(AssertionError):
        threefold(pieces)


def test_free_torsions_of_a_map_see_each_other_in_every_layer() -> None:
    """Of five soft torsions three are rotors: φ and ψ in the same half would be moved without knowing of each other."""
    together = 0
    for seed in range(20):
        mixed, random = (halves(5, 4, torch.Generator().manual_seed(seed), apart=apart) for apart in ((0, 3), ()))
        for moved, seen in mixed:
            assert sorted([*moved, *seen]) == list(range(5))
            assert len({0, 3} & set(moved)) == len({0, 3} & set(seen)) == 1
        together += all({0, 3} <= set(moved) or {0, 3} <= set(seen) for moved, seen in random)
    assert together > 0  # what random halves do to some molecules and seeds
    assert [sorted(map(len, pair)) for pair in halves(7, 2, torch.Generator(), apart=(0, 2, 4, 6))] == [[3, 4], [3, 4]]


@pytest.mark.parametrize("between_basins", [False, True])
def test_a_low_rank_map_starts_as_the_identity_and_knows_its_jacobian(between_basins: bool) -> None:
    """All coordinates of all atoms, against automatic differentiation; a torsion that is turned first keeps the volume."""
    molecule, data = molecule_and_data("alanine_dipeptide_vacuum")
    domains, x = learn_domains(molecule, data), torch.from_numpy(data[:2])
    turn = torch.linspace(-1, 1, domains.n_soft) if between_basins else None
    made = low_rank_map(molecule, domains, size=SIZE, rank=3, turn=turn, generator=torch.Generator().manual_seed(1))
    y, log_det = made.transform(x)
    if not between_basins:
        torch.testing.assert_close(y, x, atol=1e-9, rtol=0)
        torch.testing.assert_close(log_det, torch.zeros_like(log_det), atol=1e-9, rtol=0)
    with torch.no_grad():
        for parameter in made.transform.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2), dtype=parameter.dtype)
    y, log_det = made.transform(x)
    for row in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda z: made.transform(z.view(1, -1, 3))[0].flatten(), x[row].flatten())
        exact = torch.linalg.slogdet(jacobian)[1]
        torch.testing.assert_close(log_det[row].detach(), exact, atol=1e-5, rtol=0)
        frameless = log_det[row] - made.transform.coordinates(made.transform.coordinates.inverse(y)[0])[1][row]  # type: ignore[operator, union-attr]
        assert abs(float((frameless - exact).detach())) > 1e-2  # the twin without the volume of the shape it makes
    torch.testing.assert_close(made.transform.inverse(y)[0], x, atol=1e-6, rtol=0)
