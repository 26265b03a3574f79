"""The ladder: what a climb measured, as rows with scores and costs, a verdict and diagnoses.

Everything is computed from the stored scores of single items, so that a finished climb can be read and printed again
without a model. The price is that no rung may answer other questions than the first: such a folder is refused.
`climb.py` stores and collects the rungs, `report` draws the ladder; the statistics are in `scoring/recommendation.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rung.config.climb import UNTUNED, OnTopConfig, RungConfig
from rung.config.climb_runs import model_titles
from rung.config.run import RunConfig
from rung.errors import CheckpointError
from rung.evaluation.evaluate import PERPLEXITY, Evaluation
from rung.results.base import Estimate
from rung.results.ladder import Diagnosis, Ladder, LadderModel, LadderRow, NextRung, SkippedRung, Verdict
from rung.runs.load import device
from rung.scoring.recommendation import paired_gain, recommend, rung_score
from rung.training.memory_use import peak_memory_bytes
from rung.training.run_folder import read_json, write_json

CONTEXT_LABELS = {"given": "context", "withheld": "closed book", "retrieved": "retrieved passages"}
"""What the ladder calls each setting of `context`; it names none where no row has a context."""
MAX_CUT_OFF = 0.1
"""Share of cut answers above which a verdict warns: beyond it cut answers alone can be a difference of 0.1."""
AnyRung = RungConfig | OnTopConfig
_COMPARED_COSTS = ("seconds_per_query", "prompt_tokens", "disk_bytes")


@dataclass(frozen=True, slots=True)
class MeasuredRung:
    """The results of a rung: one evaluation and one cost for each training seed."""

    config: AnyRung
    evaluations: tuple[Evaluation, ...]
    costs: tuple[dict[str, Any], ...]

    def table(self, metric: str) -> NDArray[np.float64]:
        """Scores [seeds, items]."""
        return np.stack([e.scores(metric) for e in self.evaluations])

    def score(self, metric: str) -> Estimate:
        """Mean over items and training seeds; the spread between the seeds is part of the interval."""
        first = self.evaluations[0]
        # With one seed the evaluation's own interval, which for perplexity is that of a ratio of sums.
        if len(self.evaluations) == 1:
            return first.interval(metric)
        in_nats = metric == PERPLEXITY
        score = rung_score(self.table(metric), first.clusters, weights=first.weights(metric), in_nats=in_nats)
        if not in_nats:
            return score
        # `rung_score` works in nats per token; a ladder shows perplexities.
        return score.replace(mean=math.exp(score.mean), low=math.exp(score.low), high=math.exp(score.high))


def rung_folder(path: Path, rung: AnyRung, seed_index: int, seeds: int) -> Path:
    """The folder of one of a rung's `seeds` runs inside the folder of a climb."""
    folder = path / "rungs" / rung.slug
    return folder / f"seed-{seed_index}" if seeds > 1 else folder


def build_ladder(
    config: RunConfig,
    measured_rungs: Sequence[MeasuredRung],
    skipped_rungs: Sequence[SkippedRung] = (),
    model_facts: Mapping[str, Mapping[str, Any]] | None = None,
) -> Ladder:
    """The ladder and its verdict, from the stored scores of single items alone.

    `model_facts` has parameters and license of each base, where there are several.

    Raises `CheckpointError` if the rungs did not answer the same questions.
    """
    metric, seed = config.evaluation.metrics[0], config.seed
    first = measured_rungs[0].evaluations[0]

    def questions(evaluation: Evaluation) -> list[tuple[str, str]]:
        return [(item.source, item.expected) for item in evaluation.items]

    # All differences are paired by position, so another order of the same questions would be as wrong as other ones.
    for m in measured_rungs:
        if any(questions(e) != questions(first) for e in m.evaluations):
            raise CheckpointError(f"rung {m.config.label} answered other questions than the first", where=config.output)
    weights, clusters = first.weights(metric), first.clusters
    tables = [m.table(metric) for m in measured_rungs]
    in_nats = metric == PERPLEXITY
    # Perplexity is judged in nats per token, where differences are additive: a margin of 0.05 is then a perplexity 5 %
    # higher, and a target its logarithm.
    margin, target = config.climb.margin, config.climb.target
    if in_nats:
        margin, target = math.log1p(margin), target and math.log(target)
    scores = [(m.config.label, table) for m, table in zip(measured_rungs, tables, strict=True)]
    verdict = recommend(scores, margin, target, clusters=clusters, weights=weights, in_nats=in_nats, seed=seed)

    def gain_between(lower_index: int, upper_index: int) -> Estimate:
        pair = tables[lower_index], tables[upper_index]
        return paired_gain(*pair, clusters, weights=weights, seed=seed, in_nats=in_nats)

    rows = [_row(config, m, gain_between(i - 1, i) if i else None) for i, m in enumerate(measured_rungs)]
    titles = _titles(config)
    if len(set(titles.values())) > 1:
        rows = [row.replace(model=titles[row.rung]) for row in rows]
    if warning := _cut_off_warning(rows):
        verdict = verdict.replace(text=f"{verdict.text}\n{warning}")
    return Ladder(
        metric=metric,
        examples=len(first.items),
        clusters=len(set(clusters)),
        rows=tuple(rows),
        models=tuple(_models(rows, model_facts or {})),
        verdict=verdict,
        skipped_rungs=tuple(skipped_rungs),
        next_rung=_next_rung(rows, verdict, gain_between),
        diagnoses=tuple(_diagnoses(measured_rungs, rows, gain_between)),
        folder=config.output,
        report=str(Path(config.output) / "report.html"),
    )


def _titles(config: RunConfig) -> dict[str, str]:
    """The base of every rung, by its label; a rung on top has that of the rung below it."""
    titles = model_titles(config)
    return {**titles, **{on_top.label: titles[on_top.base_rung] for on_top in config.climb.on_top}}


def _models(rows: Sequence[LadderRow], facts: Mapping[str, Mapping[str, Any]]) -> Iterator[LadderModel]:
    """The bases of a ladder with several, each with what its rungs take."""
    for title in dict.fromkeys(row.model for row in rows if row.model in facts):
        own = [row for row in rows if row.model == title]
        tokens, seconds = [row.prompt_tokens or 0.0 for row in own], [row.seconds_per_query or 0.0 for row in own]
        yield LadderModel(
            model=title,
            parameters=facts[title]["parameters"],
            license=facts[title]["license"],
            rungs=tuple(row.rung for row in own),
            peak_memory_bytes=max(row.peak_memory_bytes or 0 for row in own),
            prompt_tokens=(min(tokens), max(tokens)),
            seconds_per_query=(min(seconds), max(seconds)),
        )


def _cut_off_warning(rows: Sequence[LadderRow]) -> str:
    """What a verdict says of rungs whose answers were cut too often to be compared; empty where none were."""
    cut_rungs = [f"{row.rung} ({row.cut_off:.0%})" for row in rows if row.cut_off > MAX_CUT_OFF]
    if not cut_rungs:
        return ""
    remedy = "raise it before you trust this verdict"
    fault = "were cut at evaluation.max_new_tokens and are scored by the text they have"
    return f"Answers of {', '.join(cut_rungs)} {fault}: {remedy}."


GainFunction = Callable[[int, int], Estimate]
"""The paired difference of two rungs by their indices in the ladder: upper minus lower."""


def _next_rung(rows: Sequence[LadderRow], verdict: Verdict, gain_between: GainFunction) -> NextRung | None:
    """Gain and cost of the rung right above the recommended one; None if there is none."""
    names = [row.rung for row in rows]
    if verdict.recommended is None or verdict.recommended == names[-1]:
        return None
    index = names.index(verdict.recommended)
    recommended_row, next_row = rows[index], rows[index + 1]
    costs = {key: getattr(next_row, key) - getattr(recommended_row, key) for key in _COMPARED_COSTS}
    # Not a difference: who already has the recommended rung still pays the whole training of the next one.
    costs["train_seconds"] = next_row.train_seconds
    gain = gain_between(index, index + 1)
    points = f"{gain.mean:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}] points"
    query = f"{costs['seconds_per_query']:+.2f} s and {costs['prompt_tokens']:+,.0f} prompt tokens a query"
    storage = f"{costs['disk_bytes'] / 1e6:+,.0f} MB on disk, {costs['train_seconds']:,.0f} s of training"
    text = f"{next_row.rung} instead of {recommended_row.rung}: {points} for {query}, {storage}"
    if next_row.model != recommended_row.model:
        text += f", and the model {next_row.model} in place of {recommended_row.model}"
    return NextRung(rung=next_row.rung, above=recommended_row.rung, gain=gain, **costs, text=text)


def _diagnosis(lacks: Literal["knowledge", "behaviour"], lower: str, upper: str, gain: Estimate) -> Diagnosis:
    meaning = "it lacks what the passages say" if lacks == "knowledge" else "it lacks the way to answer"
    points = f"{upper} over {lower}: {gain.mean:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}]"
    text = f"{lacks}: {meaning} ({points})"
    return Diagnosis(lacks=lacks, lower=lower, upper=upper, difference=gain, text=text)


def _diagnoses(
    measured_rungs: Sequence[MeasuredRung], rows: Sequence[LadderRow], gain_between: GainFunction
) -> Iterator[Diagnosis]:
    """Where retrieval surely improves the same prompt, and where tuning surely improves on the same context."""
    kinds = [m.config.kind for m in measured_rungs]
    metric = next(iter(rows[0].scores))
    lower_is_better = metric == PERPLEXITY

    def is_better(difference: Estimate) -> bool:
        return difference.high < 0 if lower_is_better else difference.low > 0

    contexts = [m.costs[0].get("context") for m in measured_rungs]
    # Each pair differs in the passages alone: on one model, with examples from the same rows. A rung that is given the
    # row's own context shows no lack of knowledge and is no counterpart.
    sources = [(row.model, m.config.data) for row, m in zip(rows, measured_rungs, strict=True)]
    for plain_kind, retrieval_kind in (("zero_shot", "rag"), ("few_shot", "few_shot+rag")):
        plain_rungs = [i for i, kind in enumerate(kinds) if kind == plain_kind and contexts[i] != "given"]
        retrieval_rungs = [i for i, kind in enumerate(kinds) if kind == retrieval_kind]
        for lower, upper in _first_pairs(sources, plain_rungs, retrieval_rungs):
            if is_better(gain := gain_between(lower, upper)):
                yield _diagnosis("knowledge", rows[lower].rung, rows[upper].rung, gain)
    # A tuned rung against the best untuned one that sees the same context: what is left is the way to answer.
    for upper, m in enumerate(measured_rungs):
        untuned = [i for i, kind in enumerate(kinds) if kind in UNTUNED and rows[i].model == rows[upper].model]
        same_context = [i for i in untuned if contexts[i] == contexts[upper]]
        if m.config.kind in (*UNTUNED, "on_top") or not same_context:
            continue
        sign = -1.0 if lower_is_better else 1.0
        best_untuned = max(same_context, key=lambda i: sign * rows[i].scores[metric].mean)
        if is_better(gain := gain_between(best_untuned, upper)):
            yield _diagnosis("behaviour", rows[best_untuned].rung, rows[upper].rung, gain)
            # The lowest rung that shows it is enough; higher ones would say the same again.
            return


def _first_pairs(sources: Sequence[Any], lower: Sequence[int], upper: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Of each source the first rung among `lower` and the first among `upper`; rungs are numbers into `sources`."""
    for index in upper:
        is_first = all(sources[other] != sources[index] for other in upper if other < index)
        same_source = [other for other in lower if sources[other] == sources[index]]
        if is_first and same_source:
            yield same_source[0], index


def _row(config: RunConfig, measured_rung: MeasuredRung, gain: Estimate | None) -> LadderRow:
    rung, evaluations, costs = measured_rung.config, measured_rung.evaluations, measured_rung.costs
    # One search serves all training seeds, so its trials count once and not as a mean.
    search_seconds = float(sum(trial.get("seconds", 0.0) for trial in costs[0].get("search", {}).get("trials", ())))
    answer_seconds = float(np.mean([e.seconds_per_query for e in evaluations]))
    return LadderRow(
        rung=rung.label,
        kind=rung.kind,
        sees=_prompt_contents(costs[0]),
        cut_off=float(np.mean([e.cut_off / max(1, len(e.items)) for e in evaluations])),
        scores={name: measured_rung.score(name) for name in config.evaluation.metrics},
        gain=gain,
        trainable_parameters=int(costs[0]["trainable_parameters"]),
        train_seconds=float(np.mean([cost["train_seconds"] for cost in costs])) + search_seconds,
        # The maximum, since the machine must have room for every seed.
        peak_memory_bytes=int(max(cost["peak_memory_bytes"] for cost in costs)),
        prompt_tokens=float(np.mean([e.prompt_tokens for e in evaluations])),
        seconds_per_query=answer_seconds + (costs[0].get("retrieval") or {}).get("seconds_per_query", 0.0),
        folder=str(rung_folder(Path(config.output), rung, 0, len(evaluations))),
        disk_bytes=int(max(cost.get("disk_bytes", 0) for cost in costs)),
        classification=evaluations[0].classification,
        retrieval=costs[0].get("retrieval"),
        instruction=costs[0].get("instruction"),
        instructions=tuple(costs[0].get("instructions", ())),
    )


def _prompt_contents(facts: Mapping[str, Any]) -> str:
    """Content of the prompt besides the question, in words."""
    selection = {"similarity": "nearest ", "coverage": "covering "}.get(str(facts.get("example_selection")), "")
    shots = f"{facts['shots_each']} {selection}shots" if facts.get("shots_each") else ""
    parts = ("instruction" if facts.get("instruction") else "", shots, CONTEXT_LABELS.get(str(facts.get("context"))))
    contents = ", ".join(filter(None, parts)) or "the question"
    return f"{contents}, in place of the prompt of {facts['replaces']}" if facts.get("replaces") else contents


def read_result(folder: Path) -> dict[str, Any]:
    """The `result.json` of a finished rung."""
    return read_json(folder / "result.json")


def store_result(folder: Path, result: Evaluation, cost: dict[str, Any]) -> None:
    """Write the items of a rung, then its `result.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    result.write(folder / "items.parquet")
    # Written last: its existence means that the rung is finished.
    write_json(folder / "result.json", {**cost, **result.summary(), "peak_memory_bytes": peak_memory_bytes(device())})
