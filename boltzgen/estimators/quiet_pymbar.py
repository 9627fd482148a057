"""pymbar, imported once for the package, without the two notices that it logs as warnings at import."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

#: Logger → text of a notice that concerns no user of this package; whatever else the logger says stays.
_NOTICES = {"pymbar.mbar_solvers": "JAX NOT FOUND", "pymbar.timeseries": "Warning on use of the timeseries module"}


@contextmanager
def _without_notices() -> Iterator[None]:
    """Drop the notices, and nothing else, while the block runs."""

    def is_news(record: logging.LogRecord) -> bool:
        return _NOTICES[record.name] not in record.getMessage()

    loggers = [logging.getLogger(name) for name in _NOTICES]
    for logger in loggers:
        logger.addFilter(is_news)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_news)


os.environ.setdefault("PYMBAR_DISABLE_JAX", "1")
with _without_notices():
    import pymbar
    from pymbar import timeseries

__all__ = ["pymbar", "timeseries"]
