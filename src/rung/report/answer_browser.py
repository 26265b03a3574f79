"""Answer browser: which items the report shows side by side.

A random sample would mostly show questions that all rungs answer alike. So items on which the rungs differ come first,
with every pattern of right and wrong in turn; filters select by who was right (only tuned, only with retrieval, none).
The page has no scripts, so filters work by CSS and every item is in the page: their number is limited. The choice is
deterministic. `html` calls `browse_answers`.
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
    """Result of one metric for one answer."""

    metric: str
    text: str
    tone: str
    """good, bad or plain."""


@dataclass(frozen=True, slots=True)
class ShownAnswer:
    """The answer of one rung."""

    rung: str
    text: str
    stopped: bool
    marks: tuple[MetricMark, ...]
    context: str | None = None
    """Context of this rung, where it differs from the context shown with the question."""
    reasoning: str = ""
    """Text before the answer, which is not scored."""


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
    """Keys of the filters that show it."""


@dataclass(frozen=True, slots=True)
class Filter:
    """A selection of items by who was right."""

    key: str
    label: str
    items: int
    """Number of matching items; at most `ITEMS_PER_FILTER` are on the page, `FIRST_ITEMS` for the first filter."""


@dataclass(frozen=True, slots=True)
class Browser:
    """Items of the answer browser with their filters."""

    filters: tuple[Filter, ...]
    """The first is active when the page opens; a single one is not shown as a choice."""
    examples: tuple[ShownExample, ...]
    differs: bool = False
    """True if the rungs differ on any item."""


# small on purpose: every item is in the page, with its context, and contexts can be long
FIRST_ITEMS, ITEMS_PER_FILTER = 10, 20
"""Items shown when the page opens, and items per further filter."""


def browse_answers(rungs: Sequence[MeasuredRung], metrics: Sequence[str]) -> Browser:
    """Items answered by every rung, ordered by who was right; deterministic for a folder.

    Rare patterns would drown in frequent ones, so patterns take turns, and within a pattern clusters do.
    """
    answered_rungs = [rung for rung in rungs if rung.items]
    if not answered_rungs:
        return Browser((), ())
    items_by_source = [{item["source"]: item for item in rung.items} for rung in answered_rungs]
    # rungs of an unfinished climb may have answered different limits
    shared_sources = [source for source in items_by_source[0] if all(source in items for items in items_by_source)]
    rows = [[items[source] for items in items_by_source] for source in shared_sources]
    order = _display_order(rows, metrics)
    differing = [i for i in order if _display_rank(rows[i], metrics) < 2]
    # without differences the first filter shows some of each pattern instead of an empty page
    filters_of_row = {i: ["differ"] for i in (differing or order)[:FIRST_ITEMS]}
    filters = [Filter("differ", "where they differ" if differing else "some of each", len(differing or order))]
    for key, label, matches in _available_filters(answered_rungs, metrics):
        matching_rows = [i for i in order if matches(_is_right(rows[i], metrics[0]))]
        if matching_rows:
            filters.append(Filter(key, label, len(matching_rows)))
        for i in matching_rows[:ITEMS_PER_FILTER]:
            filters_of_row.setdefault(i, []).append(key)
    labels = [rung.label for rung in answered_rungs]
    examples = [_example(rows[i], labels, metrics, filters_of_row[i]) for i in order if i in filters_of_row]
    return Browser(tuple(filters), tuple(examples), bool(differing))


AnswerFilter = tuple[str, str, Callable[[Sequence[bool]], bool]]
"""Key, label, and a predicate on which rungs were right."""


def _available_filters(rungs: Sequence[MeasuredRung], metrics: Sequence[str]) -> list[AnswerFilter]:
    """Filters that separate these rungs."""
    if not metrics or metrics[0] == PERPLEXITY:  # perplexity does not say who is right
        return []
    if len(rungs) == 1:
        return [("all", "right", all), ("none", "wrong", lambda well: not any(well))]

    def only(selected: Sequence[bool]) -> Callable[[Sequence[bool]], bool]:
        """A predicate: exactly rungs of the selection were right."""
        return lambda well: {True} == {is_selected for is_selected, right in zip(selected, well, strict=True) if right}

    tuned = [bool(rung.runs) for rung in rungs]
    retrieves = [rung.row.retrieval is not None for rung in rungs]
    filters: list[AnswerFilter] = []
    # a filter that can match nothing, or everything, is no choice
    if len(set(tuned)) > 1:
        filters.append(("tuned", "only tuned is right", only(tuned)))
        filters.append(("untuned", "only untuned is right", only([not is_selected for is_selected in tuned])))
    if len(set(retrieves)) > 1:
        filters.append(("found", "only with retrieval", only(retrieves)))
    return [*filters, ("all", "all right", all), ("none", "none right", lambda well: not any(well))]


def _display_order(rows: Sequence[Sequence[Item]], metrics: Sequence[str]) -> list[int]:
    """Indices of the rows in the order of display."""
    patterns = [_pattern(row, metrics[:1]) for row in rows]
    kinds = [_display_rank(row, metrics) for row in rows]
    # One counter for two turns: first of a cluster within its pattern, then of a row within its pattern.
    counts: Counter[Hashable] = Counter()

    def next_turn(key: Hashable) -> int:
        counts[key] += 1
        return counts[key]

    groups = [row[0].get("group") or row[0]["source"] for row in rows]
    turn_of_cluster = [next_turn(key) for key in zip(kinds, patterns, groups, strict=True)]
    # the index breaks ties, so the order is that of the data
    by_cluster = sorted(range(len(rows)), key=lambda i: (turn_of_cluster[i], i))
    turn = {i: next_turn((kinds[i], patterns[i])) for i in by_cluster}
    return sorted(range(len(rows)), key=lambda i: (kinds[i], turn[i], i))


def _display_rank(row: Sequence[Item], metrics: Sequence[str]) -> int:
    """0 where the rungs differ in the deciding metric, 1 where they differ in another one, 2 where they agree."""
    differences = [len(set(well)) > 1 for well in _pattern(row, metrics)]
    return 0 if differences[:1] == [True] else 1 if any(differences) else 2


def _pattern(row: Sequence[Item], metrics: Sequence[str]) -> tuple[tuple[bool, ...], ...]:
    """For each metric, which rungs are right: one boolean per rung."""
    return tuple(_is_right(row, metric) for metric in metrics)


def _is_right(row: Sequence[Item], metric: str) -> tuple[bool, ...]:
    if metric == PERPLEXITY:  # no answer is right by perplexity: the lowest one counts as right
        nats = [_nats(item) for item in row]
        best = min((n for n in nats if n is not None), default=None)
        return tuple(n == best for n in nats)
    # graded metrics (F1, ROUGE-L) count as right from one half on
    return tuple(item.get("scores", {}).get(metric, 0.0) >= 0.5 for item in row)


def _example(row: Sequence[Item], labels: Sequence[str], metrics: Sequence[str], filters: list[str]) -> ShownExample:
    first = row[0]
    contexts = Counter(item["context"] for item in row if item.get("context"))
    # The most common context is shown once with the question: only some rungs may have another one, or none.
    context = contexts.most_common(1)[0][0] if contexts else None
    answers = []
    for label, item in zip(labels, row, strict=True):
        text, stopped, item_context = item.get("answer", ""), bool(item.get("stopped", True)), item.get("context")
        shown_context = None if item_context == context else item_context
        reasoning = item.get("reasoning") or ""
        answers.append(ShownAnswer(label, text, stopped, _marks(item, metrics), shown_context, reasoning))
    question, expected = first.get("question", ""), first.get("expected", "")
    shown = (question, context, expected, tuple(answers), tuple(filters))
    return ShownExample(first["source"], first.get("group"), *shown)


def _marks(item: Item, metrics: Sequence[str]) -> tuple[MetricMark, ...]:
    marks = []
    for metric in metrics:
        score = _nats(item) if metric == PERPLEXITY else item.get("scores", {}).get(metric)
        if score is None:
            continue
        if is_binary(metric):
            marks.append(MetricMark(metric, "right" if score else "wrong", "good" if score else "bad"))
        else:
            text = f"{format_significant(score, 3)} nats per token" if metric == PERPLEXITY else f"{score:.2f}"
            marks.append(MetricMark(metric, text, "plain"))
    return tuple(marks)


def _nats(item: Item) -> float | None:
    nats = item.get("nats")
    return None if nats is None else float(nats) / (item.get("answer_tokens") or 1)
