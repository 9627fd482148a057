from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from boltzgen.config import PathsConfig, make_config
from boltzgen.config.sections import FrozenConfig
from boltzgen.errors import ConfigError
from boltzgen.workflows.path_analysis import _stopped_early, enough

FILES = {"task": "paths", "topology": "t.pdb", "system": "s.xml"}
TURN = {"kind": "force", "file": "f.xml", "period": 360.0}
DIHEDRAL = {"phi": {"kind": "dihedral", "atoms": [0, 1, 2, 3]}}


def config(**settings: Any) -> PathsConfig:
    made = make_config(FILES | {"collective_variables": {"turn": TURN}} | settings)
    assert isinstance(made, PathsConfig)
    return made


class Recorded:
    """Cycles of production ``[c, w, 1]`` as a recorder returns them."""

    def __init__(self, xi: np.ndarray) -> None:
        self.xi = xi

    def history(self, stage: str) -> Any:
        assert stage == "production"
        return _History(self.xi)


class _History:
    def __init__(self, xi: np.ndarray) -> None:
        self.xi = self.xi_between = xi

    def __len__(self) -> int:
        return len(self.xi)

    def kept(self, production: FrozenConfig) -> _History:
        return _History(self.xi[production.n_discarded(len(self)) :])


def test_a_periodic_force_has_its_own_turn() -> None:
    found = config()
    assert found.limits == ((-180.0, 180.0),)
    assert found.periods == (360.0,)
    assert found.width_values == pytest.approx((0.2 * 360 / (2 * math.pi),))
    assert config(collective_variables=DIHEDRAL).width_values == pytest.approx((0.2,))


def test_a_range_beyond_one_turn_is_refused() -> None:
    with pytest.raises(ConfigError, match="whole circle"):
        config(collective_variables=DIHEDRAL, ranges={"phi": ["0 degree", "360 degree"]})
    assert config(collective_variables=DIHEDRAL, ranges={"phi": ["-180 degree", "180 degree"]}).limits[0][1] == pytest.approx(math.pi)


def test_production_stops_for_trips_agreement_and_draws_on_the_circle_of_the_variable() -> None:
    """Walkers about ±180 of a period of 360 agree; by a cosine of the bare number they would too, but not those that only look alike."""
    ready = config(
        production={"round_trips": 5, "cycles": 500},
        basins={"low": {"turn": ["-180 dimensionless", "0 dimensionless"]}, "high": {"turn": ["0 dimensionless", "180 dimensionless"]}},
    )
    rng = np.random.default_rng(1)
    mixed = rng.uniform(-180, 180, (200, 4, 1))
    assert enough(ready, Recorded(mixed))  # type: ignore[arg-type]
    assert not enough(ready, Recorded(mixed[:10]))  # type: ignore[arg-type]  # 40 draws
    apart = rng.normal(0, 5, (200, 4, 1)) + 360 / (2 * math.pi) * np.array([0, 0, 0.5, 0.5])[:, None] * math.pi
    assert not enough(ready, Recorded(apart))  # type: ignore[arg-type]


def test_a_production_that_stopped_early_says_so() -> None:
    assert "bias" in _stopped_early(config(), 50)[0]
    assert not _stopped_early(config(), 100)
