"""Steering engines that moves of one process share: one for every system, made when first needed."""

from __future__ import annotations

import hashlib
import json
from weakref import WeakKeyDictionary

import numpy as np
import openmm

from boltzgen.cvs import CollectiveVariables
from boltzgen.md.platforms import ResolvedPlatform
from boltzgen.md.steering import OpenMMSteering
from boltzgen.workflows.plugins.descriptions import described

#: What a platform may be told, where it knows it.
_PROPERTIES = ("DeviceIndex", "Precision", "Threads", "OpenCLPlatformIndex", "DeterministicForces", "UseCpuPme", "DisablePmeStream")


class SteeringEngines:
    """Engines by system, variables, friction and platform.

    An engine serves all states that differ by temperature, box and global parameters, for all copies of a move. Contexts that someone
    else owns are only held weakly.
    """

    def __init__(self) -> None:
        self._hashes: WeakKeyDictionary[openmm.Context, str] = WeakKeyDictionary()
        self._engines: dict[str, OpenMMSteering] = {}

    def __len__(self) -> int:
        return len(self._engines)

    def engine(self, context: openmm.Context, variables: CollectiveVariables, *, friction_per_ps: float) -> OpenMMSteering:
        """The engine of the system of a context, on its platform; temperature, box, parameters and widths are left to be set.

        Raises:
            InputError: If the system cannot be steered along these variables.
            PlatformError: If the platform cannot run it.
        """
        description = json.dumps([[described(cv) for cv in variables], friction_per_ps])
        key = self._hash(context) + description
        if key not in self._engines:
            seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:3], "big")
            self._engines[key] = OpenMMSteering(
                context.getSystem(), variables, temperature_kelvin=300.0,
                positions=np.zeros((context.getSystem().getNumParticles(), 3)), widths=[1.0] * len(variables), timestep_ps=0.001,
                friction_per_ps=friction_per_ps, platform=_platform_of(context), seed=seed,
            )  # fmt: skip
        return self._engines[key]

    def empty(self) -> None:
        """Free all contexts."""
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()

    def _hash(self, context: openmm.Context) -> str:
        """Hash of the system and the platform of a context; computed once for each."""
        if context not in self._hashes:
            platform = _platform_of(context)
            text = json.dumps([platform.name, dict(platform.properties)]) + openmm.XmlSerializer.serialize(context.getSystem())
            self._hashes[context] = hashlib.sha256(text.encode()).hexdigest()
        return self._hashes[context]


def _platform_of(context: openmm.Context) -> ResolvedPlatform:
    platform = context.getPlatform()
    known = set(platform.getPropertyNames()) & set(_PROPERTIES)
    return ResolvedPlatform(platform.getName(), {name: platform.getPropertyValue(context, name) for name in sorted(known)}, 1)


#: The engines of this process.
shared_engines = SteeringEngines()
