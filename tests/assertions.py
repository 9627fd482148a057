"""The one assertion that statistical tests use."""

from __future__ import annotations


def z_score(estimate: float, exact: float, stderr: float) -> float:
    """Deviation of an estimate from the exact value in standard errors."""
    assert stderr > 0, f"a statistical test needs a positive standard error, got {stderr}"
    return (estimate - exact) / stderr


def assert_z(estimate: float, exact: float, stderr: float, *, n_sigma: float = 4.5) -> None:
    """Assert that an estimate lies within ``n_sigma`` standard errors of the exact value."""
    z = z_score(estimate, exact, stderr)
    assert abs(z) < n_sigma, f"{estimate} differs from {exact} by {z:.1f} standard errors of {stderr}"
