"""Formatting of numbers and terminal tables: 4.9M, 2.4 GB, 3 min 12 s, never more digits than are certain.

Digits follow the uncertainty: a score is rounded to what its interval supports, so a table never suggests a precision
that the test set does not have. Exact values are in the JSON output. All report modules and the terminal use it.
"""

from __future__ import annotations

import io
import math
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table

from rung.console import StyledLine, plain

if TYPE_CHECKING:  # the models of all results take 45 ms to import, which `rung plan` does not need
    from rung.results.base import Estimate

MISSING = "–"
"""Shown for a missing value."""


def format_count(number: float | None) -> str:
    """A count in two or three digits: 4884480 is 4.9M."""
    return _in_units(number, {"B": 1e9, "M": 1e6, "k": 1e3, "": 1.0})


def format_bytes(size: float | None) -> str:
    """Bytes in units of ten: 2411261952 is 2.4 GB."""
    return _in_units(size, {" TB": 1e12, " GB": 1e9, " MB": 1e6, " kB": 1e3, " B": 1.0})


def _in_units(number: float | None, units: Mapping[str, float]) -> str:
    """In the largest of the units that the number reaches; in the last one, of size 1, without decimals."""
    if number is None:
        return MISSING
    # 0.9995: 999,600 rounds to 1.0M, not to 1000k
    unit = next((unit for unit, size in units.items() if number >= 0.9995 * size), list(units)[-1])
    value = number / units[unit]
    return f"{value:.1f}{unit}" if value < 9.95 and units[unit] > 1.0 else f"{value:.0f}{unit}"


def format_duration(seconds: float | None) -> str:
    """A time in at most two units: 192 is 3 min 12 s."""
    if seconds is None:
        return MISSING
    # below ten seconds fractions matter; 9.95 would round to 10
    if seconds < 9.95:
        return f"{format_significant(seconds)} s"
    total = round(seconds)
    for (large, size), (small, part) in pairwise((("d", 86400), ("h", 3600), ("min", 60), ("s", 1))):
        if total >= size:
            return f"{total // size} {large} {total % size // part} {small}"
    return f"{total} s"


def format_significant(number: float, digits: int = 2) -> str:
    """Rounded to a number of significant digits: 0.6269 is 0.63, 1234 is 1234, 2.098e-05 is 2.1e-05."""
    if not math.isfinite(number):
        return str(number)
    if number == 0:
        return "0"
    size = math.floor(math.log10(abs(number)))
    # as Python's %g: below 0.0001 leading zeros are hard to count
    if size < -4:
        return f"{number:.{digits - 1}e}"
    return f"{number:.{max(0, digits - 1 - size)}f}"


def format_loss(nats: float | None) -> str:
    """A loss in nats per token."""
    return MISSING if nats is None else f"{nats:.3f}"


def format_p_value(p: float | None) -> str:
    """A p-value as text; empty if no valid test exists."""
    if p is None:
        return ""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def decimals(estimates: Iterable[Estimate | None]) -> int:
    """Decimals of a column of estimates, the same for all, so that it lines up: those of the least certain one.

    Rounding of the Particle Data Group: an error that begins with 100 to 354 keeps two digits, another one keeps one.
    """
    half_widths = [half for e in estimates if e and 0 < (half := (e.high - e.low) / 2) < math.inf]
    # 3.55: the rule's border between two digits and one, scaled; at most 4 decimals
    return min((max(0, min(4, math.ceil(-math.log10(half / 3.55)))) for half in half_widths), default=2)


def format_fixed(number: float, digits: int, *, signed: bool = False) -> str:
    """A number with a fixed number of decimals, without minus zero."""
    # -0.0 + 0.0 is 0.0
    rounded = round(number, digits) + 0.0
    return f"{rounded:{'+' if signed and rounded else ''}.{digits}f}"


def format_bounds(estimate: Estimate, digits: int) -> str:
    """The 95 % interval."""
    low_text = "(-∞" if math.isinf(estimate.low) else f"[{format_fixed(estimate.low, digits)}"
    high_text = "∞)" if math.isinf(estimate.high) else f"{format_fixed(estimate.high, digits)}]"
    return f"{low_text}, {high_text}"


def format_estimate(estimate: Estimate, digits: int | None = None, *, signed: bool = False) -> str:
    """The mean with its interval; by default with the decimals that the interval supports."""
    digits = decimals([estimate]) if digits is None else digits
    return f"{format_fixed(estimate.mean, digits, signed=signed)} {format_bounds(estimate, digits)}"


PIPE_WIDTH = 120
"""Width without a terminal: one line per rung, for logs and grep."""


def empty_table(heads: Sequence[str], gap: int = 1, text_columns: Collection[int] = (0,)) -> Table:
    """An empty table; `text_columns` are left-aligned text, all others right-aligned numbers."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, gap, 0, 0), pad_edge=False, header_style="bold", show_edge=False)
    for number, head in enumerate(heads):
        # numbers never wrap: half a number in the next line reads as another number
        is_text = number in text_columns
        table.add_column(plain(head), justify="left" if is_text else "right", no_wrap=not is_text)
    return table


def render_lines(parts: Callable[[Console], Sequence[RenderableType]]) -> list[str]:
    """The output of a console with the width and colors of the terminal, as lines; text of data must be `plain`."""
    # any stream: in `rung climb | less` stdout is a pipe, but a person reads it in a terminal
    attached = any(os.isatty(stream) for stream in (0, 1, 2)) or "COLUMNS" in os.environ
    width = Console().width if attached else PIPE_WIDTH
    buffer = io.StringIO()
    # colors only if stdout itself is a terminal: files must not contain escape codes
    console = Console(file=buffer, width=width, force_terminal=sys.stdout.isatty(), highlight=False)
    console.print(*parts(console), sep="\n")
    return [StyledLine(line.rstrip()) for line in buffer.getvalue().removesuffix("\n").split("\n")]


def name_value_table(lines: Mapping[str, str]) -> list[str]:
    """Lines of names on the left and aligned values on the right."""
    width = max(map(len, lines))
    hanging = "\n" + " " * (width + 4)
    return [f"  {name:<{width}}  {text}".replace("\n", hanging) for name, text in lines.items()]
