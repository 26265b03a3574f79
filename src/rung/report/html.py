"""HTML report: one self-contained page about a run or a climb.

No scripts and no external resources: the page can be mailed or archived and opens offline; the price is that plots are
inline SVG and not interactive. The same folder always gives the same bytes, so reports can be compared by diff.
`cli` calls `write_report`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from rung.console import visible
from rung.files import write_bytes
from rung.report import sections
from rung.report.answer_browser import FIRST_ITEMS, ITEMS_PER_FILTER, browse_answers
from rung.report.run_reader import ReportSource, read_report_source

SECTIONS: tuple[Callable[[ReportSource], Any], ...] = (
    *(sections.status, sections.facts, sections.ladder, sections.models),
    *(sections.difference_plot, sections.score_plots),
    *(
        sections.cost_plots,
        sections.learning_curve_plots,
        sections.further_findings,
        sections.retrieval,
        sections.harness,
        sections.classes,
    ),
    *(sections.instructions, sections.curves, sections.layers, sections.training_summaries, sections.data),
    *(sections.gates, sections.versions, sections.config),
)
"""What the template shows, each under the name of its function."""


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run or climb folder atomically, and return its path.

    The same folder always gives the same bytes. Raises `CheckpointError` when the folder holds no run or cannot be
    written to.
    """
    target = folder / "report.html"
    page = render_page(read_report_source(folder))
    write_bytes(target, page.encode("utf-8", "replace"))  # data may hold lone surrogates
    return target


def render_page(source: ReportSource) -> str:
    """The page as HTML text."""
    parts: dict[str, Any] = {section.__name__: section(source) for section in SECTIONS}
    parts |= {"title": source.path.resolve().name, "source": source, "first": FIRST_ITEMS, "each": ITEMS_PER_FILTER}
    return page_template("template.html").render(browser=browse_answers(source.rungs, source.metrics), **parts)


@cache
def page_template(name: str) -> Template:
    """A template of this folder, in which all values are escaped."""
    loader = FileSystemLoader(Path(__file__).parent)
    # StrictUndefined: a misspelled name in the template raises, instead of leaving a gap in the page
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, finalize=html_text)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.filters["minus"] = _typeset_minus
    environment.filters["present"] = _without_missing
    return environment.get_template(name)


def html_text(value: Any) -> Any:
    """A value of the page: text as `visible` shows it, which the template then escapes; markup of the report itself."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _typeset_minus(text: str) -> str:
    """Replace hyphens by minus signs."""
    return text.replace("-", "\u2212")


def _without_missing(pairs: Mapping[str, Any]) -> dict[str, Any]:
    """The pairs without empty values."""
    return {name: value for name, value in pairs.items() if value not in (None, "")}
