"""Reading OpenMM's XML files without running what is in them.

A System file may hold a ``PythonForce``: a pickled function, and unpickling runs code. The file is therefore read by an XML parser,
every ``type`` attribute (the only thing by which OpenMM chooses a class) is compared with a list of OpenMM's own harmless types, and
OpenMM is handed the tree written out again, so that both saw the same document.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NoReturn

import openmm

from boltzgen.errors import InputError, UnsafeFileError

#: Types that OpenMM may be asked to build from a file of unknown origin.
SAFE_TYPES = frozenset({
    "System", "State",
    "ATMForce", "AmoebaGeneralizedKirkwoodForce", "AmoebaMultipoleForce", "AmoebaTorsionTorsionForce", "AmoebaVdwForce",
    "AmoebaWcaDispersionForce", "CMAPTorsionForce", "ConstantPotentialForce", "CustomAngleForce", "CustomBondForce", "CustomCVForce",
    "CustomCentroidBondForce", "CustomCompoundBondForce", "CustomExternalForce", "CustomGBForce", "CustomHbondForce",
    "CustomManyParticleForce", "CustomNonbondedForce", "CustomTorsionForce", "CustomVolumeForce", "DrudeForce", "GBSAOBCForce",
    "GayBerneForce", "HarmonicAngleForce", "HarmonicBondForce", "HippoNonbondedForce", "LCPOForce", "NonbondedForce",
    "OrientationRestraintForce", "PeriodicTorsionForce", "RBTorsionForce", "RGForce", "RMSDForce",
    "AndersenThermostat", "CMMotionRemover", "MonteCarloAnisotropicBarostat", "MonteCarloBarostat", "MonteCarloFlexibleBarostat",
    "MonteCarloMembraneBarostat", "RPMDMonteCarloBarostat",
    "Continuous1DFunction", "Continuous2DFunction", "Continuous3DFunction",
    "Discrete1DFunction", "Discrete2DFunction", "Discrete3DFunction",
})  # fmt: skip

_READ_SIZE = 1 << 20


def read_system(path: Path, *, trust: bool = False) -> openmm.System:
    """Read a System written by ``openmm.XmlSerializer``.

    Args:
        path: The file.
        trust: Allow every force type, also a ``PythonForce``, whose pickled function runs code when it is read.

    Returns:
        The system as stored.

    Raises:
        UnsafeFileError: If the file holds a type that is not on the list and is not trusted, or declares a DOCTYPE.
        InputError: If the file is missing, truncated, or holds something else.
    """
    return _deserialize(Path(path), expected="System", trust=trust)


def read_state(path: Path, *, trust: bool = False) -> openmm.State:
    """Read a State (positions, box) written by ``openmm.XmlSerializer`` or ``Simulation.saveState``; as :func:`read_system`."""
    return _deserialize(Path(path), expected="State", trust=trust)


def read_force(path: Path, *, trust: bool = False) -> openmm.Force:
    """Read a force written by ``openmm.XmlSerializer``; as :func:`read_system`."""
    return _deserialize(Path(path), expected="Force", trust=trust)


class _Builder(ET.TreeBuilder):
    """A tree builder that refuses document type declarations, and with them entities."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> NoReturn:
        raise UnsafeFileError(f"the XML declares a DOCTYPE ({name}), which no file written by OpenMM does; remove the declaration")


def _deserialize(path: Path, *, expected: str, trust: bool) -> openmm.System | openmm.State | openmm.Force:
    root = _parse(path)
    is_expected = root.tag == expected and (expected == "Force" or root.get("type") == expected)
    if not is_expected:
        raise InputError(f"{path}: expected an OpenMM {expected}, got <{root.tag} type={root.get('type')!r}>; "
                         f"write it with openmm.XmlSerializer.serialize")  # fmt: skip
    if not trust:
        _require_safe(root, path)
    if expected == "Force" and str(root.get("type")) in ("System", "State"):
        raise InputError(f"{path}: expected an OpenMM force, got a {root.get('type')}")
    for element in root.iter():
        element.text = element.tail = None
    try:
        return openmm.XmlSerializer.deserialize(ET.tostring(root, encoding="unicode"))
    except (openmm.OpenMMException, ValueError) as error:
        raise InputError(f"{path}: OpenMM {openmm.__version__} cannot build the {expected}: {error}; "
                         f"was the file edited, or written by another version?") from error  # fmt: skip


def _parse(path: Path) -> ET.Element:
    parser = ET.XMLParser(target=_Builder())
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_READ_SIZE):
                parser.feed(chunk)
        return parser.close()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ET.ParseError as error:
        raise InputError(f"{path}: not a complete XML file ({error}); it may be truncated: copy it again, "
                         f"or write it again with openmm.XmlSerializer.serialize") from error  # fmt: skip
    except UnsafeFileError as error:
        raise UnsafeFileError(f"{path}: {error}") from None


def _require_safe(root: ET.Element, path: Path) -> None:
    """Refuse types off the list. Integers name no class: some forces use them for an unrelated ``type`` of their own."""
    for element in root.iter():
        if "{" in element.tag or any("{" in key for key in element.attrib):
            raise UnsafeFileError(f"{path}: <{element.tag}> uses an XML namespace, which no file written by OpenMM does")
        kind = element.get("type")
        if kind is None or kind in SAFE_TYPES or kind.isdecimal():
            continue
        reason = (
            "which holds a pickled Python function and runs code when it is read"
            if kind == "PythonForce"
            else "which is not one of OpenMM's own force types that are known to be safe to read"
        )
        raise UnsafeFileError(f"{path}: contains a {kind}, {reason}; if you made this file yourself, say so with trust=True "
                              f"(--trust on the command line)")  # fmt: skip
