"""The checks of the self-test fail when what they check is broken."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from boltzgen.transforms import coupling
from boltzgen.transforms.coupling import CompiledSpline, eager_spline, fast_spline
from boltzgen.workflows import selftest


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable], None]]:
    """Makes a function of ours torch.compile."""

    def install(compile_function: Callable) -> None:
        monkeypatch.setattr(coupling.shutil, "which", lambda name: "/usr/bin/g++")
        monkeypatch.setattr(coupling.torch, "compile", lambda function, **options: compile_function(function))

    fast_spline.cache_clear()
    yield install
    fast_spline.cache_clear()


def slightly_wrong(function: Callable) -> Callable:
    def graph(*arguments: object) -> tuple[Tensor, Tensor]:
        y, log_slope = function(*arguments)
        return y, log_slope + 1e-4

    return graph


def fails_for_more_than_six_rows(function: Callable) -> Callable:
    """Compiles the first small example, and nothing else."""

    def graph(x: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
        if len(x) > 6:
            raise RuntimeError("no graph")
        return function(x, *arguments)

    return graph


def test_the_compiled_spline_is_really_used(compiled: Callable[[Callable], None]) -> None:
    compiled(lambda function: function)
    assert selftest._splines_compile() == (True, "compiled splines differ from uncompiled ones by 0.0e+00")
    spline = fast_spline()
    assert isinstance(spline, CompiledSpline)
    assert spline.calls == 2, "the trial at the start and the layer"


def test_a_wrong_compiled_spline_fails(compiled: Callable[[Callable], None]) -> None:
    compiled(slightly_wrong)
    ok, detail = selftest._splines_compile()
    assert not ok
    assert "differ from uncompiled ones by 1.0e-04" in detail


def test_a_compiled_spline_that_is_not_used_fails(compiled: Callable[[Callable], None], monkeypatch: pytest.MonkeyPatch) -> None:
    compiled(fails_for_more_than_six_rows)
    assert selftest._splines_compile() == (False, "the compiled spline was not used although it is there")
    fast_spline.cache_clear()
    compiled(lambda function: function)
    randn = torch.randn
    monkeypatch.setattr(selftest.torch, "randn", lambda *size, **options: randn(*size, **options | {"dtype": torch.float64}))
    assert selftest._splines_compile() == (False, "the compiled spline was not used although it is there")


def test_it_says_when_there_is_no_compiler(compiled: Callable[[Callable], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coupling.shutil, "which", lambda name: None)
    ok, detail = selftest._splines_compile()
    assert ok
    assert "no working C++ compiler" in detail
    assert fast_spline() is eager_spline


@pytest.mark.slow
def test_the_real_compiler_passes() -> None:
    if not isinstance(fast_spline(), CompiledSpline):
        pytest.skip("no C++ compiler")
    ok, detail = selftest._splines_compile()
    assert ok, detail
