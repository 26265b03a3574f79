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
from rung.data.chat import Chat
from rung.engine.progress import say
from rung.engine.record import RunFolder, is_climb, peak_memory_bytes, read_manifest, reset_peak_memory, write_json
from rung.errors import CheckpointError, ConfigError, RungError
from rung.evaluate.baselines import Framing
from rung.evaluate.task import PERPLEXITY, Evaluation, evaluate
from rung.model.load import Base
from rung.model.policy import Policy, Untouched
from rung.pipeline.asking import Asking
from rung.scoring.stats import Difference, Interval
from rung.scoring.verdict import Verdict, gain_over, score_of, verdict
from rung.spec.climb import UNTUNED, RungSpec
from rung.spec.evaluate import Context
from rung.spec.io import for_rung, to_dict
from rung.spec.method import FullSpec
from rung.spec.run import RunSpec
from rung.types import Record

CONTEXTS = {"given": "context", "withheld": "closed book", "retrieved": "retrieved passages"}
"""What the ladder calls what stands before the question, where any row has a context or passages are retrieved."""


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
    retrieval: dict[str, Any] | None = None
    """Where passages were retrieved: how often the right ones were, and from what."""
    instruction: str | None = None
    """The system turn of an untuned rung."""
    instructions: tuple[dict[str, Any], ...] = ()
    """Where it was chosen: each that was tried, with its scores on the validation split."""

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
        asking = Asking(self.spec, splits)
        fingerprints = {"data": splits.fingerprint}
        if asking.library is not None:
            fingerprints["documents"] = asking.library.fingerprint
            self._refuse_other("documents", fingerprints["documents"])
        self._fresh = base = opened.load(self.spec.model)
        fingerprints["base"] = base.fingerprint
        self._refuse_other("base", base.fingerprint)
        data = {context: self._shared(context, asking, base) for context in asking.contexts}
        own = next(iter(data.values()))
        asking.check_room(own.chat, base.context - self.spec.evaluate.max_new_tokens)
        resume = (self.path / "run.json").exists() and not self._overwrite
        claimed = RunFolder.claim(self.path, to_dict(self.spec), resume=resume, overwrite=self._overwrite)
        with closing(claimed) as folder:
            folder.manifest.pop("error", None)  # of an earlier try
            folder.update(climb=True, status="running", data=own.summary(), fingerprints=fingerprints)
            return self._climb(folder, data, asking)

    def _shared(self, context: Context, asking: Asking, base: Base) -> prepared.Data:
        """What rungs of a method without virtual tokens share: those take room, or stand inside the text."""
        evaluate = self.spec.evaluate.model_copy(update={"context": context})
        spec = self.spec.model_copy(update={"method": FullSpec(), "evaluate": evaluate})
        return prepared.tokenise(spec, asking.splits, base, asking.library)

    def _climb(self, folder: RunFolder, data: dict[Context, prepared.Data], asking: Asking) -> Ladder:
        try:
            for rung in self.spec.climb.rungs:
                self._measure(rung, data, asking)
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
            have = "have" if what == "documents" else "has"
            summary = f"the {what} {have} changed since this climb began"
            raise CheckpointError(summary, where=str(self.path), hint="start anew with --overwrite")

    def _folders(self, rung: RungSpec) -> list[Path]:
        """Where a rung's results stand: one folder a training seed."""
        seeds = 1 if rung.kind in UNTUNED else self.spec.climb.seeds
        return [rung_folder(self.path, rung, number, seeds) for number in range(seeds)]

    def _stored(self, rung: RungSpec) -> _Measured:
        """A finished rung, from its files."""
        folders = self._folders(rung)
        evaluations = tuple(Evaluation.read(folder / "items.jsonl") for folder in folders)
        costs = tuple(map(_result, folders))
        return _Measured(rung, evaluations, costs)

    def _measure(self, rung: RungSpec, data: dict[Context, prepared.Data], asking: Asking) -> None:
        """What is missing of one rung."""
        folders = self._folders(rung)
        for number, folder in enumerate(folders):
            if (folder / "result.json").exists():
                continue
            say(f"rung {rung.label}" + (f", seed {number}" if len(folders) > 1 else ""))
            if rung.kind in UNTUNED:
                self._ask(rung, folder, next(iter(data.values())).chat, asking)
            else:
                self._tune(rung, folder, number, data[asking.context(rung)], asking)

    def _ask(self, rung: RungSpec, folder: Path, chat: Chat, asking: Asking) -> None:
        """An untuned rung: the base with the strongest prompt the config has."""
        reset_peak_memory()
        policy = Policy(self._base(), Untouched())

        def score(records: Sequence[Record], framing: Framing) -> Evaluation:
            return evaluate(policy, chat, records, framing, self.spec.evaluate, title=rung.label)

        cost: dict[str, Any] = {"trainable_parameters": 0, "train_seconds": 0.0}
        instruction = self.spec.evaluate.instruction
        if asking.chooser == rung:
            cost |= asking.choose(rung, folder, score)
            instruction = cost["instruction"]
        elif asking.chooser is not None:
            instruction = _result(self._folders(asking.chooser)[0])["instruction"]
        asked = asking.of(rung, instruction)
        _store(folder, score(asked.records, asked.framing), {**cost, **asked.facts})

    def _tune(self, rung: RungSpec, folder: Path, number: int, data: prepared.Data, asking: Asking) -> None:
        """A tuned rung: a run in a folder of its own, then the bare question."""
        spec = for_rung(self.spec, rung, str(folder), self.spec.seed + number)
        begun = (folder / "run.json").exists()
        if begun and read_manifest(folder)["status"] == "finished":
            policy, chat, _ = opened.open_run(folder)
        else:
            base = self._base()
            own = data
            if hasattr(spec.method, "virtual_tokens"):
                own = prepared.tokenise(spec, asking.splits, base, asking.library)
            policy, _ = running.train_on(spec, base, own, resume=begun)
            self._fresh = None  # its model has been tuned
            chat = own.chat
        manifest = read_manifest(folder)
        asked = asking.of(rung, None)
        opened.widen_if_asked(policy, spec)
        result = evaluate(policy, chat, asked.records, asked.framing, spec.evaluate, title=rung.label)
        keys = ("trainable_parameters", "train_seconds", "tokens_per_second")
        _store(folder, result, {**{key: manifest[key] for key in keys}, **asked.facts})

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

    def mean(key: str) -> float:
        return float(np.mean([cost[key] for cost in costs]))

    return Row(
        rung=rung.label,
        kind=rung.kind,
        sees=_sees(costs[0]),
        scores={name: _score(evaluations, name) for name in spec.evaluate.metrics},
        gain=gain,
        trainable_parameters=int(costs[0]["trainable_parameters"]),
        train_seconds=mean("train_seconds"),
        peak_memory_bytes=int(max(cost["peak_memory_bytes"] for cost in costs)),
        prompt_tokens=float(np.mean([e.prompt_tokens for e in evaluations])),
        seconds_per_query=float(np.mean([e.seconds_per_query for e in evaluations])),
        folder=str(rung_folder(Path(spec.output), rung, 0, len(evaluations))),
        retrieval=costs[0].get("retrieval"),
        instruction=costs[0].get("instruction"),
        instructions=tuple(costs[0].get("instructions", ())),
    )


def _sees(facts: Mapping[str, Any]) -> str:
    """What stands in the prompt besides the question."""
    chosen = {"similarity": "nearest ", "coverage": "covering "}.get(str(facts.get("choose")), "")
    parts = [
        "instruction" if facts.get("instruction") else "",
        f"{facts['shots_each']} {chosen}shots" if facts.get("shots_each") else "",
        CONTEXTS.get(str(facts.get("context")), ""),
    ]
    return ", ".join(filter(None, parts)) or "the question"


def _score(evaluations: Sequence[Evaluation], metric: str) -> Interval:
    if len(evaluations) == 1:
        return evaluations[0].interval(metric)
    first = evaluations[0]
    table = np.stack([e.scores(metric) for e in evaluations])
    score = score_of(table, first.clusters, weights=first.weights(metric))
    if metric != PERPLEXITY:
        return score
    return replace(score, mean=math.exp(score.mean), low=math.exp(score.low), high=math.exp(score.high))


def _result(folder: Path) -> dict[str, Any]:
    """What `_store` wrote last."""
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def _store(folder: Path, result: Evaluation, cost: dict[str, Any]) -> None:
    """Keep a rung's items and, last, the file that says it is finished."""
    folder.mkdir(parents=True, exist_ok=True)
    result.write(folder / "items.jsonl")
    write_json(folder / "result.json", {**cost, **result.summary(), "peak_memory_bytes": peak_memory_bytes()})
