"""From standardised latent coordinates to internal coordinates inside their domains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from boltzgen.core import Context, Transform
from boltzgen.errors import InputError, TopologyError
from boltzgen.transforms.coupling import wrap
from boltzgen.transforms.internal import InternalCoordinates
from boltzgen.transforms.zmatrix import ZMatrix

#: A torsion whose data stay within an arc of this length (rad) is stiff: described on the line, with the Gaussian block.
STIFF_ARC = 2.2
#: Share of frames that may lie outside the sector of the others (a hydrogen swung past its neighbour in hot data).
MAX_OTHER_SECTOR = 1e-3

#: Sectors of the circle that are looked at for that, and the share of frames below which one counts as empty.
_SECTORS, _STRAY_SHARE = 72, 2e-3


@dataclass(frozen=True)
class Domains:
    """Which domain every internal coordinate lives in, read off training data.

    Attributes:
        soft: Columns of q that are angles on the whole circle.
        fold: Rotational symmetry of each soft column (3 for a methyl group).
        bonds: Columns in (0, ∞).
        intervals: Columns in an open interval ``(low, high)``: bond angles and stiff torsions.
        low: Lower ends of the intervals, rad.
        high: Upper ends, rad.
        center: Typical value of every stiff column (bonds, then intervals), nm or rad.
        spread: Its standard deviation.
    """

    soft: np.ndarray
    fold: np.ndarray
    bonds: np.ndarray
    intervals: np.ndarray
    low: np.ndarray
    high: np.ndarray
    center: np.ndarray
    spread: np.ndarray

    @classmethod
    def from_data(cls, coordinates: InternalCoordinates, zmatrix: ZMatrix, q: np.ndarray, *, names: tuple[str, ...]) -> Domains:
        """Domains for training data.

        Torsions at four-coordinate centres keep the sign that the data have (one mirror image, one labelling of
        equivalent hydrogens); other torsions whose data stay within ``STIFF_ARC`` are stiff; the rest are soft.

        Args:
            coordinates: The internal coordinates.
            zmatrix: Their Z-matrix.
            q: Internal coordinates of the data ``[n, n_internal]``, nm and rad.
            names: Atom labels, for messages.

        Raises:
            InputError: If there are fewer than two frames.
            TopologyError: If the data contain both mirror images, or two labellings of equivalent atoms.
        """
        if len(q) < 2:
            raise InputError(f"expected at least two frames to learn the scales of the coordinates from, got {len(q)}")
        bonds, angles, torsions = (
            np.asarray(columns) for columns in (coordinates.bond_columns, coordinates.angle_columns, coordinates.torsion_columns)
        )
        soft, fold, stiff, low, high = [], [], [], [], []
        for column, row in zip(torsions.tolist(), np.asarray(coordinates.torsion_rows).tolist(), strict=True):
            values = q[:, column]
            middle, arc = _arc(values)
            if zmatrix.chiral[row]:
                sign = 1.0 if np.median(np.sign(values)) > 0 else -1.0
                other = float((np.sign(values) != sign).mean())
                if other > MAX_OTHER_SECTOR:
                    atom = names[int(zmatrix.rows[row, 0])]
                    raise TopologyError(
                        f"expected one mirror image and one labelling of equivalent atoms, got both around {atom} "
                        f"in the data ({100 * other:.2g} % of the frames are of the other kind); relabel those frames or remove them"
                    )
                stiff.append(column)
                low.append(0.0 if sign > 0 else -np.pi)
                high.append(np.pi if sign > 0 else 0.0)
            elif arc < STIFF_ARC and zmatrix.rotor_fold[row] == 1:
                stiff.append(column)
                low.append(middle - np.pi)
                high.append(middle + np.pi)
            else:
                soft.append(column)
                fold.append(zmatrix.rotor_fold[row])
        intervals = np.concatenate([angles, np.array(stiff, dtype=np.int64)]).astype(np.int64)
        lows = np.concatenate([np.zeros(len(angles)), np.array(low)])
        highs = np.concatenate([np.full(len(angles), np.pi), np.array(high)])
        kinds = cls(
            soft=np.array(soft, dtype=np.int64), fold=np.array(fold, dtype=np.int64), bonds=bonds, intervals=intervals,
            low=lows, high=highs, center=np.zeros(0), spread=np.zeros(0),
        )  # fmt: skip
        return kinds.recentred(q)

    def recentred(self, q: np.ndarray) -> Domains:
        """The same domains with centres and spreads of other internal coordinates ``[n, n_internal]``."""
        intervals = _unwrap(q[:, self.intervals], self.low)
        values = np.concatenate([q[:, self.bonds], intervals], axis=1)[(intervals < self.high).all(axis=1)]
        return replace(self, center=values.mean(axis=0), spread=values.std(axis=0).clip(1e-6))

    def to_dict(self) -> dict[str, list[float]]:
        """Plain lists, for JSON."""
        return {item.name: getattr(self, item.name).tolist() for item in fields(self)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Sequence[float]]) -> Domains:
        """The inverse of :meth:`to_dict`.

        Raises:
            KeyError, TypeError, ValueError: If the content is not that.
        """
        whole = ("soft", "fold", "bonds", "intervals")
        return cls(**{f.name: np.asarray(content[f.name], dtype=np.int64 if f.name in whole else np.float64) for f in fields(cls)})

    def contains(self, q: np.ndarray) -> np.ndarray:
        """Which rows of internal coordinates ``[n, n_internal]`` lie in the sector, bool ``[n]``."""
        values = _unwrap(q[:, self.intervals], self.low)
        return np.all((values > self.low) & (values < self.high), axis=1)

    @property
    def n_soft(self) -> int:
        """Number of torsions on the whole circle."""
        return len(self.soft)

    @property
    def n_stiff(self) -> int:
        """Number of all other coordinates."""
        return len(self.center)


class InternalDomains(Transform):
    """Standardised coordinates to internal coordinates, each inside its domain.

    y = [soft angles, stiff]. Soft angles are copied. A bond is b = b₀ exp(s y / b₀); an angle or a stiff torsion is
    low + (high − low) σ(a + c y) with a, c such that y = 0 is its centre and the slope there is its spread. Both are
    smooth bijections onto the whole domain and nearly linear where the data are, so nothing is reflected or clipped.
    ``inverse`` gives configurations of another sector (mirror image, labelling) the log_det −∞: their density is zero.

    Args:
        domains: Kinds, centres and spreads.
    """

    center: Tensor
    relative: Tensor
    low: Tensor
    length: Tensor
    offset: Tensor
    slope: Tensor
    order: Tensor
    position: Tensor

    def __init__(self, domains: Domains) -> None:
        super().__init__()
        self.n_soft = domains.n_soft
        n_bonds = len(domains.bonds)
        columns = np.concatenate([domains.soft, domains.bonds, domains.intervals]).astype(np.int64)
        position = np.argsort(columns)
        length = domains.high - domains.low
        middle = (domains.center[n_bonds:] - domains.low) / length
        buffers = {
            "center": domains.center[:n_bonds],
            "relative": domains.spread[:n_bonds] / domains.center[:n_bonds],
            "low": domains.low,
            "length": length,
            "offset": np.log(middle) - np.log1p(-middle),
            "slope": domains.spread[n_bonds:] / (length * middle * (1 - middle)),
        }
        for name, values in buffers.items():
            self.register_buffer(name, torch.as_tensor(values, dtype=torch.float64).clone())
        self.register_buffer("order", torch.as_tensor(columns), persistent=False)
        self.register_buffer("position", torch.as_tensor(position), persistent=False)

    def forward(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        n_bonds = len(self.center)
        z = z.to(torch.float64)
        soft, bond, rest = z[:, : self.n_soft], z[:, self.n_soft : self.n_soft + n_bonds], z[:, self.n_soft + n_bonds :]
        exponent = self.relative * bond
        t = self.offset + self.slope * rest
        q = torch.cat([soft, self.center * exponent.exp(), wrap(self.low + self.length * t.sigmoid())], dim=1)
        return q[:, self.position], self._log_det(exponent, t)

    def inverse(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        n_bonds = len(self.center)
        q = x[:, self.order]
        soft, bond, rest = q[:, : self.n_soft], q[:, self.n_soft : self.n_soft + n_bonds], q[:, self.n_soft + n_bonds :]
        exponent = (bond / self.center).log()
        fraction = torch.remainder(rest - self.low, 2 * torch.pi) / self.length
        outside = (fraction >= 1).any(dim=1)
        t = torch.logit(fraction.clamp_max(1 - 1e-12))
        z = torch.cat([soft, exponent / self.relative, (t - self.offset) / self.slope], dim=1)
        return z, torch.where(outside, -torch.inf, -self._log_det(exponent, t))

    def _log_det(self, exponent: Tensor, t: Tensor) -> Tensor:
        logsigmoid = torch.nn.functional.logsigmoid
        bonds = exponent + (self.center * self.relative).log()
        rest = logsigmoid(t) + logsigmoid(-t) + (self.length * self.slope).log()
        return bonds.sum(dim=1) + rest.sum(dim=1)


def _arc(values: np.ndarray) -> tuple[float, float]:
    """Middle and length of the shortest arc that holds the occupied sectors of angles ``[n]``; stray frames do not count."""
    counts, edges = np.histogram(values, bins=_SECTORS, range=(-np.pi, np.pi))
    occupied = np.flatnonzero(counts > _STRAY_SHARE * len(values))
    gaps = np.diff(np.concatenate([occupied, occupied[:1] + _SECTORS])) - 1
    widest = int(np.argmax(gaps))
    start = edges[occupied[(widest + 1) % len(occupied)]]
    arc = 2 * np.pi * (1 - gaps[widest] / _SECTORS)
    return float(np.remainder(start + arc / 2 + np.pi, 2 * np.pi) - np.pi), float(arc)


def _unwrap(angles: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Angles ``[n, k]`` moved by whole turns into [low, low + 2π)."""
    return low + np.remainder(angles - low, 2 * np.pi)
