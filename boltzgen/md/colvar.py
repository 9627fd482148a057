"""COLVAR files, in which PLUMED writes collective variables along a simulation."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np

from boltzgen.cvs import CollectiveVariables
from boltzgen.errors import InputError, ShapeError
from boltzgen.files import written

#: A limit such as -pi, 2*pi or pi/2, as PLUMED writes it.
_MULTIPLE_OF_PI = re.compile(r"([+-]?)(?:([\d.eE+-]+)\*)?pi(?:/([\d.]+))?")


@dataclass(frozen=True)
class Colvar:
    """A table of collective variables along a simulation.

    Attributes:
        fields: Names of the columns, such as ``time``, ``phi``.
        values: ``[n, k]``, float64, in the units of the file (PLUMED's own are ps, nm, rad and kJ/mol).
        bounds: Periodic columns → their lower and upper bound.
        constants: What else the header sets, as text.
        starts: First row of every run in the file: 0, and one more for every restart that was appended.
    """

    fields: tuple[str, ...]
    values: np.ndarray
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    constants: Mapping[str, str] = field(default_factory=dict)
    starts: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.values.shape[1] != len(self.fields):
            raise ShapeError(f"expected values [n, {len(self.fields)}] of {', '.join(self.fields)}, got {list(self.values.shape)}")
        unknown = [name for name in self.bounds if name not in self.fields]
        if unknown:
            raise ShapeError(f"expected bounds of {', '.join(self.fields)}, got some of {', '.join(unknown)}")
        wrong = [name for name in self.fields if not name or any(letter.isspace() for letter in name)]
        if wrong or len(set(self.fields)) != len(self.fields):
            raise ShapeError(f"expected different names without spaces for the columns, got {list(self.fields)}")

    @classmethod
    def of(cls, cvs: CollectiveVariables, values: np.ndarray, *, time_ps: np.ndarray) -> Colvar:
        """Values ``[n, k]`` of collective variables at times ``[n]`` in ps; the bounds of period P are ∓P/2."""
        bounds = {cv.name: (-0.5 * cv.period, 0.5 * cv.period) for cv in cvs if cv.period is not None}
        return cls(("time", *cvs.names), np.column_stack([time_ps, values]).astype(np.float64), bounds)

    def column(self, name: str) -> np.ndarray:
        """Values ``[n]`` of one column.

        Raises:
            InputError: If there is no such column.
        """
        if name not in self.fields:
            raise InputError(f"expected one of the columns {', '.join(self.fields)}, got {name!r}")
        return self.values[:, self.fields.index(name)]

    @property
    def periods(self) -> tuple[float | None, ...]:
        """Period of every column, None where it has none."""
        return tuple(self.bounds[name][1] - self.bounds[name][0] if name in self.bounds else None for name in self.fields)


def write_colvar(colvar: Colvar, path: Path, *, decimals: int | None = None) -> None:
    """Write a COLVAR file; runs after the first begin with a header of their own, as PLUMED appends them.

    Args:
        colvar: What it holds.
        path: The file, replaced whole.
        decimals: Digits after the point; by default as many digits as give the same numbers back.

    Raises:
        OutputError: If it cannot be written.
    """
    header = [f"#! FIELDS {' '.join(colvar.fields)}"]
    for name, (low, high) in colvar.bounds.items():
        header += [f"#! SET min_{name} {_limit_text(low)}", f"#! SET max_{name} {_limit_text(high)}"]
    header += [f"#! SET {name} {text}" for name, text in colvar.constants.items()]
    with written(Path(path), remedy="choose another place") as partial, open(partial, "w", encoding="utf-8") as file:
        for row, numbers in enumerate(colvar.values.tolist()):
            if row in colvar.starts:
                file.write("\n".join(header) + "\n")
            file.write(" " + " ".join(repr(number) if decimals is None else f"{number:.{decimals}f}" for number in numbers) + "\n")
        if not len(colvar.values):
            file.write("\n".join(header) + "\n")


def read_colvar(path: Path) -> Colvar:
    """Read a COLVAR file, also one to which restarted runs were appended.

    All rows are kept, also where a restart went back in time; ``starts`` says where each run begins.

    Raises:
        InputError: If the file cannot be read, a line is malformed, or a later header differs; the message names the line.
    """
    path = Path(path)
    try:
        with open(path, encoding="utf-8") as file:
            return _Reader(path).read(file)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from None


class _Reader:
    """What was read of one file so far."""

    def __init__(self, path: Path) -> None:
        self.path, self.number = path, 0
        self.fields: tuple[str, ...] = ()
        self.rows: list[list[float]] = []
        self.starts: list[int] = []
        self.sets: dict[str, str] = {}

    def read(self, lines: Iterable[str]) -> Colvar:
        for number, line in enumerate(lines, start=1):
            self.number = number
            words = line.split()
            if words[:1] == ["#!"]:
                self._header(words[1:])
            elif words and not words[0].startswith("#"):
                self._row(words)
        if not self.fields:
            raise InputError(f"{self.path}: expected a COLVAR file, whose first line is '#! FIELDS time ...'; there is no such line")
        bounds, constants = self._bounds()
        values = np.array(self.rows, dtype=np.float64).reshape(-1, len(self.fields))
        starts = sorted({start for start in self.starts if start < len(self.rows)} | {0})
        return Colvar(self.fields, values, bounds, constants, tuple(starts))

    def _header(self, words: list[str]) -> None:
        if words[:1] == ["FIELDS"] and len(words) > 1:
            if len(set(words[1:])) != len(words[1:]):
                self._refuse(f"every column needs a name of its own, got {' '.join(words[1:])}")
            if self.fields and self.fields != tuple(words[1:]):
                self._refuse(f"this run has the columns {' '.join(words[1:])}, the first has {' '.join(self.fields)}; split the file")
            self.fields = tuple(words[1:])
            self.starts.append(len(self.rows))
        elif words[:1] == ["SET"] and len(words) == 3:
            name, text = words[1:]
            if self.sets.setdefault(name, text) != text:
                self._refuse(f"{name} is {text} in this run and {self.sets[name]} in those before it; split the file")
            if _bounded(name, self.fields):
                self._limit(text)
        else:
            self._refuse(f"expected '#! FIELDS names' or '#! SET name value', got '#! {' '.join(words)}'")

    def _row(self, words: list[str]) -> None:
        if not self.fields:
            self._refuse("expected '#! FIELDS time ...' before the first values")
        if len(words) != len(self.fields):
            self._refuse(f"expected {len(self.fields)} values ({' '.join(self.fields)}), got {len(words)}; a run that was killed leaves "
                         f"its last line half written: remove it")  # fmt: skip
        try:
            row = [float(word) for word in words]
        except ValueError as error:
            self._refuse(f"expected numbers, got {' '.join(words)} ({error})")
        if any(math.isnan(value) for value in row):
            self._refuse(f"a value is not a number: {' '.join(words)}; the simulation broke there")
        self.rows.append(row)

    def _bounds(self) -> tuple[dict[str, tuple[float, float]], dict[str, str]]:
        """Bounds of the periodic columns, and the other constants."""
        limits = {key: self._limit(text) for key, text in self.sets.items() if _bounded(key, self.fields)}
        bounds: dict[str, tuple[float, float]] = {}
        for name in self.fields:
            ends = [limits.get(f"{end}_{name}") for end in ("min", "max")]
            if ends == [None, None]:
                continue
            low, high = ends
            if low is None or high is None or not low < high:
                raise InputError(f"{self.path}: expected min_{name} and max_{name} with min < max, got {low} and {high}")
            bounds[name] = (low, high)
        return bounds, {key: text for key, text in self.sets.items() if key not in limits}

    def _limit(self, text: str) -> float:
        match = _MULTIPLE_OF_PI.fullmatch(text)
        try:
            if match is None:
                return float(text)
            sign, factor, divisor = match.groups()
            return (-1 if sign == "-" else 1) * float(factor or 1) * math.pi / float(divisor or 1)
        except ValueError:
            self._refuse(f"expected a bound such as 0.5, pi or -pi, got {text!r}")

    def _refuse(self, reason: str) -> NoReturn:
        raise InputError(f"{self.path}, line {self.number}: {reason}")


def _bounded(key: str, fields: tuple[str, ...]) -> bool:
    """Whether a constant is a bound of a column."""
    return key[:4] in ("min_", "max_") and key[4:] in fields


def _limit_text(limit: float) -> str:
    return {math.pi: "pi", -math.pi: "-pi"}.get(limit, repr(limit))
