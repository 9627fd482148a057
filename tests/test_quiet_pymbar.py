"""pymbar's two import notices stay away; its other warnings do not."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from boltzgen.estimators.quiet_pymbar import _without_notices


def test_importing_the_door_prints_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import boltzgen.estimators.mbar, boltzgen.estimators.timeseries"],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.stdout + done.stderr == ""


def test_only_the_notices_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    solver = logging.getLogger("pymbar.mbar_solvers")
    with _without_notices():
        solver.warning("****** JAX NOT FOUND ******")
        solver.warning("did not converge")
    solver.warning("JAX NOT FOUND again")
    assert caplog.messages == ["did not converge", "JAX NOT FOUND again"]
