"""Analytic systems with a known normalisation, and tempered, restricted or regularised views of another target."""
