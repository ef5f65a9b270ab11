"""Simulated federations: virtual clients on this machine."""

from fedlora.simulation.grid import InProcessGrid

__all__ = ["InProcessGrid"]
