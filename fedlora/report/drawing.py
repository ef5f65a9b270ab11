"""A plot as an SVG element that follows the page's colours.

matplotlib draws with stand-ins for colours; in the SVG each becomes a variable of the page's style
sheet, so that one picture is right on paper, on a light screen and on a dark one. Text stays text.
What would make two pictures in one page disturb each other (ids, a style for every element) goes.
"""

from __future__ import annotations

import io
import re
import warnings
from typing import Any
from xml.etree import ElementTree

from fedlora.errors import MissingExtraError
from fedlora.report.blocks import Plot

__all__ = ["ADAPTER_COLORS", "BAD", "INK", "MUTED", "SERIES", "PAGE", "svg_of"]

# Each stands for a variable of the page; black and white are matplotlib's own defaults.
INK, MUTED, PAGE, BAD = "#010101", "#020202", "#030303", "#040404"
SERIES = ("#050505", "#060606", "#070707", "#080808", "#090909", "#0a0a0a", "#0b0b0b", "#0c0c0c")
ADAPTER_COLORS = {
    "base": SERIES[3],
    "own": SERIES[1],
    "global": SERIES[0],
    "personal": SERIES[2],
}
VARIABLES = {INK: "ink", MUTED: "muted", PAGE: "page", BAD: "bad"} | {
    color: f"s{number}" for number, color in enumerate(SERIES)
}
_NAMESPACE = re.compile(r"^\{[^}]*\}")
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a client's id may hold a dollar sign
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.formatter.useoffset": False,
    "figure.facecolor": "none",
    "grid.color": MUTED,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
}


def svg_of(plot: Plot, name: str) -> str:
    """Return a plot as an ``<svg>`` element whose ids begin with `name`.

    Raises `MissingExtraError` without matplotlib.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure  # without pyplot: no window, no global state
    except ImportError:
        raise MissingExtraError("a report with plots", "plots") from None
    file = io.StringIO()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}), warnings.catch_warnings():
        # A letter that matplotlib's own font lacks is measured as a box; the browser has it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(plot.width, plot.height), layout="constrained")
        axes = figure.subplots()
        plot.draw(axes)
        handles, labels = axes.get_legend_handles_labels()
        if len(labels) > 1:
            columns = 2 if len(labels) in (2, 4) or max(map(len, labels)) > 16 else 3
            figure.legend(handles, labels, loc="outside upper left", ncols=columns)
        figure.savefig(file, format="svg", metadata={"Date": None})
    return _themed(file.getvalue(), name, plot)


def _themed(picture: str, name: str, plot: Plot) -> str:
    root: Any = ElementTree.fromstring(picture)
    for parent in list(root.iter()):
        for child in list(parent):
            if _NAMESPACE.sub("", child.tag) in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = _NAMESPACE.sub("", element.tag)
        element.text = element.text.strip() if element.text else element.text
        element.tail = None
        for key in list(element.attrib):
            value = element.attrib.pop(key)
            new = _changed(_NAMESPACE.sub("", key), value, name, element.tag)
            if new is not None:
                element.attrib[_NAMESPACE.sub("", key)] = new
    del root.attrib["version"]
    box = root.attrib["viewBox"].split()
    root.attrib |= {
        "width": box[2],
        "height": box[3],
        "role": "img",
        "aria-labelledby": f"{name}-title {name}-words",
    }
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=True)


def _changed(key: str, value: str, name: str, tag: str) -> str | None:
    """Return an attribute's new value; None: it goes."""
    if key == "id":
        return f"{name}-{value}" if tag in ("path", "clipPath") else None
    if key == "href":
        return f"#{name}-{value[1:]}"
    if key == "clip-path":
        return value.replace("url(#", f"url(#{name}-")
    if key == "style":
        return _styled(value)
    return value


def _styled(style: str) -> str:
    for color, variable in VARIABLES.items():
        style = style.replace(color, f"var(--{variable})")
    return re.sub(r"(font(?:-family)?:[^;]*?)'DejaVu Sans'[^;]*", r"\1var(--sans)", style)
