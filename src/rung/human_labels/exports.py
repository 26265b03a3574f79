"""Labels as rows: for training and evaluation here, and in the files of Arena, Argilla and Label Studio."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from statistics import fmean
from typing import Any

from rung.console import print_status
from rung.data.rows import answer_row, preference_row, present, prompt_value
from rung.errors import ConfigError
from rung.human_labels.data import LabelData, LabeledVote
from rung.human_labels.items import Item
from rung.human_labels.tasks import LabelKind
from rung.human_labels.votes import Comparison
from rung.scoring.pairwise import OUTCOME_VALUES, majority
from rung.types import Message

Row = dict[str, Any]
WINNERS = {"first": "model_a", "second": "model_b", "tie": "tie"}
COMPARED: tuple[LabelKind, ...] = ("rank", "compare", "rate")


def export_rows(data: LabelData, name: str, min_people: int = 1) -> list[Row]:
    """The rows of an export. Raises `ConfigError` for an unknown one and one that these labels do not have."""
    if name not in EXPORTS:
        raise ConfigError("no such export", where="--export", given=name, allowed=", ".join(EXPORTS))
    kinds, rows_of = EXPORTS[name]
    if data.kind not in kinds:
        allowed = ", ".join(each for each, (fitting, _) in EXPORTS.items() if data.kind in fitting)
        raise ConfigError(
            f"labels of the kind {data.kind} have no such rows", where="--export", given=name, allowed=allowed
        )
    if min_people == 1:
        return list(rows_of(data))
    # by task: of a pair of answers, or of one answer that is rated
    people: dict[object, set[str]] = defaultdict(set)
    for vote in data.first_votes:
        people[vote.task].add(vote.person)
    votes = [vote for vote in data.votes if len(people[vote.task]) >= min_people]
    return list(rows_of(LabelData(data.source, data.kind, data.items, data.people, votes, data.open_tasks)))


def _scores(data: LabelData) -> dict[str, dict[int, float]]:
    """Of each item the score of each answer: the mean rating, or the share of its comparisons that it won."""
    values: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    pairs: dict[str, set[tuple[int, int]]] = defaultdict(set)
    people: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    if data.kind == "rate":
        for vote in data.first_votes:
            values[vote.item][vote.shown[0]].append(float(vote.vote.score or 0))
            people[vote.item][vote.shown[0]].add(vote.person)
    else:
        for vote, comparison in data.comparisons():
            value = OUTCOME_VALUES[comparison.outcome]
            values[vote.item][comparison.first].append(value)
            values[vote.item][comparison.second].append(1.0 - value)
            pairs[vote.item].add((comparison.first, comparison.second))
    # wins over different opponents, and ratings of different people, are no common scale
    complete = [
        item
        for item in data.items
        if item in values
        and (data.kind == "rate" or len(pairs[item]) == len(values[item]) * (len(values[item]) - 1) // 2)
        and len({frozenset(own) for own in people[item].values()}) <= 1
    ]
    if lost := len(values) - len(complete):
        print_status(
            f"{lost:,} of {len(values):,} items are left out: not all of their answers were judged by the same people"
        )
    # in the order of the items, whoever voted first
    return {item: {answer: round(fmean(own), 6) for answer, own in sorted(values[item].items())} for item in complete}


def _columns(item: Item) -> Row:
    return {"context": item.context, "group": item.group}


def ranked(data: LabelData) -> Iterator[Row]:
    """Rows of the format `ranked`, best answer first; items with a tie between two answers have none."""
    for item_id, scores in _scores(data).items():
        item = data.items[item_id]
        if len(set(scores.values())) == len(scores) > 1:
            best_first = [item.answers[i].text for i in sorted(scores, key=lambda i: -scores[i])]
            yield {"prompt": prompt_value(item.prompt), **present(_columns(item)), "ranked": best_first}


def rated(data: LabelData) -> Iterator[Row]:
    """Rows of the format `rated`: all answers with their scores; items whose answers all score the same have none."""
    for item_id, scores in _scores(data).items():
        item = data.items[item_id]
        if len(set(scores.values())) > 1:
            order = sorted(scores, key=lambda i: -scores[i])
            answers = {"answers": [item.answers[i].text for i in order], "scores": [scores[i] for i in order]}
            yield {"prompt": prompt_value(item.prompt), **present(_columns(item)), **answers}


def preference(data: LabelData) -> Iterator[Row]:
    """Rows of the format `preference`: every pair of answers of which more than half of the people prefer one."""
    for item, first, second, votes in _pairs(data):
        outcome = majority([comparison.outcome for _, comparison in votes])
        if outcome in ("first", "second"):
            chosen, rejected = (first, second) if outcome == "first" else (second, first)
            texts = item.answers[chosen].text, item.answers[rejected].text
            yield preference_row(item.prompt, *texts, **_columns(item), people=len(votes))


def sft(data: LabelData) -> Iterator[Row]:
    """Rows to learn from: the corrected answers, or the best answer of each item unless somebody called all bad."""
    if data.kind == "correct":
        for vote in data.first_votes:
            item = data.items[vote.item]
            yield answer_row(item.prompt, vote.vote.text or "", **_columns(item))
        return
    bad = {vote.item for vote in data.first_votes if vote.vote.is_bad}
    for item_id, scores in _scores(data).items():
        item, best = data.items[item_id], max(scores, key=lambda i: scores[i])
        if item_id not in bad:
            yield answer_row(item.prompt, item.answers[best].text, **_columns(item))


def human_labels(data: LabelData) -> Iterator[Row]:
    """Rows of `evaluation.judge.human_labels`: two answers and what each person said."""
    for item, first, second, votes in _pairs(data):
        said = {vote.person: comparison.outcome for vote, comparison in votes}
        texts = {"first": item.answers[first].text, "second": item.answers[second].text}
        row = {"question": _prompt_text(item), **texts, "human": [said.get(person) for person in data.people]}
        yield row | present({**_columns(item), "expected": item.expected})


def _pairs(data: LabelData) -> Iterator[tuple[Item, int, int, list[tuple[LabeledVote, Comparison]]]]:
    by_pair: dict[tuple[str, int, int], list[tuple[LabeledVote, Comparison]]] = defaultdict(list)
    for vote, comparison in data.comparisons():
        by_pair[vote.item, comparison.first, comparison.second].append((vote, comparison))
    order = {item: position for position, item in enumerate(data.items)}
    for (item, first, second), votes in sorted(by_pair.items(), key=lambda pair: (order[pair[0][0]], *pair[0][1:])):
        yield data.items[item], first, second, votes


def _prompt_text(item: Item) -> str:
    """The prompt as one text: the question, or all turns with their roles."""
    if len(item.prompt) == 1:
        return item.prompt[0].content
    return "\n\n".join(f"{turn.role}: {turn.content}" for turn in item.prompt)


def arena(data: LabelData) -> Iterator[Row]:
    """Rows of Chatbot Arena's conversations, one a vote on two answers."""
    for vote, comparison in data.comparisons():
        item = data.items[vote.item]
        names = [_system(item, i) for i in (comparison.first, comparison.second)]
        conversations = [_conversation(item, i) for i in (comparison.first, comparison.second)]
        winner = "tie (bothbad)" if comparison.is_both_bad else WINNERS[comparison.outcome]
        yield {
            "question_id": item.id,
            **{"model_a": names[0], "model_b": names[1], "winner": winner, "judge": vote.person},
            **{"conversation_a": conversations[0], "conversation_b": conversations[1]},
            **{"turn": sum(turn.role == "user" for turn in item.prompt), "anony": True, "tstamp": _timestamp(vote.at)},
        }


def _system(item: Item, index: int) -> str:
    return "+".join(item.answers[index].systems) or f"answer-{index + 1}"


def _conversation(item: Item, index: int) -> list[Row]:
    turns = [*item.prompt, Message("assistant", item.answers[index].text)]
    # Arena has no column for a context
    if item.context:
        turns.insert(0, Message("system", item.context))
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def _timestamp(at: str) -> float | None:
    return datetime.fromisoformat(at).timestamp() if at else None


def argilla(data: LabelData) -> Iterator[Row]:
    """Records of Argilla, flat: a ranking question over the answers, or a rating question for each answer."""
    by_unit: dict[tuple[str, tuple[int, ...]], list[LabeledVote]] = defaultdict(list)
    for vote in data.first_votes:
        by_unit[vote.task].append(vote)
    for number, ((item_id, answers), votes) in enumerate(by_unit.items()):
        item = data.items[item_id]
        row: Row = {"id": f"{item.id}-{number}", "prompt": _prompt_text(item), **present({"context": item.context})}
        question = "rating" if data.kind == "rate" else "ranking"
        if data.kind == "rate":
            row["answer"] = item.answers[answers[0]].text
            responses: list[Any] = [vote.vote.score for vote in votes]
        else:
            row |= {_system(item, i): item.answers[i].text for i in answers}
            responses = [
                [{"value": _system(item, i), "rank": rank} for i, rank in _ranks(vote).items()] for vote in votes
            ]
        row |= {f"{question}.responses": responses, f"{question}.responses.users": [vote.person for vote in votes]}
        yield {**row, f"{question}.responses.status": ["submitted"] * len(votes)}


def _ranks(vote: LabeledVote) -> Mapping[int, int]:
    if vote.vote.ranks is not None:
        return vote.vote.ranks
    (comparison,) = vote.vote.comparisons()
    ranks = {"first": (1, 2), "second": (2, 1), "tie": (1, 1)}[comparison.outcome]
    return {comparison.first: ranks[0], comparison.second: ranks[1]}


def label_studio(data: LabelData) -> Iterator[Row]:
    """Tasks of Label Studio: `pairwise` for comparisons, `ranker` for rankings.

    Its pairwise tag knows left and right alone, and its ranker no ties: a tie has an annotation without a result.
    """
    by_unit: dict[tuple[str, tuple[int, ...]], list[LabeledVote]] = defaultdict(list)
    for vote in data.first_votes:
        by_unit[vote.task].append(vote)
    for number, ((item_id, answers), votes) in enumerate(by_unit.items(), 1):
        item = data.items[item_id]
        values: Row = {"prompt": _prompt_text(item), **present({"context": item.context})}
        if data.kind == "compare":
            values |= {"text1": item.answers[answers[0]].text, "text2": item.answers[answers[1]].text}
        else:
            values["items"] = [{"id": f"answer-{i + 1}", "body": item.answers[i].text} for i in answers]
        annotations = [
            {"id": i, "completed_by": vote.person, "result": _result(vote)} for i, vote in enumerate(votes, 1)
        ]
        yield {"id": number, "data": values, "annotations": annotations}


def _result(vote: LabeledVote) -> list[Row]:
    if vote.vote.outcome is not None:
        outcome = vote.vote.outcome.outcome
        value = {"selected": "left" if outcome == "first" else "right"}
        tag = {"from_name": "pairwise", "to_name": "text1,text2", "type": "pairwise"}
        return [] if outcome == "tie" else [{**tag, "value": value}]
    ranks = _ranks(vote)
    if max(Counter(ranks.values()).values()) > 1:
        return []
    order = [f"answer-{i + 1}" for i in sorted(ranks, key=lambda i: ranks[i])]
    return [{"from_name": "ranker", "to_name": "items", "type": "ranker", "value": {"ranker": order}}]


EXPORTS: dict[str, tuple[tuple[LabelKind, ...], Callable[[LabelData], Iterator[Row]]]] = {
    "ranked": (COMPARED, ranked),
    "preference": (COMPARED, preference),
    "rated": (COMPARED, rated),
    "sft": (("rank", "compare", "rate", "correct"), sft),
    "human_labels": (COMPARED, human_labels),
    "arena": (COMPARED, arena),
    "argilla": (COMPARED, argilla),
    "label_studio": (("rank", "compare"), label_studio),
}
"""Each export with the kinds of labels that have it."""
