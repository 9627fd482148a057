"""Collective variables: differentiable functions of the coordinates that a user reads, histograms or steers."""

from boltzgen.cvs.combination import Combination, Cosine, Sine
from boltzgen.cvs.geometry import Angle, Dihedral, Distance
from boltzgen.cvs.groups import RMSD, Coordination, RadiusOfGyration
from boltzgen.cvs.learned import linear_features, principal_components, time_lagged_components
from boltzgen.cvs.variable import CollectiveVariable, CollectiveVariables

__all__ = [
    "RMSD",
    "Angle",
    "CollectiveVariable",
    "CollectiveVariables",
    "Combination",
    "Coordination",
    "Cosine",
    "Dihedral",
    "Distance",
    "RadiusOfGyration",
    "Sine",
    "linear_features",
    "principal_components",
    "time_lagged_components",
]
