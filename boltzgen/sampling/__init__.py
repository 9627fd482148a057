"""Drawing from trained flows: importance sampling and Markov chains."""
