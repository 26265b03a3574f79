"""Numbers as people read them: 4.9M, 2.4 GB, 3 min 12 s, and never more digits than are known."""

from __future__ import annotations

import io
import math
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

Json = Mapping[str, Any]
MISSING = "–"
"""Stands where there is nothing to say."""


def format_count(number: float | None) -> str:
    """A count in two or three digits: 4884480 is 4.9M."""
    if number is None:
        return MISSING
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            return f"{_short(number / size)}{unit}"
    return f"{number:.0f}"


def format_bytes(size: float | None) -> str:
    """Bytes in units of ten: 2411261952 is 2.4 GB."""
    if size is None:
        return MISSING
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= 0.9995 * scale:
            return f"{_short(size / scale)} {unit}"
    return f"{size:.0f} B"


def format_duration(seconds: float | None) -> str:
    """A time in at most two units: 192 is 3 min 12 s."""
    if seconds is None:
        return MISSING
    if seconds < 9.95:
        return f"{format_significant(seconds)} s"
    whole = round(seconds)
    for (large, size), (small, part) in (
        (("d", 86400), ("h", 3600)),
        (("h", 3600), ("min", 60)),
        (("min", 60), ("s", 1)),
    ):
        if whole >= size:
            return f"{whole // size} {large} {whole % size // part} {small}"
    return f"{whole} s"


def format_significant(number: float, digits: int = 2) -> str:
    """Rounded to a number of significant digits: 0.6269 is 0.63, 1234 is 1234, 2.098e-05 is 2.1e-05."""
    if not math.isfinite(number):
        return str(number)
    if number == 0:
        return "0"
    size = math.floor(math.log10(abs(number)))
    if size < -4:
        return f"{number:.{digits - 1}e}"
    return f"{number:.{max(0, digits - 1 - size)}f}"


def format_loss(nats: float | None) -> str:
    """A loss in nats per token."""
    return MISSING if nats is None else f"{nats:.3f}"


def format_p_value(p: float | None) -> str:
    """Empty when no test is valid."""
    if p is None:
        return ""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def decimals(estimates: Iterable[Json | None]) -> int:
    """Decimals that a column of estimates can bear, so that it lines up: those of the least certain one.

    Rounding of the Particle Data Group: an error that begins with 100 to 354 keeps two digits, another one keeps one.
    """
    known = [half for e in estimates if e and (half := _half_width(e))]
    return min((max(0, min(4, math.ceil(-math.log10(half / 3.55)))) for half in known), default=2)


def format_fixed(number: float, digits: int, *, signed: bool = False) -> str:
    """A number with a number of decimals and no minus zero."""
    rounded = round(number, digits) + 0.0
    return f"{rounded:{'+' if signed and rounded else ''}.{digits}f}"


def format_bounds(estimate: Json, digits: int) -> str:
    """The 95 % interval; a bound that is null is infinite."""
    low, high = estimate.get("low"), estimate.get("high")
    left = "(-∞" if low is None else f"[{format_fixed(low, digits)}"
    right = "∞)" if high is None else f"{format_fixed(high, digits)}]"
    return f"{left}, {right}"


def _half_width(estimate: Json) -> float | None:
    low, high = estimate.get("low"), estimate.get("high")
    return None if low is None or high is None else float(high - low) / 2


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


PIPE_WIDTH = 120
"""Width where no terminal is attached: one line a rung, for logs and for grep."""


def empty_table(heads: Sequence[str], gap: int = 1, left: Collection[int] = (0,)) -> Table:
    """An empty one; columns `left` are text, all others numbers."""
    made = Table(box=box.SIMPLE_HEAD, padding=(0, gap, 0, 0), pad_edge=False, header_style="bold", show_edge=False)
    for number, head in enumerate(heads):
        made.add_column(Text(head), justify="left" if number in left else "right", no_wrap=number not in left)
    return made


def render_lines(parts: Callable[[Console], Sequence[RenderableType]]) -> list[str]:
    """What a console as wide and as colorful as the terminal shows, as lines."""
    attached = any(os.isatty(stream) for stream in (0, 1, 2)) or "COLUMNS" in os.environ
    width = Console().width if attached else PIPE_WIDTH
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=sys.stdout.isatty(), highlight=False)
    console.print(*parts(console), sep="\n")
    return [encodable_on_terminal(line.rstrip()) for line in out.getvalue().splitlines()]


def name_value_table(lines: Mapping[str, str]) -> list[str]:
    """Names on the left, values lined up on the right."""
    width = max(map(len, lines))
    hanging = "\n" + " " * (width + 4)
    return [encodable_on_terminal(f"  {name:<{width}}  {text}".replace("\n", hanging)) for name, text in lines.items()]


def encodable_on_terminal(line: str) -> str:
    """The line in letters this terminal has: a result must not be lost to its encoding."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return line.encode(encoding, "replace").decode(encoding)
