"""Velocity fields for the particles of a target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from boltzgen.core import Target
from boltzgen.errors import InputError, ShapeError
from boltzgen.networks.compiled import CompiledField
from boltzgen.networks.field import ParticleField
from boltzgen.networks.gradient_field import GradientField
from boltzgen.networks.pair_scales import PairStatistics
from boltzgen.networks.radial_field import RadialField


@dataclass(frozen=True)
class FieldSize:
    """Size of a velocity field.

    Attributes:
        length: Typical distance of neighbours in nm.
        n_layers: Layers, in fields that have any number of them.
        hidden: Width of the hidden layers.
        n_radial: Radial functions.
        compiled: Whether to compile it (:class:`~boltzgen.networks.compiled.CompiledField`).
    """

    length: float
    n_layers: int = 2
    hidden: int = 64
    n_radial: int = 16
    compiled: bool = False


def particle_field(
    kind: Callable[..., ParticleField],
    target: Target,
    *,
    size: FieldSize,
    statistics: PairStatistics | None = None,
    generator: torch.Generator,
) -> ParticleField:
    """A velocity field for the particles of a target; particles of equal labels are equal to it.

    Args:
        kind: Class of the field, or a function that makes it.
        target: Target over configurations ``[n, d]``.
        size: Its size.
        statistics: Distances of all pairs in base and data, for an :class:`~boltzgen.networks.embedded_field.EmbeddedField` of a molecule.
        generator: Source of the initial weights.

    Raises:
        InputError: If the target is periodic, and no field here is.
        ShapeError: If it is not one of particles, or has not one label for each.
    """
    if target.box is not None:
        raise InputError("the target is periodic and the velocity fields are not: they would tear molecules apart at the box's faces")
    if len(target.event_shape) != 2 or len(target.labels) not in (0, target.event_shape[0]):
        raise ShapeError(
            f"expected particles [n, d] with one label each or none, got {list(target.event_shape)} and {len(target.labels)} labels"
        )
    n, d = target.event_shape
    names = sorted(set(target.labels))
    labels = [names.index(label) for label in target.labels] or None
    sizes: dict[str, object] = {"n_radial": size.n_radial}
    if statistics is not None:
        sizes["statistics"] = statistics
    if kind is not RadialField:
        sizes["hidden"] = size.hidden
    if kind not in (RadialField, GradientField):
        sizes["n_layers"] = size.n_layers
    field = kind(n, d, length=size.length, labels=labels, **sizes, generator=generator)  # type: ignore[call-arg]
    return CompiledField(field) if size.compiled else field
