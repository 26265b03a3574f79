"""Options that several commands have, and how a result is printed."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from rung.console import print_lines

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def show_result(value: Any, lines: list[str], as_json: bool) -> None:
    """Print one JSON object, or lines for people."""
    # default=str: paths, for example, have no JSON form
    print_lines([json.dumps(value, indent=2, default=str)] if as_json else lines)
