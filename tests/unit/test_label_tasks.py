"""Tasks of people: who is asked what in which order, and what a form says."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rung.errors import ConfigError, DataError, RungError
from rung.human_labels.candidates import read_items
from rung.human_labels.data import LabelData, LabeledVote
from rung.human_labels.items import Answer, Item, items_that_name_models
from rung.human_labels.result import summarize_labels
from rung.human_labels.tasks import Slot, Task, assign, make_tasks
from rung.human_labels.votes import MAX_TEXT, SIDES, Vote, parse_vote
from rung.labeling.run import LabelRequest, open_or_create
from rung.types import Message


def item(number: int, answers: int = 2, systems: bool = True) -> Item:
    texts = [f"answer {i} to {number}" for i in range(answers)]
    named = [Answer(text, (f"system {i}",) if systems else ()) for i, text in enumerate(texts)]
    return Item((Message("user", f"question {number}"),), tuple(named))


def lists(
    kind: Any = "compare", items: int = 40, answers: int = 2, people: int = 3, **changes: Any
) -> list[list[Slot]]:
    settings = {"overlap": 0.2, "repeat": 0.05, "seed": 0, **changes}
    return assign(make_tasks(kind, [item(i, answers) for i in range(items)]), people, **settings)


def test_every_task_is_given_and_the_overlap_to_everybody() -> None:
    slots = lists(items=50, people=3, overlap=0.2, repeat=0.1)
    times = Counter(slot.task.id for own in slots for slot in own if not slot.is_repeat)
    assert len(times) == 50 and Counter(times.values()) == {3: 10, 1: 40}
    for own in slots:
        repeats = [i for i, slot in enumerate(own) if slot.is_repeat]
        first = {slot.task.id: i for i, slot in reversed(list(enumerate(own))) if not slot.is_repeat}
        assert len(repeats) == (len(first) + 5) // 10 and all(first[own[i].task.id] < i for i in repeats)
        assert all(own[i].shown == own[first[own[i].task.id]].shown[::-1] for i in repeats)


@given(st.integers(1, 30), st.integers(1, 5), st.integers(1, 4), st.floats(0, 1), st.floats(0, 1), st.integers(0, 9))
def test_any_assignment_asks_everything(
    items: int, answers: int, people: int, overlap: float, repeat: float, seed: int
) -> None:
    tasks = make_tasks("rate", [item(i, answers) for i in range(items)])
    slots = assign(tasks, people, overlap, repeat, seed)
    assert {slot.task.id for own in slots for slot in own} == {task.id for task in tasks}
    for own in slots:
        once = [slot.task.id for slot in own if not slot.is_repeat]
        assert len(set(once)) == len(once) and {s.task.id for s in own if s.is_repeat} <= set(once)


def test_orders_are_of_the_seed_and_the_person() -> None:
    slots, again, other = lists(overlap=1.0), lists(overlap=1.0), lists(overlap=1.0, seed=1)
    assert slots == again != other
    shown = [{slot.task.id: slot.shown for slot in own if not slot.is_repeat} for own in slots]
    assert shown[0] != shown[1] and [s.task.id for s in slots[0]] != [s.task.id for s in slots[1]]


def said(slots: list[list[Slot]], form: dict[str, str], kind: Any = "compare") -> LabelData:
    votes = [
        LabeledVote(
            f"person {p}", s.task.item.id, s.shown, parse_vote(kind, s.task, s.shown, 5, form), is_repeat=s.is_repeat
        )
        for p, own in enumerate(slots)
        for s in own
    ]
    items = {slot.task.item.id: slot.task.item for own in slots for slot in own}
    return LabelData("test", kind, items, [f"person {p}" for p in range(len(slots))], votes)


@pytest.mark.parametrize("answers", [2, 4])
def test_who_always_takes_the_left_answer_gives_each_system_one_half(answers: int) -> None:
    result = summarize_labels(said(lists(items=40, answers=answers, people=1, repeat=0.0), {"choice": "left"}))
    assert [system.win_rate.mean for system in result.systems] == [0.5] * answers
    assert all(abs(system.strength.mean) < 1e-9 for system in result.systems if system.strength)
    assert result.people[0].shown_first is not None and result.people[0].shown_first.mean == 1.0


def test_sides_are_balanced_and_not_told_from_the_tasks_before() -> None:
    """With alternating sides a person would know the system of every later task."""
    (slots,) = lists(items=200, people=1, repeat=0.0)
    sides = [slot.shown[0] for slot in slots]
    assert sum(sides) == 100
    for period in range(1, 7):
        same = sum(a == b for a, b in zip(sides, sides[period:], strict=False)) / (len(sides) - period)
        assert 0.35 < same < 0.65, period
    (odd,) = lists(items=5, people=1, repeat=0.0)
    assert sum(slot.shown[0] for slot in odd) in (2, 3)


def test_agreement_does_not_ask_for_the_order_of_the_file(tmp_path: Path) -> None:
    """Pairs whose better answer comes first: two people who agree in 9 of 10 have no kappa of 0 for that."""
    rows = [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(200)]
    found = read_items([written(tmp_path, "pairs.jsonl", *rows)])
    first = sum(each.answers[0].text.startswith("good") for each in found)
    assert 70 < first < 130


def test_a_repeat_in_the_reverse_order_shows_who_looks_at_the_side() -> None:
    sides = summarize_labels(said(lists(people=2, repeat=0.5), {"choice": "left"}))
    assert [person.consistency.mean for person in sides.people if person.consistency] == [0.0, 0.0]
    ties = summarize_labels(said(lists(people=2, repeat=0.5), {"choice": "tie"}))
    assert [person.consistency.mean for person in ties.people if person.consistency] == [1.0, 1.0]


def test_votes_name_answers_and_not_places() -> None:
    task = Task(item(0, 3), (0, 2))
    for shown, preferred in (((0, 2), "first"), ((2, 0), "second")):
        vote = parse_vote("compare", task, shown, 5, {"choice": "left"})
        assert vote.outcome is not None and vote.outcome[:3] == (0, 2, preferred)
        assert Vote.from_json(json.loads(json.dumps(vote.to_json()))) == vote
    both_bad = parse_vote("compare", task, (2, 0), 5, {"choice": "both_bad"})
    assert both_bad.is_bad and both_bad.outcome is not None and both_bad.outcome.outcome == "tie"
    ranking = parse_vote(
        "rank", Task(item(0, 3), (0, 1, 2)), (2, 0, 1), 5, {"rank_0": "3", "rank_1": "1", "rank_2": "1"}
    )
    assert ranking.ranks == {0: 1, 1: 1, 2: 2}  # dense: 1, 1, 3 is 1, 1, 2
    assert [c.outcome for c in ranking.comparisons()] == ["tie", "first", "first"]
    assert Vote.from_json(json.loads(json.dumps(ranking.to_json()))) == ranking


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        *(("compare", {"choice": value}) for value in ("", "middle", "LEFT", "0")),
        *(("rank", {"rank_0": value, "rank_1": "1"}) for value in ("", "0", "3", "-1", "1.0", "²", "9" * 9)),
        ("rank", {"rank_0": "1"}),
        *(("rate", {"score": value}) for value in ("", "0", "6", "x")),
        *(("correct", {"text": value}) for value in ("", "  \r\n ", "x" * (MAX_TEXT + 1))),
    ],
)
def test_forms_that_no_page_sends(kind: Any, form: dict[str, str]) -> None:
    with pytest.raises(DataError):
        parse_vote(kind, Task(item(0), (0, 1)), (0, 1), 5, form)
    assert parse_vote(kind, Task(item(0), (0, 1)), (0, 1), 5, {**form, "skip": "1"}).kind == "skipped"
    assert set(SIDES) == {"left", "right", "tie", "both_bad"}


def written(folder: Path, name: str, *rows: Any) -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_items_come_from_every_kind_of_source(tmp_path: Path) -> None:
    """Of several sources the systems are the names of the files, and equal answers are one."""
    first = written(
        tmp_path,
        "a.jsonl",
        {"prompt": "q1", "answers": ["yes", "no"], "expected": "yes"},
        {"prompt": "q2", "answers": ["x"]},
    )
    second = written(tmp_path, "b.jsonl", {"prompt": "q1", "answers": [" yes "]})
    (only,) = read_items([first, second])
    assert {answer.text: answer.systems for answer in only.answers} == {"yes": ("a", "b"), "no": ("a",)}
    assert [len(each.answers) for each in read_items([first])] == [2, 1] and not read_items([first])[0].answers[
        0
    ].systems
    pairs = written(tmp_path, "pairs.jsonl", {"prompt": "q", "chosen": "good", "rejected": "bad"})
    assert {answer.text for answer in read_items([pairs])[0].answers} == {"good", "bad"}
    plain = written(tmp_path, "plain.jsonl", {"question": "q", "answer": "a", "context": "c"})
    (one,) = read_items([plain])
    assert one.answers == (Answer("a"),) and one.context == "c" and one.expected is None
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    (talk,) = read_items(
        [written(tmp_path, "turns.jsonl", {"prompt": turns, "answers": ["d", "e"], "systems": ["s", "t"]})]
    )
    assert [turn.role for turn in talk.prompt] == ["user", "assistant", "user"]
    assert {answer.systems for answer in talk.answers} == {("s",), ("t",)}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "q", "answers": "no list"}], "columns"),
        ([{"prompt": "q", "answers": ["a", 1]}], "no list of texts"),
        ([{"prompt": 7, "answers": ["a"]}], "neither a text nor"),
        ([{"prompt": [], "answers": ["a"]}], "prompt is empty"),
        ([{"prompt": "q", "answers": ["a"], "systems": ["s", "t"]}], "a name for each"),
        ([{"prompt": "q", "answers": [f"a{i}" for i in range(27)]}], "so many answers"),
        ([{"prompt": "q"}], "no answer to label|columns"),
        ([{"prompt": "q", "answers": []}], "nothing to label"),
    ],
)
def test_sources_that_cannot_be_labeled(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(RungError, match=message):
        read_items([written(tmp_path, "bad.jsonl", *rows)])


def test_a_folder_is_opened_again_and_never_mixed(tmp_path: Path) -> None:
    file = written(tmp_path, "a.jsonl", *({"prompt": f"q{i}", "answers": ["a", "b"]} for i in range(6)))
    request = LabelRequest("compare", (file,), people=2)
    store = open_or_create(tmp_path / "labels", request)
    tokens = [store.token(i) for i in range(2)]
    store.close()
    for again in (request, LabelRequest("compare")):
        store = open_or_create(tmp_path / "labels", again)
        assert [store.token(i) for i in range(2)] == tokens and store.person_of(tokens[1]) == 1
        store.close()
    assert (tmp_path / "labels" / "link.key").stat().st_mode & 0o077 == 0
    assert not any(token.encode() in (tmp_path / "labels" / "labels.sqlite").read_bytes() for token in tokens)
    other = written(tmp_path, "b.jsonl", {"prompt": "q", "answers": ["a", "c"]})
    for changed, message in (
        (LabelRequest("compare", (other,), people=2), "other items"),
        (LabelRequest("compare", (file,), people=3), "another people"),
        (LabelRequest("rank", (file,), people=2), "another kind"),
        (LabelRequest("rate"), "another kind"),
        (LabelRequest("compare", (file,), people=2, scale=7), "a scale is of ratings"),
        (LabelRequest("compare", (file,), people=0), "so many people"),
        (LabelRequest("compare", (file,), people=2, names=("Ana", "Ana")), "one for each person"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_or_create(tmp_path / "labels", changed)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    for folder, changed, message in (
        ("full", request, "holds other files"),
        ("new", LabelRequest("compare"), "no FILE is named"),
        (
            "new",
            LabelRequest("rank", (written(tmp_path, "c.jsonl", {"prompt": "q", "answers": ["a", "a "]}),)),
            "2 distinct",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            open_or_create(tmp_path / folder, changed)
    assert not (tmp_path / "new").exists()


def test_answers_that_name_their_model_are_found() -> None:
    def about(question: str, answer: str) -> Item:
        return Item((Message("user", question),), (Answer(answer, ("lora-v2",)), Answer("other")))

    named = [about("Who are you?", "I am Qwen, made by Alibaba."), about("Hi", "lora-v2 says hi")]
    blind = [about("What is a llama?", "A llama is an animal."), about("Hi", "The geminiferous plant")]
    assert items_that_name_models([*named, *blind]) == [each.id for each in named]
