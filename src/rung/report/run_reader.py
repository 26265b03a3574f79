"""Reader of a run or climb folder for the report.

Missing pieces stay missing: a report must also open for a run that failed or is still running, because that is when it
is needed most. So fields of a run have defaults and sections show what exists; only a value of a wrong type is refused.
`html` calls `read_report_source`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rung.config.climb import OnTopConfig, RungConfig
from rung.errors import CheckpointError
from rung.files import is_run_folder
from rung.results.ladder import Ladder, LadderRow
from rung.results.training import RunResult
from rung.scoring.metrics import BINARY_METRICS
from rung.training.run_folder import read_items, read_manifest

PERPLEXITY = "perplexity"


@dataclass(frozen=True, slots=True)
class LoggedRun:
    """One training run."""

    label: str
    result: RunResult
    log: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class MeasuredRung:
    """One measured rung. With several training seeds, items are those of the first seed."""

    label: str
    row: LadderRow
    """Its row of the ladder; in an unfinished climb its `result.json`; without scores if there is neither."""
    items: tuple[Mapping[str, Any], ...]
    cut_off: int | None
    """Answers truncated at `max_new_tokens`."""
    runs: tuple[LoggedRun, ...]


@dataclass(frozen=True, slots=True)
class ReportSource:
    """All data of a report."""

    path: Path
    result: RunResult
    """The manifest of the run or of the climb."""
    rungs: tuple[MeasuredRung, ...]
    """A single run is one rung."""
    is_climb: bool = False
    ladder: Ladder | None = None
    """The result of a finished climb."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The resolved config."""
        return self.result.config

    @property
    def climb_config(self) -> Mapping[str, Any]:
        """The `climb` section of the config; empty for a single run."""
        return self.config.get("climb") or {}

    @property
    def runs(self) -> tuple[LoggedRun, ...]:
        """Every training run, all seeds of all rungs."""
        return tuple(run for rung in self.rungs for run in rung.runs)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Measured metrics, the deciding one first."""
        return tuple(dict.fromkeys(name for rung in self.rungs for name in rung.row.scores))


def read_report_source(path: Path) -> ReportSource:
    """Read a folder. Raises `CheckpointError` when it holds no run, or values of another type than a run writes."""
    try:
        return _read_source(path, read_manifest(path))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        given = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        summary = "a result in this folder is not what a run writes"
        raise CheckpointError(summary, where=str(path), given=given) from None


def _run_result(manifest: Mapping[str, Any]) -> RunResult:
    """The manifest as a result; a null counts as missing, so that the default applies."""
    return RunResult.model_validate({name: value for name, value in manifest.items() if value is not None})


def _read_source(path: Path, manifest: Mapping[str, Any]) -> ReportSource:
    result = _run_result(manifest)
    # a single run is shown as a ladder of one rung, so that sections need no second case
    if "climb" not in manifest:
        run = LoggedRun("", result, _read_log(path / "log.jsonl"))
        row = LadderRow.model_validate({**manifest, **result.metrics}) if result.metrics else LadderRow()
        rung = MeasuredRung("this run", row, _read_items(path), result.metrics.get("cut_off"), (run,))
        return ReportSource(path, result, (rung,))
    stored = manifest.get("ladder") or {}
    # without rows: of an earlier version. The page then says that `rung climb` completes it, which trains nothing
    ladder = Ladder.model_validate(stored) if "rows" in stored else None
    rungs = _finished_rungs(path, ladder) if ladder else _unfinished_rungs(path, result.config)
    return ReportSource(path, result, rungs, is_climb=True, ladder=ladder)


def is_binary(metric: str) -> bool:
    """True if the metric scores only 0 and 1."""
    return metric in BINARY_METRICS


def _finished_rungs(path: Path, ladder: Ladder) -> tuple[MeasuredRung, ...]:
    # The climb may have been moved since: only the path relative to it is used, rungs/NAME without seed-0.
    folders = [path.joinpath(*Path(row.folder).relative_to(ladder.folder).parts[:2]) for row in ladder.rows]
    return tuple(_read_rung(row.rung, folder, row) for row, folder in zip(ladder.rows, folders, strict=True))


def _unfinished_rungs(path: Path, config: Mapping[str, Any]) -> tuple[MeasuredRung, ...]:
    """Rungs of an unfinished climb, in the order of its config."""
    climb = config.get("climb", {})
    rungs: list[RungConfig | OnTopConfig] = [RungConfig.model_validate(rung) for rung in climb.get("rungs", ())]
    rungs += [OnTopConfig.model_validate(rung) for rung in climb.get("on_top", ())]
    config_order = {rung.slug: (number, rung.label) for number, rung in enumerate(rungs)}
    folders = [p for p in (path / "rungs").glob("*") if p.is_dir()]
    # folders that the config does not name come last
    folders.sort(key=lambda p: (config_order.get(p.name, (len(config_order), ""))[0], p.name))
    return tuple(_read_rung(config_order.get(p.name, (0, p.name))[1], p, None) for p in folders)


def _read_rung(label: str, folder: Path, row: LadderRow | None) -> MeasuredRung:
    # by length first: seed-10 after seed-9
    seeds = sorted(folder.glob("seed-*"), key=lambda p: (len(p.name), p.name))
    run_folders = seeds or [folder]
    file = run_folders[0] / "result.json"
    result = (_parse(file.read_text(encoding="utf-8")) if file.exists() else None) or {}
    runs = []
    for i, run_folder in enumerate(run_folders):
        if is_run_folder(run_folder):
            run_label = f"{label}, seed {i}" if seeds else label
            log = _read_log(run_folder / "log.jsonl")
            runs.append(LoggedRun(run_label, _run_result(read_manifest(run_folder)), log))
    row = row or LadderRow.model_validate(result)
    return MeasuredRung(label, row, _read_items(run_folders[0]), result.get("cut_off"), tuple(runs))


def _read_items(folder: Path) -> tuple[Mapping[str, Any], ...]:
    # rungs of a climb write items.parquet, `rung eval` writes eval.parquet
    path = next((folder / name for name in ("items.parquet", "eval.parquet") if (folder / name).exists()), None)
    return tuple(read_items(path)[0]) if path else ()


def _read_log(path: Path) -> tuple[Mapping[str, Any], ...]:
    """Objects of a JSON Lines file up to the first line that a kill left incomplete."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = map(_parse, text.split("\n"))  # not splitlines: U+2028 may occur unescaped inside a JSON string
    return tuple(line for line in takewhile(lambda line: line is not None, lines) if line is not None)


def _parse(text: str) -> Mapping[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
