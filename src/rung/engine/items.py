"""Scores of single items as a parquet file, from which every summary is computed: one row an item, one column a score.

Any other program reads it; what belongs to all items stands in the metadata of the file.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rung.errors import CheckpointError
from rung.held import write_bytes

SCORE = "score."
"""Before the name of a metric."""
_KEY = b"rung"


def write_items(path: Path, items: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    """Replace the file in one go; `scores` of an item, by metric, become columns. Raises `CheckpointError`."""
    import pyarrow as pa
    from pyarrow import parquet

    rows = [
        {
            **{name: value for name, value in item.items() if name != "scores"},
            **{SCORE + metric: score for metric, score in item["scores"].items()},
        }
        for item in items
    ]
    table = pa.Table.from_pylist(rows).replace_schema_metadata({_KEY: json.dumps(about)})
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    write_bytes(path, buffer.getvalue())


def read_items(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The items and what belongs to all of them. Raises `CheckpointError` where `write_items` wrote no such file."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
        about: dict[str, Any] = json.loads((table.schema.metadata or {})[_KEY])
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise CheckpointError(f"these are no scored items: {error}", where=str(path)) from error
    items = []
    for row in table.to_pylist():
        scores = {name.removeprefix(SCORE): row.pop(name) for name in list(row) if name.startswith(SCORE)}
        items.append({**row, "scores": scores})
    return items, about
