"""What people said as rows: for training here, and in the files of other tools, out and in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rung.config.data import DataConfig
from rung.data.formats import load_records
from rung.errors import ConfigError, DataError
from rung.evaluation.judge import read_human_labels
from rung.human_labels.data import LabelData, LabeledVote, labels_by_unit
from rung.human_labels.exports import EXPORTS, export_rows
from rung.human_labels.items import Answer, Item
from rung.human_labels.report import label_lines
from rung.human_labels.result import label_result, read_labels, summarize_labels
from rung.human_labels.votes import Comparison, Vote
from rung.types import Message

SYSTEMS = ("base", "tuned", "big")


def items(count: int = 12) -> dict[str, Item]:
    made = [
        Item(
            (Message("user", f"question {i}"),),
            tuple(Answer(f"{name} says {i}", (name,)) for name in SYSTEMS),
            context=f"context {i}",
            group=f"group {i // 2}",
        )
        for i in range(count)
    ]
    return {item.id: item for item in made}


def labels(kind: Any, people: int = 2) -> LabelData:
    """`big` is best and `tuned` next; the last person errs on every third item."""
    data, votes = items(), []
    for number, item in enumerate(data.values()):
        for person in range(people):
            errs = person == people - 1 and number % 3 == 0
            name, at = f"person {person + 1}", "2026-12-01T08:00:00.000+00:00"
            if kind == "rank":
                vote = Vote("rank", ranks={0: 1, 1: 2, 2: 2} if errs else {0: 3, 1: 2, 2: 1})
                votes.append(LabeledVote(name, item.id, (2, 0, 1), vote, at=at))
            elif kind == "compare":
                for first, second in ((0, 1), (0, 2), (1, 2)):
                    outcome: Any = "tie" if errs else "second"
                    vote = Vote("compare", outcome=Comparison(first, second, outcome, errs), is_bad=errs)
                    votes.append(LabeledVote(name, item.id, (second, first), vote, at=at))
            elif kind == "rate":
                for answer in range(3):
                    votes.append(
                        LabeledVote(name, item.id, (answer,), Vote("rate", score=1 if errs else answer + 2), at=at)
                    )
            else:
                votes.append(LabeledVote(name, item.id, (0,), Vote("correct", text=f"right {number}"), at=at))
    return LabelData("test", kind, data, [f"person {i + 1}" for i in range(people)], votes)


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["rank", "compare", "rate", "correct"])
def test_exports_for_training_are_read_as_their_formats(kind: Any, tmp_path: Path) -> None:
    data = labels(kind)
    formats = {"ranked": "ranked", "preference": "preference", "rated": "rated", "sft": "question_answer"}
    for name, format in formats.items():
        if kind not in EXPORTS[name][0]:
            continue
        file = written(tmp_path / f"{name}.jsonl", export_rows(data, name))
        loaded = load_records(DataConfig(path=str(file), group="group"), str(file))
        assert loaded.detection.format == format and len(loaded.records), name
        records = list(loaded.records)
        assert all(record.context and record.group for record in records)
        best = {record.answer for record in records}
        if kind == "correct":
            assert len(records) == 24 and best == {f"right {i}" for i in range(12)}
        elif name == "preference":
            assert all("base" not in record.answer for record in records)
        else:
            assert sum("big says" in record.answer for record in records) == len(records)


def test_what_people_call_bad_is_not_learned() -> None:
    assert len(export_rows(labels("rank"), "sft")) == 12
    assert len(export_rows(labels("compare"), "sft")) == 8  # a third was called bad by one person


def test_items_without_a_common_scale_are_left_out(capsys: Any) -> None:
    """Wins over different opponents order nothing, nor do ratings of different people."""
    data = labels("compare", people=1)
    some = [vote for vote in data.votes if vote.shown != (2, 0) or not data.items[vote.item].question.endswith(" 5")]
    rows = export_rows(LabelData(data.source, data.kind, data.items, data.people, some), "rated")
    assert len(rows) == len(export_rows(data, "rated")) - 1 and not any(r["prompt"] == "question 5" for r in rows)
    assert "1 of 12 items are left out" in capsys.readouterr().err
    data = labels("rate")
    dealt = [vote for vote in data.votes if (vote.person == "person 1") == (vote.shown[0] < 2)]
    assert export_rows(LabelData(data.source, data.kind, data.items, data.people, dealt), "ranked") == []


def test_exports_by_people() -> None:
    data = labels("compare", people=2)
    alone = [vote for vote in data.votes if vote.person == "person 1" or int(data.items[vote.item].question[9:]) < 4]
    some = LabelData(data.source, data.kind, data.items, data.people, alone)
    assert len(export_rows(some, "human_labels")) == 36 and len(export_rows(some, "human_labels", min_people=2)) == 12
    # one person judged A and B, another B and C of the same item: nobody judged what the other did
    alone = [vote for vote in data.votes if (vote.person == "person 1") == (vote.shown == (1, 0))]
    parts = LabelData(data.source, data.kind, data.items, data.people, alone)
    assert export_rows(parts, "preference", min_people=2) == []
    for name, message in (("csv", "no such export"), ("sft", "")):
        if message:
            with pytest.raises(ConfigError, match=message):
                export_rows(some, name)
    with pytest.raises(ConfigError, match="have no such rows"):
        export_rows(labels("correct"), "preference")
    with pytest.raises(ConfigError, match="have no such rows"):
        export_rows(labels("rate"), "label_studio")


def test_a_judge_reads_the_labels(tmp_path: Path) -> None:
    file = written(tmp_path / "pairs.jsonl", export_rows(labels("compare"), "human_labels"))
    pairs, people = read_human_labels(str(file))
    assert len(pairs) == 36 and people[0] == ["second", "tie"] and people[3] == ["second", "second"]
    assert pairs[0].group == "group 0" and pairs[0].context == "context 0"


@pytest.mark.parametrize("kind", ["rank", "compare", "rate"])
@pytest.mark.parametrize("name", ["arena", "argilla", "label_studio", "human_labels"])
def test_other_tools_files_come_back_as_they_went(kind: Any, name: str, tmp_path: Path) -> None:
    """The same votes on the same texts, whatever the order of the answers is there."""
    if kind not in EXPORTS[name][0]:
        return
    data = labels(kind)
    back = read_labels(written(tmp_path / "file.jsonl", export_rows(data, name)))
    expected = texts_preferred(data, scores=kind == "rate" and name == "argilla")
    found = texts_preferred(back, scores=back.kind == "rate")
    if name == "label_studio":  # it has no ties
        expected = {key: value for key, value in expected.items() if value != "tie"}
        expected = {k: v for k, v in expected.items() if k in found or kind == "compare"}
    assert found == expected and found
    if name == "arena":
        assert {a for item in back.items.values() for answer in item.answers for a in answer.systems} == set(SYSTEMS)
        ours, theirs = summarize_labels(data), summarize_labels(back)
        assert [s.system for s in ours.systems] == [s.system for s in theirs.systems] == ["big", "tuned", "base"]
        # Arena has no groups
        assert [s.win_rate.mean for s in ours.systems] == pytest.approx([s.win_rate.mean for s in theirs.systems])


def texts_preferred(data: LabelData, *, scores: bool) -> dict[tuple[str, ...], str]:
    """The better text of every pair by every person, or the score of every text."""
    found = {}
    for (item, answers), said in labels_by_unit(data).items() if scores else []:
        for person, score in said.items():
            found[person, data.items[item].answers[answers[0]].text] = str(score)
    for vote, comparison in () if scores else data.comparisons():
        texts = [data.items[vote.item].answers[i].text for i in (comparison.first, comparison.second)]
        better = {"first": texts[0], "second": texts[1], "tie": "tie"}[comparison.outcome]
        found[vote.person, *sorted(texts)] = better
    return found


def test_files_as_the_tools_write_them(tmp_path: Path) -> None:
    """Buckets of a ranker, users as objects, drafts, and answers in columns with other separators."""
    studio = [
        {
            "id": 7,
            "data": {"prompt": "q", "items": [{"id": "a", "title": "A", "body": "one"}, {"id": "b", "body": "two"}]},
            "annotations": [
                {
                    "completed_by": {"id": 3, "email": "x@y.z"},
                    "result": [{"type": "ranker", "value": {"ranker": {"_": [], "rank": ["b", "a"]}}}],
                },
                {"completed_by": 4, "was_cancelled": True, "result": [{"value": {"ranker": ["a", "b"]}}]},
            ],
        }
    ]
    (tmp_path / "studio.json").write_text(json.dumps(studio))
    data = read_labels(tmp_path / "studio.json")
    assert data.people == ["x@y.z"] and data.votes[0].vote.ranks == {0: 2, 1: 1}
    argilla = {
        "instruction": "q",
        "reply_1": "one",
        "reply_2": "two",
        "reply-ranking.responses": [[{"value": "reply-1", "rank": 1}, {"value": "reply-2", "rank": 1}], None],
        "reply-ranking.responses.users": ["u1", "u2"],
        "reply-ranking.responses.status": ["submitted", "discarded"],
    }
    data = read_labels(written(tmp_path / "argilla.jsonl", [argilla]))
    assert data.people == ["u1"] and data.votes[0].vote.ranks == {0: 1, 1: 1}  # ties stay ties
    assert all(not answer.systems for item in data.items.values() for answer in item.answers)


def test_sides_of_label_studio_are_those_of_its_tag(tmp_path: Path) -> None:
    """The first column of a task need not be the left text, and other texts stand beside them."""
    result = {"type": "pairwise", "to_name": "answer_a,answer_b", "value": {"selected": "left"}}
    data = {"prompt": "q", "source": "web", "answer_b": "B", "answer_a": "A"}
    row = {"data": data, "annotations": [{"completed_by": 1, "result": [result]}]}
    (found,) = texts_preferred(read_labels(written(tmp_path / "pair.jsonl", [row])), scores=False).values()
    assert found == "A"
    ranked = {"prompt": "q", "items": [{"id": "1", "body": "x"}, {"id": "2", "body": "y"}]}
    buckets = {"value": {"ranker": {"good": ["1"], "bad": ["2"]}}}
    with pytest.raises(DataError, match="several buckets"):
        read_labels(written(tmp_path / "buckets.jsonl", [{"data": ranked, "annotations": [{"result": [buckets]}]}]))


def test_arena_files_as_they_are(tmp_path: Path, capsys: Any) -> None:
    """Newer words, parts of texts, odd times, conversations whose earlier turns differ, and many people."""

    def talk(answer: Any, *turns: str) -> list[dict[str, Any]]:
        earlier = [
            {"role": role, "content": text} for turn in turns for role, text in (("assistant", turn), ("user", "?"))
        ]
        return [{"role": "user", "content": "q"}, *earlier, {"role": "assistant", "content": answer}]

    base = {"model_a": "m", "model_b": "n", "winner": "both_bad", "tstamp": 1e20}
    parts = [{"type": "text", "text": "one"}]
    rows = [
        {**base, "judge": f"j{i}", "conversation_a": talk(parts), "conversation_b": talk("two")} for i in range(400)
    ]
    rows.append({**base, "judge": "k", "conversation_a": talk("x", "early"), "conversation_b": talk("y", "other")})
    result = label_result(written(tmp_path / "arena.jsonl", rows))
    assert (result.votes, result.both_bad, len(result.people), result.pairs) == (400, 400, 400, ())
    assert "1 votes are on conversations" in capsys.readouterr().err
    assert "380 people more" in "\n".join(label_lines(result))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"a": 1}, "no labels of people"),
        ({"model_a": "x", "model_b": "y", "winner": "left"}, "no such winner"),
        (
            {"model_a": "x", "model_b": "y", "winner": "tie", "conversation_a": "text", "conversation_b": []},
            "list of turns",
        ),
        ({"question": "q", "first": 1, "second": "b", "human": "tie"}, "texts in question"),
        ({"question": "q", "first": "a", "second": "b", "human": ["left"]}, "could have said"),
        ({"prompt": "q", "r.responses": [1, 2], "r.responses.users": ["u"]}, "differ in number"),
        ({"prompt": "q", "answer": "a", "r.responses": ["high"]}, "no whole number"),
        ({"prompt": "q", "r.responses": [[{"value": "x"}]]}, "value and rank"),
        ({"prompt": "q", "r.responses": [[{"value": "x", "rank": 1}]]}, "no field has the text"),
        ({"x": "q", "r.responses": [3]}, "no column has the prompt"),
        ({"data": {"prompt": "q", "text1": "a"}, "annotations": []}, "two texts"),
        (
            {"data": {"prompt": "q", "items": [1]}, "annotations": [{"result": [{"value": {"ranker": []}}]}]},
            "id and body",
        ),
    ],
)
def test_files_that_are_no_labels(row: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_labels(written(tmp_path / "bad.jsonl", [row]))


def test_the_result_says_what_people_said(tmp_path: Path) -> None:
    result = summarize_labels(labels("compare"))
    assert (result.votes, result.gold, result.undecided, result.both_bad) == (72, 24, 12, 12)
    assert result.alpha is not None and len(result.pairs) == 1 and len(result.disagreements) == 12
    lines = "\n".join(label_lines(result))
    assert "72 votes of 2 people" in lines and "big" in lines and "people disagree on 12" in lines
    with pytest.raises(ConfigError, match="an export has a kind and a file"):
        label_result(tmp_path, export="arena")
    with pytest.raises(ConfigError, match="is of an export"):
        label_result(tmp_path, min_people=2)


def test_people_of_pandalm_agree_as_published(real_data: Path, tmp_path: Path) -> None:
    """Their votes on 999 pairs, cast on the page's own store: kappa 0.852, 0.879 and 0.862."""
    from rung.human_labels.store import LabelSettings, LabelStore
    from rung.human_labels.tasks import assign, make_tasks
    from rung.human_labels.votes import parse_vote

    rows = json.loads((real_data / "pandalm" / "testset-v1.json").read_text())
    found = {}
    for row in rows:
        question = f"{row['idx']}: {row['instruction']}\n{row['input']}"
        # the index keeps equal answers apart, which people were asked about too
        answers = tuple(Answer(f"{row[f'response{i}']} #{i}") for i in (1, 2))
        item = Item((Message("user", question),), answers)
        found[item.id] = (item, [row[f"annotator{i}"] for i in (1, 2, 3)])
    chosen = [item for item, _ in found.values()]
    slots = assign(make_tasks("compare", chosen), 3, 1.0, 0.0, 0)
    settings = LabelSettings("compare", people=3, overlap=1.0, repeat=0.0)
    store = LabelStore.create(tmp_path / "labels", settings, chosen, ["one", "two", "three"], slots)
    for person, own in enumerate(slots):
        for position, slot in enumerate(own):
            said = found[slot.task.item.id][1][person]
            side = "tie" if said == 0 else "left" if slot.shown[0] == said - 1 else "right"
            store.cast(person, position, 0, parse_vote("compare", slot.task, slot.shown, 5, {"choice": side}), "", None)
    store.close()
    result = label_result(tmp_path / "labels")
    kappas = {(pair.first, pair.second): round(pair.kappa.mean, 3) for pair in result.pairs}
    assert sorted(kappas.values()) == [0.852, 0.862, 0.879], kappas
    assert result.items == 999 and result.gold + result.undecided == 999
