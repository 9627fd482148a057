"""Work values: what a map, a switching protocol or an instantaneous change does to samples of one state, row by row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.special import expit
from torch import Tensor

from boltzgen.core import Role, WeightedSamples, require_exact_rows, summed_log_det_error
from boltzgen.errors import EnergyError, InputError, NoOverlapError, ShapeError
from boltzgen.estimators.bootstrap import INEFFICIENCIES_IN_A_UNIT, independent_units, numbered
from boltzgen.estimators.timeseries import decorrelate, statistical_inefficiency
from boltzgen.units import thermal_energy

#: Share of rows whose work may be NaN, for the rest still to stand for the state.
MAX_NAN_SHARE = 0.001


@dataclass(frozen=True)
class Works:
    """Generalised work values of samples of one state, in kT.

    For a map T from A to B a forward work is u_B(Tx) − u_A(x) − ln|det J_T(x)| of x ~ A, a reverse one the same with A and B exchanged and
    the inverse map; without a map they are energy differences, and for a switching protocol the work done in units of kT.

    Attributes:
        w: Works ``[n]``, float64; +inf is a row that B forbids.
        units: Independent unit of every row ``[n]``, labels 0 to m − 1.
        chain: Chain of every row ``[n]``; the rows of a chain are in the order of time.
        role: ``train`` or ``evaluate``; estimators refuse rows that trained the map.
        n_nan: Rows left out because their work was not a number.
        log_det_error: Error of the Jacobian in nats; None where it is only estimated.
        is_exact: False when an energy is that of an altered target.
        n_maps: Works of each row, one after the other: more than one in a :meth:`union` of maps.
    """

    w: np.ndarray
    units: np.ndarray
    chain: np.ndarray
    role: Role
    n_nan: int = 0
    log_det_error: float | None = 0.0
    is_exact: bool = True
    n_maps: int = 1

    @classmethod
    def of(
        cls,
        w: Tensor | np.ndarray | Sequence[float],
        *,
        role: Role,
        log_det_error: float | None,
        is_exact: bool = True,
        units: np.ndarray | None = None,
        chain: np.ndarray | None = None,
    ) -> Works:
        """Check work values and count what is not a number.

        Args:
            w: Works ``[n]`` in kT.
            role: Whether these rows trained the map.
            log_det_error: Error of the Jacobian in nats, ``transform.log_det_error``; 0 without a map.
            is_exact: Whether both targets are.
            units: Independent unit of every row ``[n]``, any integers; every row its own by default.
            chain: Chain of every row ``[n]``, any integers; one chain by default.

        Raises:
            ShapeError: If ``w`` is not ``[n]``, or units or chains are not.
            InputError: If there are fewer than two independent units.
            EnergyError: If a work is −inf, all are infinite, or more than 0.1 % are NaN.
        """
        values = np.asarray(w.detach().cpu() if isinstance(w, Tensor) else w, dtype=np.float64)
        if values.ndim != 1:
            raise ShapeError(f"expected works [n], got shape {values.shape}")
        labels = np.arange(len(values)) if units is None else np.asarray(units)
        chains = np.zeros(len(values), dtype=np.int64) if chain is None else np.asarray(chain)
        if labels.shape != values.shape or chains.shape != values.shape:
            raise ShapeError(f"expected units and chains [{len(values)}], one per work, got shapes {labels.shape} and {chains.shape}")
        bad = np.isnan(values)
        if bad.sum() > MAX_NAN_SHARE * len(values):
            raise EnergyError(
                f"{int(bad.sum())} of {len(values)} works are NaN, in rows {np.flatnonzero(bad)[:10].tolist()}: at most "
                f"{100 * MAX_NAN_SHARE:g} % may be; find out why their energies fail"
            )
        if np.isneginf(values).any():
            raise EnergyError(
                f"row {int(np.argmax(np.isneginf(values)))} has a work of -inf: it cannot come from its state, where its energy is +inf"
            )
        values, labels, chains = values[~bad], labels[~bad], chains[~bad]
        if len(np.unique(labels)) < 2:
            raise InputError(
                f"the {len(values)} works form {len(np.unique(labels))} independent units: expected at least 2 (100 for a useful error)"
            )
        if np.isposinf(values).all():
            raise NoOverlapError(
                f"all {len(values)} works are +inf: the other state forbids every configuration that was made for it; check that map "
                "and end states belong together"
            )
        return cls(values, numbered(labels), numbered(chains), role, int(bad.sum()), log_det_error, is_exact)

    @classmethod
    def of_samples(cls, samples: WeightedSamples, w: Tensor, *, log_det_error: float | None, is_exact: bool = True) -> Works:
        """Works of samples that follow their state, with the chains, time blocks, role and exactness of the samples.

        Args:
            samples: Samples of the state that the works start from, unweighted.
            w: Works ``[n]`` in kT.
            log_det_error: Error of the Jacobian in nats, ``transform.log_det_error``; 0 without a map.
            is_exact: Whether the other target is exact.

        Raises:
            InputError: If the samples carry weights, or form one block.
            ShapeError, EnergyError: As :meth:`of`.
        """
        if bool((samples.log_w != samples.log_w[:1]).any()):
            raise InputError("expected samples that follow their state; weighted samples need their weights in the estimate")
        return cls.of(
            w, role=samples.role, log_det_error=summed_log_det_error(samples.log_det_error, log_det_error),
            is_exact=is_exact and samples.is_exact, units=independent_units(samples), chain=samples.chain.cpu().numpy(),
        )  # fmt: skip

    @classmethod
    def read(cls, path: Path, *, unit: Literal["kT", "kJ/mol"], temperature_kelvin: float | None = None) -> Works:
        """Works of a text file, one value in every line; ``#`` begins a comment. Rows count as independent.

        Reverse works are those done on the way from B to A: both directions of a dissipative process have positive means when ΔF is small.

        Args:
            path: The file.
            unit: Unit of its values.
            temperature_kelvin: Needed for kJ/mol.

        Raises:
            InputError: If the file cannot be read, a line is not a number, the unit is another one, or the temperature is missing.
            ShapeError, EnergyError: As :meth:`of`.
        """
        if unit not in ("kT", "kJ/mol"):
            raise InputError(f"expected works in kT or kJ/mol, got {unit!r}")
        if unit == "kJ/mol" and not (temperature_kelvin is not None and 0 < temperature_kelvin < math.inf):
            raise InputError(f"works in kJ/mol need a temperature above 0 K, to be turned into kT, got {temperature_kelvin}")
        try:
            lines = Path(path).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the works {path}: {error}") from error
        values = []
        for number, line in enumerate(lines, start=1):
            text = line.partition("#")[0].strip()
            try:
                values += [float(text)] if text else []
            except ValueError:
                raise InputError(f"{path}, line {number}: expected one work value, got {text[:40]!r}") from None
        scale = thermal_energy(temperature_kelvin) if unit == "kJ/mol" and temperature_kelvin is not None else 1.0
        try:
            return cls.of(np.array(values) / scale, role="evaluate", log_det_error=0.0)
        except (EnergyError, InputError) as error:
            raise InputError(f"{path} (rows count values from 0, without comments): {error}") from error

    @classmethod
    def union(cls, several: Sequence[Works]) -> Works:
        """Works of the same rows by several maps, those of several epochs of training for instance, as one set.

        Choosing one of the maps at random and applying it is a process too, with the same choice on the way back, so that Crooks' theorem
        holds for pairs of row and map, and every estimator for their union. All works of a row stay in its unit: maps are no data.

        Args:
            several: Works of the same rows in the same order.

        Raises:
            InputError: If the rows, their units, chains or roles differ; works that were not a number leave out different rows.

        References:
            Rizzi, Carloni & Parrinello, J. Phys. Chem. Lett. 12, 9449 (2021); multimap targeted free energies: arXiv 2302.07683.
        """
        first, n = several[0], len(several)
        for works in several:
            same = len(works) == len(first) and np.array_equal(works.units, first.units) and np.array_equal(works.chain, first.chain)
            if not same or works.role != first.role or works.n_maps != 1 or works.n_nan:
                raise InputError("expected works of the same rows by several maps, all of them numbers: units, chains or roles differ")
        return replace(
            first, w=np.stack([works.w for works in several], axis=1).reshape(-1), units=np.repeat(first.units, n), n_maps=n,
            chain=np.repeat(first.chain, n), **_exactness(several),
        )  # fmt: skip

    @classmethod
    def joined(cls, parts: Sequence[Works]) -> Works:
        """Works of different rows by different maps as one set: halves of the data, each by a map that the other half trained.

        Crooks' theorem holds for every part by itself, whatever its map: for any C, E_F[f(C + Φ_F − ΔF)] e^C = E_R[f(−C + Φ_R + ΔF)]. So
        Bennett's equation summed over parts keeps its root at ΔF, where every part has the same share of forward and reverse rows.
        The rows of a chain follow each other in the order of the parts, which is to be that of time; units are numbered part by part.

        Args:
            parts: Works of different rows of the same chains, in the order of time.

        Raises:
            InputError: If there are none, or roles, numbers of maps or of chains differ.

        References:
            Cross-fitting: Chernozhukov et al., Econometrics J. 21, C1 (2018), section 3.
        """
        if len({(works.role, works.n_maps) for works in parts}) != 1:
            raise InputError("expected parts with the same role and the same number of maps")
        if len({int(works.chain.max()) for works in parts}) != 1:
            raise InputError(
                "expected parts that hold rows of all chains: one of them lacks a chain, which all others would be mistaken for"
            )
        first = np.cumsum([0, *(works.n_units for works in parts)])
        return replace(
            parts[0], w=np.concatenate([works.w for works in parts]), chain=np.concatenate([works.chain for works in parts]),
            units=np.concatenate([works.units + k for works, k in zip(parts, first, strict=False)]),
            n_nan=sum(works.n_nan for works in parts), **_exactness(parts),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.w)

    @property
    def n_units(self) -> int:
        """Number of independent units."""
        return int(self.units.max()) + 1

    def rows(self, chosen: np.ndarray) -> Works:
        """Some of the rows, by number or as bool ``[n]``."""
        return replace(self, w=self.w[chosen], units=numbered(self.units[chosen]), chain=numbered(self.chain[chosen]))

    def share(self, share: float, *, from_end: bool = False) -> Works:
        """The first, or the last, part of every chain, rounded to rows."""
        kept = []
        for entries in self._chains():
            n = round(share * len(entries))
            kept.append(entries[len(entries) - n :] if from_end else entries[:n])
        return self.rows(np.sort(np.concatenate(kept).reshape(-1)))

    def decorrelated(self) -> Works:
        """Every (2g − 1)-th row of each chain, each its own unit; g is the statistical inefficiency of the chain.

        Rows that are g apart still remember e⁻² of each other where memory fades exponentially, which makes errors 15 % too small: 95 %
        intervals then cover 90 % (``benchmarks/calibration.py``). Independent rows, g = 1, are all kept.
        """
        found = []
        for entries in self._chains():
            accepted = self._accepted(entries)
            found.append(entries[decorrelate(accepted, inefficiency=2 * statistical_inefficiency(accepted) - 1)])
        kept = np.concatenate(found)
        return replace(self.rows(kept.reshape(-1)), units=np.repeat(np.arange(len(kept)), self.n_maps))

    def statistical_inefficiency(self) -> float:
        """Rows worth one independent row: the largest over chains of that of 1/(1 + e^{w − c}), c the median.

        That is how rows are accepted, which is bounded; in the works themselves rare clashes without memory hide the memory of all others.
        1 where all works are the same: each row then says the same.
        """
        series = [self._accepted(entries) for entries in self._chains()]
        if np.ptp(np.concatenate(series)) < 1e-9:
            return 1.0
        return max(statistical_inefficiency(accepted) for accepted in series)

    def blocked(self, *, at_least: float) -> Works:
        """All rows, in units of consecutive rows of a chain, five times as long as the memory of the works, or as a longer one.

        Five statistical inefficiencies keep the error of a mean over correlated rows within about a tenth.

        Args:
            at_least: A statistical inefficiency in rows that these works may not show, that of the slowest coordinate for instance.

        Raises:
            InputError: If that is one unit.
        """
        length = math.ceil(INEFFICIENCIES_IN_A_UNIT * max(self.statistical_inefficiency(), at_least))
        units, first = np.empty(len(self), dtype=np.int64), 0
        for entries in self._chains():
            n_units = max(1, len(entries) // length)
            units[entries] = first + (np.arange(len(entries)) * n_units // len(entries))[:, None]
            first += n_units
        if first < 2:
            raise InputError(
                f"the {len(self)} works form one independent unit, of {length} rows at least: expected 2 or more; sample longer"
            )
        return replace(self, units=units)

    def _accepted(self, entries: np.ndarray) -> np.ndarray:
        """How likely rows ``[n, maps]`` are accepted, the mean over maps."""
        return expit(np.median(self.w[np.isfinite(self.w)]) - self.w[entries]).mean(axis=1)

    def require_exact(self) -> Works:
        """These works, if a statistically exact number may rest on them.

        Raises:
            TrainingDataError: If the rows trained the map.
            InexactDensityError: If a Jacobian or an energy is not exact.
        """
        require_exact_rows(self.role, is_exact=self.is_exact, log_det_error=self.log_det_error)
        return self

    def _chains(self) -> list[np.ndarray]:
        """Numbers of the works of every chain, ``[rows, maps]``, in the order of time."""
        return [np.flatnonzero(self.chain == chain).reshape(-1, self.n_maps) for chain in range(int(self.chain.max()) + 1)]

    @property
    def note(self) -> str:
        """What a reader must know of the rows, or an empty string."""
        infinite = int(np.isposinf(self.w).sum())
        parts = [f"{self.n_nan} works that were not a number are left out"] if self.n_nan else []
        parts += [f"{infinite} of {len(self)} works are infinite"] if infinite else []
        return "; ".join(parts)


def _exactness(several: Sequence[Works]) -> dict[str, Any]:
    """How exact works are together: as the least exact of them."""
    errors = [works.log_det_error for works in several]
    return {
        "is_exact": all(works.is_exact for works in several),
        "log_det_error": None if None in errors else max(errors),  # type: ignore[type-var]
    }
