"""SIGTERM and SIGINT as a question that a long job asks."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether the process was asked to stop."""

    def __init__(self) -> None:
        self._asked = threading.Event()

    def __call__(self) -> bool:
        return self._asked.is_set()

    def ask(self, signal_number: int, frame: FrameType | None) -> None:
        """Signal handler."""
        self._asked.set()


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """A request that SIGTERM or SIGINT fills, in the main thread; elsewhere one that stays empty."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
