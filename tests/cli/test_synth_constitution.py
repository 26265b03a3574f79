"""Answers revised by rules, or compared by them: from a server and from a model here, in rows that train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loopback import Local
from processes import inside

RULE = "An answer says nothing is rotten."


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def revise(local: Local, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config of twelve questions, whose answers say up to three times that fruit is rotten."""
    monkeypatch.setenv("RUNG_CACHE", str(tmp_path / "cache"))
    local.rule(rotten=True)
    seeds = [{"prompt": f"How is the fruit in box {i}?"} for i in range(12)]
    (tmp_path / "seeds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in seeds))
    file = tmp_path / "constitution.yaml"
    file.write_text(
        f"synth:\n  kind: constitution\n  teacher: {{server: {local.url}, model: teacher}}\n"
        f"  critic: {{server: {local.url}, model: critic, price: {{prompt: 2, answer: 10}}}}\n"
        f"  principles: ['{RULE}']\n  seeds: {tmp_path / 'seeds.jsonl'}\n"
        f"  makes: {{kind: revisions, rounds: 2}}\noutput: {tmp_path / 'made'}\n"
    )
    return file


def roles(request: dict[str, Any]) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in request["asked"]["messages"]]


def test_revisions_that_train(revise: Path, local: Local, config: Path, tmp_path: Path, capsys: Any) -> None:
    """Every revision of every round is a row; one that changes nothing is counted; training says who made its rows."""
    helpful = [{"question": f"Who sells fruit here, {i}?", "answer": "The baker."} for i in range(2)]
    (tmp_path / "helpful.jsonl").write_text("".join(json.dumps(row) + "\n" for row in helpful))
    settings = ("synth.seeds=" + str(tmp_path / "seeds.jsonl"), f"synth.makes.helpful={tmp_path / 'helpful.jsonl'}")
    code, out, err = inside(capsys, "synth", "constitution", revise, *settings, "--json")
    assert code == 0 and "revisions" in err, err
    result, rows = json.loads(out), lines(tmp_path / "made" / "rows.jsonl")
    revisions = [row for row in rows if row["made"]["kind"] == "revision"]
    first, *rounds = result["rounds"]
    assert result["rows"] == len(rows) and result["helpful"] == 2 and result["seeds"] == 12
    assert sum(r["revised"] for r in rounds) == len(revisions) > 0
    assert all(r["revised"] + r["unchanged"] == 12 for r in rounds) and first["revised"] == 0
    # the answers draw one word each: what was rotten is fresh after one round
    assert all("rotten" not in row["answer"] and "fresh" in row["answer"] for row in revisions)
    assert all(row["made"]["before"].count("rotten") == 1 for row in revisions)
    assert rounds[1]["revised"] == 0 and {row["made"]["rule"] for row in revisions} == {RULE}
    assert [row["answer"] for row in rows[len(revisions) :]] == ["The baker."] * 2
    teacher, critic = result["costs"]["teacher"], result["costs"]["critic"]
    assert teacher["requests"] == 12 and critic["requests"] == 48 and teacher["money"] is None
    assert critic["money"] == pytest.approx((2 * critic["prompt_tokens"] + 10 * critic["answer_tokens"]) / 1e6)
    assert result["critic"] is None
    page = (tmp_path / "made" / "report.html").read_text()
    assert "not measured: no human_labels" in page and "Rounds" in page and RULE in page
    # nothing is asked again, neither for the same rows nor after the results are gone
    asked = len(local.requests())
    again = inside(capsys, "synth", "constitution", revise, *settings, "--json")
    assert again[0] == 0 and json.loads(again[1]) == result
    (tmp_path / "made" / "synth.json").unlink()
    again = inside(capsys, "synth", "constitution", revise, *settings, "--json")
    assert again[0] == 0 and json.loads(again[1])["rows"] == len(rows) and len(local.requests()) == asked
    assert lines(tmp_path / "made" / "rows.jsonl") == rows
    code, _, err = inside(capsys, "synth", "constitution", revise, *settings, "seed=1")
    assert code == 3 and "rows of another config" in err
    given = (f"data.path={tmp_path / 'made' / 'rows.jsonl'}", "data.group=null", "data.validation=0", "data.test=0")
    code, _, err = inside(capsys, "train", config, *given, "training.max_steps=2")
    assert code == 0, err
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    (made,) = [part["made_by"] for part in run["data"]["splits"]["sets"]]
    assert made == {
        "kind": "constitution", "teacher": "teacher", "critic": "critic", "trusted": None, "unchanged": True
    }  # fmt: skip


def test_the_order_of_a_dialogue(revise: Path, local: Local, tmp_path: Path, capsys: Any) -> None:
    """Question, answer, request for a critique, critique, request for a revision; the next round has the revision."""
    (tmp_path / "rotten.jsonl").write_text(
        json.dumps({"question": "Box 7?", "context": "a shop", "answer": "It is rotten, rotten."}) + "\n"
    )
    example = {"rule": "Be kind.", "question": "Who?", "answer": "Nobody.", "critique": "Rude.", "revision": "Anne."}
    (tmp_path / "examples.jsonl").write_text(json.dumps(example) + "\n")
    settings = [f"synth.seeds={tmp_path / 'rotten.jsonl'}", "synth.makes.answers=seeds", "synth.filters.language=false"]
    settings.append(f"synth.transcripts={tmp_path / 'examples.jsonl'}")
    assert inside(capsys, "synth", "constitution", revise, *settings)[0] == 0
    critique_1, revision_1, critique_2, revision_2 = map(roles, local.requests())
    example_turns = [
        ("user", "Who?"), ("assistant", "Nobody."),
        ("user", "Say in a few sentences in what way your last answer breaks this rule: Be kind."),
        ("assistant", "Rude."),
        ("user", "Write your last answer anew, so that it follows this rule: Be kind. "
         "Reply with the new answer and nothing else."), ("assistant", "Anne."),
    ]  # fmt: skip
    question = ("user", "a shop\n\nBox 7?")
    asked = ("user", f"Say in a few sentences in what way your last answer breaks this rule: {RULE}")
    wanted = f"Write your last answer anew, so that it follows this rule: {RULE} Reply with the new answer and nothing"
    assert critique_1 == [*example_turns, question, ("assistant", "It is rotten, rotten."), asked]
    assert revision_1[:-1] == [*critique_1, ("assistant", "It says 2 times that fruit is rotten.")]
    assert revision_1[-1] == ("user", wanted + " else.")
    # the dialogue of round 2 has the revision of round 1 as its answer, and nothing else of that round
    assert critique_2 == [*example_turns, question, ("assistant", "It is fresh, rotten."), asked]
    assert revision_2[:-2] == critique_2 and revision_2[-1] == revision_1[-1]
    rows = lines(tmp_path / "made" / "rows.jsonl")
    assert [(row["answer"], row["made"]["round"]) for row in rows] == [
        ("It is fresh, rotten.", 1),
        ("It is fresh, fresh.", 2),
    ]
    assert all(row["context"] == "a shop" and row["question"] == "Box 7?" for row in rows)
    # without critiques: the revision is asked for behind the answer, in the examples too
    before = len(local.requests())
    settings += ["synth.makes.critiques=false", "--overwrite"]
    assert inside(capsys, "synth", "constitution", revise, *settings)[0] == 0
    direct = list(map(roles, local.requests()[before:]))
    assert len(direct) == 2
    assert direct[0] == [*example_turns[:2], *example_turns[4:], question, critique_1[-2], revision_1[-1]]


@pytest.mark.parametrize(
    ("said", "filter_"),
    [
        ("It is fine.\n\nHuman: And box 2?", "roles"),
        ("**Critique:** it was rude.", "roles"),
        ("Here is a revised answer that keeps the rule: it is fine.", "prefaces"),
        ("Это совсем другой язык, и в нём другие буквы.", "language"),
        ("", "empty"),
        ("It is " + "very " * 40 + "fine.", "length"),
    ],
)
def test_what_is_no_answer_is_left_out(
    said: str, filter_: str, revise: Path, local: Local, tmp_path: Path, capsys: Any
) -> None:
    message = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
    # the first two revisions of box 3; its critique is whole
    local.rule(rotten=True, fail={"anew,": [1, {"body": json.dumps({"choices": [message]})}]})
    settings = ("synth.teacher.concurrency=1", "synth.critic.concurrency=1", "synth.filters.max_answer_words=30")
    code, out, err = inside(capsys, "synth", "constitution", revise, *settings, "--json")
    assert code == 0 and json.loads(out)["rejected"] == {filter_: 1}, err
    (rejected,) = lines(tmp_path / "made" / "rejected.jsonl")
    assert rejected["filter"] == filter_ and rejected.get("answers", [""]) == [said.strip()]
    numbers = {row["made"]["number"] for row in lines(tmp_path / "made" / "rows.jsonl")}
    assert rejected["number"] not in numbers


def sigmoid(z: float) -> float:
    return float(1.0 / (1.0 + np.exp(-np.float64(z))))


@pytest.mark.parametrize("reports", [True, False])
def test_preferences_are_averaged_over_both_orders(
    reports: bool, revise: Path, local: Local, tmp_path: Path, capsys: Any
) -> None:
    """The place of an answer is worth one nat to this critic: the mean over both orders has none of it."""
    local.rule(rotten=True, **({"preference": 0.7} if reports else {"refuse": "logprobs"}))
    settings = ("synth.makes=preferences",)
    code, out, err = inside(capsys, "synth", "constitution", revise, *settings, "--json")
    assert code == 0, err
    result, rows = json.loads(out), lines(tmp_path / "made" / "rows.jsonl")
    assert len(rows) + sum(result["rejected"].values()) == 12 and set(result["rejected"]) <= {"tie"}
    assert len(rows) > 3
    for row in rows:
        difference = row["rejected"].count("rotten") - row["chosen"].count("rotten")
        assert difference > 0
        mean = (sigmoid(0.7 * difference + 1.0) + sigmoid(0.7 * difference - 1.0)) / 2
        # without probabilities the letter decides, and both orders agree: a hard label
        assert row.get("probability") == (pytest.approx(mean, abs=2e-6) if reports else None)
    assert result["shown_first"] > (0.6 if reports else 0.45)
    # a choice is a paid request too
    critic = result["costs"]["critic"]
    same = sum("are the same" in row["reason"] for row in lines(tmp_path / "made" / "rejected.jsonl"))
    assert critic["requests"] == 2 * (12 - same)
    assert critic["uncounted"] == 0 and critic["answer_tokens"] == 9 * critic["requests"] and critic["money"] > 0
    assert ("the server gives no log-probabilities" in err) == (not reports)
    asked = [r["asked"] for r in local.requests() if "[Answer A]" in r["question"] and not r["how"]]
    pairs = [tuple(a["messages"][-1]["content"].split("[Answer A]\n")[1].split("\n\n[Answer B]\n")) for a in asked]
    shown = {(first, second.split("\n\nWhich")[0]) for first, second in pairs}
    assert all((second, first) in shown for first, second in shown)
    assert all(("logprobs" in a) == reports for a in asked)


def test_soft_labels_reach_the_loss(revise: Path, local: Local, config: Path, tmp_path: Path, capsys: Any) -> None:
    """The written rows train a preference as they are; with reasons the probabilities are clamped."""
    local.rule(rotten=True, preference=3.0)
    settings = ["synth.makes={kind: preferences, pairs_per_question: 2, reasoning: true}"]
    code, out, err = inside(capsys, "synth", "constitution", revise, *settings, "--json")
    assert code == 0, err
    rows = lines(tmp_path / "made" / "rows.jsonl")
    assert {row["probability"] for row in rows} == {0.6} and len({r["made"]["number"] // 2 for r in rows}) > 4
    choices = [r["asked"]["messages"] for r in local.requests() if r["question"].startswith("Which answer is better?")]
    assert choices and all("of them." in turns[-2]["content"] for turns in choices)
    given = (f"data.path={tmp_path / 'made' / 'rows.jsonl'}", "data.group=null", "data.validation=0", "data.test=0")
    objective = ("objective.kind=preference", "training.max_steps=2", "evaluation.metrics=[exact]")
    code, _, err = inside(capsys, "train", config, *given, *objective)
    assert code == 0, err
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["data"]["splits"]["sets"][0]["mapping"]["probability"] == "probability"


@pytest.mark.parametrize(("preference", "trusted"), [(2.0, True), (-2.0, False), (0.0, False)])
def test_a_critic_is_trusted_if_people_agree_with_it(
    preference: float, trusted: bool, revise: Path, local: Local, config: Path, tmp_path: Path, capsys: Any
) -> None:
    """One that prefers what people prefer, one that prefers the other, and one that prefers what is shown first."""
    local.rule(rotten=True, preference=preference)
    pairs = [
        {"question": f"Box {i}?", "first": "It is rotten.", "second": "It is good.", "human": "second"}
        if i % 2
        else {"question": f"Box {i}?", "first": "Good.", "second": "Rotten, rotten.", "human": ["first", "first", None]}
        for i in range(20)
    ]
    pairs.append({"question": "Box 99?", "first": "a", "second": "b", "human": "tie"})
    (tmp_path / "people.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    settings = (f"synth.human_labels={tmp_path / 'people.jsonl'}", "synth.limit=3", "synth.makes.rounds=1")
    code, out, err = inside(capsys, "synth", "constitution", revise, *settings, "--json")
    critic = json.loads(out)["critic"]
    assert (code, critic["trusted"], critic["pairs"]) == ((0 if trusted else 3), trusted, 20), err
    share = {2.0: 1.0, -2.0: 0.0, 0.0: 0.5}[preference]
    assert critic["agreement"]["mean"] == share and (critic["shown_first"] > 0.7) == (preference == 0.0)
    # the rows are written in every case, and say what their critic is worth
    assert lines(tmp_path / "made" / "rows.jsonl")
    assert ("NOT TRUSTED" in (tmp_path / "made" / "report.html").read_text()) == (not trusted)
    assert json.loads((tmp_path / "made" / "synth.json").read_text())["trusted"] == trusted
    given = (f"data.path={tmp_path / 'made' / 'rows.jsonl'}", "data.group=null", "data.validation=0", "data.test=0")
    code, _, err = inside(capsys, "train", config, *given, "training.max_steps=1")
    assert code == 0 and ("NOT TRUSTED, people do not agree" in err) == (not trusted), err
    code, out, _ = inside(capsys, "synth", "constitution", revise, *settings)
    assert (code, "critic: trusted" in out, "critic: NOT TRUSTED" in out) == (0 if trusted else 3, trusted, not trusted)


def test_a_model_here_is_teacher_and_critic(
    config: Path, revise: Path, local: Local, tmp_path: Path, capsys: Any
) -> None:
    """One model for both, opened once, with one journal; its choices are log-probabilities."""
    assert inside(capsys, "train", config, "training.max_steps=40")[0] == 0
    writer = json.dumps({"model": str(tmp_path / "run"), "max_new_tokens": 12, "stop": ["s"]})
    settings = [f"synth.teacher={writer}", "synth.critic=null", "synth.filters.language=false", "synth.limit=4"]
    settings += ["synth.makes=preferences", "synth.filters.roles=false"]
    code, out, err = inside(capsys, "synth", "constitution", revise, *settings, "--json")
    assert code == 0 and not local.requests() and err.count("loading") == 1, err
    rows = lines(tmp_path / "made" / "rows.jsonl")
    assert all(0.5 < row["probability"] < 1 for row in rows)
    assert len(list((tmp_path / "made").glob("journal-*.jsonl"))) == 1
    code, out, err = inside(capsys, "synth", "constitution", revise, *settings[:4], "--preview", 2, "--json")
    answers = json.loads(out)["answers"]
    assert code == 0 and len(answers) == 2 and all("question" in answer for answer in answers), err


def test_a_preview_writes_nothing(revise: Path, local: Local, tmp_path: Path, capsys: Any) -> None:
    code, out, err = inside(capsys, "synth", "constitution", revise, "--preview", 3)
    assert code == 0 and out.count("question: ") == 3 and "nothing was written" in out, err
    assert "critique: It says" in out and not (tmp_path / "made").exists()
    # what the preview was answered is not asked again: three answers, and two rounds of critique and revision
    previewed = len(local.requests())
    code, out, _ = inside(capsys, "synth", "constitution", revise, f"output={tmp_path / 'made'}", "--json")
    assert code == 0 and len(local.requests()) == 12 * 5 and previewed == 3 * 5
    code, out, _ = inside(capsys, "synth", "constitution", revise, "synth.makes=preferences", "--preview", 3)
    assert code == 0 and out.count("first: ") == out.count("second: ") == 3


def test_what_was_banned_is_said_less(revise: Path, config: Path, tmp_path: Path, capsys: Any) -> None:
    """A tiny model that learned from revisions says the banned word less, and answers helpful questions as before."""
    questions = [
        {"question": f"box {i}: how is it?", "answer": "rotten"}
        if i % 2
        else {"question": f"what, {i}?", "answer": "pears"}
        for i in range(60)
    ]
    for name, part in (("all", questions), ("odd", questions[1::2]), ("even", questions[::2])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    settings = (
        "synth.makes.answers=seeds",
        f"synth.seeds={tmp_path / 'odd.jsonl'}",
        f"synth.makes.helpful={tmp_path / 'even.jsonl'}",
    )
    assert inside(capsys, "synth", "constitution", revise, *settings)[0] == 0
    scores = {}
    for name, path in (("before", tmp_path / "all.jsonl"), ("after", tmp_path / "made" / "rows.jsonl")):
        given = [
            f"data.path={path}",
            "data.group=null",
            "data.test=0",
            "data.validation=0",
            f"output={tmp_path / name}",
        ]
        learning = ["training.max_steps=70", "training.epochs=10", "evaluation.max_new_tokens=16"]
        assert inside(capsys, "train", config, *given, *learning)[0] == 0
        for split in ("odd", "even"):
            asked = [f"data.test={tmp_path / split}.jsonl", "evaluation.metrics=[not_banned,exact]"]
            asked += ["evaluation.banned=[rotten]", "data.overlap=drop_train", "evaluation.max_new_tokens=16"]
            code, out, err = inside(capsys, "eval", tmp_path / name, "--config", config, *asked, "--json")
            assert code == 0, err
            scores[name, split] = {n: v["mean"] for n, v in json.loads(out)["scores"].items()}
    assert scores["before", "odd"]["not_banned"] < 0.2 and scores["after", "odd"]["not_banned"] > 0.8
    assert scores["after", "even"]["exact"] >= scores["before", "even"]["exact"] - 0.1 > 0.5


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["synth.makes={kind: preferences, rounds: 2}"], "rounds"),
        (["synth.makes.reasoning=true"], "reasoning"),
        (["synth.makes={kind: preferences, clamp: [0.6, 0.7]}"], "clamp is a lowest probability below"),
        (["synth.makes={kind: preferences, clamp: [0.1, 0.6]}"], "and 1 less that"),
        (["synth.principles=[{One rule: with a colon}]"], "a rule with a colon stands in quotes"),
        (["synth.principles=['   ']"], "principles"),
        (["synth.principles=[]"], "principles"),
        (["synth.principles=nowhere.yaml"], "nowhere.yaml: no such file"),
        (["synth.principles=[be kind, be kind]"], "a rule stands in principles twice"),
        (["synth.makes.answers=seeds"], "no row has an answer"),
        (["synth.never=[{tmp}/seeds.jsonl]"], "a row asks what synth.never names"),
        (["synth.transcripts={tmp}/seeds.jsonl"], "no text in column rule"),
        (["synth.teacher.model=nothing-here", "synth.teacher.server=null"], "no such model"),
    ],
)
def test_what_cannot_be_made(settings: list[str], said: str, revise: Path, tmp_path: Path, capsys: Any) -> None:
    given = [setting.replace("{tmp}", str(tmp_path)) for setting in settings]
    code, _, err = inside(capsys, "synth", "constitution", revise, *given)
    assert code in (1, 2, 3) and said in " ".join(err.split()) and "Traceback" not in err, err
    assert not (tmp_path / "made" / "rows.jsonl").exists()


def test_principles_in_a_file(revise: Path, local: Local, tmp_path: Path, capsys: Any) -> None:
    """Each round draws one; requests in the words of a principle take the place of the default."""
    (tmp_path / "rules.yaml").write_text(
        "- Nothing is rotten.\n- {rule: Be kind., critique: 'Say in a few sentences: is it kind?', revision: Kinder!}\n"
    )
    code, _, err = inside(capsys, "synth", "constitution", revise, f"synth.principles={tmp_path / 'rules.yaml'}")
    assert code == 0, err
    asked = [r["question"] for r in local.requests() if r["asked"]["model"] == "critic"]
    assert "Kinder!" in asked and "Say in a few sentences: is it kind?" in asked
    assert any("Nothing is rotten." in text for text in asked)
    assert "- rule: Nothing is rotten." in (tmp_path / "made" / "report.html").read_text()


def test_turns_of_a_seed_keep_their_places(revise: Path, local: Local, tmp_path: Path, capsys: Any) -> None:
    """The context stands in the first turn of the user, where the template puts it, in requests and in rows."""
    turns = [{"role": "system", "content": "Be terse."}, {"role": "user", "content": "Which box?"}]
    turns += [{"role": "assistant", "content": "Box 7."}, {"role": "user", "content": "How is it?"}]
    seed = {"prompt": turns, "context": "a shop"}
    (tmp_path / "turns.jsonl").write_text(json.dumps(seed) + "\n")
    settings = (f"synth.seeds={tmp_path / 'turns.jsonl'}", "synth.filters.language=false")
    for seed_number in range(9):  # until an answer is rotten
        code, _, _ = inside(capsys, "synth", "constitution", revise, *settings, f"seed={seed_number}", "--overwrite")
        if code == 0:
            break
    asked = local.requests()[-1]["asked"]["messages"]
    expected = ["Be terse.", "a shop\n\nWhich box?", "Box 7.", "How is it?"]
    assert [turn["content"] for turn in asked[:4]] == expected
    (row,) = lines(tmp_path / "made" / "rows.jsonl")[:1]
    assert [turn["content"] for turn in row["messages"][:4]] == expected and "context" not in row
    local.rule(rotten=True, preference=0.7)
    for seed_number in range(9):
        given = (*settings, "synth.makes=preferences", f"seed={seed_number}", "--overwrite")
        if inside(capsys, "synth", "constitution", revise, *given)[0] == 0:
            break
    compared = local.requests()[-1]["question"]
    assert "System: Be terse.\n\nHuman: a shop\n\nWhich box?\n\nAssistant: Box 7.\n\nHuman: How is it?" in compared
    (pair,) = lines(tmp_path / "made" / "rows.jsonl")
    assert pair["prompt"] == turns and pair["context"] == "a shop"


def test_rows_of_another_config_do_not_stay(revise: Path, local: Local, tmp_path: Path, capsys: Any) -> None:
    assert inside(capsys, "synth", "constitution", revise)[0] == 0
    before = len(local.requests())
    code, _, err = inside(capsys, "synth", "constitution", revise, "synth.filters.max_answer_words=1", "--overwrite")
    assert code == 2 and "no answer was revised" in err
    names = {path.name for path in (tmp_path / "made").iterdir()}
    assert "rejected.jsonl" in names and not names & {"rows.jsonl", "synth.json"}
    # the first config makes its rows again, of the replies that are kept
    code, out, _ = inside(capsys, "synth", "constitution", revise, "--json")
    assert code == 0 and json.loads(out)["rows"] == len(lines(tmp_path / "made" / "rows.jsonl"))
    assert len(local.requests()) == before
    (tmp_path / "made" / "synth.json").write_text("{")
    code, _, err = inside(capsys, "synth", "constitution", revise)
    assert code == 3 and "this is no manifest" in err


def test_another_test_of_a_seed_is_another_seed(revise: Path, tmp_path: Path, capsys: Any) -> None:
    seeds = tmp_path / "seeds.jsonl"
    row = {"prompt": "How is the fruit?", "tests": ["assert f(1)"]}
    for number, tests in enumerate((["assert f(1)"], ["assert f(2)"])):
        seeds.write_text("".join(json.dumps({**row, "prompt": f"Box {i}?", "tests": tests}) + "\n" for i in range(6)))
        code, _, err = inside(capsys, "synth", "constitution", revise)
        assert (code, "other seeds" in err) == ((0, False) if number == 0 else (3, True)), err


def test_a_server_that_fails_on_log_probabilities(revise: Path, local: Local, capsys: Any) -> None:
    """It answers 500 to the setting: asked without it, it names an option."""
    local.rule(rotten=True, refuse="logprobs", refuse_status=500)
    code, out, err = inside(capsys, "synth", "constitution", revise, "synth.makes=preferences", "--json")
    assert code == 0 and json.loads(out)["rows"] > 3 and "gives no log-probabilities" in err, err
