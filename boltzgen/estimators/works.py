"""Work values: what a map, a switching protocol or an instantaneous change does to samples of one state, row by row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from boltzgen.core import Role, WeightedSamples, require_exact_density
from boltzgen.errors import EnergyError, InexactDensityError, InputError, ShapeError, TrainingDataError
from boltzgen.estimators.bootstrap import independent_units
from boltzgen.estimators.timeseries import decorrelate
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
        role: ``train`` or ``evaluate``; estimators refuse rows that trained the map.
        n_nan: Rows left out because their work was not a number.
        log_det_error: Error of the Jacobian in nats; None where it is only estimated.
        is_exact: False when an energy is that of an altered target.
    """

    w: np.ndarray
    units: np.ndarray
    role: Role
    n_nan: int = 0
    log_det_error: float | None = 0.0
    is_exact: bool = True

    @classmethod
    def of(
        cls,
        w: Tensor | np.ndarray,
        *,
        role: Role,
        units: np.ndarray | None = None,
        log_det_error: float | None = 0.0,
        is_exact: bool = True,
    ) -> Works:
        """Check work values and count what is not a number.

        Args:
            w: Works ``[n]`` in kT.
            role: Whether these rows trained the map.
            units: Independent unit of every row ``[n]``, any integers; every row its own by default.
            log_det_error: Error of the Jacobian in nats, ``transform.log_det_error``.
            is_exact: Whether both targets are.

        Raises:
            ShapeError: If ``w`` is not ``[n]`` with n ≥ 2, or the units are not ``[n]``.
            EnergyError: If a work is −inf, all are infinite, or more than 0.1 % are NaN.
        """
        values = torch.as_tensor(w).detach().to("cpu", torch.float64).numpy()
        labels = np.arange(len(values)) if units is None else np.asarray(units)
        if values.ndim != 1 or len(values) < 2 or labels.shape != values.shape:
            raise ShapeError(f"expected works [n] with n >= 2 and units [n], got shapes {values.shape} and {labels.shape}")
        bad = np.isnan(values)
        if bad.mean() > MAX_NAN_SHARE:
            raise EnergyError(
                f"{int(bad.sum())} of {len(values)} works are NaN, in rows {np.flatnonzero(bad)[:10].tolist()}: at most "
                f"{100 * MAX_NAN_SHARE:g} % may be; find out why their energies fail"
            )
        if np.isneginf(values).any():
            raise EnergyError(
                f"row {int(np.argmax(np.isneginf(values)))} has a work of -inf: it cannot come from its state, where its energy is +inf"
            )
        values, labels = values[~bad], labels[~bad]
        if np.isposinf(values).all():
            raise EnergyError(
                f"all {len(values)} works are +inf: the other state forbids every configuration that was made for it; check that map "
                "and end states belong together"
            )
        return cls(values, np.unique(labels, return_inverse=True)[1].reshape(-1), role, int(bad.sum()), log_det_error, is_exact)

    @classmethod
    def of_samples(cls, samples: WeightedSamples, w: Tensor, *, log_det_error: float | None = 0.0, is_exact: bool = True) -> Works:
        """Works of samples that follow their state, with the chains, time blocks and role of the samples.

        Args:
            samples: Samples of the state that the works start from, unweighted.
            w: Works ``[n]`` in kT.
            log_det_error: Error of the Jacobian in nats.
            is_exact: Whether the other target is exact.

        Raises:
            InputError: If the samples carry weights, or form one block.
            ShapeError, EnergyError: As :meth:`of`.
        """
        if bool((samples.log_w != samples.log_w[:1]).any()):
            raise InputError("expected samples that follow their state; weighted samples need their weights in the estimate")
        units = independent_units(samples)
        return cls.of(w, role=samples.role, units=units, log_det_error=log_det_error, is_exact=is_exact and samples.is_exact)

    @classmethod
    def read(cls, path: Path, *, unit: Literal["kT", "kJ/mol"], temperature_kelvin: float | None = None) -> Works:
        """Works of a text file, one value in every line; ``#`` begins a comment. Rows count as independent.

        Args:
            path: The file.
            unit: Unit of its values.
            temperature_kelvin: Needed for kJ/mol.

        Raises:
            InputError: If the file cannot be read, a line is not a number, or the temperature is missing.
            ShapeError, EnergyError: As :meth:`of`.
        """
        if unit == "kJ/mol" and temperature_kelvin is None:
            raise InputError("works in kJ/mol need a temperature, to be turned into kT")
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
        scale = 1.0 if temperature_kelvin is None or unit == "kT" else thermal_energy(temperature_kelvin)
        return cls.of(np.array(values) / scale, role="evaluate")

    def __len__(self) -> int:
        return len(self.w)

    def rows(self, chosen: np.ndarray | slice) -> Works:
        """Some of the rows."""
        return replace(self, w=self.w[chosen], units=np.unique(self.units[chosen], return_inverse=True)[1].reshape(-1))

    def decorrelated(self) -> Works:
        """Every g-th row of one chain, g the statistical inefficiency of the works, each its own unit."""
        finite = np.where(np.isfinite(self.w), self.w, self.w[np.isfinite(self.w)].max())
        kept = self.rows(decorrelate(finite))
        return replace(kept, units=np.arange(len(kept)))

    def require_exact(self) -> Works:
        """These works, if a statistically exact number may rest on them.

        Raises:
            TrainingDataError: If the rows trained the map.
            InexactDensityError: If a Jacobian or an energy is not exact.
        """
        if self.role != "evaluate":
            raise TrainingDataError("these works are those of rows that trained the map: any estimate on them is biased; use held-out rows")
        if not self.is_exact:
            raise InexactDensityError("an energy of these works is clipped or regularised; evaluate them with the exact targets")
        require_exact_density(self.log_det_error)
        return self

    @property
    def note(self) -> str:
        """What a reader must know of the rows, or an empty string."""
        infinite = int(np.isposinf(self.w).sum())
        parts = [f"{self.n_nan} works that were not a number are left out"] if self.n_nan else []
        parts += [f"{infinite} of {len(self)} works are infinite"] if infinite else []
        return "; ".join(parts)
