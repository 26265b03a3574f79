"""Rows that a teacher writes: from a server and from a model here, filtered, journalled, and read by `rung train`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import rung
from loopback import Local
from processes import inside
from rung.config.synth import FiltersConfig
from rung.synth.filters import check_length

FOUR = [
    ("How many apples are in the red box of the shop?", "There are twelve apples in it."),
    ("Who carried the plums to the market this morning?", "The baker carried them there."),
    ("What did the gardener put into the old barn?", "He put three sacks of pears there."),
    ("Why were the figs left in the cellar all winter?", "Nobody had a key to the cellar."),
]


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def seeds(tmp_path: Path) -> Path:
    file = tmp_path / "seeds.jsonl"
    file.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in FOUR))
    return file


@pytest.fixture
def teach(local: Local, seeds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config of twelve rows by a server that writes some questions of one word, and refuses some answers."""
    monkeypatch.setenv("RUNG_CACHE", str(tmp_path / "cache"))
    local.rule(teach=True)
    file = tmp_path / "teach.yaml"
    file.write_text(
        f"synth:\n  kind: teach\n  teacher: {{server: {local.url}, model: big, price: {{prompt: 2, answer: 10}}}}\n"
        f"  seeds: {seeds}\n  task: fruit\n  rows: 12\noutput: {tmp_path / 'made'}\n"
    )
    return file


def test_rows_that_train(teach: Path, local: Local, config: Path, tmp_path: Path, capsys: Any) -> None:
    """Kept rows and reasons for the others; the same command asks nothing again; training says who made its rows."""
    code, out, err = inside(capsys, "synth", "teach", teach, "--json")
    assert code == 0 and "kept" in err, err
    result, rows = json.loads(out), lines(tmp_path / "made" / "rows.jsonl")
    assert result["rows"] == len(rows) == 12 and result["tried"] == 12 + sum(result["rejected"].values())
    assert set(result["rejected"]) <= {"length", "refusals"} and len(result["rejected"]) == 2
    rejected = lines(tmp_path / "made" / "rejected.jsonl")
    assert all(row["filter"] in result["rejected"] and row["reason"] for row in rejected)
    assert all(len(row["made"]["parents"]) >= 4 and not row["answer"].startswith("I'm sorry") for row in rows)
    asked = local.requests()
    cost = result["cost"]
    assert cost["requests"] == len(asked) and cost["failed"] == cost["uncounted"] == 0
    assert cost["money"] == pytest.approx((2 * cost["prompt_tokens"] + 10 * cost["answer_tokens"]) / 1e6)
    assert cost["answer_tokens"] == 9 * len(asked)
    page = (tmp_path / "made" / "report.html").read_text()
    assert "12 rows of" in page and "Left out: refusals" in page and rows[0]["question"] in page
    # examples stand before each request, and later rounds have rows that were made before
    assert len(asked[0]["asked"]["messages"]) == 2 + 2 * 4
    assert any(parent.startswith("row ") for row in rows for parent in row["made"]["parents"])
    again = inside(capsys, "synth", "teach", teach, "--json")
    assert again[0] == 0 and json.loads(again[1]) == result and len(local.requests()) == len(asked)
    settings = (f"data.path={tmp_path / 'made' / 'rows.jsonl'}", "data.group=null", "data.validation=0", "data.test=0")
    code, _, err = inside(capsys, "train", config, *settings, "training.max_steps=2")
    assert code == 0, err
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    (made,) = [part["made_by"] for part in run["data"]["splits"]["sets"]]
    assert made == {"kind": "teach", "teacher": "big", "unchanged": True}


def test_the_same_seed_gives_the_same_rows(teach: Path, tmp_path: Path, capsys: Any) -> None:
    outputs = []
    for name, *settings in (("a",), ("b",), ("c", "seed=1"), ("d", "synth.rows=5")):
        given = (f"output={tmp_path / name}", *settings)
        assert inside(capsys, "synth", "teach", teach, *given)[0] == 0
        outputs.append((tmp_path / name / "rows.jsonl").read_text())
    assert outputs[0] == outputs[1] != outputs[2]
    # fewer rows are the first ones: a round asks for no more than is missing
    assert [r["question"] for r in lines(tmp_path / "d" / "rows.jsonl")][:3] == [
        r["question"] for r in lines(tmp_path / "a" / "rows.jsonl")
    ][:3]


def test_a_preview_writes_nothing(teach: Path, tmp_path: Path, capsys: Any) -> None:
    code, out, err = inside(capsys, "synth", "teach", teach, "--preview", 3)
    assert code == 0 and out.count("question: Why is the") >= 3 and "nothing was written" in out, err
    assert "row 0" in out and not (tmp_path / "made").exists()
    code, out, _ = inside(capsys, "synth", "teach", teach, "--preview", 2, "--json")
    assert code == 0 and len(json.loads(out)["rows"]) == 2


def test_the_replies_of_a_preview_are_taken_over(teach: Path, local: Local, tmp_path: Path, capsys: Any) -> None:
    """What a preview asked is not asked again, by the command or by another preview, though filters have changed."""
    assert inside(capsys, "synth", "teach", teach, "--preview", 4)[0] == 0
    previewed = [json.dumps(request["asked"], sort_keys=True) for request in local.requests()]
    assert len(previewed) >= 8
    assert inside(capsys, "synth", "teach", teach, "--preview", 4, "synth.filters.refusals=false")[0] == 0
    assert len(local.requests()) == len(previewed)
    code, out, err = inside(capsys, "synth", "teach", teach, "--json")
    assert code == 0, err
    asked = [json.dumps(request["asked"], sort_keys=True) for request in local.requests()][len(previewed) :]
    cost = json.loads(out)["cost"]["requests"]
    taken = cost - len(asked)
    assert not set(asked) & set(previewed) and taken >= 8
    # they stand in the journal of the folder, and the rows are those of a command without a preview
    (journal,) = (tmp_path / "made").glob("journal-*.jsonl")
    assert len(lines(journal)) - 1 == cost
    shutil.rmtree(tmp_path / "cache" / "synth-previews")
    assert inside(capsys, "synth", "teach", teach, f"output={tmp_path / 'alone'}")[0] == 0
    assert (tmp_path / "alone" / "rows.jsonl").read_text() == (tmp_path / "made" / "rows.jsonl").read_text()


def test_a_request_that_failed_in_a_preview_is_asked_again(teach: Path, local: Local, capsys: Any) -> None:
    local.rule(teach=True, fail={"new": [3, 400]})
    code, out, _ = inside(capsys, "synth", "teach", teach, "--preview", 4, "synth.attempts=1", "--json")
    assert code == 0 and "failed" in {row["filter"] for row in json.loads(out)["rejected"]}
    code, out, err = inside(capsys, "synth", "teach", teach, "--json")
    assert code == 0 and json.loads(out)["cost"]["failed"] == 0, err


def test_a_folder_of_another_config(teach: Path, local: Local, tmp_path: Path, capsys: Any) -> None:
    """It is not overwritten unasked; with --overwrite the replies that are still asked for are not asked again."""
    assert inside(capsys, "synth", "teach", teach)[0] == 0
    before = len(local.requests())
    code, _, err = inside(capsys, "synth", "teach", teach, "synth.filters.refusals=false")
    assert code == 3 and "rows of another config" in err
    code, _, err = inside(capsys, "synth", "teach", teach, "synth.filters.refusals=false", "--overwrite")
    assert code == 0 and any(r["answer"].startswith("I'm sorry") for r in lines(tmp_path / "made" / "rows.jsonl")), err
    assert len(local.requests()) - before < before / 2
    # changed seeds are noticed, and so is a command that was stopped while it wrote
    (tmp_path / "made" / "synth.json").unlink()
    (tmp_path / "made" / ".rows.jsonl.writing-1").write_text("{")
    assert inside(capsys, "synth", "teach", teach, "synth.filters.refusals=false")[0] == 0
    assert not (tmp_path / "made" / ".rows.jsonl.writing-1").exists()
    with (tmp_path / "seeds.jsonl").open("a") as file:
        file.write(json.dumps({"question": "Who ate the plums?", "answer": "A mouse did."}) + "\n")
    code, _, err = inside(capsys, "synth", "teach", teach, "synth.filters.refusals=false")
    assert code == 3 and "rows of other seeds or documents" in err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    code, _, err = inside(capsys, "synth", "teach", teach, f"output={tmp_path / 'other'}", "--overwrite")
    assert code == 3 and "something else" in err


def test_a_teacher_that_gives_too_little(teach: Path, tmp_path: Path, capsys: Any) -> None:
    """Exit code 3 and the rows that there are; without any row an error that names the filters."""
    code, out, err = inside(capsys, "synth", "teach", teach, "synth.rows=40", "synth.filters.max_answer_words=1")
    assert code == 2 and "none of 200 questions became a row" in err and "length: " in err
    settings = ("synth.attempts=1", f"output={tmp_path / 'few'}")
    code, out, _ = inside(capsys, "synth", "teach", teach, *settings)
    assert code == 3 and "fewer than the 12 that were asked for" in out
    assert 0 < len(lines(tmp_path / "few" / "rows.jsonl")) < 12


@pytest.mark.parametrize(
    ("settings", "columns"),
    [
        (("synth.makes=preferences", "synth.selection.samples=3"), {"prompt", "chosen", "rejected"}),
        (("synth.makes={kind: dialogues, turns: 3}",), {"messages"}),
        (("synth.makes={kind: labels, labels: [sweet, sour]}", "synth.seeds=null"), {"question", "answer"}),
        (("synth.seeds=null", "synth.task=fruit and cellars"), {"question", "answer"}),
        (("synth.attributes={reader: [a child, a baker], tone: [dry]}",), {"question", "answer"}),
    ],
)
def test_what_a_teacher_makes(
    settings: tuple[str, ...], columns: set[str], teach: Path, local: Local, tmp_path: Path, capsys: Any
) -> None:
    reward = tmp_path / "reward.py"
    reward.write_text("def longer(answer, row):\n    return float(len(answer))\n")
    if "preferences" in settings[0]:
        settings = (*settings, f"synth.selection.verifier={{kind: function, path: '{reward}:longer'}}")
    code, _, err = inside(capsys, "synth", "teach", teach, *settings)
    assert code == 0, err
    rows = lines(tmp_path / "made" / "rows.jsonl")
    assert len(rows) == 12 and all(set(row) - {"made"} == columns for row in rows)
    asked = local.requests()
    if "chosen" in columns:
        assert all(len(row["chosen"]) > len(row["rejected"]) for row in rows)
        assert all(row["made"]["scores"] == sorted(row["made"]["scores"], reverse=True) for row in rows)
    if "messages" in columns:
        roles = ["user", "assistant"] * 3
        assert all([turn["role"] for turn in row["messages"]] == roles for row in rows)
        assert any("Write the next question" in request["question"] for request in asked)
    if "sweet" in settings[0]:
        assert {row["answer"] for row in rows} == {"sweet", "sour"}
        assert all("Write a text with the label: s" in request["question"] for request in asked)
    if "attributes" in settings[0]:
        assert all(row["made"]["attributes"]["reader"] in ("a child", "a baker") for row in rows)
        assert any("Take into account: reader: a" in request["question"] for request in asked)
    assert inside(capsys, "data", "check", tmp_path / "made" / "rows.jsonl")[0] == 0


def test_rows_about_documents_are_grounded(teach: Path, local: Local, tmp_path: Path, capsys: Any) -> None:
    """Each passage is asked about before any is asked about again; answers with other numbers are left out."""
    (tmp_path / "docs").mkdir()
    for i in range(6):
        (tmp_path / "docs" / f"{i}.txt").write_text(f"In the year {i} there were {i} of them in cellar {i}.")
    settings = (f"synth.documents={tmp_path / 'docs'}", "synth.rows=2", "synth.attempts=20")
    code, out, _ = inside(capsys, "synth", "teach", teach, *settings, "--json")
    found = lines(tmp_path / "made" / "rejected.jsonl") if code == 0 else []
    code, out, err = inside(
        capsys, "synth", "teach", teach, *settings, "synth.filters.grounded=false", "--overwrite", "--json"
    )
    assert code == 0, err
    rows = lines(tmp_path / "made" / "rows.jsonl")
    assert all(row["context"].startswith("In the year") for row in rows) and len({r["context"] for r in rows}) == 2
    assert all("this text answers" in local.requests()[0]["question"] for _ in rows)
    assert not found or any(row["filter"] == "grounded" for row in found)


def test_the_questions_of_seeds_are_answered_and_verified(
    teach: Path, local: Local, tmp_path: Path, capsys: Any
) -> None:
    """Rejection sampling: of four answers one that is right is kept, and a question without one is left out."""
    questions = tmp_path / "sums.jsonl"
    rows = [{"question": f"what is in box {i} and shelf {i}?", "answer": str(60 + i)} for i in range(60)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = (f"synth.seeds={questions}", "synth.questions=seeds", "synth.task=null", "synth.rows=60")
    settings = (
        *settings,
        "synth.selection.verifier={kind: regex, pattern: 'were (6\\d) of'}",
        "synth.filters.refusals=false",
    )
    code, out, err = inside(capsys, "synth", "teach", teach, *settings, "--json")
    assert code in (2, 3), err  # hardly any number of this teacher is that of its row
    settings = (
        *settings[:-2],
        "synth.selection.verifier={kind: regex, pattern: 'were 1'}",
        "synth.selection.samples=4",
    )
    code, out, err = inside(capsys, "synth", "teach", teach, *settings, f"output={tmp_path / 'right'}", "--json")
    assert code == 3, err
    kept = lines(tmp_path / "right" / "rows.jsonl")
    assert 10 < len(kept) < 60 and all("were 1" in row["answer"] for row in kept)
    assert json.loads(out)["rejected"].keys() == {"verifier", "refusals"} or "verifier" in json.loads(out)["rejected"]
    # nothing but the question is asked
    assert {len(request["asked"]["messages"]) for request in local.requests()} == {1}


def test_a_run_is_the_teacher(config: Path, teach: Path, questions: Path, tmp_path: Path, capsys: Any) -> None:
    """The rows of a model here are made chunk by chunk, and found again in the journal."""
    assert inside(capsys, "train", config)[0] == 0
    teacher = f"synth.teacher={{model: {tmp_path / 'run'}, max_new_tokens: 6, stop: [e, a, o, t]}}"
    settings = (teacher, f"synth.seeds={questions}", "synth.questions=seeds", "synth.rows=20", "synth.task=null")
    filters = "synth.filters={language: false, near_duplicates: null}"
    code, out, err = inside(capsys, "synth", "teach", teach, *settings, filters, "--json")
    assert code in (0, 3) and json.loads(out)["rows"] > 0, err
    rows = lines(tmp_path / "made" / "rows.jsonl")
    assert all(row["context"].startswith("box") for row in rows)
    (tmp_path / "made" / "synth.json").unlink()
    shutil.rmtree(tmp_path / "made" / "rows.jsonl", ignore_errors=True)
    code, _, err = inside(capsys, "synth", "teach", teach, *settings, filters)
    assert "something else" in err or code in (0, 3)


def test_a_question_that_must_never_occur(teach: Path, seeds: Path, tmp_path: Path, capsys: Any) -> None:
    """Among the seeds it is an error; one that the teacher writes is left out."""
    code, _, err = inside(capsys, "synth", "teach", teach, f"synth.never=['{seeds}']")
    assert code == 2 and "a seed asks what synth.never names" in err and "line 1" in err
    assert inside(capsys, "synth", "teach", teach)[0] == 0
    first = lines(tmp_path / "made" / "rows.jsonl")[0]
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": first["question"].upper(), "answer": "x"}) + "\n")
    settings = (f"synth.never=['{tmp_path / 'test.jsonl'}']", f"output={tmp_path / 'clean'}")
    assert inside(capsys, "synth", "teach", teach, *settings)[0] == 0
    assert first["question"] not in (tmp_path / "clean" / "rows.jsonl").read_text()
    # a question of the test is one with the passage of a document before it, too
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("There is a cellar.")
    about = (f"synth.documents={tmp_path / 'docs'}", "synth.filters.grounded=false", "synth.rows=2")
    assert inside(capsys, "synth", "teach", teach, *about, f"output={tmp_path / 'about'}")[0] == 0
    asked = lines(tmp_path / "about" / "rows.jsonl")[0]["question"]
    (tmp_path / "bare.jsonl").write_text(json.dumps({"question": asked, "answer": "x"}) + "\n")
    bare = (*about, f"synth.never=['{tmp_path / 'bare.jsonl'}']", f"output={tmp_path / 'bare'}")
    assert inside(capsys, "synth", "teach", teach, *bare)[0] == 0
    assert asked not in (tmp_path / "bare" / "rows.jsonl").read_text()
    (left_out,) = [r for r in lines(tmp_path / "clean" / "rejected.jsonl") if r["filter"] == "leak"]
    assert left_out["question"] == first["question"] and "test.jsonl line 1" in left_out["reason"]


@pytest.mark.parametrize("status", [402, 429, 503])
def test_an_outage_is_no_answer(status: int, teach: Path, local: Local, tmp_path: Path, capsys: Any) -> None:
    """It was kept as a failure of each request, and used up all attempts for ever."""
    local.rule(teach=True, fail={"new": [10_000, status]})
    code, _, err = inside(capsys, "synth", "teach", teach)
    assert code == 3 and "answers nobody" in err and "the same command continues" in err, err
    local.rule(teach=True)
    code, out, err = inside(capsys, "synth", "teach", teach, "--json")
    assert code == 0 and json.loads(out)["cost"]["failed"] == 0, err


def test_a_server_that_is_down_stops_the_command(teach: Path, local: Local, capsys: Any) -> None:
    """One request that ends in 500 fails alone, eight in a row are a server that is down."""
    local.rule(teach=True, fail={"new": [10_000, 500]})
    code, _, err = inside(capsys, "synth", "teach", teach)
    assert code == 3 and "the server fails" in err, err
    local.rule(teach=True)
    assert inside(capsys, "synth", "teach", teach)[0] == 0


def test_reasoning_stays_out_of_rows(teach: Path, local: Local, tmp_path: Path, capsys: Any) -> None:
    local.rule(teach=True, think=True)
    assert inside(capsys, "synth", "teach", teach)[0] == 0
    assert "think" not in (tmp_path / "made" / "rows.jsonl").read_text()
    assert all("think" not in json.dumps(request["asked"]) for request in local.requests())


def test_a_server_that_gives_one_answer_at_a_time(teach: Path, local: Local, tmp_path: Path, capsys: Any) -> None:
    """Ollama ignores `n`: the missing answers are asked for with other seeds."""
    local.rule(teach=True, single=True)
    reward = tmp_path / "reward.py"
    reward.write_text("def longer(answer, row):\n    return float(len(answer))\n")
    verifier = f"synth.selection={{samples: 3, verifier: {{kind: function, path: '{reward}:longer'}}}}"
    code, out, err = inside(capsys, "synth", "teach", teach, "synth.makes=preferences", verifier, "--json")
    assert code == 0 and len(lines(tmp_path / "made" / "rows.jsonl")) == 12, err
    cost, requests = json.loads(out)["cost"], [r for r in local.requests() if r["how"] is None]
    assert cost["answer_tokens"] == 9 * len(requests) > 9 * cost["requests"]


def test_a_judge_decides_only_if_people_agree_with_it(teach: Path, local: Local, tmp_path: Path, capsys: Any) -> None:
    """Its agreement is measured once, before anything is written."""
    pairs = [
        {"question": f"q {i}", "first": "apples and apples" if i % 2 else "no", "second": "none", "human": "tie"}
        for i in range(30)
    ]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    judge = f"{{model: big, server: '{local.url}', human_labels: {tmp_path / 'labels.jsonl'}}}"
    settings = (f"synth.selection={{samples: 2, judge: {judge}}}",)
    local.rule(teach=True, judge=True)
    code, _, err = inside(capsys, "synth", "teach", teach, *settings)
    assert code == 3 and "this judge is not trusted" in err and not (tmp_path / "made").exists(), err


def test_a_call_from_python_overwrites_as_the_command_does(teach: Path, config: Path, tmp_path: Path) -> None:
    rows = tmp_path / "made" / "rows.jsonl"
    rung.synthesize(rung.load_synth_config(teach))
    changed = rung.load_synth_config(teach, ["synth.filters.refusals=false"])
    with pytest.raises(rung.CheckpointError, match="rows of another config"):
        rung.synthesize(changed)
    rung.synthesize(changed, overwrite=True)
    assert any(row["answer"].startswith("I'm sorry") for row in lines(rows))
    config.write_text("synth: {kind: improve, verifier: {kind: exact}}\n" + config.read_text().split("evaluation:")[0])
    with pytest.raises(rung.ConfigError, match="not overwritten"):
        rung.synthesize(rung.load_synth_config(config, [f"output={tmp_path / 'other'}"]), overwrite=True)


def test_documents_are_rows_with_a_column(teach: Path, local: Local, tmp_path: Path, capsys: Any) -> None:
    """Errors name the settings of synth, not those of retrieval."""
    pages = tmp_path / "pages.jsonl"
    pages.write_text("".join(json.dumps({"body": f"In cellar {i} stood {i} barrels."}) + "\n" for i in range(4)))
    settings = ("synth.filters.grounded=false", "synth.rows=2")
    code, _, err = inside(capsys, "synth", "teach", teach, f"synth.documents={pages}", *settings)
    assert code == 2 and "synth.documents.column" in err and "retrieve" not in err, err
    documents = f"synth.documents={{path: {pages}, column: body, chunk_words: 3}}"
    assert inside(capsys, "synth", "teach", teach, documents, *settings)[0] == 0
    assert {row["context"] for row in lines(tmp_path / "made" / "rows.jsonl")} <= {
        part for i in range(4) for part in (f"In cellar {i}", f"stood {i} barrels.")
    }


def test_a_file_of_unknown_columns_is_named_by_its_setting(teach: Path, tmp_path: Path, capsys: Any) -> None:
    """Neither seeds nor files of `never` take settings of data, so none are proposed."""
    strange = tmp_path / "strange.jsonl"
    strange.write_text(json.dumps({"alpha": "a", "beta": "b"}) + "\n")
    for setting, place in ((f"synth.seeds={strange}", "synth.seeds"), (f"synth.never=['{strange}']", "synth.never")):
        code, _, err = inside(capsys, "synth", "teach", teach, setting)
        assert code == 2 and f"{place} takes files alone" in err and "data.map" not in err, err


def test_what_stands_in_the_way_of_a_folder(teach: Path, local: Local, tmp_path: Path, capsys: Any) -> None:
    """Rows that are gone are written again, edited ones are not overwritten, and another teacher may follow."""
    assert inside(capsys, "synth", "teach", teach)[0] == 0
    rows = tmp_path / "made" / "rows.jsonl"
    text, asked = rows.read_text(), len(local.requests())
    rows.unlink()
    assert inside(capsys, "synth", "teach", teach)[0] == 0 and rows.read_text() == text
    assert len(local.requests()) == asked
    rows.write_text(text + text)
    code, _, err = inside(capsys, "synth", "teach", teach)
    assert code == 3 and "rows of another hand" in err
    other = f"synth.teacher={{model: other, server: '{local.url}'}}"
    assert inside(capsys, "synth", "teach", teach, other, "--overwrite")[0] == 0
    assert len(list((tmp_path / "made").glob("journal-*.jsonl"))) == 2
    code, _, err = inside(capsys, "synth", "teach", teach, f"output={rows}")
    assert code == 3 and "this is a file" in err


def test_seeds_as_people_have_them(teach: Path, seeds: Path, tmp_path: Path, capsys: Any) -> None:
    """Chinese has no spaces between words; earlier turns are counted; tools are refused."""
    chinese = [{"question": f"第{i}家公司的年收入是多少?", "answer": f"是{i}亿元"} for i in range(4)]
    seeds.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chinese))
    settings = ("synth.filters.language=false", f"output={tmp_path / 'zh'}")
    assert inside(capsys, "synth", "teach", teach, *settings)[0] == 0
    assert check_length("第一家公司的年收入是多少", FiltersConfig()) is None
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    seeds.write_text(json.dumps({"messages": turns}) + "\n")
    code, _, err = inside(
        capsys, "synth", "teach", teach, "synth.filters.language=false", f"output={tmp_path / 'chat'}"
    )
    assert code == 0 and "1 of 1 seeds have turns before their question" in err
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    seeds.write_text(json.dumps({"messages": turns, "tools": [tool]}) + "\n")
    code, _, err = inside(capsys, "synth", "teach", teach)
    assert code == 2 and "this seed offers tools" in err


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("synth.seeds=null", "synth.task=null"), "something to begin with"),
        (("synth.selection.samples=3",), "need a verifier or a judge"),
        (("synth.makes=preferences", "synth.selection.samples=1"), "between two answers"),
        (("synth.makes={kind: answers, labels: [a]}",), "is for makes"),
        (("synth.questions=seeds", "synth.makes=dialogues"), "questions: seeds takes"),
        (("synth.attributes={reader: []}",), "has no values"),
        (("synth.selection.verifier={kind: exact}",), "made questions have none"),
        (("synth.selection.judge={model: x}", "synth.selection.samples=2"), "only after its agreement with people"),
        (("synth.teacher={model: x, stop: [a], server: 'http://127.0.0.1:9/v1'}",), "ends its answers itself"),
        (("synth.rows=null",), "rows is missing"),
        (("synth.questions=seeds", "synth.attempts=9"), "attempts is of new questions"),
        (("synth.questions=seeds", "synth.examples.seeds=2"), "examples is of new questions"),
        (
            ("synth.selection={samples: 2, judge: {model: x, human_labels: y, reference: true}}",),
            "made questions have none",
        ),
        (("synth.selection.verifier={kind: judge, model: x, human_labels: y}",), "is set in `judge`"),
        (("synth.selection.verifier={kind: function, path: 'x.py:f'}",), "synth.selection.verifier.path"),
        (("synth.filters={min_words: 20, max_words: 5}",), "at most max_words"),
        (("synth.attributes={reader: ['']}",), "an empty one"),
        (("synth.rovs=3",), "did you mean synth.rows?"),
        (("synth.filters.novelti=3",), "did you mean synth.filters.novelty?"),
        (("model.name=smol",), "is not a setting of rung synth"),
        (("synth.seeds=nowhere.jsonl",), "nowhere.jsonl"),
    ],
)
def test_what_cannot_be_made(settings: tuple[str, ...], said: str, teach: Path, tmp_path: Path, capsys: Any) -> None:
    code, _, err = inside(capsys, "synth", "teach", teach, *settings)
    assert code in (2, 3) and said in err and not (tmp_path / "made").exists(), err


def test_configs_of_the_other_kind(teach: Path, config: Path, capsys: Any) -> None:
    code, _, err = inside(capsys, "train", teach)
    assert code == 2 and "rung synth reads it" in err, err
    code, _, err = inside(capsys, "synth", "teach", config)
    assert code == 2 and "synth is missing" in err, err
