"""Does memory grow with the data? `.venv/bin/python -m benchmarks.memory_rows`: Rung on 1,000 and on 100,000 rows.

Two steps each, so that only reading, tokenizing and holding the rows differ. The peak of the whole process, watched
from outside, may differ by 5 %. Each run tokenizes anew, into a cache of its own. `--trace` says which lines hold the
memory.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import tracemalloc
from pathlib import Path

import yaml

from benchmarks.rows import make_rows
from benchmarks.runner import OURS, RunError
from benchmarks.runner import run as run_process
from benchmarks.workloads import BASE
from rung.files import cache_folder

COUNTS = (1_000, 100_000)
LIMIT = 0.05


def main() -> int:
    """0 when the two peaks are within the limit."""
    parser = argparse.ArgumentParser(prog="memory_rows", description="Peak memory of Rung by the number of rows.")
    parser.add_argument("--rows", type=int, nargs=2, default=COUNTS, metavar="N", help="fewer and more rows")
    parser.add_argument("--trace", action="store_true", help="what the larger data set holds, line by line")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if asked.trace:
            os.environ["RUNG_CACHE"] = str(fresh_cache(Path(folder)))
            print("\n".join(trace(write(Path(folder), max(asked.rows)))))
            return 0
        try:
            peaks = [measure(Path(folder), count) for count in asked.rows]
        except RunError as error:
            print(error, file=sys.stderr)
            return 2
    growth = peaks[1] / peaks[0] - 1
    print(f"{growth:+.1%} from {asked.rows[0]:,} to {asked.rows[1]:,} rows; at most {LIMIT:.0%} is allowed")
    return int(growth > LIMIT)


def write(folder: Path, count: int) -> Path:
    """Rows and a config of two steps."""
    rows, config = folder / f"{count}.jsonl", folder / f"{count}.yaml"
    with rows.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row.to_json()) + "\n" for row in make_rows(count))
    run_config = {
        "model": {"name": BASE, "dtype": "float32"},
        "data": {"path": str(rows), "validation": 0, "test": 0},
        "training": {"max_steps": 2, "examples_per_step": 8},
        "output": str(folder / f"run-{count}"),
    }
    config.write_text(yaml.safe_dump(run_config))
    return config


def fresh_cache(folder: Path, count: int = 0) -> Path:
    """A cache that holds the models and nothing tokenized."""
    cache = folder / f"cache-{count}"
    cache.mkdir()
    (cache / "models").symlink_to(cache_folder() / "models")
    return cache


def measure(folder: Path, count: int) -> int:
    """Peak of a whole run in bytes."""
    config = write(folder, count)
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    log = folder / f"{count}.log"
    done = run_process([OURS / "rung", "train", config], log, {**env, "RUNG_CACHE": str(fresh_cache(folder, count))})
    training = json.loads((folder / f"run-{count}" / "run.json").read_text())["peak_memory_bytes"]
    peaks = f"peak {done.peak_bytes / 1e9:.3f} GB, in the steps {training / 1e9:.3f} GB"
    print(f"{count:>8,} rows: {peaks}, {done.seconds:.0f} s", flush=True)
    return done.peak_bytes


def trace(config: Path) -> list[str]:
    """What reading and tokenizing hold in Python objects and arrays when they are done, and the most they held."""
    from rung.config.io import load_config
    from rung.runs.dataset import read_splits, tokenize_splits
    from rung.runs.load import load_base_on_device

    run_config = load_config(str(config)).config
    base = load_base_on_device(run_config.model)
    tracemalloc.start(1)
    splits = read_splits(run_config)
    read = tracemalloc.get_traced_memory()[0]
    data = tokenize_splits(run_config, splits, base)
    held, most = tracemalloc.get_traced_memory()
    lines = tracemalloc.take_snapshot().statistics("lineno")[:15]
    return [
        f"records {read / 1e6:.0f} MB; with examples {held / 1e6:.0f} MB; at most {most / 1e6:.0f} MB",
        *(f"{s.size / 1e6:8.1f} MB  {s.count:>8}  {s.traceback[0].filename}:{s.traceback[0].lineno}" for s in lines),
        f"{len(data.train.examples)} examples",
    ]


if __name__ == "__main__":
    sys.exit(main())
