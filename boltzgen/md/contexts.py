"""A pool of OpenMM contexts that evaluates batches of configurations on threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue

import numpy as np
import openmm
from openmm import _openmm

from boltzgen.errors import PlatformError

#: A batch is abandoned after this many failed rows: every failure costs a new context.
_MAX_FAILURES = 8
_LARGEST_CHUNK = 16

_ENERGY_AND_FORCES = openmm.State.Energy | openmm.State.Forces
_ALL_GROUPS = -1


@dataclass
class Batch:
    """The rows of one call, and where their results go.

    Attributes:
        x: Configurations ``[b, n, 3]`` in nm, float64, contiguous.
        energies: ``[b]`` in kJ/mol, float64; NaN where the row failed.
        forces: ``[b, n, 3]`` in kJ/mol/nm, float64.
        failures: What OpenMM said about a row that it could not evaluate.
        stopped: Set to let the workers leave the rest of the rows undone.
    """

    x: np.ndarray
    energies: np.ndarray
    forces: np.ndarray
    failures: dict[int, str] = field(default_factory=dict)
    stopped: bool = False


class ContextPool:
    """Contexts of one system, each used by one thread at a time.

    OpenMM releases Python's global lock while it computes, so threads with a context each use all cores. A pool of one context works in
    the calling thread.

    Args:
        system: The system; it must not be changed afterwards.
        platform_name: OpenMM platform.
        properties: Platform properties.
        n_contexts: Number of contexts.
        parameters: Values of global context parameters that differ from the system's defaults.

    Raises:
        PlatformError: If a context cannot be made.
    """

    def __init__(
        self,
        system: openmm.System,
        *,
        platform_name: str,
        properties: Mapping[str, str],
        n_contexts: int,
        parameters: Mapping[str, float] | None = None,
    ) -> None:
        self.platform_name = platform_name
        self.n_contexts = n_contexts
        self.n_evaluations = 0
        self._n_particles = system.getNumParticles()
        self._closed = False
        self._lock = threading.Lock()
        self._slots: SimpleQueue[_Slot] = SimpleQueue()
        for _ in range(n_contexts):
            self._slots.put(_Slot(system, platform_name, dict(properties), dict(parameters or {})))
        self._threads = ThreadPoolExecutor(n_contexts, thread_name_prefix="openmm") if n_contexts > 1 else None

    def evaluate(self, x: np.ndarray) -> Batch:
        """Energies and forces of configurations ``[b, n, 3]`` in nm (float64, contiguous).

        Raises:
            PlatformError: If the pool is closed or a lost context cannot be made again.
        """
        if self._closed:
            raise PlatformError("this OpenMM target was closed; make a new one")
        batch = Batch(x, np.full(len(x), np.nan), np.full_like(x, np.nan))
        chunk = max(1, min(_LARGEST_CHUNK, len(x) // (4 * self.n_contexts)))
        starts = iter(range(0, len(x), chunk))  # advancing it is one atomic step, so workers can share it
        try:
            if self._threads is None or len(x) == 1:
                self._work(batch, starts, chunk)
            else:
                jobs = [self._threads.submit(self._work, batch, starts, chunk) for _ in range(min(self.n_contexts, len(x)))]
                for job in jobs:
                    job.result()
        finally:
            batch.stopped = True
        with self._lock:
            self.n_evaluations += len(x)
        return batch

    def close(self) -> None:
        """Free the contexts and end the threads, once running evaluations are done."""
        self._closed = True
        if self._threads is not None:
            self._threads.shutdown()
        while not self._slots.empty():
            self._slots.get().discard()

    def _work(self, batch: Batch, starts: Iterator[int], chunk: int) -> None:
        slot = self._slots.get()
        try:
            for start in starts:
                if batch.stopped:
                    return
                slot.evaluate(batch, range(start, min(start + chunk, len(batch.x))))
        except BaseException:
            batch.stopped = True
            raise
        finally:
            self._slots.put(slot)


class _Slot:
    """One context, made when first needed and made again after it failed."""

    def __init__(self, system: openmm.System, platform_name: str, properties: dict[str, str], parameters: dict[str, float]) -> None:
        self._system, self._platform_name, self._properties, self._parameters = system, platform_name, properties, parameters
        self._context: openmm.Context | None = self._make()

    def discard(self) -> None:
        self._context = None

    def evaluate(self, batch: Batch, rows: range) -> None:
        """Fill in the results of some rows. The inner calls are OpenMM's own, without unit objects and keyword parsing."""
        set_positions, get_state = _openmm.Context_setPositions, _openmm.Context_getState
        get_energy, get_vector, forces_type = _openmm.State_getPotentialEnergy, _openmm.State__getVectorAsNumpy, openmm.State.Forces
        x, energies, forces = batch.x, batch.energies, batch.forces
        for row in rows:
            context = self._context
            if context is None:
                context = self._context = self._make()
            try:
                set_positions(context, x[row])
                state = get_state(context, _ENERGY_AND_FORCES, False, _ALL_GROUPS)
                energy = get_energy(state)
                get_vector(state, forces_type, forces[row])
                energies[row] = energy
            except openmm.OpenMMException as error:
                energy = np.nan
                batch.failures[row] = str(error)
                if len(batch.failures) >= _MAX_FAILURES:
                    batch.stopped = True
            if energy != energy:
                self.discard()
            if batch.stopped:
                return

    def _make(self) -> openmm.Context:
        try:
            platform = openmm.Platform.getPlatformByName(self._platform_name)
            context = openmm.Context(self._system, openmm.VerletIntegrator(0.001), platform, self._properties)
            for name, value in self._parameters.items():
                context.setParameter(name, value)
        except openmm.OpenMMException as error:
            raise PlatformError(f"platform {self._platform_name} cannot compute this system: {error}") from error
        return context
