"""Which items to show side by side: those on which the rungs differ, each pattern of right and wrong in turn.

Others stand behind filters, by who was right: what only tuning gets right, what it lost, what only looking up finds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rung.report.formatting import format_significant
from rung.report.run_reader import PERPLEXITY, MeasuredRung, is_binary

Item = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class MetricMark:
    """One metric's judgement of one answer."""

    metric: str
    text: str
    tone: str
    """good, bad or plain."""


@dataclass(frozen=True, slots=True)
class ShownAnswer:
    """What one rung answered."""

    rung: str
    text: str
    stopped: bool
    marks: tuple[MetricMark, ...]
    context: str | None = None
    """What it saw, where that is not what stands with the question."""


@dataclass(frozen=True, slots=True)
class ShownExample:
    """One question with every rung's answer."""

    source: str
    group: str | None
    question: str
    context: str | None
    expected: str
    answers: tuple[ShownAnswer, ...]
    filters: tuple[str, ...] = ()
    """Keys of those that show it."""


@dataclass(frozen=True, slots=True)
class Filter:
    """Some of the items, by who was right."""

    key: str
    label: str
    items: int
    """All of them; no more than `EACH` are on the page, of the first no more than `FIRST`."""


@dataclass(frozen=True, slots=True)
class Browser:
    """Items to look through."""

    filters: tuple[Filter, ...]
    """The first is what stands there before anybody chooses; a single one is no choice."""
    examples: tuple[ShownExample, ...]
    apart: bool = False
    """Whether the rungs differ on any item."""


FIRST, EACH = 10, 20
"""Items on the page at first, and for each filter."""


def browse_answers(rungs: Sequence[MeasuredRung], metrics: Sequence[str]) -> Browser:
    """Items that every rung answered, by who was right; the same folder always gives the same ones.

    Rare patterns would drown in frequent ones, so patterns take turns, and within one so do the clusters.
    """
    shown = [rung for rung in rungs if rung.items]
    if not shown:
        return Browser((), ())
    answered = [{item["source"]: item for item in rung.items} for rung in shown]
    shared = [source for source in answered[0] if all(source in items for items in answered)]
    rows = [[items[source] for items in answered] for source in shared]
    order = _display_order(rows, metrics)
    apart = [i for i in order if _interest(rows[i], metrics) < 2]
    on = {i: ["differ"] for i in (apart or order)[:FIRST]}
    filters = [Filter("differ", "where they differ" if apart else "some of each", len(apart or order))]
    for key, label, holds in _available_filters(shown, metrics):
        found = [i for i in order if holds(_did_well(rows[i], metrics[0]))]
        if found:
            filters.append(Filter(key, label, len(found)))
        for i in found[:EACH]:
            on.setdefault(i, []).append(key)
    labels = [rung.label for rung in shown]
    return Browser(
        tuple(filters), tuple(_example(rows[i], labels, metrics, on[i]) for i in order if i in on), bool(apart)
    )


def _available_filters(
    rungs: Sequence[MeasuredRung], metrics: Sequence[str]
) -> list[tuple[str, str, Callable[[Sequence[bool]], bool]]]:
    """Filters that these rungs can be told apart by: a key, what it says, and whether it holds of who was right."""
    if not metrics or metrics[0] == PERPLEXITY:  # by which no answer is right
        return []
    if len(rungs) == 1:
        return [("all", "right", all), ("none", "wrong", lambda well: not any(well))]

    def only(those: Sequence[bool]) -> Callable[[Sequence[bool]], bool]:
        """Whether some of these were right, and none of the others."""
        return lambda well: {True} == {own for own, right in zip(those, well, strict=True) if right}

    tuned = [bool(rung.runs) for rung in rungs]
    found = [bool(rung.row.get("retrieval")) for rung in rungs]
    kinds: list[tuple[str, str, Callable[[Sequence[bool]], bool]]] = []
    if len(set(tuned)) > 1:
        kinds.append(("tuned", "only tuned is right", only(tuned)))
        kinds.append(("untuned", "only untuned is right", only([not own for own in tuned])))
    if len(set(found)) > 1:
        kinds.append(("found", "only with retrieval", only(found)))
    return [*kinds, ("all", "all right", all), ("none", "none right", lambda well: not any(well))]


def _display_order(rows: Sequence[Sequence[Item]], metrics: Sequence[str]) -> list[int]:
    """Numbers of the rows, those to show first in front."""
    patterns = [_pattern(row, metrics[:1]) for row in rows]
    kinds = [_interest(row, metrics) for row in rows]
    seen: Counter[Hashable] = Counter()
    turn_of_cluster = []
    for i, row in enumerate(rows):
        key = (kinds[i], patterns[i], row[0].get("group") or row[0]["source"])
        turn_of_cluster.append(seen[key])
        seen[key] += 1
    by_cluster = sorted(range(len(rows)), key=lambda i: (turn_of_cluster[i], i))
    turn: dict[int, int] = {}
    for i in by_cluster:
        turn[i] = seen[kinds[i], patterns[i]]
        seen[kinds[i], patterns[i]] += 1
    return sorted(range(len(rows)), key=lambda i: (kinds[i], turn[i], i))


def _interest(row: Sequence[Item], metrics: Sequence[str]) -> int:
    """0 where the rungs differ by the deciding metric, 1 where they differ by another one, 2 where they agree."""
    judged = [len(set(well)) > 1 for well in _pattern(row, metrics)]
    return 0 if judged[:1] == [True] else 1 if any(judged) else 2


def _pattern(row: Sequence[Item], metrics: Sequence[str]) -> tuple[tuple[bool, ...], ...]:
    """Who did well, by each metric: a row of booleans, one a rung."""
    return tuple(_did_well(row, metric) for metric in metrics)


def _did_well(row: Sequence[Item], metric: str) -> tuple[bool, ...]:
    if metric == PERPLEXITY:  # no answer is right by it: the likeliest is told from the rest
        nats = [_nats(item) for item in row]
        best = min((n for n in nats if n is not None), default=None)
        return tuple(n == best for n in nats)
    return tuple(item.get("scores", {}).get(metric, 0.0) >= 0.5 for item in row)


def _example(
    row: Sequence[Item], labels: Sequence[str], metrics: Sequence[str], filters: Sequence[str]
) -> ShownExample:
    first = row[0]
    seen = Counter(item["context"] for item in row if item.get("context"))
    # The context may be withheld from one rung only: it is the item's all the same.
    context = seen.most_common(1)[0][0] if seen else None
    answers = tuple(
        ShownAnswer(
            label,
            item.get("answer", ""),
            bool(item.get("stopped", True)),
            _marks(item, metrics),
            own if (own := item.get("context")) != context else None,
        )
        for label, item in zip(labels, row, strict=True)
    )
    question, expected = first.get("question", ""), first.get("expected", "")
    return ShownExample(first["source"], first.get("group"), question, context, expected, answers, tuple(filters))


def _marks(item: Item, metrics: Sequence[str]) -> tuple[MetricMark, ...]:
    marks = []
    for metric in metrics:
        if metric == PERPLEXITY:
            if (nats := _nats(item)) is not None:
                marks.append(MetricMark(metric, f"{format_significant(nats, 3)} nats per token", "plain"))
        elif (score := item.get("scores", {}).get(metric)) is not None:
            if is_binary(metric):
                marks.append(MetricMark(metric, "right" if score else "wrong", "good" if score else "bad"))
            else:
                marks.append(MetricMark(metric, f"{score:.2f}", "plain"))
    return tuple(marks)


def _nats(item: Item) -> float | None:
    nats = item.get("nats")
    return None if nats is None else float(nats) / (item.get("answer_tokens") or 1)
