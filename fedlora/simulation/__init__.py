"""Simulated federations: virtual clients on this machine, one run or a comparison of many."""

from fedlora.federation.callbacks import RunCallback
from fedlora.federation.tensorboard import TensorBoard
from fedlora.simulation.comparison import Comparison, compare
from fedlora.simulation.grid import InProcessGrid
from fedlora.simulation.simulate import Progress, Run, simulate

__all__ = [
    "Comparison",
    "InProcessGrid",
    "Progress",
    "Run",
    "RunCallback",
    "TensorBoard",
    "compare",
    "simulate",
]
