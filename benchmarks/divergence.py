"""Exact divergence of every velocity field: its time, in forward passes, beside one backward pass for each coordinate; one thread.

    python benchmarks/divergence.py [--out benchmarks/results/divergence.json]

Particles lie near a lattice with one particle per unit volume. For each field and size the forward pass, the field's own
divergence, and n·d backward passes (the design of published codes) take turns on the same batch, without gradients of weights;
ratios are medians over rounds of the ratio within a round. Of the backward passes, which all cost the same, at most twelve are
timed and the rest is counted. Training samples per second are those of a forward and a backward pass of a squared error.

A second table asks from which size on EGNN's neighbour lists (``cutoff``) are faster than all pairs, forward and backward.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from stored import out_path, store
from torch import Tensor
from tqdm import tqdm

from boltzgen.allocator import keep_freed_memory
from boltzgen.networks.egnn import EGNN
from boltzgen.networks.embedded_field import EmbeddedField
from boltzgen.networks.field import ParticleField
from boltzgen.networks.gradient_field import GradientField
from boltzgen.networks.hollow_field import HollowField
from boltzgen.networks.radial_field import RadialField
from boltzgen.networks.tensor_field import TensorField

Make = Callable[[int, int, torch.Generator], ParticleField]

FIELDS: dict[str, Make] = {
    "EmbeddedField": lambda n, d, g: EmbeddedField(n, d, length=1.0, generator=g),
    "EmbeddedField, one layer": lambda n, d, g: EmbeddedField(n, d, length=1.0, n_layers=1, generator=g),
    "RadialField": lambda n, d, g: RadialField(n, d, length=1.0),
    "HollowField": lambda n, d, g: HollowField(n, d, length=1.0, generator=g),
    "GradientField": lambda n, d, g: GradientField(n, d, length=1.0, generator=g),
    "EGNN": lambda n, d, g: EGNN(n, d, length=1.0, generator=g),
    "EGNN, cutoff 2": lambda n, d, g: EGNN(n, d, length=1.0, cutoff=2.0, generator=g),
    "TensorField": lambda n, d, g: TensorField(n, d, length=1.0, generator=g),
}
SIZES = {(4, 2): 64, (13, 3): 16, (22, 3): 8, (55, 3): 1}  # particles and dimensions: rows of a batch
ROUNDS, ROUND_SECONDS, PASSES = 3, 3.0, 12
#: Particles, and rows of a batch, of the comparison of neighbour lists with all pairs.
LISTED = {13: 16, 55: 4, 108: 2, 216: 1}
SEED = 0


def positions(b: int, n: int, d: int, generator: torch.Generator) -> Tensor:
    """The n lattice points nearest to the origin, shaken."""
    axis = torch.arange(-5.0, 6.0)
    lattice = torch.cartesian_prod(*[axis] * d)
    return lattice[lattice.norm(dim=1).argsort()[:n]] + 0.1 * torch.randn(b, n, d, generator=generator)


def seconds(work: Callable[[], object], *, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - start) / repeats


def backward_passes(field: ParticleField, t: Tensor, x: Tensor) -> float:
    """Seconds of a forward pass and n·d backward passes, counted from at most ``PASSES`` of them."""
    x = x.clone().requires_grad_(True)
    start = time.perf_counter()
    v = field(t, x).flatten(1)
    forward = time.perf_counter() - start
    timed = min(PASSES, v.shape[1])
    start = time.perf_counter()
    for k in range(timed):
        torch.autograd.grad(v[:, k].sum(), x, retain_graph=True)
    return forward + (time.perf_counter() - start) * v.shape[1] / timed


def training_rate(field: ParticleField, t: Tensor, x: Tensor) -> float:
    """Samples per second, forward and backward."""

    def step() -> None:
        torch.autograd.grad((field(t, x) - x).square().mean(), list(field.parameters()))

    step()
    return len(x) / statistics.median(seconds(step, repeats=2) for _ in range(ROUNDS))


def measure(name: str, n: int, d: int, b: int) -> dict[str, str | int | float]:
    generator = torch.Generator().manual_seed(SEED)
    field = FIELDS[name](n, d, generator)
    x, t = positions(b, n, d, generator), torch.rand(b, generator=generator)
    rate = training_rate(field, t, x)
    field.requires_grad_(False)
    field(t, x)
    rounds: list[tuple[float, float, float]] = []
    start = time.perf_counter()
    while not rounds or (len(rounds) < ROUNDS and time.perf_counter() - start < ROUND_SECONDS):
        forward = seconds(lambda: field(t, x), repeats=4)
        rounds.append((forward, seconds(lambda: field.divergence(t, x), repeats=1), backward_passes(field, t, x)))
    return {
        "field": name,
        "particles": n,
        "dimensions": d,
        "batch": b,
        "rounds": len(rounds),
        "forward_ms": 1e3 / b * statistics.median(forward for forward, _, _ in rounds),
        "divergence_per_forward": statistics.median(own / forward for forward, own, _ in rounds),
        "backward_passes_per_forward": statistics.median(backward / forward for forward, _, backward in rounds),
        "training_samples_per_second": rate,
    }


def neighbour_lists(n: int, b: int) -> dict[str, int | float]:
    """Time of a training step of EGNN over all pairs, in units of that over neighbours within 2; the two take turns."""
    generator = torch.Generator().manual_seed(SEED)
    x, t = positions(b, n, 3, generator), torch.rand(b, generator=generator)
    fields = [EGNN(n, 3, length=1.0, cutoff=cutoff, generator=generator) for cutoff in (None, 2.0)]
    rounds = [[1 / training_rate(field, t, x) for field in fields] for _ in range(ROUNDS)]
    return {"particles": n, "batch": b, "all_pairs_per_neighbour_list": statistics.median(whole / near for whole, near in rounds)}


def main() -> None:
    out = out_path(__doc__)
    keep_freed_memory()
    torch.set_num_threads(1)
    cells = [(name, n, d, b) for (n, d), b in SIZES.items() for name in FIELDS if d == 3 or name != "TensorField"]
    rows = [measure(*cell) for cell in tqdm(cells, desc="fields and sizes", file=sys.stderr)]
    print(f"{'field':<26}{'n':>4}{'d':>3}{'forward ms':>12}{'divergence':>12}{'n·d backward':>14}{'trained/s':>11}")
    for row in rows:
        print(
            f"{row['field']:<26}{row['particles']:>4}{row['dimensions']:>3}{row['forward_ms']:>12.3f}"
            f"{row['divergence_per_forward']:>12.1f}{row['backward_passes_per_forward']:>14.1f}"
            f"{row['training_samples_per_second']:>11.0f}"
        )
    print("divergence and backward passes are in units of the forward pass")
    listed = [neighbour_lists(n, b) for n, b in LISTED.items()]
    for cell in listed:
        ratio = cell["all_pairs_per_neighbour_list"]
        print(f"EGNN of {cell['particles']} particles: all pairs take {ratio:.2f} times as long as neighbours within 2")
    result = {
        "what": "exact divergences in units of one forward pass, beside one backward pass per coordinate; float32, one thread",
        "seed": SEED,
        "rows": rows,
        "neighbour_lists": listed,
    }
    store(out, result)


if __name__ == "__main__":
    main()
