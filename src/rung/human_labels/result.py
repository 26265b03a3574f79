"""What people said: gold, agreement, consistency and bias of each person, and preferences between systems.

Every figure is computed from the votes alone, so `rung label result` may be asked at any time while people label.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean, median

from rung.errors import ConfigError
from rung.files import write_json_lines
from rung.human_labels.data import LabelData, LabeledVote, Unit, labels_by_unit, read_label_folder
from rung.human_labels.exchange import read_exchange_file
from rung.human_labels.exports import EXPORTS, export_rows
from rung.human_labels.items import items_that_name_models
from rung.human_labels.store import is_label_folder
from rung.results.base import Estimate
from rung.results.labels import Disagreement, LabelResult, PairAgreement, PersonResult, SystemStrength
from rung.scoring.agreement import Label, cohen_kappa, krippendorff_alpha, percent_agreement
from rung.scoring.bradley_terry import Comparisons, make_comparisons, strengths, unconnected_groups, win_rates
from rung.scoring.pairwise import OUTCOME_VALUES, majority
from rung.scoring.stats import score_interval

MAX_PAIRED_PEOPLE = 20
"""People up to which every two are compared; alpha is of all, however many."""


def label_result(
    source: str | Path, *, export: str | None = None, output: Path | None = None, min_people: int = 1
) -> LabelResult:
    """The result of a labeling folder or of a file of another tool; with `export` its rows are written to `output`.

    `min_people` exports only what at least so many people labeled. Raises `ConfigError` for an export that the kind of
    labels does not have and for a file that exists, `DataError` for a file that cannot be read.
    """
    if (export is None) != (output is None):
        missing = "--output" if output is None else "--export"
        raise ConfigError("an export has a kind and a file", where=missing, allowed=", ".join(EXPORTS))
    if export is None and min_people > 1:
        raise ConfigError("min_people is of an export", where="--min-people", given=min_people)
    if output is not None and output.exists():
        raise ConfigError("this file exists already", where="--output", given=str(output))
    data = read_labels(source)
    result = summarize_labels(data)
    if export is None or output is None:
        return result
    rows = export_rows(data, export, min_people)
    write_json_lines(output, rows)
    return result.replace(exported=len(rows), output=str(output))


def read_labels(source: str | Path) -> LabelData:
    """The votes of a folder, or of a file of another tool."""
    folder = Path(source)
    if not folder.exists():
        hint = "a folder of rung label, or a file that another tool exported"
        raise ConfigError("no labels are here", where=str(source), hint=hint)
    if is_label_folder(folder) or folder.is_dir():
        return read_label_folder(folder)
    return read_exchange_file(folder)


def summarize_labels(data: LabelData) -> LabelResult:
    """All figures of the votes."""
    units = labels_by_unit(data)
    several = {unit: labels for unit, labels in units.items() if len(labels) > 1}
    majorities = {unit: majority([_label(value) for value in labels.values()]) for unit, labels in several.items()}
    return LabelResult(
        source=data.source,
        kind=data.kind,
        items=len(data.items),
        tasks=len({vote.task for vote in data.first_votes}),
        votes=sum(vote.vote.kind != "skipped" for vote in data.votes),
        people=tuple(_people(data)),
        gold=sum(value is not None for value in majorities.values()),
        undecided=sum(value is None for value in majorities.values()),
        alpha=_alpha(data, several),
        pairs=tuple(_pair_agreements(data, several)),
        both_bad=sum(vote.vote.is_bad for vote in data.first_votes),
        systems=tuple(system_strengths(data)),
        unconnected=_unconnected(data),
        disagreements=tuple(_disagreements(data, several)),
        names_models=len(items_that_name_models(data.items.values())),
    )


def _alpha(data: LabelData, several: Mapping[Unit, Mapping[str, object]]) -> Estimate | None:
    if not several:
        return None
    # alpha does not ask who said what: a column for each of thousands of people would not fit into memory
    width = max(map(len, several.values()))
    ratings = [[*map(_label, labels.values()), *[None] * (width - len(labels))] for labels in several.values()]
    return krippendorff_alpha(ratings, _clusters(data, several), is_scale=data.kind == "rate")


def _pair_agreements(data: LabelData, several: Mapping[Unit, Mapping[str, object]]) -> list[PairAgreement]:
    found = []
    if len(data.people) > MAX_PAIRED_PEOPLE:
        return []
    for first, second in combinations(data.people, 2):
        both = {unit: labels for unit, labels in several.items() if first in labels and second in labels}
        if not both:
            continue
        a, b = ([_label(labels[person]) for labels in both.values()] for person in (first, second))
        clusters = _clusters(data, both)
        kappa = cohen_kappa(a, b, clusters, is_scale=data.kind == "rate")
        agreement = percent_agreement(list(zip(a, b, strict=True)), clusters)
        found.append(PairAgreement(first=first, second=second, kappa=kappa, agreement=agreement))
    return found


def _people(data: LabelData) -> list[PersonResult]:
    by_person: dict[str, list[LabeledVote]] = {name: [] for name in data.people}
    for vote in data.votes:
        by_person[vote.person].append(vote)
    return [_person(data, name, votes) for name, votes in by_person.items()]


def _person(data: LabelData, name: str, votes: Sequence[LabeledVote]) -> PersonResult:
    cast = [vote for vote in votes if vote.vote.kind != "skipped"]
    seconds = [vote.seconds for vote in cast if vote.seconds is not None]
    # two corrections of one answer differ in words, which says nothing
    consistent, consistent_clusters = ([], []) if data.kind == "correct" else _repeat_agreement(data, cast)
    firsts, first_clusters = _shown_first(data, cast)
    return PersonResult(
        name=name,
        votes=len(cast),
        skipped=len(votes) - len(cast),
        open=data.open_tasks.get(name, 0),
        seconds=median(seconds) if seconds else None,
        consistency=score_interval(consistent, consistent_clusters) if consistent else None,
        shown_first=score_interval(firsts, first_clusters) if firsts else None,
    )


def _repeat_agreement(data: LabelData, votes: Sequence[LabeledVote]) -> tuple[list[float], list[str]]:
    """1 for every comparison or score that was the same the second time, and the cluster of each."""
    first = {vote.task: vote for vote in votes if not vote.is_repeat}
    values, clusters = [], []
    for repeat in (vote for vote in votes if vote.is_repeat and vote.task in first):
        before, again = first[repeat.task].vote, repeat.vote
        pairs = list(zip(before.comparisons(), again.comparisons(), strict=True))
        same = [float(a.outcome == b.outcome) for a, b in pairs] or [float(before == again)]
        values += same
        clusters += [data.items[repeat.item].cluster] * len(same)
    return values, clusters


def _shown_first(data: LabelData, votes: Sequence[LabeledVote]) -> tuple[list[float], list[str]]:
    """1 for every decided comparison in which the answer that was shown first won, and the cluster of each."""
    values, clusters = [], []
    for vote in votes:
        place = {answer: number for number, answer in enumerate(vote.shown)}
        for comparison in vote.vote.comparisons():
            if comparison.outcome != "tie" and comparison.first in place and comparison.second in place:
                preferred, other = comparison.first, comparison.second
                if comparison.outcome == "second":
                    preferred, other = other, preferred
                values.append(float(place[preferred] < place[other]))
                clusters.append(data.items[vote.item].cluster)
    return values, clusters


def system_comparisons(data: LabelData) -> tuple[Comparisons | None, list[str]]:
    """One comparison of two systems for each item: the mean of the people's outcomes, and the cluster of each.

    The mean keeps an item that many people saw from counting more than others. Equal answers of two systems are a tie,
    which nobody had to be asked. None where the answers have no systems.
    """
    outcomes: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    labeled = set()
    for vote, comparison in data.comparisons():
        item, value = data.items[vote.item], OUTCOME_VALUES[comparison.outcome]
        labeled.add(item.id)
        for a in item.answers[comparison.first].systems:
            for b in item.answers[comparison.second].systems:
                if a != b:
                    key, oriented = ((item.id, a, b), value) if a < b else ((item.id, b, a), 1.0 - value)
                    outcomes[key].append(oriented)
    for item in data.items.values():
        # all answers equal: nobody was asked; with others beside them the item counts once somebody was
        if item.id in labeled or len(item.answers) == 1:
            for answer in item.answers:
                for a, b in combinations(sorted(answer.systems), 2):
                    outcomes[item.id, a, b] = [0.5]
    if not outcomes:
        return None, []
    first, second = [a for _, a, _ in outcomes], [b for _, _, b in outcomes]
    comparisons = make_comparisons(first, second, [fmean(values) for values in outcomes.values()])
    return comparisons, [data.items[item].cluster for item, _, _ in outcomes]


def system_strengths(data: LabelData) -> list[SystemStrength]:
    """How often people prefer each system, best first; empty where the answers have no systems."""
    comparisons, clusters = system_comparisons(data)
    scores = _scores_by_system(data)
    if comparisons is None:
        return []
    rates = win_rates(comparisons, clusters)
    is_connected = len(unconnected_groups(comparisons)) == 1
    by_system = strengths(comparisons, clusters) if is_connected else {}
    found = [
        SystemStrength(
            system=name,
            comparisons=rates[name].examples,
            win_rate=rates[name],
            strength=by_system.get(name),
            mean_score=scores.get(name),
        )
        for name in comparisons.systems
    ]
    return sorted(found, key=lambda system: -(system.strength or system.win_rate).mean)


def _scores_by_system(data: LabelData) -> dict[str, Estimate]:
    """Mean rating of the answers of each system, with clusters of items."""
    scores: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for vote in data.first_votes:
        if vote.vote.score is not None:
            item = data.items[vote.item]
            for system in item.answers[vote.shown[0]].systems:
                scores[system].append((float(vote.vote.score), item.cluster))
    return {
        system: score_interval([value for value, _ in pairs], [cluster for _, cluster in pairs], bounded=False)
        for system, pairs in scores.items()
    }


def _unconnected(data: LabelData) -> tuple[tuple[str, ...], ...]:
    comparisons, _ = system_comparisons(data)
    groups = [] if comparisons is None else unconnected_groups(comparisons)
    return tuple(tuple(group) for group in groups) if len(groups) > 1 else ()


def _disagreements(data: LabelData, several: Mapping[Unit, Mapping[str, object]]) -> list[Disagreement]:
    notes: dict[str, dict[str, str]] = defaultdict(dict)
    for vote in data.votes:
        if vote.note:
            notes[vote.item][vote.person] = vote.note
    found = []
    for (item_id, answers), labels in several.items():
        if len(set(labels.values())) > 1:
            item = data.items[item_id]
            votes = {person: _words(value, answers) for person, value in labels.items()}
            texts = tuple(item.answers[i].text for i in answers)
            found.append(
                Disagreement(item=item_id, question=item.question, answers=texts, votes=votes, notes=notes[item_id])
            )
    return found


def _words(value: object, answers: Sequence[int]) -> str:
    words = {"first": "the first answer", "second": "the second answer", "tie": "a tie"}
    return words.get(str(value), f"{value}")


def _label(value: object) -> Label:
    return value if isinstance(value, str | int | float) else None


def _clusters(data: LabelData, units: Mapping[Unit, object]) -> list[str]:
    return [data.items[item].cluster for item, _ in units]
