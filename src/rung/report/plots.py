"""Plots as inline SVG, deterministic, in the page's colors and font, each with a text alternative.

Matplotlib draws, and the SVG is then adapted to the page: CSS variables instead of colors, so that one drawing suits
light and dark mode, and unique ids. A JavaScript library would be interactive, but the page has no scripts. `sections`
calls one function per plot.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from rung.console import visible
from rung.report.formatting import decimals, format_estimate
from rung.results.base import Estimate
from rung.results.ladder import RungVerdict

Json = Mapping[str, Any]
DrawFunction = Callable[[Any], None]

# Colors used nowhere else: CSS variables replace them, so one drawing suits the light and the dark scheme.
INK, MUTED, GRID = "#010101", "#010102", "#010103"
SERIES = tuple(f"#0102{i:02d}" for i in range(6))
_STYLE = {INK: "currentColor", MUTED: "var(--muted)", GRID: "var(--line)"}
_STYLE |= {color: f"var(--series-{i})" for i, color in enumerate(SERIES)}
_MARKERS = "osD^vP"
_RC: Json = {
    **dict.fromkeys(("axes.edgecolor", "grid.color"), GRID),
    **dict.fromkeys(("axes.labelcolor", "xtick.color", "ytick.color"), MUTED),
    **dict.fromkeys(("axes.spines.right", "axes.spines.top", "legend.frameon"), False),
    **{"axes.grid": True, "axes.unicode_minus": True, "grid.linewidth": 0.6, "font.size": 9.0, "text.color": INK},
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), 8.5),
    # text stays text, searchable and in the page's font; labels may contain dollar signs
    **{"svg.fonttype": "none", "text.parse_math": False},
}


def scores(rows: Sequence[tuple[str, Mapping[str, Estimate]]], metrics: Sequence[str], target: float | None) -> Markup:
    """Score of each rung by each metric, with its 95 % interval."""

    def draw(axes: Any) -> None:
        # metrics share a row: their whiskers are spread over 0.7 of its height
        step = 0.7 / len(metrics)
        for number, metric in enumerate(metrics):
            for row_index, (_, scores_by_metric) in enumerate(rows):
                if metric in scores_by_metric:
                    # one legend entry a metric
                    label = metric if row_index == 0 else None
                    position = row_index + (number - (len(metrics) - 1) / 2) * step
                    _whisker(axes, scores_by_metric[metric], position, number, label)
        if target is not None:
            axes.axvline(target, color=INK, linewidth=1, linestyle=(0, (4, 3)), label=f"target {target:g}")
        # scores start at 0, or small differences look large
        axes.set_xlim(left=0)
        _categories(axes, [label for label, _ in rows])
        axes.set_xlabel(("perplexity, lower is better" if metrics[0] == "perplexity" else "score") + ", 95 % interval")
        if len(metrics) > 1 or target is not None:
            _legend(axes)

    digits = {m: decimals(scores_by_metric.get(m) for _, scores_by_metric in rows) for m in metrics}
    descriptions = []
    for label, estimates in rows:
        texts = [f"{m} {format_estimate(estimates[m], digits[m])}" for m in metrics if m in estimates]
        descriptions.append(f"{label}: {', '.join(texts)}")
    height = 0.75 + len(rows) * max(0.36, 0.2 * len(metrics))
    return _svg("scores-" + "-".join(metrics), draw, height, "Scores with intervals. " + "; ".join(descriptions))


def differences(rows: Sequence[RungVerdict], best: str, margin: float, unit: str, lower_is_better: bool) -> Markup:
    """Paired difference of each rung to the best one, with the margin: the basis of the verdict."""
    # the best rung's difference to itself is 0 by definition
    compared_rows = [row for row in rows if row.name != best]
    limit = margin if lower_is_better else -margin

    def draw(axes: Any) -> None:
        axes.axvline(0, color=MUTED, linewidth=1)
        axes.axvline(limit, color=SERIES[1], linewidth=1.2, linestyle=(0, (4, 3)), label=f"margin {margin:.2g}")
        for row_index, row in enumerate(compared_rows):
            _whisker(axes, row.difference, row_index, 0, None)
        axes.locator_params(axis="x", nbins=6)
        _categories(axes, [row.name for row in compared_rows])
        axes.set_xlabel(f"difference to {_clip(best)}, {unit}")
        _legend(axes)

    digits = decimals(row.difference for row in compared_rows)
    descriptions = [f"{row.name}: {format_estimate(row.difference, digits)}, {row.reason}" for row in compared_rows]
    text = f"Paired difference to {best}, margin {margin:.2g}. " + "; ".join(descriptions)
    return _svg("differences", draw, 0.95 + 0.36 * len(compared_rows), text)


def cost(points: Sequence[tuple[str, Estimate, float]], metric: str, x_label: str) -> Markup:
    """Score of each rung against the cost of a query."""

    def draw(axes: Any) -> None:
        for number, (label, score, x) in enumerate(points):
            low, high = _finite_bounds(score)
            style = {"color": SERIES[number % len(SERIES)], "marker": _MARKERS[number % len(_MARKERS)]}
            error = [[score.mean - low], [high - score.mean]]
            axes.errorbar([x], [score.mean], yerr=error, label=_clip(label), linestyle="none", clip_on=False, **style)
        # `or 1`: an axis of zero width would be an error when all costs are 0
        axes.set_xlim(0, 1.1 * max([x for *_, x in points], default=0) or 1)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel(metric)
        _legend(axes)

    descriptions = [f"{label}: {metric} {score.mean:.3g} at {x:.3g}" for label, score, x in points]
    return _svg(f"cost-{x_label}", draw, 2.9, f"{metric} against {x_label}. " + "; ".join(descriptions))


def logged_curve(name: str, logs: Sequence[Sequence[Json]], key: str, unit: str = "") -> Markup:
    """A logged number over the steps, in training and validation; several training seeds are drawn over each other."""
    title = key.replace("_", " ")

    def draw(axes: Any) -> None:
        # more seeds, fainter lines: the sum stays readable
        opacity = 0.9 / math.sqrt(len(logs))
        for number, log in enumerate(logs):
            first = number == 0
            train, validation = _curve(log, key), _curve(log, f"validation_{key}")
            axes.plot(*train, color=SERIES[5], linewidth=1.1, alpha=opacity, label="training" if first else None)
            if validation[0]:
                label = "validation" if first else None
                axes.plot(*validation, "o-", color=SERIES[0], markersize=4, linewidth=1.6, label=label)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(f"{title}, {unit}" if unit else title)
        axes.xaxis.get_major_locator().set_params(integer=True)
        _legend(axes)

    descriptions = []
    for curve_key, curve_name in ((key, "training"), (f"validation_{key}", "validation")):
        ends = [values for log in logs if (values := _curve(log, curve_key)[1])]
        descriptions += [f"{curve_name} {title} from {values[0]:.3f} to {values[-1]:.3f}" for values in ends]
    text = f"{title[:1].upper()}{title[1:]} over the optimizer steps: " + "; ".join(descriptions)
    return _svg(f"{key}-{name}", draw, 2.6, text)


def layer_scores(name: str, scores: Mapping[str, float], winners: Sequence[int]) -> Markup:
    """Score of each layer in a lottery; the layers that continued are highlighted."""
    numbers = sorted(map(int, scores))

    def draw(axes: Any) -> None:
        for label, color, is_winner in (("went on", SERIES[0], True), ("left", GRID, False)):
            layers = [n for n in numbers if (n in winners) == is_winner]
            axes.bar(layers, [scores[str(n)] for n in layers], color=color, label=label)
        axes.set_xlabel("layer")
        axes.set_ylabel("share of the score")
        axes.xaxis.get_major_locator().set_params(integer=True)
        _legend(axes)

    description = ", ".join(f"{n}: {scores[str(n)]:.1%}" for n in numbers)
    return _svg(f"layers-{name}", draw, 2.2, f"Share of the score of each layer. {description}")


def has_curve(log: Sequence[Json], key: str = "loss") -> bool:
    """True if a log has at least two points to draw."""
    return len(_curve(log, key)[0]) > 1


def _curve(log: Sequence[Json], key: str) -> tuple[list[int], list[float]]:
    # a NaN loss would break the axis limits
    entries = [e for e in log if isinstance(e.get(key), int | float) and math.isfinite(e[key])]
    return [e["step"] for e in entries], [e[key] for e in entries]


def _whisker(axes: Any, estimate: Estimate, position: float, number: int, label: str | None) -> None:
    low, high = _finite_bounds(estimate)
    color, mean = SERIES[number % len(SERIES)], estimate.mean
    axes.plot([low, high], [position, position], color=color, linewidth=1.8, solid_capstyle="round")
    style = {"color": color, "marker": _MARKERS[number % len(_MARKERS)], "markersize": 6 if number == 0 else 4.5}
    axes.plot([mean], [position], linestyle="none", label=label, clip_on=False, **style)
    for bound, arrow in ((estimate.low, "<"), (estimate.high, ">")):
        if math.isinf(bound):  # an arrow pointing outwards
            axes.plot([mean], [position], linestyle="none", color=color, marker=arrow, markersize=9, fillstyle="none")


def _finite_bounds(estimate: Estimate) -> tuple[float, float]:
    finite = [bound for bound in (estimate.mean, estimate.low, estimate.high) if math.isfinite(bound)]
    return min(finite), max(finite)


def _categories(axes: Any, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), [_clip(label) for label in labels], color=INK)
    axes.set_ylim(len(labels) - 0.4, -0.6)  # reversed: the lowest rung on top, as in the table
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)


def _legend(axes: Any) -> None:
    handles, _ = axes.get_legend_handles_labels()
    # four entries in three columns would leave one alone in the second line
    columns = 2 if len(handles) == 4 else 3
    axes.figure.legend(loc="outside upper left", ncols=columns, handlelength=1.4, columnspacing=1.2, fontsize=8.5)


# Long labels would squeeze the plot: the full name is in the table and in the text alternative.
def _clip(label: str, limit: int = 22) -> str:
    label = visible(label)
    return label if len(label) <= limit else label[: limit - 1] + "…"


def _svg(name: str, draw: DrawFunction, height: float, text: str) -> Markup:
    """Draw a plot and adapt its SVG to the page: CSS colors, unique ids, no XML header, no fixed size."""
    buffer = io.StringIO()
    # the salt makes matplotlib's ids deterministic, and different from plot to plot
    with mpl.rc_context({**_RC, "svg.hashsalt": name}), warnings.catch_warnings():
        # the page has the font
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure = Figure(figsize=(4.7, height), layout="constrained")
        # not pyplot: no global state, no display, no figure that stays open
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        # Date None: the same data must give the same bytes
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    view = re.search(r'viewBox="[^"]*"', svg)
    content = svg[svg.index(">", svg.index("<svg")) + 1 : svg.rindex("</svg>")]
    # the metadata names matplotlib's version: an update would change every page
    content = re.sub(r"<metadata>.*?</metadata>", "", content, flags=re.DOTALL)
    for color, variable in _STYLE.items():
        content = content.replace(color, variable)
    # matplotlib's ids are unique within a figure only, and a page has many figures
    scope = re.sub(r"\W+", "-", name)
    content = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{scope}-", content)
    box = view.group() if view else ""
    return Markup(f'<svg class="plot" role="img" {box} aria-label="{escape(visible(text))}">{content}</svg>')  # noqa: S704
