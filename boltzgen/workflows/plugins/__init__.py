"""Moves and reporters that work inside other programs: openmmtools, and OpenMM's own replica exchange and simulations."""
