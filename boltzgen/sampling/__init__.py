"""Drawing from trained flows and from targets: importance sampling, Markov chains, Hamiltonian Monte Carlo."""
