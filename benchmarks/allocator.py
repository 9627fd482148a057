"""What keeping freed memory saves where a flow is sampled with its density: time and page faults; one thread.

    python benchmarks/allocator.py [--out benchmarks/results/allocator.json]

Two processes take turns, one with the settings of ``boltzgen.allocator`` and one without; each times the default field with its
exact divergence, as in one evaluation of the solver, on batches of 1,000 configurations. The ratio is the median over rounds of the
ratio within a round.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from stored import out_path, store

from boltzgen.allocator import keep_freed_memory
from boltzgen.networks.embedded_field import EmbeddedField

ROWS, PASSES, ROUNDS, SIZES = 1000, 3, 3, (4, 13)
SEED = 0


def measured(n: int, keep: bool) -> dict[str, float]:
    """Seconds and page faults of one evaluation with divergence, in this process."""
    if keep:
        keep_freed_memory()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(SEED)
    field = EmbeddedField(n, 3, length=1.0, generator=generator).requires_grad_(False)
    x, t = torch.randn(ROWS, n, 3, generator=generator), torch.tensor(0.5)
    field.divergence(t, x)
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(PASSES):
        field.divergence(t, x)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return {"seconds": (time.perf_counter() - start) / PASSES, "page_faults": faults / PASSES}


def in_a_process(n: int, keep: bool) -> dict[str, float]:
    code = f"import json; from allocator import measured; print(json.dumps(measured({n}, {keep})))"
    run = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, cwd=sys.path[0])
    return dict(json.loads(run.stdout))


def main() -> None:
    out = out_path(__doc__)
    rows = []
    for n in SIZES:
        rounds = []
        for k in range(ROUNDS):  # the one that comes first takes turns
            both = {keep: in_a_process(n, keep=keep) for keep in ((False, True) if k % 2 else (True, False))}
            rounds.append((both[False], both[True]))
        ratio = statistics.median(default["seconds"] / kept["seconds"] for default, kept in rounds)
        row: dict[str, float] = {"particles": n, "ratio": ratio}
        for name, values in (("default", [default for default, _ in rounds]), ("kept", [kept for _, kept in rounds])):
            row |= {f"{name}_{key}": statistics.median(value[key] for value in values) for key in ("seconds", "page_faults")}
        rows.append(row)
        faults = f"{row['default_page_faults']:.0f} page faults, kept {row['kept_page_faults']:.0f}"
        print(f"{n} particles: {ratio:.2f} times faster; {faults}", flush=True)
    what = f"default field with divergence on {ROWS} rows, float32, one thread: time without keeping / with"
    store(out, {"what": what, "seed": SEED, "rows": rows})


if __name__ == "__main__":
    main()
