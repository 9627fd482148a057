"""SIGTERM and SIGINT as a question that a long job asks, or as an error where it does not ask."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from boltzgen.errors import Interrupted

#: PR_SET_PDEATHSIG of Linux.
_SET_DEATH_SIGNAL = 1


class StopRequest:
    """Whether the process was asked to stop."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self.from_keyboard = False

    def __call__(self) -> bool:
        return self._asked.is_set()

    def ask(self, signal_number: int, frame: FrameType | None) -> None:
        """Signal handler."""
        self.from_keyboard = signal_number == signal.SIGINT
        self._asked.set()


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """A request that SIGTERM or SIGINT fills, in the main thread; elsewhere one that stays empty. Who stops for it says who asked."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    except Interrupted as error:
        error.from_keyboard = request.from_keyboard
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_with(parent: int) -> None:
    """Let this process be asked to stop, by SIGTERM, when its parent is gone (Linux); at once where that has happened already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != parent:
        raise SystemExit(128 + signal.SIGTERM)


@contextmanager
def raise_on_termination() -> Iterator[None]:
    """SIGTERM raises :class:`Interrupted` in the main thread, as SIGINT raises KeyboardInterrupt, unless someone asks for it inside."""

    def terminated(signal_number: int, frame: FrameType | None) -> None:
        raise Interrupted("asked to stop; what was finished before is kept")

    before = signal.signal(signal.SIGTERM, terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
