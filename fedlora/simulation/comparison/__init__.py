"""Methods compared over seeds and a grid: `compare`, and what it returns."""

from fedlora.simulation.comparison.compare import Comparison, compare
from fedlora.simulation.comparison.plan import Plan, parse_grid
from fedlora.simulation.comparison.report import Table

__all__ = ["Comparison", "Plan", "Table", "compare", "parse_grid"]
