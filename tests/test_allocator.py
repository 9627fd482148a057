"""Freed memory is kept, so that large arrays made again and again cost no page faults."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

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


def huge_pages() -> bool:
    """Whether the kernel hands out pages of 2 MB unasked, so that there is little to count."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.exists() and "[always]" in setting.read_text()


@pytest.mark.skipif(not keep_freed_memory() or huge_pages(), reason="counts small pages of glibc")
def test_large_arrays_cost_no_page_faults_the_second_time() -> None:
    kept, default = faults("keep"), faults("default")
    pages = 50_000_000 / resource.getpagesize()
    assert default - kept > 3 * pages  # kept, the first of five arrays is paid for


def test_elsewhere_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()
