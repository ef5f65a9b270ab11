"""Simulated federations: in this process, or in Flower's own simulation."""

from fedlora.simulation.grid import InProcessGrid

__all__ = ["InProcessGrid"]
