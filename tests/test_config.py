"""The configuration: loads, round trips, and every mistake is named with its key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from openmm import unit

from boltzgen.config import GeneratorConfig, default_config_text, dump_config, load_config, make_config
from boltzgen.errors import ConfigError

FILES = {"topology": "a.pdb", "system": "a.xml"}
PHI = {"phi": {"kind": "dihedral", "atoms": [4, 6, 8, 14]}}


def test_the_default_text_loads_and_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(default_config_text())
    assert load_config(path) == make_config({"topology": tmp_path / "topology.pdb", "system": tmp_path / "system.xml"})
    for field in GeneratorConfig.model_fields:
        assert f"\n{field}:" in default_config_text()


def test_every_field_is_documented() -> None:
    def walk(section: Any) -> None:
        for name, field in type(section).model_fields.items():
            assert field.description, f"{type(section).__name__}.{name} has no description"
            if hasattr(type(value := getattr(section, name)), "model_fields"):
                walk(value)

    walk(make_config(FILES))


def test_a_dumped_configuration_loads_equal(tmp_path: Path) -> None:
    values = FILES | {
        "temperature": "310 kelvin",
        "data": {"source": "trajectory", "files": ["md/a.xtc"], "timestep": "2 femtosecond"},
        "platform": {"device": 0},
        "collective_variables": PHI | {"r": {"kind": "distance", "atoms": [1, 5]}},
        "basins": {"left": {"phi": ["0 radian", "120 degree"], "r": ["1 angstrom", "5 angstrom"]}},
    }
    config = make_config(values, folder=tmp_path)
    dump_config(config, tmp_path / "elsewhere.yaml")
    assert load_config(tmp_path / "elsewhere.yaml") == config
    assert config.topology == tmp_path / "a.pdb"
    assert config.data.files == (tmp_path / "md/a.xtc",)
    assert config.data.timestep_ps == pytest.approx(0.002)
    assert config.platform.device == "0"
    assert config.basin_ranges["left"]["phi"] == pytest.approx((0, 2.0944), abs=1e-4)
    assert config.basin_ranges["left"]["r"] == pytest.approx((0.1, 0.5))


def test_paths_are_seen_from_the_folder_of_the_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.yaml").write_text("topology: ../a.pdb\nsystem: /data/a.xml\n")
    monkeypatch.chdir("/")
    config = load_config(tmp_path / "run.yaml")
    assert config.topology == tmp_path.parent / "a.pdb"
    assert config.system == Path("/data/a.xml")


def test_quantities_of_openmm_are_accepted() -> None:
    config = GeneratorConfig(topology=Path("a.pdb"), system=Path("a.xml"), temperature=350 * unit.kelvin)
    assert config.temperature_kelvin == 350.0
    assert config.data.friction_per_ps == 1.0


def test_the_ladder_is_derived_from_the_temperature() -> None:
    config = make_config(FILES | {"temperature": "400 kelvin"})
    assert config.data.temperatures_kelvin == pytest.approx((400, 500, 625, 781.25))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 300}, "temperature: expected a value with its unit, such as '1.0 kelvin', got the bare 300"),
        ({"temperature": "300"}, "temperature: expected a value with its unit"),
        ({"temperature": "300 nanometer"}, "temperature: expected a quantity in kelvin, got '300 nanometer'"),
        ({"temperature": "-5 kelvin"}, "temperature: expected a positive quantity in kelvin"),
        ({"data": {"timestep": "2 parsecs_"}}, "data.timestep: cannot read '2 parsecs_'"),
        ({"data": {"temperatures": ["310 kelvin", "400 kelvin"]}}, "data: temperatures must rise from the target's 300 kelvin"),
        ({"data": {"temperatures": ["300 kelvin", 400]}}, "data.temperatures.1: expected a value with its unit"),
        ({"data": {"source": "trajectory"}}, "needs files"),
        ({"data": {"files": ["a.xtc"]}}, "files are read for source: trajectory only"),
        ({"topolgy": "x"}, "topolgy: unknown key; did you mean 'topology'?"),
        ({"flow": {"hiden": [3]}}, "flow.hiden: unknown key; did you mean 'hidden'?"),
        ({"training": {"annealing": {"enable": True}}}, "training.annealing.enable: unknown key; did you mean 'enabled'?"),
        ({"flow": {"hidden": [0]}}, "flow.hidden.0: "),
        ({"flow": 3}, "flow: "),
        ({"seed": 1.5}, "seed: "),
        ({"task": "docking"}, "task: "),
        ({"evaluation": {"clip_fraction": 2}}, "evaluation.clip_fraction: "),
        ({"collective_variables": {"r": {"kind": "distance", "atoms": [1, 2, 3]}}}, "collective_variables.r: expected 2 different atoms"),
        (
            {"collective_variables": {"r": {"kind": "distance", "atom": [1]}}},
            "collective_variables.r.atom: unknown key; did you mean 'atoms'?",
        ),
        ({"basins": {"A": {"phi": ["0 radian", "1 kelvin"]}}}, "basins.A.phi.1: expected an angle or a length"),
        ({"basins": {"A": {"phi": [0, 1]}}}, "basins.A.phi.0: expected an angle or a length with its unit"),
        (
            {"basins": {"A": {"phi": ["0 nanometer", "1 nanometer"]}}, "collective_variables": PHI},
            "basins.A.phi: expected a quantity in radian",
        ),
        ({"basins": {"A": {"psi": ["0 radian", "1 radian"]}}, "collective_variables": PHI}, "basins.A: 'psi' is not among"),
    ],
)
def test_mistakes_are_named_with_their_key(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_config(FILES | values)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("topology: [", "is not valid YAML"),
        ("topology: a.pdb\ntopology: b.pdb\n", "the key 'topology' stands twice"),
        ("- 1", "expected keys and values"),
        ("", "expected keys and values"),
        ("system: a.xml", "topology: missing"),
    ],
)
def test_files_that_are_no_configuration(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "run.yaml")
    assert message in str(error.value)
    assert "run.yaml" in str(error.value)


def test_all_mistakes_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        make_config({"topology": "a.pdb", "seed": "x", "temperature": 3})
    assert all(key in str(error.value) for key in ("system", "seed", "temperature"))


def test_a_missing_file_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        load_config(tmp_path / "none.yaml")
