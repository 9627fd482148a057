"""Freed memory is kept, so that large arrays made again and again cost no page faults."""

from __future__ import annotations

import subprocess
import sys

import pytest

from boltzgen.allocator import keep_freed_memory

_PROGRAM = """
import resource, sys
from boltzgen.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(5):
    array = bytearray(b"1") * 50_000_000
    del array
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def faults(mode: str) -> int:
    return int(subprocess.run([sys.executable, "-c", _PROGRAM, mode], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_large_arrays_cost_no_page_faults_the_second_time() -> None:
    kept, default = faults("keep"), faults("default")
    assert default - kept > 40_000  # an array of 50 MB has 12,000 pages of 4 kB; kept, the first of five is paid for


def test_elsewhere_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()
