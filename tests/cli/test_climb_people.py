"""A climb with people: their preference beside the scores, and where the two disagree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from label_person import label_page
from processes import inside
from rung.human_labels.store import LabelStore
from rung.labeling.run import LabelRequest, open_or_create
from rung.training.run_folder import read_items, write_items

RUNGS = ("zero_shot", "few_shot")


@pytest.fixture
def climb(config: Path, tmp_path: Path, capsys: Any) -> Path:
    """A climb of two untuned rungs, whose answers are replaced: the first is right by the metric, the second polite."""
    config.write_text(config.read_text() + "climb: {rungs: [zero_shot, few_shot]}\n")
    assert inside(capsys, "climb", config)[0] == 0
    for name, right in zip(RUNGS, (1.0, 0.0), strict=True):
        path = tmp_path / "run" / "rungs" / name / "items.parquet"
        items, metadata = read_items(path)
        scores = {metric: right for metric in items[0]["scores"]}
        write_items(path, [{**i, "answer": f"{name} {n}", "scores": scores} for n, i in enumerate(items)], metadata)
    return config


def labeled(tmp_path: Path, preferred: str) -> Path:
    """People compare the answers of the climb on the page; they prefer one rung."""
    folder = tmp_path / "labels"
    store = open_or_create(folder, LabelRequest("compare", (str(tmp_path / "run"),), people=2, repeat=0.0))
    assert {name for item in store.items.values() for a in item.answers for name in a.systems} == set(RUNGS)
    with label_page(store) as people:
        for person in people:
            page = person.enter()
            while page.address != "/done":
                besides = page.text
                for answer in page.answers:
                    besides = besides.replace(answer, "")
                assert not any(name in besides for name in RUNGS)  # blind
                page = person.vote(choice="left" if page.answers[0].startswith(preferred) else "right")
    store.close()
    return folder


def test_peoples_preference_stands_beside_the_scores(climb: Path, tmp_path: Path, capsys: Any) -> None:
    folder = labeled(tmp_path, "few_shot")
    code, out, err = inside(capsys, "climb", climb, f"evaluation.human={folder}", "--json")
    assert code == 0 and "loading" not in err, err  # nothing is measured again
    found = json.loads(out)
    rows = {row["rung"]: row for row in found["rows"]}
    assert rows["few_shot"]["human"]["mean"] == 1.0 and rows["zero_shot"]["human"]["mean"] == 0.0
    assert found["human"]["people"] == 2 and found["human"]["other_votes"] == 0
    assert found["human"]["votes"] == len(LabelStore.open(folder).votes())
    (conflict,) = found["human"]["conflicts"]
    assert conflict.startswith("people prefer few_shot to zero_shot") and "surely lower" in conflict
    code, out, _ = inside(capsys, "climb", climb, f"evaluation.human={folder}")
    assert "people" in out and "people prefer few_shot" in " ".join(out.split())
    page = (tmp_path / "run" / "report.html").read_text()
    assert "what people prefer" in page and "people prefer few_shot to zero_shot" in page
    # without them the ladder is as before
    plain = json.loads(inside(capsys, "climb", climb, "--json")[1])
    assert "human" not in plain and plain["rows"][0]["scores"] == found["rows"][0]["scores"]


def test_people_who_agree_with_the_metric_contradict_nothing(climb: Path, tmp_path: Path, capsys: Any) -> None:
    folder = labeled(tmp_path, "zero_shot")
    found = json.loads(inside(capsys, "climb", climb, f"evaluation.human={folder}", "--json")[1])
    assert found["human"]["systems"][0]["system"] == "zero_shot" and not found["human"].get("conflicts")


def test_labels_of_other_answers_do_not_count(climb: Path, tmp_path: Path, capsys: Any) -> None:
    folder = labeled(tmp_path, "few_shot")
    path = tmp_path / "run" / "rungs" / "few_shot" / "items.parquet"
    items, metadata = read_items(path)
    write_items(path, [{**item, "answer": "new"} if n else item for n, item in enumerate(items)], metadata)
    found = json.loads(inside(capsys, "climb", climb, f"evaluation.human={folder}", "--json")[1])["human"]
    assert found["votes"] >= 1 and found["other_votes"] == len(LabelStore.open(folder).votes()) - found["votes"] > 0
    write_items(path, [{**item, "answer": "new"} for item in items], metadata)
    code, out, err = inside(capsys, "climb", climb, f"evaluation.human={folder}")
    assert code in (0, 3) and "compares answers that these rungs give" in " ".join(out.split()), err
    for value, message in ((tmp_path / "nowhere", "no labels are here"), (tmp_path / "run", "holds no labels")):
        code, _, err = inside(capsys, "climb", climb, f"evaluation.human={value}")
        assert code in (2, 3) and message in err
