"""Distributions that a move can carry through files: written down, or stored and known by their hash."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import boltzgen.recipes as recipes
from boltzgen.core import Distribution, require_exact_density
from boltzgen.errors import CheckpointError, InputError
from boltzgen.md.loading import file_hash
from boltzgen.training.checkpoints import load_weights, read_description, save_weights

_RECIPE, _ARGUMENTS = "recipe", "arguments"


@dataclass(frozen=True)
class DescribedDistribution:
    """A distribution that a recipe makes of plain values.

    Attributes:
        recipe: Name of a function of :mod:`boltzgen.recipes` that returns a distribution, such as ``normal_mixture``.
        arguments: Its arguments, as JSON holds them.
    """

    recipe: str
    arguments: Mapping[str, Any]

    def load(self) -> Distribution:
        """The distribution.

        Raises:
            CheckpointError: If there is no such recipe, or it takes other arguments.
            InexactDensityError: If its density is only estimated.
        """
        return _exact(_made(self.recipe, self.arguments))

    def to_dict(self) -> dict[str, Any]:
        """Its attributes as plain values."""
        return {"recipe": self.recipe, "arguments": json.loads(json.dumps(dict(self.arguments)))}


@dataclass(frozen=True)
class SavedDistribution:
    """A distribution in a file of :func:`save_distribution`, known by its hash.

    Attributes:
        path: The file, absolute.
        sha256: Its hash when it was first named.
    """

    path: str
    sha256: str

    @classmethod
    def at(cls, path: str | Path) -> SavedDistribution:
        """The distribution in a file as it is now.

        Raises:
            InputError: If there is no such file.
        """
        found = Path(path).resolve()
        if not found.is_file():
            raise InputError(f"expected a file written by save_distribution, there is none at {found}")
        return cls(str(found), file_hash(found))

    def load(self) -> Distribution:
        """The distribution.

        Raises:
            CheckpointError: If the file is missing, or is not what it was.
            InexactDensityError: If its density is only estimated.
        """
        require_unchanged(self.path, self.sha256)
        return _exact(_read(self.path, self.sha256))

    def to_dict(self) -> dict[str, Any]:
        """Its attributes as plain values."""
        return {"path": self.path, "sha256": self.sha256}


DistributionSource = DescribedDistribution | SavedDistribution


def normal_mixture(
    means: Sequence[Sequence[float]],
    widths: Sequence[Sequence[float]],
    *,
    weights: Sequence[float] | None = None,
    periods: Sequence[float | None] | None = None,
) -> DescribedDistribution:
    """A mixture of normals, written down (see :func:`boltzgen.recipes.normal_mixture`)."""
    described = DescribedDistribution("normal_mixture", {"means": means, "widths": widths, "weights": weights, "periods": periods})
    described.load()
    return described


def source_of(given: DistributionSource | str | Path | Mapping[str, Any]) -> DistributionSource:
    """A distribution from what a user gives, or from the plain values of one.

    Raises:
        InputError: If it is neither.
    """
    if isinstance(given, (DescribedDistribution, SavedDistribution)):
        return given
    if isinstance(given, (str, Path)):
        return SavedDistribution.at(given)
    if isinstance(given, Mapping):
        return SavedDistribution(given["path"], given["sha256"]) if "sha256" in given else DescribedDistribution(**given)
    raise InputError(f"expected the file of a saved distribution, or one that is written down such as normal_mixture(...), got a "
                     f"{type(given).__name__}; write it to a file with save_distribution, so that a resumed run finds it")  # fmt: skip


def save_distribution(distribution: Distribution, path: Path, *, recipe: str, arguments: Mapping[str, Any]) -> SavedDistribution:
    """Write a distribution to one safetensors file: its weights, and how to make it anew.

    Args:
        distribution: What is written.
        path: Where.
        recipe: Name of the function of :mod:`boltzgen.recipes` that made it.
        arguments: Its arguments, as JSON holds them; a ``generator`` is left out.

    Raises:
        CheckpointError: If the recipe does not make such a distribution.
        OutputError: If it cannot be written.
    """
    again = _made(recipe, arguments)
    if {k: v.shape for k, v in again.state_dict().items()} != {k: v.shape for k, v in distribution.state_dict().items()}:
        raise CheckpointError(f"the recipe {recipe!r} with these arguments makes a distribution of other weights than the one given")
    save_weights(distribution, Path(path), fingerprint="", description={_RECIPE: recipe, _ARGUMENTS: json.dumps(dict(arguments))})
    return SavedDistribution.at(path)


def require_unchanged(path: str, sha256: str) -> None:
    """Refuse a file that is not what it was.

    Raises:
        CheckpointError: If it is missing or changed.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"the weights {path} are gone: put the file back, the run cannot go on without it")
    if file_hash(Path(path)) != sha256:
        raise CheckpointError(f"the weights {path} have changed since the run began, so that it would go on with another proposal: put "
                              f"back the file with sha256 {sha256}, or start a new run")  # fmt: skip


@functools.lru_cache(maxsize=16)
def _read(path: str, sha256: str) -> Distribution:
    description = read_description(Path(path))
    if _RECIPE not in description:
        raise CheckpointError(f"{path} does not say how to make its distribution; write it with save_distribution")
    distribution = _made(description[_RECIPE], json.loads(description[_ARGUMENTS]))
    load_weights(distribution, Path(path), fingerprint=None)
    return distribution


def _made(recipe: str, arguments: Mapping[str, Any]) -> Distribution:
    if recipe not in recipes.__all__:
        raise CheckpointError(f"there is no recipe {recipe!r} in boltzgen.recipes")
    function = getattr(recipes, recipe)
    try:
        seeded = {"generator": torch.Generator().manual_seed(0)} if "generator" in inspect.signature(function).parameters else {}
        made = function(**arguments, **seeded)
    except TypeError as error:
        raise CheckpointError(f"the recipe {recipe!r} takes other arguments: {error}") from error
    if not isinstance(made, Distribution):
        raise CheckpointError(f"the recipe {recipe!r} makes no distribution but a {type(made).__name__}")
    return made.eval()


def _exact(distribution: Distribution) -> Distribution:
    require_exact_density(distribution.log_det_error)
    return distribution
