"""Compiled against eager spline: forward + backward time of 512 × 27 rational-quadratic splines with 8 bins, one thread.

    python benchmarks/splines.py [--out benchmarks/results/splines.json]

The spline of :func:`boltzgen.transforms.coupling.fast_spline` (compiled once for all shapes) takes turns with the eager one; the
ratio is the median over rounds of the ratio within a round. Compile seconds are those of the first call in each direction and
precision, without torch's cache on disk (set TORCHINDUCTOR_CACHE_DIR to an empty folder to measure them again).
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
from stored import out_path, store
from torch import Tensor
from tqdm import tqdm

from boltzgen.transforms.coupling import Spline, eager_spline, fast_spline

ROWS, COLUMNS, BINS = 512, 27, 8
ROUNDS, REPEATS = 9, 5
SEED = 0


def make_inputs(dtype: torch.dtype) -> list[Tensor]:
    """Values ``[rows, columns]`` and knots, all with gradients."""
    generator = torch.Generator().manual_seed(SEED)
    values = 2 * torch.rand(ROWS, COLUMNS, generator=generator, dtype=dtype) - 1
    knots = [torch.randn(ROWS, COLUMNS, k, generator=generator, dtype=dtype) for k in (BINS, BINS, BINS + 1)]
    return [tensor.requires_grad_(True) for tensor in (values, *knots)]


def step(spline: Spline, inputs: list[Tensor], inverse: bool) -> None:
    """One forward and backward pass."""
    values, widths, heights, slopes = inputs
    y, log_slope = spline(values, widths, heights, slopes, inverse)
    torch.autograd.grad(y.sum() + log_slope.sum(), inputs)


def seconds(spline: Spline, inputs: list[Tensor], inverse: bool, *, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        step(spline, inputs, inverse)
    return (time.perf_counter() - start) / repeats


def measure(dtype: torch.dtype, inverse: bool) -> dict[str, str | float]:
    inputs = make_inputs(dtype)
    start = time.perf_counter()
    compiled = fast_spline()
    if compiled is eager_spline:
        sys.exit("no working C++ compiler was found, so there is nothing to compare")
    step(compiled, inputs, inverse)
    compile_seconds = time.perf_counter() - start
    step(eager_spline, inputs, inverse)
    rounds = [
        [seconds(spline, inputs, inverse, repeats=REPEATS) for spline in (eager_spline, compiled)]
        for _ in tqdm(range(ROUNDS), desc=f"{dtype} {'inverse' if inverse else 'forward'}", file=sys.stderr)
    ]
    return {
        "precision": str(dtype).removeprefix("torch."),
        "direction": "inverse" if inverse else "forward",
        "eager_ms": 1e3 * statistics.median(eager for eager, _ in rounds),
        "compiled_ms": 1e3 * statistics.median(fast for _, fast in rounds),
        "ratio": statistics.median(eager / fast for eager, fast in rounds),
        "compile_seconds": compile_seconds,
    }


def main() -> None:
    out = out_path(__doc__)
    torch.set_num_threads(1)
    rows = [measure(dtype, inverse) for dtype in (torch.float32, torch.float64) for inverse in (False, True)]
    print(f"{'precision':<10}{'direction':<11}{'eager ms':>10}{'compiled ms':>13}{'ratio':>7}{'compile s':>11}")
    for row in rows:
        print(
            f"{row['precision']:<10}{row['direction']:<11}{row['eager_ms']:>10.2f}{row['compiled_ms']:>13.2f}{row['ratio']:>7.2f}"
            f"{row['compile_seconds']:>11.1f}"
        )
    result = {
        "what": f"forward + backward of {ROWS} x {COLUMNS} splines with {BINS} bins, one thread",
        "seed": SEED,
        "rows": rows,
    }
    store(out, result)


if __name__ == "__main__":
    main()
