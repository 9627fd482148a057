"""Boltzmann generators beside OpenMM: exact reweighting and free energies from trained flows."""

__version__ = "0.1.0"
