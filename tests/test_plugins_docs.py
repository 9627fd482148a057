"""The script of docs/plugins.md runs as it is written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from openmmtools import cache

DOCS = Path(__file__).parents[1] / "docs/plugins.md"


def test_the_five_lines_work() -> None:
    script, lines = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len([line for line in lines.splitlines() if line]) == 5
    names: dict[str, Any] = {}
    exec(script, names)
    exec(lines, names)
    contexts = cache.ContextCache(platform=openmm.Platform.getPlatformByName("Reference"))
    names["sampler"].run(4, context_cache=contexts)
    jump = names["jump"]
    assert jump.n_proposed == len(jump.works) == 4
    assert jump.n_failed == 0
    assert np.isfinite(names["sampler"].sampler_state.positions._value).all()
