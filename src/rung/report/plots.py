"""Plots as inline SVG: deterministic, in the page's own colors and font, with a text for those who cannot see them."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from rung.report.formatting import decimals, format_bounds, format_fixed

Json = Mapping[str, Any]
DrawFunction = Callable[[Any], None]

# Colors that occur nowhere else: the style sheet's variables take their place, so one drawing suits both schemes.
INK, MUTED, GRID = "#010101", "#010102", "#010103"
SERIES = tuple(f"#0102{i:02d}" for i in range(6))
_STYLE = {INK: "currentColor", MUTED: "var(--muted)", GRID: "var(--line)"} | {
    color: f"var(--series-{i})" for i, color in enumerate(SERIES)
}
_MARKERS = "osD^vP"
_RC = {
    "axes.edgecolor": GRID,
    "axes.grid": True,
    "axes.labelcolor": MUTED,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.unicode_minus": True,
    "font.size": 9.0,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.color": MUTED,
    "ytick.labelsize": 8.5,
}


def scores(rows: Sequence[tuple[str, Mapping[str, Json]]], metrics: Sequence[str], target: float | None) -> Markup:
    """Score of each rung by each metric, with its 95 % interval."""

    def draw(axes: Any) -> None:
        step = 0.7 / len(metrics)
        for number, metric in enumerate(metrics):
            for place, (_, found) in enumerate(rows):
                if metric in found:
                    label = metric if place == 0 else None
                    at = place + (number - (len(metrics) - 1) / 2) * step
                    _whisker(axes, found[metric], at, number, label)
        if target is not None:
            axes.axvline(target, color=INK, linewidth=1, linestyle=(0, (4, 3)), label=f"target {target:g}")
        axes.set_xlim(left=0)
        _categories(axes, [label for label, _ in rows])
        axes.set_xlabel(("perplexity, lower is better" if metrics[0] == "perplexity" else "score") + ", 95 % interval")
        if len(metrics) > 1 or target is not None:
            _legend(axes)

    digits = {m: decimals(found.get(m) for _, found in rows) for m in metrics}
    said = [
        f"{label}: " + ", ".join(f"{m} {_estimate_text(found[m], digits[m])}" for m in metrics if m in found)
        for label, found in rows
    ]
    height = 0.75 + len(rows) * max(0.36, 0.2 * len(metrics))
    return _svg("scores-" + "-".join(metrics), draw, height, "Scores with intervals. " + "; ".join(said))


def differences(rows: Sequence[Json], best: str, margin: float, unit: str, *, lower_is_better: bool) -> Markup:
    """What the verdict rests on: the paired difference of each rung to the best one, and the margin."""
    others = [row for row in rows if row["name"] != best]
    limit = margin if lower_is_better else -margin

    def draw(axes: Any) -> None:
        axes.axvline(0, color=MUTED, linewidth=1)
        axes.axvline(limit, color=SERIES[1], linewidth=1.2, linestyle=(0, (4, 3)), label=f"margin {margin:.2g}")
        for place, row in enumerate(others):
            _whisker(axes, row["difference"], place, 0, None)
        axes.locator_params(axis="x", nbins=6)
        _categories(axes, [row["name"] for row in others])
        axes.set_xlabel(f"difference to {_clip(best)}, {unit}")
        _legend(axes)

    digits = decimals(row["difference"] for row in others)
    said = [f"{row['name']}: {_estimate_text(row['difference'], digits)}, {row['reason']}" for row in others]
    text = f"Paired difference to {best}, margin {margin:.2g}. " + "; ".join(said)
    return _svg("differences", draw, 0.95 + 0.36 * len(others), text)


def cost(points: Sequence[tuple[str, Json, float]], metric: str, x_label: str) -> Markup:
    """Score of each rung against what a query costs."""

    def draw(axes: Any) -> None:
        for number, (label, score, x) in enumerate(points):
            low, high = _finite(score)
            style = {"color": SERIES[number % len(SERIES)], "marker": _MARKERS[number % len(_MARKERS)]}
            span = [[score["mean"] - low], [high - score["mean"]]]
            axes.errorbar([x], [score["mean"]], yerr=span, label=_clip(label), linestyle="none", clip_on=False, **style)
        axes.set_xlim(0, 1.1 * max([x for *_, x in points], default=0) or 1)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel(metric)
        _legend(axes)

    said = [f"{label}: {metric} {score['mean']:.3g} at {x:.3g}" for label, score, x in points]
    return _svg(f"cost-{x_label}", draw, 2.9, f"{metric} against {x_label}. " + "; ".join(said))


def logged_curve(name: str, logs: Sequence[Sequence[Json]], key: str, unit: str = "") -> Markup:
    """A logged number over the steps, in training and validation; several training seeds lie over one another."""
    known = key.replace("_", " ")

    def draw(axes: Any) -> None:
        faint = 0.9 / math.sqrt(len(logs))
        for number, log in enumerate(logs):
            first = number == 0
            train, held = _curve(log, key), _curve(log, f"validation_{key}")
            axes.plot(*train, color=SERIES[5], linewidth=1.1, alpha=faint, label="training" if first else None)
            if held[0]:
                axes.plot(
                    *held, "o-", color=SERIES[0], markersize=4, linewidth=1.6, label=None if number else "validation"
                )
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(f"{known}, {unit}" if unit else known)
        axes.xaxis.get_major_locator().set_params(integer=True)
        _legend(axes)

    said = []
    for own, what in ((key, "training"), (f"validation_{key}", "validation")):
        ends = [values for log in logs if (values := _curve(log, own)[1])]
        said += [f"{what} {known} from {values[0]:.3f} to {values[-1]:.3f}" for values in ends]
    text = f"{known[:1].upper()}{known[1:]} over the optimizer steps: " + "; ".join(said)
    return _svg(f"{key}-{name}", draw, 2.6, text)


def layer_scores(name: str, scores: Mapping[str, float], winners: Sequence[int]) -> Markup:
    """What each layer scored in a lottery; those that went on stand out."""
    numbers = sorted(map(int, scores))

    def draw(axes: Any) -> None:
        for label, color, chosen in (
            ("went on", SERIES[0], [n for n in numbers if n in winners]),
            ("left", GRID, [n for n in numbers if n not in winners]),
        ):
            axes.bar(chosen, [scores[str(n)] for n in chosen], color=color, label=label)
        axes.set_xlabel("layer")
        axes.set_ylabel("share of the score")
        axes.xaxis.get_major_locator().set_params(integer=True)
        _legend(axes)

    said = ", ".join(f"{n}: {scores[str(n)]:.1%}" for n in numbers)
    return _svg(f"layers-{name}", draw, 2.2, f"Share of the score of each layer. {said}")


def has_curve(log: Sequence[Json], key: str = "loss") -> bool:
    """Whether a log holds a line to draw, and not a single point."""
    return len(_curve(log, key)[0]) > 1


def _curve(log: Sequence[Json], key: str) -> tuple[list[int], list[float]]:
    entries = [e for e in log if isinstance(e.get(key), int | float) and math.isfinite(e[key])]
    return [e["step"] for e in entries], [e[key] for e in entries]


def _whisker(axes: Any, estimate: Json, place: float, number: int, label: str | None) -> None:
    low, high = _finite(estimate)
    color, mean = SERIES[number % len(SERIES)], estimate["mean"]
    axes.plot([low, high], [place, place], color=color, linewidth=1.8, solid_capstyle="round")
    style = {"color": color, "marker": _MARKERS[number % len(_MARKERS)], "markersize": 6 if number == 0 else 4.5}
    axes.plot([mean], [place], linestyle="none", label=label, clip_on=False, **style)
    for bound, arrow in ((estimate["low"], "<"), (estimate["high"], ">")):
        if bound is None:  # no bound is known: an arrow that points outwards
            axes.plot([mean], [place], linestyle="none", color=color, marker=arrow, markersize=9, fillstyle="none")


def _finite(estimate: Json) -> tuple[float, float]:
    mean = estimate["mean"]
    low, high = estimate.get("low"), estimate.get("high")
    return min(mean, mean if low is None else low), max(mean, mean if high is None else high)


def _categories(axes: Any, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), [_clip(label) for label in labels], color=INK)
    axes.set_ylim(len(labels) - 0.4, -0.6)  # the lowest rung on top, as in the table
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)


def _legend(axes: Any) -> None:
    handles, _ = axes.get_legend_handles_labels()
    columns = 2 if len(handles) == 4 else 3
    axes.figure.legend(loc="outside upper left", ncols=columns, handlelength=1.4, columnspacing=1.2, fontsize=8.5)


def _clip(label: str, limit: int = 22) -> str:
    return label if len(label) <= limit else label[: limit - 1] + "…"


def _estimate_text(estimate: Json, digits: int) -> str:
    return f"{format_fixed(estimate['mean'], digits)} {format_bounds(estimate, digits)}"


@contextmanager
def _settings(salt: str) -> Iterator[None]:
    with mpl.rc_context({**_RC, "svg.hashsalt": salt}), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing from", category=UserWarning
        )  # the page has the font
        yield


def _svg(name: str, draw: DrawFunction, height: float, text: str) -> Markup:
    """Draw and make it fit the page: its colors, its font, ids of its own, no XML head, no fixed size."""
    out = io.StringIO()
    with _settings(name):
        figure = Figure(figsize=(4.7, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    drawn = out.getvalue()
    view = re.search(r'viewBox="[^"]*"', drawn)
    inner = drawn[drawn.index(">", drawn.index("<svg")) + 1 : drawn.rindex("</svg>")]
    inner = re.sub(r"<metadata>.*?</metadata>", "", inner, flags=re.DOTALL)
    for color, variable in _STYLE.items():
        inner = inner.replace(color, variable)
    scope = re.sub(r"\W+", "-", name)
    inner = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{scope}-", inner)
    box = view.group() if view else ""
    return Markup(f'<svg class="plot" role="img" {box} aria-label="{escape(text)}">{inner}</svg>')  # noqa: S704
