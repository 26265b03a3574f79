"""How high must I climb? Measures the rungs on one held-out test set and recommends the lowest that is enough."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rung import opened, prepared
from rung import run as running
from rung.data.split import Splits
from rung.engine.progress import say
from rung.engine.record import RunFolder, is_climb, peak_memory_bytes, read_manifest, reset_peak_memory, write_json
from rung.errors import CheckpointError, ConfigError, RungError
from rung.evaluate.baselines import Framing, choose_shots
from rung.evaluate.task import PERPLEXITY, Evaluation, evaluate, require_questions
from rung.model.load import Base
from rung.model.policy import Policy, Untouched
from rung.scoring.stats import Difference, Interval
from rung.scoring.verdict import Verdict, gain_over, score_of, verdict
from rung.spec.climb import RungSpec
from rung.spec.io import for_rung, to_dict
from rung.spec.method import FullSpec
from rung.spec.run import RunSpec
from rung.types import Record

UNTUNED = ("zero_shot", "few_shot")


@dataclass(frozen=True, slots=True)
class Row:
    """One rung of the printed ladder. Costs of a rung with several training seeds are means over them."""

    rung: str
    kind: str
    sees: str
    """What stands in the prompt besides the question."""
    scores: dict[str, Interval]
    gain: Difference | None
    """Paired difference to the rung below, in points of the deciding metric."""
    trainable_parameters: int
    train_seconds: float
    peak_memory_bytes: int
    prompt_tokens: float
    seconds_per_query: float
    folder: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **asdict(self),
            "scores": {name: interval.to_json() for name, interval in self.scores.items()},
            "gain": self.gain.to_json() if self.gain else None,
        }


@dataclass(frozen=True, slots=True)
class Ladder:
    """What `rung climb` measured."""

    rows: tuple[Row, ...]
    verdict: Verdict
    metric: str
    examples: int
    clusters: int
    folder: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "metric": self.metric,
            "examples": self.examples,
            "clusters": self.clusters,
            "ladder": [row.to_json() for row in self.rows],
            "verdict": self.verdict.to_json(),
            "folder": self.folder,
            "report": str(Path(self.folder) / "report.html"),
        }


@dataclass(frozen=True, slots=True)
class _Measured:
    """A rung's results: one evaluation per training seed, and what the runs cost."""

    spec: RungSpec
    evaluations: tuple[Evaluation, ...]
    costs: tuple[dict[str, Any], ...]


class Climb:
    """A climb in its folder. Finished rungs found there are not repeated; an unfinished one goes on."""

    def __init__(self, spec: RunSpec, *, overwrite: bool = False) -> None:
        self.spec = spec
        self.path = Path(spec.output)
        if spec.objective.kind == "reward":
            raise ConfigError("a reward model writes nothing that a ladder could score", where="objective.kind")
        for rung in spec.climb.rungs:  # a rung that cannot be is an error before anything is spent
            if rung.kind not in UNTUNED:
                for_rung(spec, rung, spec.output, spec.seed)
        resume = (self.path / "run.json").exists() and not overwrite
        if resume and not is_climb(self.path):
            raise CheckpointError(
                "this folder holds a single run, not a climb", where=str(self.path), hint="name another output=..."
            )
        RunFolder.check(self.path, to_dict(spec), resume=resume, overwrite=overwrite)
        self._overwrite = overwrite
        self._fresh: Base | None = None

    def run(self) -> Ladder:
        """Measure what is missing and judge the whole; with nothing missing, no model is loaded."""
        splits = prepared.read_splits(self.spec)
        self._refuse_other("data", splits.fingerprint)
        finished = all((f / "result.json").exists() for rung in self.spec.climb.rungs for f in self._folders(rung))
        if finished and not self._overwrite:
            return self._judge()
        records = opened.test_records(self.spec, splits)
        require_questions(records)
        for rung in self.spec.climb.rungs:
            self._shots(rung, splits)
        self._fresh = base = opened.load(self.spec.model)
        self._refuse_other("base", base.fingerprint)
        # rungs share what a method without virtual tokens reads: those take room, or stand inside the text
        data = prepared.tokenise(self.spec.model_copy(update={"method": FullSpec()}), splits, base)
        resume = (self.path / "run.json").exists() and not self._overwrite
        fingerprints = {"base": base.fingerprint, "data": splits.fingerprint}
        claimed = RunFolder.claim(self.path, to_dict(self.spec), resume=resume, overwrite=self._overwrite)
        with closing(claimed) as folder:
            return self._climb(folder, data, records, fingerprints)

    def _climb(
        self, folder: RunFolder, data: prepared.Data, records: Sequence[Record], fingerprints: Mapping[str, str]
    ) -> Ladder:
        folder.manifest.pop("error", None)  # of an earlier try
        folder.update(climb=True, status="running", data=data.summary(), fingerprints=fingerprints)
        try:
            for rung in self.spec.climb.rungs:
                self._measure(rung, data, records)
        except KeyboardInterrupt:
            folder.update(status="interrupted")
            raise
        except RungError as error:
            folder.update(status="failed", error=str(error))
            raise
        ladder = self._judge()
        folder.update(status="finished", ladder=ladder.to_json())
        return ladder

    def _judge(self) -> Ladder:
        return judge(self.spec, [self._stored(rung) for rung in self.spec.climb.rungs])

    def _refuse_other(self, what: str, fingerprint: str) -> None:
        """Rungs measured on other data or another base must not stand in one ladder."""
        known = (self.path / "run.json").exists() and not self._overwrite
        begun = read_manifest(self.path).get("fingerprints", {}) if known else {}
        if begun.get(what, fingerprint) != fingerprint:
            summary = f"the {what} has changed since this climb began"
            raise CheckpointError(summary, where=str(self.path), hint="start anew with --overwrite")

    def _folders(self, rung: RungSpec) -> list[Path]:
        """Where a rung's results stand: one folder a training seed."""
        seeds = 1 if rung.kind in UNTUNED else self.spec.climb.seeds
        return [rung_folder(self.path, rung, number, seeds) for number in range(seeds)]

    def _stored(self, rung: RungSpec) -> _Measured:
        """A finished rung, from its files."""
        folders = self._folders(rung)
        evaluations = tuple(Evaluation.read(folder / "items.parquet") for folder in folders)
        costs = tuple(json.loads((folder / "result.json").read_text()) for folder in folders)
        return _Measured(rung, evaluations, costs)

    def _measure(self, rung: RungSpec, data: prepared.Data, records: Sequence[Record]) -> None:
        """What is missing of one rung."""
        folders = self._folders(rung)
        for number, folder in enumerate(folders):
            if (folder / "result.json").exists():
                continue
            say(f"rung {rung.label}" + (f", seed {number}" if len(folders) > 1 else ""))
            if rung.kind in UNTUNED:
                self._ask(rung, folder, data, records)
            else:
                self._tune(rung, folder, number, data, records)

    def _ask(self, rung: RungSpec, folder: Path, data: prepared.Data, records: Sequence[Record]) -> None:
        """An untuned rung: the base with the strongest prompt the config has."""
        shots = self._shots(rung, data.splits)
        framing = Framing(self.spec.evaluate.instruction, shots, self.spec.evaluate.context == "given")
        reset_peak_memory()
        policy = Policy(self._base(), Untouched())
        result = evaluate(policy, data.chat, records, framing, self.spec.evaluate, title=rung.label)
        cost = {"trainable_parameters": 0, "train_seconds": 0.0, "shots": [str(shot.source) for shot in shots]}
        _store(folder, result, cost)

    def _shots(self, rung: RungSpec, splits: Splits) -> tuple[Record, ...]:
        """The worked examples of a rung; raises `DataError` when the training split has too few."""
        count = (rung.shots or self.spec.evaluate.shots) if rung.kind == "few_shot" else 0
        return choose_shots(splits.train, count, self.spec.seed)

    def _tune(self, rung: RungSpec, folder: Path, number: int, data: prepared.Data, records: Sequence[Record]) -> None:
        """A tuned rung: a run in a folder of its own, then the bare question."""
        spec = for_rung(self.spec, rung, str(folder), self.spec.seed + number)
        begun = (folder / "run.json").exists()
        if begun and read_manifest(folder)["status"] == "finished":
            policy, chat, _ = opened.open_run(folder)
        else:
            base = self._base()
            own = prepared.tokenise(spec, data.splits, base) if hasattr(spec.method, "virtual_tokens") else data
            policy, _ = running.train_on(spec, base, own, resume=begun)
            self._fresh = None  # its model has been tuned
            chat = own.chat
        manifest = read_manifest(folder)
        framing = Framing(context=spec.evaluate.context == "given")
        opened.widen_if_asked(policy, spec)
        result = evaluate(policy, chat, records, framing, spec.evaluate, title=rung.label)
        keys = ("trainable_parameters", "train_seconds", "tokens_per_second")
        _store(folder, result, {key: manifest[key] for key in keys})

    def _base(self) -> Base:
        """A base that no rung has touched."""
        if self._fresh is None:
            self._fresh = opened.load(self.spec.model)
        return self._fresh


def rung_folder(path: Path, rung: RungSpec, number: int, seeds: int) -> Path:
    """Where one of a rung's `seeds` runs stands inside a climb's folder."""
    inside = path / "rungs" / rung.slug
    return inside / f"seed-{number}" if seeds > 1 else inside


def judge(spec: RunSpec, measured: Sequence[_Measured]) -> Ladder:
    """The ladder and its verdict, from the stored per-item scores alone."""
    metric = spec.evaluate.metrics[0]
    first = measured[0].evaluations[0]
    for m in measured:
        if any(
            [(i.source, i.expected) for i in e.items] != [(i.source, i.expected) for i in first.items]
            for e in m.evaluations
        ):
            raise CheckpointError(f"rung {m.spec.label} answered other questions than the first", where=spec.output)
    weights = first.weights(metric)
    tables = [np.stack([e.scores(metric) for e in m.evaluations]) for m in measured]
    lower = metric == PERPLEXITY
    found = verdict(
        [(m.spec.label, table) for m, table in zip(measured, tables, strict=True)],
        math.log1p(spec.climb.margin) if lower else spec.climb.margin,
        math.log(spec.climb.target) if lower and spec.climb.target else spec.climb.target,
        clusters=first.clusters,
        weights=weights,
        in_nats=lower,
        seed=spec.seed,
    )
    rows = []
    for i, m in enumerate(measured):
        gain = gain_over(tables[i - 1], tables[i], first.clusters, weights=weights, seed=spec.seed) if i else None
        rows.append(_row(spec, m, gain))
    return Ladder(tuple(rows), found, metric, len(first.items), len(set(first.clusters)), spec.output)


def _row(spec: RunSpec, measured: _Measured, gain: Difference | None) -> Row:
    rung, evaluations, costs = measured.spec, measured.evaluations, measured.costs
    context = "context" if spec.evaluate.context == "given" and any(i.context for i in evaluations[0].items) else ""
    instruction = "instruction" if rung.kind in UNTUNED and spec.evaluate.instruction else ""
    shots = f"{len(costs[0]['shots'])} shots" if costs[0].get("shots") else ""

    def mean(key: str) -> float:
        return float(np.mean([cost[key] for cost in costs]))

    return Row(
        rung=rung.label,
        kind=rung.kind,
        sees=", ".join(part for part in (instruction, shots, context) if part) or "the question",
        scores={name: _score(evaluations, name) for name in spec.evaluate.metrics},
        gain=gain,
        trainable_parameters=int(costs[0]["trainable_parameters"]),
        train_seconds=mean("train_seconds"),
        peak_memory_bytes=int(max(cost["peak_memory_bytes"] for cost in costs)),
        prompt_tokens=float(np.mean([e.prompt_tokens for e in evaluations])),
        seconds_per_query=float(np.mean([e.seconds_per_query for e in evaluations])),
        folder=str(rung_folder(Path(spec.output), rung, 0, len(evaluations))),
    )


def _score(evaluations: Sequence[Evaluation], metric: str) -> Interval:
    if len(evaluations) == 1:
        return evaluations[0].interval(metric)
    first = evaluations[0]
    table = np.stack([e.scores(metric) for e in evaluations])
    score = score_of(table, first.clusters, weights=first.weights(metric))
    if metric != PERPLEXITY:
        return score
    return replace(score, mean=math.exp(score.mean), low=math.exp(score.low), high=math.exp(score.high))


def _store(folder: Path, result: Evaluation, cost: dict[str, Any]) -> None:
    """Keep a rung's items and, last, the file that says it is finished."""
    folder.mkdir(parents=True, exist_ok=True)
    result.write(folder / "items.parquet")
    write_json(folder / "result.json", {**cost, **result.summary(), "peak_memory_bytes": peak_memory_bytes()})
