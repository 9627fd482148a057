"""Units at the border: strings and ``openmm.unit`` quantities in, plain floats out.

Inside boltzgen lengths are nm, times ps, energies kJ/mol until they pass the door of ``md``, and kT beyond it.
"""

from __future__ import annotations

import ast
from typing import Any

from boltzgen.errors import ConfigError

#: Molar gas constant in kJ/mol/K (CODATA 2018, exact; the value OpenMM uses).
MOLAR_GAS_CONSTANT = 8.31446261815324e-3


def thermal_energy(temperature_kelvin: float) -> float:
    """kT in kJ/mol.

    Args:
        temperature_kelvin: Temperature in kelvin.

    Returns:
        R·T in kJ/mol.
    """
    return MOLAR_GAS_CONSTANT * temperature_kelvin


def parse_quantity(text: str | Any, unit_name: str) -> float:
    """Value of a quantity in a stated unit.

    Args:
        text: ``"300 kelvin"``, ``"2 femtosecond"``, ``"1 / picosecond"``, or an ``openmm.unit.Quantity``.
        unit_name: Name of an ``openmm.unit`` unit or an expression of them, e.g. ``"kelvin"`` or ``"1/picosecond"``; for
            ``"dimensionless"`` the text says that word as well.

    Returns:
        The value in that unit.

    Raises:
        ConfigError: If there is no unit, the unit is unknown, or it has another dimension.
    """
    from openmm import unit  # the border: imported only where a user's quantity is read

    wanted = _evaluate(unit_name, unit)
    if isinstance(wanted, unit.Quantity):
        wanted = wanted.unit
    quantity: Any = text if unit.is_quantity(text) else None
    if quantity is None:
        if not isinstance(text, str):
            raise ConfigError(f"expected a value with its unit, such as '1.0 {unit_name}', got the bare {text!r}")
        quantity = _evaluate(text, unit)
        if not unit.is_quantity(quantity):
            if unit_name == "dimensionless" and text.strip().endswith("dimensionless"):
                return float(quantity)
            raise ConfigError(f"expected a value with its unit, such as '{text.strip()} {unit_name}', got {text!r}")
    try:
        return float(quantity.value_in_unit(wanted))
    except TypeError:
        raise ConfigError(f"expected a quantity in {unit_name}, got {text!r}, which has another dimension") from None


def _evaluate(text: str, unit: Any) -> Any:
    """Value of ``"2.5 kilojoule/mole"`` read by a parser that knows numbers, unit names, ``* / **`` and nothing else."""
    head, _, tail = text.strip().partition(" ")
    source = f"{head}*({tail})" if tail and _is_number(head) and not tail.lstrip().startswith(("*", "/")) else text

    def walk(node: ast.AST) -> Any:
        if isinstance(node, ast.Expression):
            return walk(node.body)
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -walk(node.operand)
        if isinstance(node, ast.BinOp):
            left, right = walk(node.left), walk(node.right)
            if isinstance(node.op, ast.Mult):
                return left * right
            if isinstance(node.op, ast.Div):
                return left / right
            if isinstance(node.op, ast.Pow):
                return left**right
        if isinstance(node, ast.Name):
            found = getattr(unit, node.id, None) or getattr(unit, node.id.rstrip("s"), None)
            if isinstance(found, unit.Unit):
                return 1.0 * found
        raise ConfigError(f"cannot read {text!r} as a quantity; write a number and a unit, such as '300 kelvin'")

    try:
        return walk(ast.parse(source.strip(), mode="eval"))
    except SyntaxError:
        raise ConfigError(f"cannot read {text!r} as a quantity; write a number and a unit, such as '300 kelvin'") from None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
