"""How lines are laid out on a terminal: as wide and as colourful as it is."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

PIPE_WIDTH = 120
"""Width where no terminal is attached: one line a rung, for logs and for grep."""


def table(heads: Sequence[str], gap: int = 1, left: Collection[int] = (0,)) -> Table:
    """An empty one; columns `left` are text, all others numbers."""
    made = Table(box=box.SIMPLE_HEAD, padding=(0, gap, 0, 0), pad_edge=False, header_style="bold", show_edge=False)
    for number, head in enumerate(heads):
        made.add_column(Text(head), justify="left" if number in left else "right", no_wrap=number not in left)
    return made


def render(parts: Callable[[Console], Sequence[RenderableType]]) -> list[str]:
    """What a console as wide and as colourful as the terminal shows, as lines."""
    attached = any(os.isatty(stream) for stream in (0, 1, 2)) or "COLUMNS" in os.environ
    width = Console().width if attached else PIPE_WIDTH
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=sys.stdout.isatty(), highlight=False)
    console.print(*parts(console), sep="\n")
    return [sayable(line.rstrip()) for line in out.getvalue().splitlines()]


def pairs(lines: Mapping[str, str]) -> list[str]:
    """Names on the left, values lined up on the right."""
    width = max(map(len, lines))
    hanging = "\n" + " " * (width + 4)
    return [sayable(f"  {name:<{width}}  {text}".replace("\n", hanging)) for name, text in lines.items()]


def sayable(line: str) -> str:
    """The line in letters this terminal has: a result must not be lost to its encoding."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return line.encode(encoding, "replace").decode(encoding)
