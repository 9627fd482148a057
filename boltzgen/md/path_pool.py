"""Threads that share a few OpenMM contexts."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Generic, Protocol, TypeVar


class Runner(Protocol):
    """What a thread takes: it may be asked to stop, and freed."""

    stopped: bool

    def free(self) -> None:
        """Let go of what it holds."""


S = TypeVar("S", bound=Runner)
R = TypeVar("R")


class Pool(Generic[S]):
    """Threads that each take a context, do one row, and give it back."""

    def __init__(self, slots: list[S], *, serial: bool) -> None:
        self.slots = slots
        self._free: SimpleQueue[S] = SimpleQueue()
        for slot in slots:
            self._free.put(slot)
        self._threads = None if serial else ThreadPoolExecutor(len(slots), thread_name_prefix="steering")

    def map(self, work: Callable[[S, int], R], n_rows: int) -> list[R]:
        """``work(slot, row)`` of every row, in order."""
        for slot in self.slots:
            slot.stopped = False

        def one(row: int) -> R:
            slot = self._free.get()
            try:
                return work(slot, row)
            finally:
                self._free.put(slot)

        if self._threads is None:
            return [one(row) for row in range(n_rows)]
        futures = [self._threads.submit(one, row) for row in range(n_rows)]
        try:
            return [future.result() for future in futures]
        except BaseException:
            for slot in self.slots:
                slot.stopped = True
            for future in futures:
                future.cancel()
            raise

    def close(self) -> None:
        """End the threads and free the contexts."""
        if self._threads is not None:
            self._threads.shutdown()
        for slot in self.slots:
            slot.free()
