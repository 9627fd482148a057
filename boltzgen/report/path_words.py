"""What the page says about sampling by steered paths."""

from __future__ import annotations

#: Picture → heading and what a reader sees in it, in the order of the page. Names may end in ``*``.
PATH_PICTURES = {
    "works.png": (
        "Works between basins",
        "Paths from basin A that ended in B, and minus those back, accepted or not: w, the work plus the log ratio of the proposals, "
        "which decides whether a path is accepted. The two distributions cross at the dashed line (Crooks): the free energy difference "
        "plus the log ratio of the shares of paths that arrive. Paths with w below a few kT are the ones that count.",
    ),
    "profile_*.png": (
        "Free-energy profile along {name}",
        "From the production alone. Bands are ± 2 standard errors of the difference to the zero; bins without a known error are left out.",
    ),
    "walkers.png": (
        "Where the walkers go",
        "The variables of every walker after every cycle, one colour each where they are few. Dashed lines are the limits of the basins. "
        "The shaded part is adaptation, and enters no result. In production walkers must cross many times, in both directions.",
    ),
    "proposal.png": (
        "Proposed and sampled",
        "Where paths are sent, beside where the walkers are: learning brings the two together. The sampled density is blurred by the width "
        "of the restraint, as the best proposal is. Before production the proposal is shown by the values that it drew, as a smoothed "
        "density or as points. In maps blue is frequent, yellow rare, grey never. "
        "A basin that is sampled and not proposed is never jumped to.",
    ),
    "rounds.png": (
        "Acceptance and work",
        "Round by round, and in production at the end. Left: accepted paths with ± 2 standard errors, of all and of those that were sent "
        "to another basin. Right: the work of the paths; what is not won back at the end of a path is lost, and longer paths lose less.",
    ),
    "path.png": (
        "A path",
        "Left: the moving centre and the variable that it pulls along, of an accepted path and of a rejected one where both were seen. "
        "Right: the work done so far, the error of the time step included. It ends at w less the log ratio of the proposals.",
    ),
}

#: Diagnostics worth a line: name → label, explanation, whether it is a fraction.
PATH_DIAGNOSTICS = {
    "acceptance": ("Acceptance of steered paths", "Of all paths of production; about a quarter is best for the cost.", True),
    "acceptance_between_basins": ("… of those sent to another basin", "These are the ones that matter.", True),
    "local_acceptance": ("Acceptance of local moves", "Far below a half: shorten the time step or the moves.", True),
    "identity_z": ("Acceptance against 2 P(w < 0) / σ", "Equal at equilibrium; beyond ± 4 the walkers are not there yet.", False),
    "round_trips": ("Round trips between basins", "There and back, of all walkers in production; a few of each are wanted.", False),
    "accepted_crossings": ("Accepted paths between basins", "In production.", False),
    "crossings_per_million": ("… per million force evaluations", "Everything counted, adaptation and rejected paths too.", False),
    "r_hat": ("R̂ of the variables", "Whether walkers agree with each other; at most 1.05.", False),
    "ess_cv": ("Independent draws of the variables", "Of all walkers together; 100 are wanted.", False),
    "proposed": ("Share of paths sent to each basin", "A basin below 1 % is hardly proposed.", False),
    "overlap": ("Overlap of the works", "1 for equal states, 0 for states that do not know of each other; 0.05 is the least.", False),
    "n_paths": ("Paths in production", "", False),
    "failed_paths": ("Paths that failed", "Counted as rejected. More than 1 %: shorten the time step or widen the restraint.", False),
    "path_steps": ("Steps of a path between basins", "Shorter ways may take fewer.", False),
    "bend": ("Bend of the pace", "0: even. Negative: slow at the ends. Positive: slow halfway.", False),
    "widths": ("Widths of the restraint", "Standard deviation of each variable about its centre, in nm, rad or its own unit.", False),
}  # fmt: skip
