"""An accepted and a rejected path for the report, looked at along the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from boltzgen.core import Distribution
from boltzgen.md.steering import OpenMMSteering
from boltzgen.paths import PathFilm, PathWalkers, Schedule
from boltzgen.report.path_pictures import FilmedPath

#: The file in which a run keeps them.
FILMS = "films.npz"
_FRAMES, _AT_ONCE = 80, 4


@dataclass(frozen=True)
class Films:
    """Filmed paths, and the force evaluations that they cost."""

    paths: tuple[FilmedPath, ...]
    n_force: int

    def arrays(self) -> dict[str, np.ndarray]:
        """``s``, ``work`` ``[p, f]``; ``centre``, ``xi`` ``[p, f, k]``; ``w``, ``accepted``, ``failure`` ``[p]``; NaN after the end."""
        films, longest = [one.film for one in self.paths], max((len(one.film.s) for one in self.paths), default=0)
        stacked = {
            name: np.array([_padded(getattr(film, name), longest) for film in films], dtype=np.float64)
            for name in ("s", "centre", "xi", "work")
        }
        return stacked | {
            "w": np.array([one.w for one in self.paths]),
            "accepted": np.array([one.accepted for one in self.paths], dtype=bool),
            "failure": np.array([film.failure or "" for film in films], dtype=str),
        }


def film_paths(
    engine: OpenMMSteering, walkers: PathWalkers, proposal: Distribution, *, schedule: Schedule, generator: torch.Generator, tries: int = 4
) -> Films:
    """Steered moves from where the walkers are, of which the widest accepted and the widest rejected path are kept.

    The walkers stay where they are; nothing of this enters an estimate.

    Args:
        engine: Runs the paths.
        walkers: Where paths start.
        proposal: ρ of the production.
        schedule: How long, and how, the centre moves.
        generator: Source of all randomness.
        tries: Moves after which one of the two may be missing; each is of the four walkers that are sent furthest.
    """
    best: dict[bool, tuple[float, FilmedPath]] = {}
    spent = 0
    for _ in range(tries):
        start, end = engine.restraint.draw(walkers.xi, generator=generator), proposal.sample(len(walkers.x), generator=generator)[0]
        way = engine.restraint.energy(start, end.to(torch.float64))
        rows = torch.argsort(way, descending=True)[:_AT_ONCE]
        start, end, some = start[rows], end[rows].to(torch.float64), PathWalkers(x=walkers.x[rows], u=walkers.u[rows], xi=walkers.xi[rows])
        result, films = engine.film(some, start, end, schedule=schedule, n_frames=_FRAMES, generator=generator)
        w = result.work + proposal.log_prob(end) - proposal.log_prob(start)
        accepted = torch.rand(w.shape, generator=generator, dtype=torch.float64).log() < -w
        for i, film in enumerate(films):
            found = float(way[rows[i]]), FilmedPath(film, w=float(w[i]), accepted=bool(accepted[i]))
            known = best.get(found[1].accepted)
            if known is None or found[0] > known[0]:
                best[found[1].accepted] = found
        spent += int(result.n_force.sum())
        if len(best) == 2:
            break
    return Films(tuple(best[kind][1] for kind in (True, False) if kind in best), spent)


def stored_films(arrays: Mapping[str, np.ndarray]) -> list[FilmedPath]:
    """The paths of :meth:`Films.arrays`."""
    films = []
    for i, length in enumerate(np.isfinite(arrays["s"]).sum(axis=1)):
        seen = {name: arrays[name][i, :length] for name in ("s", "centre", "xi", "work")}
        film = PathFilm(**seen, failure=str(arrays["failure"][i]) or None)
        films.append(FilmedPath(film, w=float(arrays["w"][i]), accepted=bool(arrays["accepted"][i])))
    return films


def _padded(values: np.ndarray, length: int) -> np.ndarray:
    missing = [(0, length - len(values))] + [(0, 0)] * (values.ndim - 1)
    return np.pad(values, missing, constant_values=np.nan)
