"""A run or climb folder as the report sees it. Pieces that are missing stay missing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from rung.config.climb import OnTopConfig, RungConfig
from rung.files import is_run_folder
from rung.scoring.metrics import METRICS
from rung.training.run_folder import read_items, read_manifest

PERPLEXITY = "perplexity"


@dataclass(frozen=True, slots=True)
class LoggedRun:
    """One training run."""

    label: str
    manifest: Mapping[str, Any]
    log: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class MeasuredRung:
    """One rung as measured. Of several training seeds, items are those of the first."""

    label: str
    row: Mapping[str, Any]
    """Its row of the ladder; of an unfinished climb, its `result.json`; empty when there is neither."""
    items: tuple[Mapping[str, Any], ...]
    cut_off: int | None
    """Answers that ended at `max_new_tokens`."""
    runs: tuple[LoggedRun, ...]


@dataclass(frozen=True, slots=True)
class ReportSource:
    """Everything a report is made of."""

    path: Path
    manifest: Mapping[str, Any]
    rungs: tuple[MeasuredRung, ...]
    """A single run is one rung."""

    @property
    def is_climb(self) -> bool:
        """Whether several rungs stand here."""
        return "climb" in self.manifest

    @property
    def ladder(self) -> Mapping[str, Any] | None:
        """What a finished climb concluded."""
        return self.manifest.get("ladder")

    @property
    def config(self) -> Mapping[str, Any]:
        """The resolved config."""
        config: Mapping[str, Any] = self.manifest.get("config", {})
        return config

    @property
    def runs(self) -> tuple[LoggedRun, ...]:
        """Every training run, all seeds of all rungs."""
        return tuple(run for rung in self.rungs for run in rung.runs)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Scores that were measured, the deciding one first."""
        return tuple(dict.fromkeys(name for rung in self.rungs for name in rung.row.get("scores", {})))


def read_report_source(path: Path) -> ReportSource:
    """Read a folder. Raises `CheckpointError` when it holds no run."""
    manifest = read_manifest(path)
    if "climb" not in manifest:
        run = LoggedRun("", manifest, _lines(path / "log.jsonl"))
        row = manifest.get("metrics", {})
        return ReportSource(path, manifest, (MeasuredRung("this run", row, _items(path), row.get("cut_off"), (run,)),))
    ladder = manifest.get("ladder")
    rungs = _finished(path, ladder) if ladder else _so_far(path, manifest.get("config", {}))
    return ReportSource(path, manifest, rungs)


def is_binary(metric: str) -> bool:
    """Whether an answer is simply right or wrong by it."""
    return metric in METRICS and METRICS[metric].binary


def _finished(path: Path, ladder: Mapping[str, Any]) -> tuple[MeasuredRung, ...]:
    rungs = []
    for row in ladder["ladder"]:
        # The climb may have been moved since: only the part below it counts.
        below = Path(row["folder"]).relative_to(ladder["folder"])
        rungs.append(_rung(row["rung"], path.joinpath(*below.parts[:2]), row))  # rungs/NAME, without seed-0
    return tuple(rungs)


def _so_far(path: Path, config: Mapping[str, Any]) -> tuple[MeasuredRung, ...]:
    """Rungs of an unfinished climb, in the order of its config."""
    climb = config.get("climb", {})
    rungs: list[RungConfig | OnTopConfig] = [RungConfig.model_validate(rung) for rung in climb.get("rungs", ())]
    rungs += [OnTopConfig.model_validate(then) for then in climb.get("on_top", ())]
    asked = {rung.slug: (number, rung.label) for number, rung in enumerate(rungs)}
    found = [p for p in (path / "rungs").glob("*") if p.is_dir()]
    found.sort(key=lambda p: (asked.get(p.name, (len(asked), ""))[0], p.name))
    return tuple(_rung(asked.get(p.name, (0, p.name))[1], p, None) for p in found)


def _rung(label: str, folder: Path, row: Mapping[str, Any] | None) -> MeasuredRung:
    seeds = sorted(folder.glob("seed-*"), key=lambda p: (len(p.name), p.name))
    places = seeds or [folder]
    result = _object(places[0] / "result.json")
    runs = tuple(
        LoggedRun(f"{label}, seed {i}" if seeds else label, read_manifest(place), _lines(place / "log.jsonl"))
        for i, place in enumerate(places)
        if is_run_folder(place)
    )
    return MeasuredRung(label, row or result, _items(places[0]), result.get("cut_off"), runs)


def _items(folder: Path) -> tuple[Mapping[str, Any], ...]:
    kept = next((folder / name for name in ("items.parquet", "eval.parquet") if (folder / name).exists()), None)
    return tuple(read_items(kept)[0]) if kept else ()


def _object(path: Path) -> Mapping[str, Any]:
    return _parse(path.read_text(encoding="utf-8")) or {} if path.exists() else {}


def _lines(path: Path) -> tuple[Mapping[str, Any], ...]:
    """Objects of a JSON lines file up to the first line that a kill left unfinished."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = map(_parse, text.split("\n"))  # not splitlines: U+2028 may stand unescaped inside a JSON string
    return tuple(line for line in takewhile(lambda line: line is not None, lines) if line is not None)


def _parse(text: str) -> Mapping[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
