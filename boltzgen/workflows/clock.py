"""Wall seconds of the stages of a run."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from boltzgen.workflows.run_folder import RunFolder


@dataclass
class Clock:
    """Wall seconds of every stage, kept in the run folder so that a resumed run reports all of them."""

    folder: RunFolder
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        path = self.folder.path / "timing.json"
        if path.exists():
            self.seconds = json.loads(path.read_text())

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of this stage."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started
            self.folder.write_json("timing.json", self.seconds)
