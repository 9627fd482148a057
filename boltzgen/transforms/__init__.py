"""Bijections: internal coordinates, domains, coupling layers and linear maps."""
