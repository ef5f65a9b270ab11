"""A plot as an SVG element that follows the page's colours.

matplotlib draws with stand-ins for colours; in the SVG each becomes a variable of the page's style
sheet, so that one picture is right on paper, on a light screen and on a dark one. Text stays text.
What would make two pictures in one page disturb each other (ids, a style for every element) goes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

from fedlora.errors import MissingExtraError
from fedlora.report.blocks import Plot

__all__ = ["ADAPTER_COLORS", "BAD", "INK", "MUTED", "PAGE", "SERIES", "boxes", "svg_of"]

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
_STYLE: dict[Any, Any] = {
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
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure  # without pyplot: no window, no global state
    except ImportError:
        raise MissingExtraError("a report with plots", "plots") from None
    file = io.StringIO()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}), warnings.catch_warnings():
        # A letter that matplotlib's own font lacks is measured as a box; the browser has it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        # 72 is what an SVG has: what is measured is what is written.
        figure = Figure(figsize=(plot.width, plot.height), layout="constrained", dpi=72)
        axes = figure.subplots()
        plot.draw(axes)
        handles, labels = axes.get_legend_handles_labels()
        if len(labels) > 1:
            columns = 2 if len(labels) in (2, 4) or max(map(len, labels)) > 16 else 3
            figure.legend(handles, labels, loc="outside upper left", ncols=columns)
        # One layout and one drawing: savefig does each twice, which is half of a report's time.
        layout: Any = figure.get_layout_engine()
        layout.execute(figure)
        figure.set_layout_engine("none")
        canvas: Any = FigureCanvasSVG(figure)
        canvas.print_svg(file, metadata={"Date": None})
    return _themed(file.getvalue(), name, plot)


def boxes(
    axes: Any,
    corners: Sequence[tuple[float, float, float, float]],
    colors: Sequence[str],
    *,
    label: str = "",
    sample: str | None = None,
    alphas: Sequence[float] | None = None,
    filled: bool = True,
) -> None:
    """Draw rectangles, each (left, bottom, right, top), as one artist.

    sample: the colour that stands for `label` in the legend; default that of the first one.
    `Axes.bar` makes an artist a bar, and a hundred of those take ten times as long to draw.
    """
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    strengths = [1.0] * len(colors) if alphas is None else alphas
    fills = [to_rgba(c, alpha) for c, alpha in zip(colors, strengths, strict=True)]
    found = PolyCollection(
        [((a, b), (a, d), (c, d), (c, b)) for a, b, c, d in corners],
        facecolors=fills if filled else "none",
        edgecolors=colors if alphas is None else "none",
        linewidths=0.8,
    )
    found.set_in_layout(False)  # it is within the axes, and measuring it is slow
    axes.add_collection(found)
    axes.autoscale_view()
    if label:  # a collection has no picture in a legend; this stands for it
        sample = sample or colors[0]
        face = sample if filled else "none"
        axes.add_patch(Rectangle((0, 0), 0, 0, fc=face, ec=sample, lw=0.8, label=label))


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
