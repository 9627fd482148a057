"""What the job of steered paths refuses, each in a line that says what to do, and before anything is written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from dimer_runs import dimer_config, plain, written_dimer

from boltzgen.cli import commands
from boltzgen.errors import ConfigError
from boltzgen.workflows.path_basins import memberships

DIHEDRAL = {"phi": {"kind": "dihedral", "atoms": [0, 1, 2, 3]}}
BOTH = DIHEDRAL | {"bond": {"kind": "distance", "atoms": [0, 1]}}


def said(folder: Path, text: str) -> str:
    """What the command says to a configuration that it refuses."""
    written_dimer(folder)
    (folder / "job.yaml").write_text(text)
    result = CliRunner().invoke(commands, ["paths", str(folder / "job.yaml"), "--out", str(folder / "out")])
    assert result.exit_code == 2, result.output
    assert not (folder / "out").exists()
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, "expected one line"
    return result.stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"collective_variables": {"bond": {"kind": "distance", "atoms": [0, 7]}}},
         "collective_variables.bond: expected atoms from 0 to 2, got [0, 7]; they count from 0"),
        ({"collective_variables": {"bond": {"kind": "distance", "select": ["name A", "name Z"]}}}, "collective_variables.bond: "),
        ({"walker": {"count": 3}}, "did you mean 'walkers'?"),
        ({"walkers": {"cuont": 3}}, "did you mean 'count'?"),
        ({"dynamics": {"timestep": "20 nanometer"}}, "dynamics.timestep"),
        ({"dynamics": {"timestep": 20}}, "dynamics.timestep"),
        ({"dynamics": {"friction": "-1 /picosecond"}}, "friction of zero or more"),
        ({"ranges": {}}, "ranges: give the range [low, high] of bond, which is not periodic"),
        ({"ranges": {"bond": ["0.5 nanometer", "0.2 nanometer"]}}, "ranges.bond: expected a range [low, high]"),
        ({"ranges": {"bond": ["20 degree", "50 degree"]}}, "ranges.bond"),
        ({"ranges": {"bond": ["0.2", "0.5 nanometer"]}}, "ranges.bond"),
        ({"widths": {"bond": "-0.1 nanometer"}}, "widths.bond: expected a positive width"),
        ({"widths": {"bnd": "0.1 nanometer"}}, "widths: 'bnd' is not among the collective_variables bond"),
        ({"basins": {"short": {"angle": ["0 degree", "9 degree"]}, "long": {"bond": ["0.4 nanometer", "1 nanometer"]}}},
         "basins.short: 'angle' is not among the collective_variables bond"),
        ({"basins": {"short": {"bond": ["0 nanometer", "0.45 nanometer"]}, "long": {"bond": ["0.4 nanometer", "1 nanometer"]}}},
         "basins: short and long overlap; a configuration may lie in one of them only"),
        ({"basins": {"short": {"bond": ["0.4 nanometer", "0 nanometer"]}, "long": {"bond": ["0.4 nanometer", "1 nanometer"]}}},
         "basins.short.bond: expected a range [low, high]"),
        ({"basins": {"short": {"bond": ["0 nanometer", "0.4 nanometer"]}}}, "basins: expected two or more to compare, or none"),
        ({"basins": {"short": {}, "long": {"bond": ["0.4 nanometer", "1 nanometer"]}}}, "basins.short: expected a range of at least one"),
        ({"walkers": {"pulled_to": [{}]}}, "walkers.pulled_to: expected a value of every variable, bond has none"),
        ({"adaptation": {"rounds": 0}}, "adaptation.rounds: a learned proposal needs at least one round"),
        ({"proposal": {"peaks": [{"centre": {"bond": "0.3 nanometer"}, "width": {"bond": "0.1 nanometer"}}]}}, "are for kind: fixed"),
        ({"proposal": {"kind": "fixed", "peaks": [{"centre": {"bond": "0.3 nanometer"}, "width": {"bond": "-0.1 nanometer"}}]}},
         "positive widths"),
        ({"paths": {"bend": 2}}, "paths.bend"),
        ({"production": {"cycles": 0}}, "production.cycles"),
    ],
)  # fmt: skip
def test_a_wrong_configuration_is_one_clear_line(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert message in said(tmp_path, yaml.safe_dump(plain(tmp_path, more), sort_keys=False))


def test_ranges_of_a_dihedral_lie_on_its_circle(tmp_path: Path) -> None:
    more = {"collective_variables": DIHEDRAL, "widths": {}, "basins": {}}
    with pytest.raises(ConfigError, match=r"ranges\.phi: expected limits from -3\.142 to 3\.142 radian.*leave it out for the whole circle"):
        dimer_config(tmp_path, more | {"ranges": {"phi": ["0 degree", "360 degree"]}})
    whole = dimer_config(tmp_path, more | {"ranges": {}})
    assert whole.limits[0] == pytest.approx((-math.pi, math.pi))
    assert whole.width_values[0] == pytest.approx(0.2)
    assert dimer_config(tmp_path, more | {"ranges": {"phi": ["-180 degree", "180 degree"]}}).limits[0] == pytest.approx((-math.pi, math.pi))


def test_a_force_has_the_circle_of_its_own_period(tmp_path: Path) -> None:
    variables = {"share": {"kind": "force", "file": str(tmp_path / "force.xml"), "period": 1.0}}
    config = dimer_config(tmp_path, {"collective_variables": variables, "ranges": {}, "widths": {}, "basins": {}})
    assert config.limits == ((-0.5, 0.5),)
    assert config.periods == (1.0,)
    assert config.width_values[0] == pytest.approx(0.2 / (2 * math.pi))


@pytest.mark.parametrize(
    ("first", "second", "overlap"),
    [
        (("170 degree", "-170 degree"), ("-170 degree", "170 degree"), False),
        (("170 degree", "-160 degree"), ("-170 degree", "0 degree"), True),
        (("170 degree", "-170 degree"), ("175 degree", "-175 degree"), True),
        (("170 degree", "200 degree"), ("-170 degree", "0 degree"), True),
        (("170 degree", "190 degree"), ("-170 degree", "0 degree"), False),
        (("0 degree", "180 degree"), ("-180 degree", "0 degree"), False),
        (("-180 degree", "180 degree"), ("10 degree", "20 degree"), True),
    ],
)
def test_basins_on_a_circle_are_apart_or_refused(first: tuple[str, str], second: tuple[str, str], overlap: bool, tmp_path: Path) -> None:
    more = {"collective_variables": DIHEDRAL, "widths": {}, "ranges": {}}
    values = more | {"basins": {"one": {"phi": list(first)}, "other": {"phi": list(second)}}}
    if overlap:
        with pytest.raises(ConfigError, match="one and other overlap"):
            dimer_config(tmp_path, values)
        return
    dimer_config(tmp_path, values)


def test_a_limit_beyond_half_a_turn_is_the_same_angle(tmp_path: Path) -> None:
    basins = {"one": {"phi": ["170 degree", "200 degree"]}, "other": {"phi": ["-20 degree", "20 degree"]}}
    config = dimer_config(tmp_path, {"collective_variables": DIHEDRAL, "widths": {}, "ranges": {}, "basins": basins})
    angles = np.radians([[175.0], [-175.0], [-159.0], [160.0], [0.0]])
    assert memberships(config)["one"](angles).tolist() == [True, True, False, False, False]


def test_basins_of_different_variables_overlap(tmp_path: Path) -> None:
    more = {"collective_variables": BOTH, "widths": {}, "basins": {
        "one": {"phi": ["0 degree", "90 degree"]}, "other": {"bond": ["0 nanometer", "0.4 nanometer"]}}}  # fmt: skip
    with pytest.raises(ConfigError, match="one and other overlap"):
        dimer_config(tmp_path, more)
    apart = {"phi": ["100 degree", "170 degree"], "bond": ["0 nanometer", "0.4 nanometer"]}
    dimer_config(tmp_path, more | {"basins": more["basins"] | {"other": apart}})
