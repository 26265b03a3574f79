"""The ladder: what a climb measured, as rows with scores and costs, a verdict and diagnoses.

Everything is computed from the stored scores of single items, so that a finished climb can be read and printed again
without a model. The price is that no rung may answer other questions than the first: such a folder is refused. Fields
of `LadderRow` are keys of `--json` and `run.json`. `climb.py` stores and collects the rungs, `report` draws the ladder;
the statistics are in `scoring/recommendation.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rung.config.climb import UNTUNED, OnTopConfig, RungConfig
from rung.config.run import RunConfig
from rung.errors import CheckpointError
from rung.evaluation.evaluate import PERPLEXITY, Evaluation
from rung.report.tables import change_text
from rung.scoring.recommendation import Verdict, paired_gain, recommend, rung_score
from rung.scoring.stats import Difference, Interval
from rung.training.run_folder import peak_memory_bytes, write_json

CONTEXT_LABELS = {"given": "context", "withheld": "closed book", "retrieved": "retrieved passages"}
"""What the ladder calls each setting of `context`; it names none where no row has a context."""
AnyRung = RungConfig | OnTopConfig


@dataclass(frozen=True, slots=True)
class LadderRow:
    """One rung of the printed ladder. Times and tokens of several training seeds are means, memory and disk maxima."""

    rung: str
    kind: str
    sees: str
    """Content of the prompt besides the question."""
    scores: dict[str, Interval]
    gain: Difference | None
    """Paired difference to the rung below, in points of the deciding metric; None for the lowest."""
    trainable_parameters: int
    train_seconds: float
    """Includes the trials of a search."""
    peak_memory_bytes: int
    prompt_tokens: float
    seconds_per_query: float
    """Retrieval and answer together."""
    folder: str
    disk_bytes: int = 0
    """Size of the saved adapter or model."""
    retrieval: dict[str, Any] | None = None
    """Hit rate and source of the passages, if any were retrieved."""
    instruction: str | None = None
    """System turn of an untuned rung."""
    instructions: tuple[dict[str, Any], ...] = ()
    """The candidates with their scores on the validation split, on the rung that chose the instruction."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **asdict(self),
            "scores": {name: interval.to_json() for name, interval in self.scores.items()},
            "gain": self.gain.to_json() if self.gain else None,
        }


@dataclass(frozen=True, slots=True)
class SkippedRung:
    """A rung that was not measured, and the reason."""

    rung: str
    why: str


@dataclass(frozen=True, slots=True)
class NextRung:
    """What the rung right above the recommended one gains, and what it costs at every query and on disk."""

    rung: str
    above: str
    gain: Difference
    """Paired difference, in points of the deciding metric."""
    seconds_per_query: float
    prompt_tokens: float
    disk_bytes: int
    train_seconds: float

    @property
    def text(self) -> str:
        """One line for the terminal and the report."""
        points = f"{self.gain.mean:+.2f} [{self.gain.low:+.2f}, {self.gain.high:+.2f}]"
        costs = f"{self.seconds_per_query:+.2f} s and {self.prompt_tokens:+,.0f} prompt tokens a query"
        storage = f", {self.disk_bytes / 1e6:+,.0f} MB on disk, {self.train_seconds:,.0f} s of training"
        return f"{self.rung} instead of {self.above}: {points} points for {costs}{storage}"


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What the model lacks, read from a sure difference between two rungs."""

    lacks: Literal["knowledge", "behaviour"]
    lower: str
    upper: str
    difference: Difference

    @property
    def text(self) -> str:
        """One line, with the numbers behind it."""
        d = self.difference
        gain = f"{self.upper} over {self.lower}: {d.mean:+.2f} [{d.low:+.2f}, {d.high:+.2f}]"
        meaning = "it lacks what the passages say" if self.lacks == "knowledge" else "it lacks the way to answer"
        return f"{self.lacks}: {meaning} ({gain})"


@dataclass(frozen=True, slots=True)
class ForgettingResult:
    """Scores of a tuned rung on other data minus those of the model it started from."""

    rung: str
    data: str
    metrics: dict[str, Any]
    """For each metric both scores and their paired difference; for perplexity in nats per token."""

    @property
    def text(self) -> str:
        """One line for the terminal and the report."""
        changes = [f"{name} {change_text(name, change)}" for name, change in self.metrics.items()]
        return f"{self.rung} on {self.data}: {', '.join(changes)}"


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """A point of the learning curve: the score of a tuned rung with fewer training rows."""

    rung: str
    rows: int
    score: Interval
    train_seconds: float


@dataclass(frozen=True, slots=True)
class Ladder:
    """The result of `rung climb`."""

    rows: tuple[LadderRow, ...]
    verdict: Verdict
    metric: str
    examples: int
    clusters: int
    folder: str
    skipped_rungs: tuple[SkippedRung, ...] = ()
    next_rung: NextRung | None = None
    """None if the recommended rung is the highest, or none is recommended."""
    diagnoses: tuple[Diagnosis, ...] = ()
    curve: tuple[CurvePoint, ...] = ()
    forgetting: tuple[ForgettingResult, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values for `--json` and `run.json`."""
        # The keys are read by users' scripts and by the report of older runs, so they keep their names whatever the
        # fields are called.
        return {
            "metric": self.metric,
            "examples": self.examples,
            "clusters": self.clusters,
            "ladder": [row.to_json() for row in self.rows],
            "verdict": self.verdict.to_json(),
            "left": [asdict(rung) for rung in self.skipped_rungs],
            "further": self.next_rung
            and {**asdict(self.next_rung), "gain": self.next_rung.gain.to_json(), "text": self.next_rung.text},
            "curve": [{**asdict(point), "score": point.score.to_json()} for point in self.curve],
            "notes": [
                {**asdict(diagnosis), "difference": diagnosis.difference.to_json(), "text": diagnosis.text}
                for diagnosis in self.diagnoses
            ],
            "forgotten": [{**asdict(result), "text": result.text} for result in self.forgetting],
            "folder": self.folder,
            "report": str(Path(self.folder) / "report.html"),
        }


@dataclass(frozen=True, slots=True)
class MeasuredRung:
    """The results of a rung: one evaluation and one cost for each training seed."""

    config: AnyRung
    evaluations: tuple[Evaluation, ...]
    costs: tuple[dict[str, Any], ...]


def rung_folder(path: Path, rung: AnyRung, seed_index: int, seeds: int) -> Path:
    """The folder of one of a rung's `seeds` runs inside the folder of a climb."""
    folder = path / "rungs" / rung.slug
    return folder / f"seed-{seed_index}" if seeds > 1 else folder


def build_ladder(
    config: RunConfig, measured_rungs: Sequence[MeasuredRung], skipped_rungs: Sequence[SkippedRung] = ()
) -> Ladder:
    """The ladder and its verdict, from the stored scores of single items alone.

    Raises `CheckpointError` if the rungs did not answer the same questions.
    """
    metric = config.evaluation.metrics[0]
    first = measured_rungs[0].evaluations[0]
    # All differences are paired by position, so another order of the same questions would be as wrong as other ones.
    for m in measured_rungs:
        if any(
            [(i.source, i.expected) for i in e.items] != [(i.source, i.expected) for i in first.items]
            for e in m.evaluations
        ):
            raise CheckpointError(f"rung {m.config.label} answered other questions than the first", where=config.output)
    weights = first.weights(metric)
    tables = [np.stack([e.scores(metric) for e in m.evaluations]) for m in measured_rungs]
    lower_is_better = metric == PERPLEXITY
    # Perplexity is judged in nats per token, where differences are additive: a margin of 0.05 is then a perplexity 5 %
    # higher, and a target its logarithm.
    verdict = recommend(
        [(m.config.label, table) for m, table in zip(measured_rungs, tables, strict=True)],
        math.log1p(config.climb.margin) if lower_is_better else config.climb.margin,
        math.log(config.climb.target) if lower_is_better and config.climb.target else config.climb.target,
        clusters=first.clusters,
        weights=weights,
        in_nats=lower_is_better,
        seed=config.seed,
    )
    rows = []
    for i, m in enumerate(measured_rungs):
        gain = paired_gain(tables[i - 1], tables[i], first.clusters, weights=weights, seed=config.seed) if i else None
        rows.append(_row(config, m, gain))

    def gain_between(lower_index: int, upper_index: int) -> Difference:
        return paired_gain(tables[lower_index], tables[upper_index], first.clusters, weights=weights, seed=config.seed)

    return Ladder(
        *(tuple(rows), verdict, metric, len(first.items), len(set(first.clusters)), config.output),
        skipped_rungs=tuple(skipped_rungs),
        next_rung=_next_rung(rows, verdict, gain_between),
        diagnoses=tuple(_diagnoses(measured_rungs, rows, gain_between, lower_is_better=lower_is_better)),
    )


GainFunction = Callable[[int, int], Difference]
"""The paired difference of two rungs by their indices in the ladder: upper minus lower."""


def _next_rung(rows: Sequence[LadderRow], verdict: Verdict, gain_between: GainFunction) -> NextRung | None:
    """Gain and cost of the rung right above the recommended one; None if there is none."""
    names = [row.rung for row in rows]
    if verdict.recommended is None or verdict.recommended == names[-1]:
        return None
    index = names.index(verdict.recommended)
    recommended_row, next_row = rows[index], rows[index + 1]
    return NextRung(
        next_row.rung,
        recommended_row.rung,
        gain_between(index, index + 1),
        seconds_per_query=next_row.seconds_per_query - recommended_row.seconds_per_query,
        prompt_tokens=next_row.prompt_tokens - recommended_row.prompt_tokens,
        disk_bytes=next_row.disk_bytes - recommended_row.disk_bytes,
        # Not a difference: who already has the recommended rung still pays the whole training of the next one.
        train_seconds=next_row.train_seconds,
    )


def _diagnoses(
    measured_rungs: Sequence[MeasuredRung],
    rows: Sequence[LadderRow],
    gain_between: GainFunction,
    *,
    lower_is_better: bool,
) -> Iterator[Diagnosis]:
    """Where retrieval surely improves the same prompt, and where tuning surely improves on the same context."""
    kinds = [m.config.kind for m in measured_rungs]

    def is_better(difference: Difference) -> bool:
        return difference.high < 0 if lower_is_better else difference.low > 0

    contexts = [m.costs[0].get("context") for m in measured_rungs]
    # Each pair differs in the passages alone. A rung that is given the row's own context shows no lack of knowledge
    # and is no counterpart.
    for plain_kind, retrieval_kind in (("zero_shot", "rag"), ("few_shot", "few_shot+rag")):
        plain_rungs = [i for i, kind in enumerate(kinds) if kind == plain_kind and contexts[i] != "given"]
        if plain_rungs and retrieval_kind in kinds:
            pair = plain_rungs[0], kinds.index(retrieval_kind)
            if is_better(gain := gain_between(*pair)):
                yield Diagnosis("knowledge", rows[pair[0]].rung, rows[pair[1]].rung, gain)
    # A tuned rung against the best untuned one that sees the same context: what is left is the way to answer.
    for upper, m in enumerate(measured_rungs):
        same_context = [i for i, c in enumerate(contexts) if kinds[i] in UNTUNED and c == contexts[upper]]
        if m.config.kind in (*UNTUNED, "on_top") or not same_context:
            continue
        sign, metric = -1.0 if lower_is_better else 1.0, next(iter(rows[0].scores))
        best_untuned = max(same_context, key=lambda i: sign * rows[i].scores[metric].mean)
        if is_better(gain := gain_between(best_untuned, upper)):
            yield Diagnosis("behaviour", rows[best_untuned].rung, rows[upper].rung, gain)
            # The lowest rung that shows it is enough; higher ones would say the same again.
            return


def _row(config: RunConfig, measured_rung: MeasuredRung, gain: Difference | None) -> LadderRow:
    rung, evaluations, costs = measured_rung.config, measured_rung.evaluations, measured_rung.costs

    def mean(key: str) -> float:
        return float(np.mean([cost[key] for cost in costs]))

    # One search serves all training seeds, so its trials count once and not as a mean.
    search_seconds = float(sum(trial.get("seconds", 0.0) for trial in costs[0].get("search", {}).get("trials", ())))
    answer_seconds = float(np.mean([e.seconds_per_query for e in evaluations]))
    return LadderRow(
        rung=rung.label,
        kind=rung.kind,
        sees=_prompt_contents(costs[0]),
        scores={name: score_of_rung(evaluations, name) for name in config.evaluation.metrics},
        gain=gain,
        trainable_parameters=int(costs[0]["trainable_parameters"]),
        train_seconds=mean("train_seconds") + search_seconds,
        # The maximum, since the machine must have room for every seed.
        peak_memory_bytes=int(max(cost["peak_memory_bytes"] for cost in costs)),
        prompt_tokens=float(np.mean([e.prompt_tokens for e in evaluations])),
        seconds_per_query=answer_seconds + (costs[0].get("retrieval") or {}).get("seconds_per_query", 0.0),
        folder=str(rung_folder(Path(config.output), rung, 0, len(evaluations))),
        disk_bytes=int(max(cost.get("disk_bytes", 0) for cost in costs)),
        retrieval=costs[0].get("retrieval"),
        instruction=costs[0].get("instruction"),
        instructions=tuple(costs[0].get("instructions", ())),
    )


def _prompt_contents(facts: Mapping[str, Any]) -> str:
    """Content of the prompt besides the question, in words."""
    selection = {"similarity": "nearest ", "coverage": "covering "}.get(str(facts.get("example_selection")), "")
    parts = [
        "instruction" if facts.get("instruction") else "",
        f"{facts['shots_each']} {selection}shots" if facts.get("shots_each") else "",
        CONTEXT_LABELS.get(str(facts.get("context")), ""),
    ]
    return ", ".join(filter(None, parts)) or "the question"


def score_of_rung(evaluations: Sequence[Evaluation], metric: str) -> Interval:
    """Mean over items and training seeds; the spread between the seeds is part of the interval."""
    # With one seed the evaluation's own interval, which for perplexity is that of a ratio of sums.
    if len(evaluations) == 1:
        return evaluations[0].interval(metric)
    first = evaluations[0]
    table = np.stack([e.scores(metric) for e in evaluations])
    score = rung_score(table, first.clusters, weights=first.weights(metric))
    if metric != PERPLEXITY:
        return score
    # `rung_score` works in nats per token; a ladder shows perplexities.
    return replace(score, mean=math.exp(score.mean), low=math.exp(score.low), high=math.exp(score.high))


def read_rung_result(folder: Path) -> dict[str, Any]:
    """The `result.json` of a finished rung."""
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def store_rung_result(folder: Path, result: Evaluation, cost: dict[str, Any]) -> None:
    """Write the items of a rung, then its `result.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    result.write(folder / "items.parquet")
    # Written last: its existence means that the rung is finished.
    write_json(folder / "result.json", {**cost, **result.summary(), "peak_memory_bytes": peak_memory_bytes()})
