"""Write the reference of fedlora's public modules, made from their docstrings, as HTML.

python docs/api.py site
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pdoc

import fedlora

MODULES = (
    "fedlora",
    "fedlora.adapter",
    "fedlora.agent",
    "fedlora.aggregation",
    "fedlora.bases",
    "fedlora.data",
    "fedlora.device",
    "fedlora.errors",
    "fedlora.evaluation",
    "fedlora.experiment",
    "fedlora.export",
    "fedlora.federation",
    "fedlora.formats",
    "fedlora.metrics",
    "fedlora.nn",
    "fedlora.ota",
    "fedlora.personalization",
    "fedlora.privacy",
    "fedlora.simulation",
    "fedlora.store",
    "fedlora.training",
)


def write(folder: Path) -> None:
    """Write a page a module, and an index."""
    for module in map(import_module, MODULES):
        for name in getattr(module, "__all__", ()):
            # Some are imported when they are asked for, and pdoc does not ask.
            setattr(module, name, getattr(module, name))
    pdoc.render.configure(docformat="google", footer_text=f"fedlora {fedlora.__version__}")
    pdoc.pdoc(*MODULES, output_directory=folder)


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "site"))
