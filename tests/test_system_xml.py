"""Reading a system.xml is safe, and broken files say so."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import openmm
import pytest

from boltzgen.errors import InputError, UnsafeFileError
from boltzgen.md.system_xml import SAFE_TYPES, read_state, read_system

RAN: list[str] = []


class _Bomb:
    """Unpickling it runs code, as a malicious file would."""

    def __reduce__(self) -> tuple:
        return _explode, ()


def _explode() -> object:
    RAN.append("code of the file ran")
    return _zero


def _zero(state: openmm.State) -> tuple[float, None]:
    return 0.0, None


def _system(force: openmm.Force | None = None) -> openmm.System:
    system = openmm.System()
    for _ in range(2):
        system.addParticle(12.0)
    bond = openmm.HarmonicBondForce()
    bond.addBond(0, 1, 0.1234567890123456789, 1000.0)
    system.addForce(bond)
    if force is not None:
        system.addForce(force)
    return system


def _write(folder: Path, text: str) -> Path:
    path = folder / "system.xml"
    path.write_text(text)
    return path


def _poisoned_xml(nested: bool = False) -> str:
    force: openmm.Force = openmm.PythonForce(_zero)
    if nested:
        outer = openmm.CustomCVForce("a")
        outer.addCollectiveVariable("a", force)
        force = outer
    text = openmm.XmlSerializer.serialize(_system(force))
    start = text.index('function="') + len('function="')
    return text[:start] + pickle.dumps(_Bomb()).hex() + text[text.index('"', start) :]


def test_round_trip_keeps_every_digit(tmp_path: Path) -> None:
    system = _system()
    text = openmm.XmlSerializer.serialize(system)
    assert openmm.XmlSerializer.serialize(read_system(_write(tmp_path, text))) == text


def test_the_bomb_is_live(tmp_path: Path) -> None:
    """The twin: OpenMM's own reader runs the code that every test below must keep from running."""
    RAN.clear()
    openmm.XmlSerializer.deserialize(_poisoned_xml())
    assert RAN
    read_system(_write(tmp_path, openmm.XmlSerializer.serialize(_system(openmm.PythonForce(_zero)))), trust=True)


def _escaped(text: str) -> str:
    return text.replace('type="PythonForce"', 'type="&#80;ython&#x46;orce"')


def _renamed_element(text: str) -> str:
    return re.sub(r"<Force ([^>]*PythonForce.*?)</Force>", r"<Bond \1</Bond>", text, flags=re.DOTALL)


@pytest.mark.parametrize(
    "text",
    [
        _poisoned_xml(),
        _poisoned_xml(nested=True),
        _escaped(_poisoned_xml()),
        _escaped(_poisoned_xml(nested=True)),
        _renamed_element(_poisoned_xml()),
        _poisoned_xml().replace('type="PythonForce"', 'type="&amp;#80;ythonForce"'),
    ],
    ids=["plain", "nested", "character reference", "nested reference", "other element", "double reference"],
)
def test_python_force_is_refused_and_does_not_run(tmp_path: Path, text: str) -> None:
    RAN.clear()
    with pytest.raises(UnsafeFileError, match="trust=True"):
        read_system(_write(tmp_path, text))
    assert not RAN


def test_python_force_in_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "system.xml"
    path.write_bytes(_poisoned_xml().replace('<?xml version="1.0" ?>', '<?xml version="1.0" encoding="utf-16"?>').encode("utf-16"))
    with pytest.raises(UnsafeFileError, match="PythonForce"):
        read_system(path)


def test_python_force_posing_as_a_state_is_refused(tmp_path: Path) -> None:
    force = openmm.XmlSerializer.serialize(openmm.PythonForce(_zero))
    with pytest.raises(InputError, match="expected an OpenMM State"):
        read_state(_write(tmp_path, force))


@pytest.mark.parametrize("trust", [False, True])
def test_doctype_and_entities_are_refused(tmp_path: Path, trust: bool) -> None:
    text = openmm.XmlSerializer.serialize(_system()).replace(
        '<?xml version="1.0" ?>', '<!DOCTYPE lolz [<!ENTITY a "PythonForce"><!ENTITY b "&a;&a;&a;">]>'
    )
    with pytest.raises(UnsafeFileError, match="DOCTYPE"):
        read_system(_write(tmp_path, text), trust=trust)


def test_unknown_force_and_namespace_are_refused(tmp_path: Path) -> None:
    text = openmm.XmlSerializer.serialize(_system())
    with pytest.raises(UnsafeFileError, match="TorchForce, which is not one of OpenMM's own"):
        read_system(_write(tmp_path, text.replace('type="HarmonicBondForce"', 'type="TorchForce"')))
    with pytest.raises(UnsafeFileError, match="namespace"):
        read_system(_write(tmp_path, text.replace("<System ", '<System xmlns:a="b" a:type="x" ')))


def test_truncated_file_is_an_error_although_openmm_reads_it(tmp_path: Path) -> None:
    text = openmm.XmlSerializer.serialize(_system())
    half = text[: text.index("<Forces>") + 8]
    assert openmm.XmlSerializer.deserialize(half).getNumForces() == 0  # OpenMM loses the forces in silence
    with pytest.raises(InputError, match=r"not a complete XML file .* truncated"):
        read_system(_write(tmp_path, half))
    with pytest.raises(InputError, match="not a complete XML file"):
        read_system(_write(tmp_path, ""))


def test_other_content_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected an OpenMM System, got <Integrator"):
        read_system(_write(tmp_path, openmm.XmlSerializer.serialize(openmm.VerletIntegrator(0.001))))
    with pytest.raises(InputError, match="cannot build the System"):
        read_system(_write(tmp_path, '<System type="System" version="1"/>'))
    with pytest.raises(InputError, match="No such file"):
        read_system(tmp_path / "nothing.xml")


def test_every_listed_force_can_be_read() -> None:
    """The list holds all of OpenMM's forces but the one that runs code."""
    forces = {name for name in dir(openmm) if name.endswith(("Force", "Barostat")) and isinstance(getattr(openmm, name), type)}
    assert forces - {"Force", "PythonForce"} <= SAFE_TYPES
    assert "PythonForce" not in SAFE_TYPES
