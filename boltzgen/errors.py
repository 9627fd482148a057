"""Every error that boltzgen raises on purpose.

An error says what was expected, what was got, and what to do about it.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence


class BoltzgenError(Exception):
    """Base of all errors raised on purpose by boltzgen.

    Attributes:
        exit_code: What a command exits with that ends in this error.
    """

    exit_code: int = 2


class ConfigError(BoltzgenError):
    """A configuration file or option is wrong."""


class InputError(BoltzgenError):
    """A user's file or system cannot be used as it is."""


class UnsafeFileError(InputError):
    """A file could run code when read and was not explicitly trusted."""


class TopologyError(InputError):
    """The molecule cannot be described by the requested coordinates."""


class ShapeError(BoltzgenError):
    """An array has another shape than the one documented."""


class DomainError(BoltzgenError):
    """A coordinate lies outside the domain of a transform."""


class PlatformError(BoltzgenError):
    """An OpenMM platform, or a device of the network, is unknown, unavailable or broken."""


class EnergyError(BoltzgenError):
    """An energy or a force is not a number, or could not be computed."""


class NoOverlapError(EnergyError):
    """Every configuration of one state is impossible in the other."""


class SolverError(BoltzgenError):
    """A differential equation could not be integrated to its end.

    Args:
        message: What happened.
        rows: Rows of the batch at which it did; empty where it cannot be said.
    """

    def __init__(self, message: str, *, rows: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.rows = tuple(rows)


class InexactDensityError(BoltzgenError):
    """A number would rest on a density or an energy that is not exact."""


class TrainingDataError(BoltzgenError):
    """Rows used for training were offered to an estimator."""


class WeightsError(BoltzgenError):
    """Log weights are not a number, or all weights are zero."""


class CheckpointError(BoltzgenError):
    """A checkpoint is corrupt or belongs to another system or configuration."""


class OutputError(BoltzgenError):
    """An output folder cannot be written or already holds another run."""


class InUseError(OutputError):
    """Another process is writing to a folder."""

    exit_code = 75  # EX_TEMPFAIL


class Interrupted(BoltzgenError):
    """The run was asked to stop; its state is saved and it can be resumed.

    Attributes:
        from_keyboard: Whether the request was Ctrl-C (SIGINT).
    """

    from_keyboard: bool = False

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        """128 and the number of the signal, as shells say it."""
        return 128 + (signal.SIGINT if self.from_keyboard else signal.SIGTERM)
