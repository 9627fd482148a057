"""The configuration of a free energy difference between two states by a learned map."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import pydantic as pd
from pydantic import Field

from boltzgen.config.collective_variables import VariableConfig
from boltzgen.config.molecule import MoleculeConfig, SamplingConfig
from boltzgen.config.sections import Bound, Count, InputPath, PlatformConfig, Positive, Section, Temperature

#: What the basin of a state is called in the configuration of that state alone.
BASIN = "basin"

End = Literal["a", "b"]
Weight = Annotated[float, Field(ge=0)]

#: Held-out configurations of each state that are looked at during training, and how many times.
LOOKED_AT, LOOKS = 100, 10


class EndStateConfig(Section):
    """One of the two states, over the atoms of the topology."""

    system: InputPath = Field(description="OpenMM system.xml of this state.", examples=["system.xml"])
    temperature: Temperature = Field("300 kelvin", description="Its temperature.")
    parameters: dict[str, float] = Field(
        {}, description="Global parameters of its forces that differ from system.xml, such as lambda_sterics.", examples=[{"scale": 0.5}]
    )
    basin: dict[str, tuple[Bound, Bound]] = Field(
        {},
        description="Ranges of coordinates that this state is confined to, so that basins of one system can be compared. A dihedral range "
        "whose first limit is the larger one passes through 180 degrees.",
        examples=[{"phi": ["0 radian", "2 radian"]}],
    )
    steps_per_replica: Count | None = Field(
        None,
        description="MD steps of every replica of this state, where it forgets more slowly or costs less than the other; null: as data.",
    )
    files: tuple[InputPath, ...] = Field((), description="Its trajectories (XTC, DCD, NetCDF, PDB), for data.source: trajectory.")


class EndDataConfig(SamplingConfig):
    """How configurations of each state are made, and split."""

    evaluate_fraction: Annotated[float, Field(gt=0, le=0.5)] = Field(
        0.5, description="Share of the data, in whole time blocks, kept for evaluation: the map never sees it."
    )


class MapConfig(Section):
    """The map from A to B."""

    kind: Literal["coupling", "low_rank", "affine", "radial", "solvent", "continuous", "identity"] = Field(
        "coupling",
        description="coupling: splines and a triangular map of bonds, angles and torsions, learned. low_rank: splines, and "
        "a linear map that acts in a few directions, learned from the identity on: for large molecules. affine: bonds, angles and stiff "
        "torsions shifted and scaled to the other state's means and spreads. radial: every atom moves along the line to a central one, by "
        "a learned function of the distance: solvent around a solute of one particle. solvent: a continuous flow for the same, in which "
        "neighbours push each other too; slower, and much closer. continuous: a flow over the Cartesian "
        "coordinates of one molecule, by flow matching between the two ensembles. identity: none, plain perturbation.",
    )
    molecule: Annotated[int, Field(ge=0)] = Field(
        0,
        description="Which molecule coupling, low_rank and affine map, where there are several: from 0, in the order of their first "
        "atoms. The others, solvent for instance, are carried.",
    )
    surroundings: bool = Field(
        False,
        description="Whether coupling, low_rank and affine depend on the atoms that they carry: two layers more turn, shift and "
        "stretch the molecule's coordinates by what is around it.",
    )
    reach: Positive | None = Field(
        None, description="How far surroundings are seen, in nm; null: 0.7, or half the shortest edge of the box where that is less."
    )
    n_around: Annotated[int, Field(ge=2)] = Field(8, description="Functions of the distance of surrounding atoms.")
    centre: Annotated[int, Field(ge=0)] = Field(0, description="The central atom of a radial or solvent map, from 0.")
    outer: Positive | None = Field(
        None,
        description="How far the central atom acts in nm; null: half the shortest edge of the box, or 0.9 of it in a solvent map.",
    )
    radial_bins: Annotated[int, Field(ge=2)] = Field(16, description="Spline bins of a radial map.")
    length: Positive | None = Field(
        None, description="Typical distance of neighbours in a solvent or continuous map, in nm; null takes the data's median."
    )
    n_central: Annotated[int, Field(ge=2)] = Field(10, description="Functions of the distance from the centre in a solvent map.")
    n_radial: Annotated[int, Field(ge=2)] = Field(8, description="Functions of the distance of neighbours in a solvent or continuous map.")
    n_times: Count = Field(2, description="Functions of time in a solvent map.")
    field_layers: Count = Field(1, description="Layers of the field of a continuous map.")
    field_width: Count = Field(16, description="Width of its hidden layers.")
    pair_scales: bool = Field(
        False, description="Whether it also has functions around the own distance of every pair of atoms, as wide as it varies: for bonds."
    )
    torsion_layers: Count = Field(4, description="Coupling layers over the torsions.")
    torsion_bins: Annotated[int, Field(ge=2)] = Field(8, description="Spline bins per torsion.")
    stiff_layers: Count = Field(2, description="Coupling layers over bonds and angles, given the torsions.")
    stiff_bins: Annotated[int, Field(ge=2)] = Field(8, description="Spline bins per bond or angle.")
    rank: Count = Field(32, description="Directions of a low_rank map.")
    hidden: tuple[Count, ...] = Field((64,), description="Widths of the hidden layers of every conditioner.")

    @pd.model_validator(mode="after")
    def _has_surroundings(self) -> MapConfig:
        if self.surroundings and self.kind not in ("coupling", "low_rank", "affine"):
            raise ValueError(
                f"surroundings: a map of kind {self.kind} carries no atoms that it could depend on: leave it out, or take kind coupling, "
                "low_rank or affine"
            )
        return self

    @property
    def is_of_a_molecule(self) -> bool:
        """Whether it maps the shape of one molecule, in one mirror image and labelling."""
        return self.kind in ("coupling", "low_rank", "affine", "continuous")

    @property
    def is_learned(self) -> bool:
        """Whether there is anything to train."""
        return self.kind != "identity" and (self.kind != "affine" or self.surroundings)


class EnsembleMatchingConfig(Section):
    """Flow matching between the two ensembles, the first stage of a continuous map: from training frames of A to those of B."""

    steps: Annotated[int, Field(ge=0)] = Field(
        0,
        description="Optimiser steps; 0 leaves the stage out. For ensembles that differ by more than their stiff coordinates vary; "
        "where they hardly differ, a start from the identity is the better one.",
    )
    batch_size: Annotated[int, Field(ge=2)] = Field(
        256, description="Pairs of frames per step, turned onto each other and paired within the batch so that they are close."
    )
    learning_rate: Positive = Field(1e-3, description="Peak learning rate; falls to zero along a cosine.")
    noise: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Noise halfway between the frames of a pair in nm (stochastic interpolant); 0 for straight lines."
    )


class MapTrainingConfig(Section):
    """How the map is trained: both mean works, by path gradients."""

    steps: Annotated[int, Field(ge=0)] = Field(1000, description="Optimiser steps.")
    batch_size: Annotated[int, Field(ge=2)] = Field(64, description="Configurations of each state per step; each costs an energy.")
    learning_rate: Positive = Field(1e-3, description="Peak learning rate; falls to zero along a cosine.")
    forward_weight: Weight = Field(1.0, description="Weight of the mean work from A to B.")
    reverse_weight: Weight = Field(1.0, description="Weight of the mean work from B to A; 0 trains for the forward direction alone.")
    cross_fitting: bool = Field(
        False,
        description="Train a second map on the other half of the data, and judge each half by the map of the other: all frames count, for "
        "twice the training. data.evaluate_fraction is 0.5 then.",
    )
    solver_steps: Count = Field(4, description="Runge-Kutta steps of a solvent or continuous map while it is trained.")
    matching: EnsembleMatchingConfig = Field(EnsembleMatchingConfig(), description=EnsembleMatchingConfig.__doc__)
    outlier_limit: Positive = Field(3.0, description="Longest path gradient of one configuration, in medians of its batch.")
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(0.99, description="Decay of the running average of the weights.")
    gradient_clip: Positive = Field(10.0, description="Largest norm of a gradient.")
    checkpoint_every: Count = Field(200, description="Steps between checkpoints.")
    threads: Count = Field(1, description="Threads of PyTorch.")

    @pd.model_validator(mode="after")
    def _something_to_learn_from(self) -> MapTrainingConfig:
        if self.steps and not self.forward_weight + self.reverse_weight:
            raise ValueError("training.steps need a direction: give forward_weight or reverse_weight")
        return self


class WorkEvaluationConfig(Section):
    """Works of held-out configurations."""

    n_bootstrap: Annotated[int, Field(ge=20)] = Field(200, description="Bootstrap resamples behind every error bar.")
    maps: Annotated[int, Field(ge=1, le=LOOKS)] = Field(
        1,
        description="Maps whose works are taken together: the trained one and those of the last looks during training, every tenth of "
        "it (multimap); each costs as many energies again.",
    )
    solver_steps: Count = Field(
        8,
        description="Runge-Kutta steps (order 4) of a solvent or continuous map for every work; more are taken until they are exact "
        "enough, or one to one.",
    )
    log_det_error: Annotated[float, Field(gt=0, le=0.01)] = Field(
        5e-3, description="Largest error of a solvent or continuous work in nats."
    )
    n_shares: Annotated[int, Field(ge=2)] = Field(10, description="Shares of the data, even, at which convergence is looked at.")


class Joining(Section):
    """How two ensembles are joined, once they are there."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(1, description="Seed of everything random.")
    map: MapConfig = Field(MapConfig(), description=MapConfig.__doc__)
    training: MapTrainingConfig = Field(MapTrainingConfig(), description=MapTrainingConfig.__doc__)
    evaluation: WorkEvaluationConfig = Field(WorkEvaluationConfig(), description=WorkEvaluationConfig.__doc__)

    @pd.model_validator(mode="after")
    def _there_is_a_map_to_fit(self) -> Joining:
        _require_a_map(self.map, self.training)
        return self


class TfepConfig(Section):
    """The free energy difference of two states of one molecule, by a learned map."""

    ENDS: ClassVar[tuple[End, End]] = ("a", "b")

    task: Literal["tfep"] = Field("tfep", description="What to do.")
    topology: InputPath = Field(description="PDB, mmCIF, prmtop or top file of one molecule.", examples=["topology.pdb"])
    coordinates: InputPath | None = Field(None, description="Starting coordinates, where the topology file has none (inpcrd, gro).")
    trust_files: bool = Field(False, description="Allow a system.xml that can run code (PythonForce). Only for files that you made.")
    a: EndStateConfig = Field(description=EndStateConfig.__doc__, examples=[{"system": "a.xml"}])
    b: EndStateConfig = Field(description=EndStateConfig.__doc__, examples=[{"system": "b.xml"}])
    collective_variables: dict[str, VariableConfig] = Field(
        {},
        description="Coordinates that basins are ranges of. Empty: backbone dihedrals, or else the softest torsions, are found.",
        examples=[{"phi": {"kind": "dihedral", "atoms": [4, 6, 8, 14]}}],
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(1, description="Seed of everything random.")
    platform: PlatformConfig = Field(PlatformConfig(), description=PlatformConfig.__doc__)
    data: EndDataConfig = Field(EndDataConfig(), description=EndDataConfig.__doc__)
    map: MapConfig = Field(MapConfig(), description=MapConfig.__doc__)
    training: MapTrainingConfig = Field(MapTrainingConfig(), description=MapTrainingConfig.__doc__)
    evaluation: WorkEvaluationConfig = Field(WorkEvaluationConfig(), description=WorkEvaluationConfig.__doc__)

    @property
    def joining(self) -> Joining:
        """How the two ensembles are joined, once they are there."""
        return Joining(seed=self.seed, map=self.map, training=self.training, evaluation=self.evaluation)

    def end(self, name: End) -> MoleculeConfig:
        """One state as a molecule of its own; B has the next seed."""
        state: EndStateConfig = getattr(self, name)
        own = {} if state.steps_per_replica is None else {"steps_per_replica": state.steps_per_replica}
        data = self.data.model_dump() | {"files": state.files} | own
        return MoleculeConfig(
            task=self.task, topology=self.topology, system=state.system, coordinates=self.coordinates, trust_files=self.trust_files,
            temperature=state.temperature, parameters=state.parameters, seed=self.seed + (name == "b"), platform=self.platform, data=data,
            collective_variables=self.collective_variables, basins={BASIN: state.basin} if state.basin else {},
        )  # fmt: skip

    @pd.model_validator(mode="after")
    def _both_ends_can_be_made(self) -> TfepConfig:
        for name in self.ENDS:
            if self.data.source == "trajectory" and getattr(self, name).steps_per_replica is not None:
                raise ValueError(f"{name}.steps_per_replica is for simulations that are made here, and data.source is trajectory")
            try:
                self.end(name)
            except pd.ValidationError as error:
                raise ValueError(f"state {name}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
        _require_a_map(self.map, self.training)
        if self.training.cross_fitting and self.data.evaluate_fraction != 0.5:
            fraction = self.data.evaluate_fraction
            raise ValueError(f"training.cross_fitting takes halves: leave data.evaluate_fraction at 0.5, not {fraction}")
        if self.evaluation.n_shares % 2:
            raise ValueError(f"evaluation.n_shares: expected an even number, so that there are halves, got {self.evaluation.n_shares}")
        return self


def _require_a_map(chosen: MapConfig, training: MapTrainingConfig) -> None:
    if training.cross_fitting and chosen.kind == "identity":
        raise ValueError("training.cross_fitting: an identity learns nothing; all frames count without it")
