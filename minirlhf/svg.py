"""Curves as inline SVG. The same curves give the same bytes: no clock, no random ids.

matplotlib (extra `report`) is imported inside the one function that needs it.
"""

import html
import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

# told apart by colour-blind eyes (Okabe & Ito), and a grey
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
MAX_POINTS = 1000  # of one curve; longer ones are drawn as means of equal parts
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "minirlhf",
    "text.parse_math": False,  # names come from files
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.7,
    "lines.linewidth": 1.5,
}
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 4.8, 0.85, 0.15, 0.2, 0.45  # inches; a layout that measures texts takes twice as long
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
Points = Sequence[tuple[float, float]]


class Curve(NamedTuple):
    """Points to be joined; a NaN leaves a gap."""

    label: str  # empty: not in the legend
    points: Points
    color: int = 0  # of COLORS
    style: str = "-"  # matplotlib's: "-" "--" ":" "o"


class Panel(NamedTuple):
    """One pair of axes."""

    ylabel: str
    curves: Sequence[Curve]
    floor: float | None = None  # lower values lie below the figure


def available() -> bool:
    """Is matplotlib installed?"""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def thinned(points: Points, most: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most so many: each the mean of as many neighbours."""
    size = max(1, -(-len(points) // most))
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def draw(name: str, panels: Sequence[Panel], *, xlabel: str, label: str) -> str:
    """Panels one below the other on a common x axis, as an <svg> element. `name` keeps its ids apart from those of
    other figures of the page, `label` is what a screen reader says."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        height = 2.6 if len(panels) == 1 else 1.55 * len(panels) + 0.4
        figure = Figure(figsize=(WIDTH, height))
        figure.subplots_adjust(LEFT / WIDTH, BOTTOM / height, 1 - RIGHT / WIDTH, 1 - TOP / height, hspace=0.12)
        axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
        for ax, panel in zip(axes, panels, strict=True):
            _draw_panel(ax, panel)
        axes[-1].set_xlabel(xlabel)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata=NO_METADATA)
    return _inline(out.getvalue(), name, label)


def _draw_panel(ax: Any, panel: Panel) -> None:
    handles = []
    for curve in panel.curves:
        x, y = zip(*thinned(curve.points), strict=True)
        dots = curve.style == "o"
        marker = "o" if dots or len(x) == 1 else None
        (line,) = ax.plot(
            x,
            y,
            linestyle="none" if dots else curve.style,
            marker=marker,
            markersize=3,
            color=COLORS[curve.color % len(COLORS)],
        )
        handles += [(line, curve.label)] if curve.label else []
    ax.set_ylabel(panel.ylabel)
    if panel.floor is not None and ax.get_ylim()[0] < panel.floor:
        ax.set_ylim(bottom=panel.floor)
    if handles:
        lines, labels = zip(*handles, strict=True)
        ax.legend(lines, labels, fontsize=8)


def _inline(svg: str, name: str, label: str) -> str:
    """matplotlib's file → an element of a page: no prologue, no fixed size, ids of its own, a name for the blind."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    head, body = svg.split(">", 1)
    head = re.sub(r'\s(width|height|version)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{html.escape(label)}">{body}'
