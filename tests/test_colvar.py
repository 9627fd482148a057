"""COLVAR files: what is written is read, and what is broken is named with its line."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from boltzgen.cvs import CollectiveVariables, Dihedral, Distance
from boltzgen.errors import InputError, ShapeError
from boltzgen.md.colvar import Colvar, read_colvar, write_colvar

HEADER = "#! FIELDS time phi d\n#! SET min_phi -pi\n#! SET max_phi pi\n"


def file_of(folder: Path, text: str) -> Path:
    path = folder / "COLVAR"
    path.write_text(text)
    return path


def random_colvar() -> Colvar:
    rng = np.random.default_rng(2)
    cvs = CollectiveVariables([Dihedral("phi", (0, 1, 2, 3)), Distance("d", (0, 3))])
    return Colvar.of(cvs, rng.normal(size=(50, 2)) * [1.0, 1e-7], time_ps=0.002 * np.arange(50))


def test_numbers_come_back_exactly(tmp_path: Path) -> None:
    colvar = random_colvar()
    write_colvar(colvar, tmp_path / "COLVAR")
    found = read_colvar(tmp_path / "COLVAR")
    np.testing.assert_array_equal(found.values, colvar.values)
    assert found.fields == ("time", "phi", "d")
    assert found.bounds == {"phi": (-math.pi, math.pi)}
    assert found.periods == (None, pytest.approx(2 * math.pi), None)
    assert "#! SET min_phi -pi" in (tmp_path / "COLVAR").read_text()
    assert found.starts == (0,)


def test_printed_digits_come_back(tmp_path: Path) -> None:
    colvar = random_colvar()
    write_colvar(colvar, tmp_path / "first", decimals=6)
    found = read_colvar(tmp_path / "first")
    np.testing.assert_array_equal(found.values, np.round(colvar.values, 6))
    write_colvar(found, tmp_path / "second", decimals=6)
    assert (tmp_path / "first").read_text() == (tmp_path / "second").read_text()


def test_a_file_of_plumed_is_read(tmp_path: Path) -> None:
    text = HEADER + "#! SET kbt 2.494\n# a remark\n 0.000000 -1.25 0.5\n\n 0.200000 3.0 0.75\n"
    found = read_colvar(file_of(tmp_path, text))
    np.testing.assert_array_equal(found.values, [[0.0, -1.25, 0.5], [0.2, 3.0, 0.75]])
    np.testing.assert_array_equal(found.column("d"), [0.5, 0.75])
    assert found.constants == {"kbt": "2.494"}
    with pytest.raises(InputError, match="one of the columns time, phi, d, got 'psi'"):
        found.column("psi")


@pytest.mark.parametrize(("text", "limit"), [("pi", math.pi), ("2*pi", 2 * math.pi), ("pi/2", math.pi / 2), ("0.5", 0.5), ("+pi", math.pi)])
def test_bounds_may_be_multiples_of_pi(tmp_path: Path, text: str, limit: float) -> None:
    path = file_of(tmp_path, f"#! FIELDS time q\n#! SET min_q 0\n#! SET max_q {text}\n 0 0.1\n")
    assert read_colvar(path).bounds == {"q": (0.0, limit)}


def test_restarts_are_one_file(tmp_path: Path) -> None:
    path = file_of(tmp_path, HEADER + " 0 1 1\n 1 1 1\n" + HEADER + " 1 2 2\n 2 2 2\n" + HEADER)
    found = read_colvar(path)
    assert found.starts == (0, 2)
    np.testing.assert_array_equal(found.column("time"), [0, 1, 1, 2])
    write_colvar(found, tmp_path / "again")
    again = read_colvar(tmp_path / "again")
    assert again.starts == (0, 2)
    np.testing.assert_array_equal(again.values, found.values)


def test_no_rows_are_a_table_too(tmp_path: Path) -> None:
    write_colvar(Colvar(("time", "q"), np.zeros((0, 2))), tmp_path / "COLVAR")
    assert read_colvar(tmp_path / "COLVAR").values.shape == (0, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER + " 0 1 1\n 1 2\n", r"COLVAR, line 5: expected 3 values \(time phi d\), got 2; a run that was killed"),
        (HEADER + " 0 1 1 1\n", "line 4: expected 3 values"),
        (HEADER + " 0 1 x\n", "line 4: expected numbers, got 0 1 x"),
        (HEADER + " 0 nan 1\n", "line 4: a value is not a number"),
        (" 0 1 1\n", "line 1: expected '#! FIELDS"),
        ("# nothing\n", "there is no such line"),
        (HEADER + " 0 1 1\n#! FIELDS time psi d\n", "line 5: this run has the columns time psi d, the first has time phi d"),
        (HEADER + " 0 1 1\n" + HEADER.replace(" pi", " 2*pi"), r"line 7: max_phi is 2\*pi in this run and pi"),
        ("#! FIELDS time phi phi\n", "line 1: every column needs a name of its own"),
        ("#! FIELDS time phi\n#! SET min_phi tau\n", "line 2: expected a bound such as"),
        ("#! FIELDS time phi\n#! SET min_phi -pi\n", "expected min_phi and max_phi"),
        ("#! FIELDS time phi\n#! UNSET phi\n", "line 2: expected '#! FIELDS names' or"),
    ],
)
def test_broken_lines_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_colvar(file_of(tmp_path, text))


def test_tables_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match=r"expected values \[n, 2\]"):
        Colvar(("time", "q"), np.zeros((3, 3)))
    with pytest.raises(ShapeError, match="without spaces"):
        Colvar(("time", "my q"), np.zeros((3, 2)))
    with pytest.raises(InputError, match="cannot read"):
        read_colvar(tmp_path / "nothing")
