"""Simulated federations: virtual clients on this machine."""

from fedlora.simulation.grid import InProcessGrid
from fedlora.simulation.simulate import Progress, Run, simulate

__all__ = ["InProcessGrid", "Progress", "Run", "simulate"]
