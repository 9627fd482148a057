"""A map of a molecule's shape that depends on the atoms around it, which stay where they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from boltzgen.core import Chain, Context, Transform
from boltzgen.errors import InputError
from boltzgen.networks.mlp import MLP
from boltzgen.networks.surroundings import Surroundings
from boltzgen.transforms.coupling import wrap
from boltzgen.transforms.domains import InternalDomains
from boltzgen.transforms.internal import InternalCoordinates
from boltzgen.transforms.internal_map import InternalMap, OnAtoms, placed

#: Largest push of an atom, and largest number of the surroundings, in units of their spreads.
_FARTHEST, _MOST = 10.0, 4.0


class SurroundedShape(Transform):
    r"""Shifts and stretches some internal coordinates of a molecule by what is around it.

    With x = (x_m, x_c), x_m the molecule and x_c the carried atoms; x_m = (t, R, q) its first atom, the frame of its first three, and its
    internal coordinates, standardised y(q) = (s, z), z those that move,

        z' = e^{a(c)} z + b(c),   c = c(t, R, s, x_c),   and t, R, s, x_c are kept

    so that c is the same forwards and backwards. In the coordinates (t, R, s, z, x_c) the matrix of derivatives is block triangular: kept
    ones have the unit matrix, whatever c does; z' depends on all, and ∂z'/∂z = e^{a}. Hence its determinant is e^{Σa}, and with
    dx = J(q) dt dR dq dx_c on both sides

        ln|det ∂x'/∂x| = ln J(q') − ln J(q) + Σ a + ln|det ∂q'/∂y'| − ln|det ∂q/∂y|

    the frame's factors b₁² b₂² sin θ₁ being part of J. Were c to see the atoms themselves, ∂c/∂z would enter.

    c is seen from a reference: the molecule in its frame with the s it has, and z at typical values. With n and v the numbers of carried
    atoms around its atoms and their directions (:class:`Surroundings`), every atom p of the reference is pushed by ℓ Σ_f w_pf v_pf, and

        b = C (z(pushed) − z(reference)) + b₀(n),   a = a₀(n)

    C a matrix, a₀ and b₀ a perceptron: coordinates follow the mean force of the surroundings. w, a₀, b₀ start at zero: this starts as
    the identity. It commutes with translations and rotations of everything, and with permutations of equal carried atoms.

    Args:
        coordinates: Internal coordinates of the molecule, without constrained bonds.
        domains: Their domains, which make them y.
        surroundings: n and v around all its atoms.
        atoms: Its atoms among all, in the order that ``coordinates`` expects.
        n_atoms: Number of all atoms.
        moved: Columns z of y. Those that are angles on a circle are turned only.
        reference: Typical z ``[n_moved]``.
        length: ℓ in nm.
        hidden: Widths of the hidden layers of the perceptron.
        generator: Source of the initial weights.

    Raises:
        InputError: If bonds are constrained, an atom does not exist, no other atom is left, or there is not one reference for each column.

    References:
        Jarzynski, Phys. Rev. E 65, 046122 (2002), eq. 8 (the Jacobian is that of all coordinates); Satorras, Hoogeboom & Welling, ICML
        2021, eq. 4 (pushes along directions to neighbours).
    """

    moved: Tensor
    circular: Tensor
    reference: Tensor
    length: Tensor
    others: Tensor

    def __init__(
        self,
        coordinates: InternalCoordinates,
        domains: InternalDomains,
        surroundings: Surroundings,
        *,
        atoms: Sequence[int],
        n_atoms: int,
        moved: Sequence[int],
        reference: Tensor,
        length: float,
        hidden: Sequence[int],
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.shape = InternalMap(coordinates, Chain())
        self.molecule = OnAtoms(self.shape, atoms=atoms, n_atoms=n_atoms)
        if len(atoms) == n_atoms or reference.shape != (len(moved),):
            raise InputError(
                f"expected carried atoms and one reference for each of {len(moved)} columns, got a molecule of {len(atoms)} among "
                f"{n_atoms} atoms and references {list(reference.shape)}"
            )
        self.domains, self.surroundings = domains, surroundings
        columns = torch.as_tensor(list(moved), dtype=torch.int64)
        rest = torch.ones(n_atoms, dtype=torch.bool).index_fill(0, self.molecule.atoms, False)
        self.register_buffer("moved", columns, persistent=False)
        self.register_buffer("circular", columns < domains.n_soft, persistent=False)
        self.register_buffer("others", rest.nonzero().squeeze(1), persistent=False)
        self.register_buffer("reference", reference.to(torch.float64).clone())
        self.register_buffer("length", torch.tensor(length, dtype=torch.float64))
        n_points, n_features = surroundings.n_points, surroundings.n_features
        self.pushes = torch.nn.Parameter(torch.zeros(n_points, n_features))
        self.compliance = torch.nn.Parameter(torch.eye(len(columns)))
        n_stretched = int((~self.circular).sum())
        self.perceptron = MLP(n_points * n_features, len(columns) + n_stretched, hidden=hidden, generator=generator)

    def forward(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        return self._moved(z, inverse=False)

    def inverse(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        return self._moved(x, inverse=True)

    @torch.no_grad()
    def standardise(self, x: Tensor) -> None:
        """Take means and spreads of the surroundings from configurations ``[b, n_atoms, 3]`` in nm."""
        self.surroundings.standardise(self.kept(x), x[:, self.others].to(torch.float64))

    def kept(self, x: Tensor) -> Tensor:
        """Atoms of the reference in the frame of the molecule ``[b, k, 3]``: what the map leaves as it is, and nothing else."""
        mapped = x[:, self.molecule.atoms].to(torch.float64)
        y, _ = self.domains.inverse(self.shape.coordinates.inverse(mapped)[0])
        y = y.index_copy(1, self.moved, self.reference.expand(len(y), -1))
        reference, _ = self.shape.coordinates(self.domains(y)[0])
        return placed(reference, mapped, self.shape.coordinates.zmatrix)

    def _moved(self, x: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        shift, log_scale = self._response(x)
        if inverse:
            shift, log_scale = -shift * (-log_scale).exp(), -log_scale

        def through(q: Tensor, context: Context | None) -> tuple[Tensor, Tensor]:
            y, left = self.domains.inverse(q)
            values = log_scale.exp() * y[:, self.moved] + shift
            y = y.index_copy(1, self.moved, torch.where(self.circular, wrap(values), values))
            q, entered = self.domains(y)
            return q, left + log_scale.sum(dim=1) + entered

        return self.molecule.on_atoms(lambda part, context: self.shape.through(through, part, context), x, None)

    def _response(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """b and a, both ``[b, n_moved]``."""
        points, around = self.kept(x), x[:, self.others].to(torch.float64)
        n, v = self.surroundings(points, around)
        push = torch.einsum("bpfx,pf->bpx", v, self.pushes.to(v))
        push = self.length * push / (1.0 + push.square().sum(dim=-1, keepdim=True) / _FARTHEST**2).sqrt()
        pushed, _ = self.domains.inverse(self.shape.coordinates.inverse(points + push)[0])
        followed = pushed[:, self.moved] - self.reference
        followed = torch.where(self.circular, wrap(followed), followed)
        numbers = (n / (1.0 + (n / _MOST).square()).sqrt()).flatten(1)
        given, stretch = self.perceptron(numbers.to(self.pushes.dtype)).to(v).split([len(self.moved), int((~self.circular).sum())], dim=1)
        log_scale = torch.zeros_like(given).index_copy(1, (~self.circular).nonzero().squeeze(1), stretch)
        return followed @ self.compliance.T.to(v) + given, log_scale
