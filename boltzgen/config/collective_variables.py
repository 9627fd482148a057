"""Coordinates to look along, as YAML names them: by kind, with atoms as indices or as a selection."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

import pydantic as pd
from pydantic import Field

from boltzgen.config.sections import InputPath, Section, quantity
from boltzgen.units import parse_quantity

Index = Annotated[int, Field(ge=0)]
Length = Annotated[str, quantity("nanometer")]
UnitName = Literal["nanometer", "radian", "dimensionless"]
#: Atom indices, or one selection.
Group = tuple[Index, ...] | str

_SELECTION = "in mdtraj's selection language, such as 'name CA and resid 1 to 8'"
_IMAGES = "Take distances to the nearest periodic image, in the box of the system."


class CollectiveVariableConfig(Section):
    """A coordinate to look along."""

    kind: str = Field(description="What it is.")

    @property
    def unit(self) -> UnitName:
        """Unit of its values."""
        raise NotImplementedError

    @property
    def is_periodic(self) -> bool:
        """Whether it goes around a circle."""
        return False


class OrderedAtomsConfig(CollectiveVariableConfig):
    """A coordinate of a few atoms whose order matters."""

    n_atoms: ClassVar[int]

    atoms: tuple[Index, ...] = Field((), description="Atom indices, from 0.")
    select: tuple[str, ...] = Field((), description=f"Instead of atoms: one selection for each, {_SELECTION}, that finds one atom.")

    @pd.model_validator(mode="after")
    def _as_many_atoms_as_the_kind_needs(self) -> Self:
        if self.select and self.atoms:
            raise ValueError("expected atoms or select, got both")
        if self.select and len(self.select) != self.n_atoms:
            raise ValueError(f"expected {self.n_atoms} selections for a {self.kind}, one for each atom, got {len(self.select)}")
        if not self.select and (len(self.atoms) != self.n_atoms or len(set(self.atoms)) != self.n_atoms):
            raise ValueError(f"expected {self.n_atoms} different atoms for a {self.kind}, got {list(self.atoms)}")
        return self


class DistanceConfig(OrderedAtomsConfig):
    """Distance of two atoms."""

    n_atoms = 2
    kind: Literal["distance"] = Field("distance", description="What it is.")
    minimum_image: bool = Field(False, description=_IMAGES)

    @property
    def unit(self) -> UnitName:
        return "nanometer"


class AngleConfig(OrderedAtomsConfig):
    """Angle at the second of three atoms."""

    n_atoms = 3
    kind: Literal["angle"] = Field("angle", description="What it is.")

    @property
    def unit(self) -> UnitName:
        return "radian"


class DihedralConfig(OrderedAtomsConfig):
    """Dihedral angle of four atoms."""

    n_atoms = 4
    kind: Literal["dihedral"] = Field("dihedral", description="What it is.")

    @property
    def unit(self) -> UnitName:
        return "radian"

    @property
    def is_periodic(self) -> bool:
        return True


class AtomGroupConfig(CollectiveVariableConfig):
    """A coordinate of a group of atoms."""

    fewest: ClassVar[int]

    atoms: tuple[Index, ...] = Field((), description="Atom indices, from 0.")
    selection: str | None = Field(None, description=f"Instead of atoms: those that a selection finds, {_SELECTION}, ascending.")

    @property
    def unit(self) -> UnitName:
        return "nanometer"

    @pd.model_validator(mode="after")
    def _there_are_atoms(self) -> Self:
        if self.selection is not None and self.atoms:
            raise ValueError("expected atoms or a selection, got both")
        if self.selection is None and (len(self.atoms) < self.fewest or len(set(self.atoms)) != len(self.atoms)):
            raise ValueError(f"expected {self.fewest} or more different atoms for {self.kind}, or a selection, got {list(self.atoms)}")
        return self


class EndToEndConfig(AtomGroupConfig):
    """Distance of the first and the last atom of a chain."""

    fewest = 2
    kind: Literal["end_to_end"] = Field("end_to_end", description="What it is.")
    minimum_image: bool = Field(False, description=_IMAGES)


class RadiusOfGyrationConfig(AtomGroupConfig):
    """Radius of gyration of a group of atoms."""

    fewest = 2
    kind: Literal["radius_of_gyration"] = Field("radius_of_gyration", description="What it is.")
    mass_weighted: bool = Field(False, description="Weight atoms by their masses in system.xml.")


class RMSDConfig(AtomGroupConfig):
    """Root mean square deviation from a reference after the best superposition, all atoms weighing the same."""

    fewest = 3
    kind: Literal["rmsd"] = Field("rmsd", description="What it is.")
    reference: InputPath | None = Field(
        None, description="PDB, mmCIF, gro or inpcrd file of all atoms of the system; null: the starting coordinates."
    )


class CoordinationConfig(CollectiveVariableConfig):
    """Coordination number of two groups of atoms, the sum of (1 − (r/r0)ⁿ) / (1 − (r/r0)ᵐ) over their pairs."""

    kind: Literal["coordination"] = Field("coordination", description="What it is.")
    first: Group = Field(description=f"Atom indices, or a selection {_SELECTION}.")
    second: Group | None = Field(None, description="The same, without atoms of first; null: pairs within first.")
    r0: Length = Field(description="Distance at which a pair counts n/m.")
    n: Annotated[int, Field(ge=1)] = Field(6, description="Exponent of the numerator.")
    m: Annotated[int, Field(ge=2)] = Field(12, description="Exponent of the denominator, larger than n.")
    minimum_image: bool = Field(False, description=_IMAGES)

    @property
    def unit(self) -> UnitName:
        return "dimensionless"

    @property
    def r0_nm(self) -> float:
        """r0 in nm."""
        return parse_quantity(self.r0, "nanometer")

    @pd.model_validator(mode="after")
    def _exponents_and_groups_fit(self) -> Self:
        if not self.n < self.m:
            raise ValueError(f"expected exponents n < m, got n = {self.n}, m = {self.m}")
        for group in (self.first, self.second):
            if isinstance(group, tuple) and len(set(group)) != len(group):
                raise ValueError(f"expected different atoms in a group, got {list(group)}")
        if isinstance(self.first, tuple) and isinstance(self.second, tuple) and set(self.first) & set(self.second):
            raise ValueError(f"both groups hold the atoms {sorted(set(self.first) & set(self.second))}; leave second out for pairs in one")
        return self


class ForceConfig(CollectiveVariableConfig):
    """The energy of your own OpenMM force, in kJ/mol, read as the value."""

    kind: Literal["force"] = Field("force", description="What it is.")
    file: InputPath = Field(description="XML file of the force, written by openmm.XmlSerializer.")
    value_unit: UnitName = Field("dimensionless", description="Unit of its values.")
    period: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Its period P in that unit; null where it has none. Values are taken to [-P/2, P/2)."
    )

    @property
    def unit(self) -> UnitName:
        return self.value_unit

    @property
    def is_periodic(self) -> bool:
        return self.period is not None


SingleConfig = Annotated[
    DistanceConfig | AngleConfig | DihedralConfig | EndToEndConfig | RadiusOfGyrationConfig | RMSDConfig | CoordinationConfig | ForceConfig,
    Field(discriminator="kind"),
]


class TermConfig(Section):
    """One term of a combination."""

    of: SingleConfig = Field(description="A coordinate.")
    function: Literal["value", "cos", "sin"] = Field("value", description="What of it is added; a dihedral needs cos or sin.")
    weight: float = Field(1.0, description="What it is multiplied with.")

    @property
    def unit(self) -> UnitName:
        """Unit of what is added."""
        return self.of.unit if self.function == "value" else "dimensionless"

    @pd.model_validator(mode="after")
    def _function_fits(self) -> Self:
        if self.function == "value" and self.of.is_periodic:
            raise ValueError(f"the {self.of.kind} is periodic, so that a combination of its values would jump: take function: cos and sin")
        if self.function != "value" and self.of.unit != "radian":
            raise ValueError(f"expected an angle for function: {self.function}, got a {self.of.kind} in {self.of.unit}")
        return self


class CombinationConfig(CollectiveVariableConfig):
    """A linear combination of other coordinates, their cosines and sines."""

    kind: Literal["combination"] = Field("combination", description="What it is.")
    terms: tuple[TermConfig, ...] = Field(description="What is added.")
    offset: float = Field(0.0, description="A constant that is added.")

    @pd.field_validator("terms", mode="after")
    @classmethod
    def _there_are_terms(cls, terms: tuple[TermConfig, ...]) -> tuple[TermConfig, ...]:
        if not terms:
            raise ValueError("expected one term or more, got none")
        return terms

    @property
    def unit(self) -> UnitName:
        units = {term.unit for term in self.terms}
        return units.pop() if len(units) == 1 else "dimensionless"


VariableConfig = Annotated[
    DistanceConfig
    | AngleConfig
    | DihedralConfig
    | EndToEndConfig
    | RadiusOfGyrationConfig
    | RMSDConfig
    | CoordinationConfig
    | ForceConfig
    | CombinationConfig,
    Field(discriminator="kind"),
]
