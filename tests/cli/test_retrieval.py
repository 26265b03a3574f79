"""Rungs that retrieve, choose their examples, or choose their instruction: what they see is stated and measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from processes import inside
from rung.training.run_folder import read_items


@pytest.fixture
def boxes(config: Path, tmp_path: Path) -> Path:
    """A config whose questions name their box, with a folder of what is known about boxes."""
    rows = [
        {
            "context": f"box{i % 40} holds fruit",
            "question": f"what fruit is in box{i % 40}, asks person{i % 7}?",
            "box": i % 40,
        }
        | {"answer": "apples" if i % 2 else "pears"}
        for i in range(120)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "docs").mkdir()
    for i in range(36):  # of four boxes nothing is known
        (tmp_path / "docs" / f"{i}.txt").write_text(f"box{i} holds fruit and more\n")
    text = config.read_text()
    config.write_text(text.replace(text.split("path: ")[1].split(",")[0], str(tmp_path / "rows.jsonl")))
    return config


def rung(tmp_path: Path, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a rung stored, and its items."""
    folder = tmp_path / "run" / "rungs" / name
    return json.loads((folder / "result.json").read_text()), read_items(folder / "items.parquet")[0]


def test_a_ladder_of_what_is_seen(boxes: Path, tmp_path: Path, capsys: Any) -> None:
    tuned = "{kind: lora, context: retrieved}, {kind: lora, name: given}"
    rungs = f"[{{kind: zero_shot, context: withheld}}, rag, few_shot+rag, {tuned}]"
    settings = [f"climb.rungs={rungs}", f"evaluation.retrieve={{documents: {tmp_path / 'docs'}, top_k: 1}}"]
    code, out, err = inside(capsys, "climb", boxes, *settings, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [row["sees"] for row in found["rows"]] == [
        "instruction, closed book",
        "instruction, retrieved passages",
        "instruction, 2 shots, retrieved passages",
        "retrieved passages",
        "context",
    ]
    result, items = rung(tmp_path, "rag")
    told = result["retrieval"]
    unknown = sum(int(item["context"].split()[0][3:]) != int(item["group"]) for item in items)
    # every question shares words with some passage; its own box is found wherever there is a document of it
    assert told["hits"] == len(items) - unknown and told["without_passages"] == 0
    assert (
        told["hit_rate"]["examples"] == len(items)
        and told["documents"] == 36
        and told["judged_by_context"] == len(items)
    )
    assert found["rows"][1]["retrieval"] == found["rows"][3]["retrieval"] == told
    assert found["rows"][0]["retrieval"] is None
    contexts = {name: [item["context"] for item in rung(tmp_path, name)[1]] for name in ("zero_shot", "lora", "given")}
    assert set(contexts["zero_shot"]) == {None} and contexts["lora"] == [item["context"] for item in items]
    assert all(text.endswith("and more") for text in contexts["lora"])
    assert not any(text.endswith("and more") for text in contexts["given"])
    runs = [json.loads((tmp_path / "run" / "rungs" / name / "run.json").read_text()) for name in ("lora", "given")]
    assert [run["config"]["evaluation"]["context"] for run in runs] == ["retrieved", "given"]
    assert runs[0]["data"]["train"]["tokens"] > runs[1]["data"]["train"]["tokens"]  # trained on passages too
    shots, passages = rung(tmp_path, "few_shot-rag")[0]["shots"], "and more"
    assert len(shots) == 2
    page = (tmp_path / "run" / "report.html").read_text()
    assert "hit rate" in page and passages in page
    code, out, err = inside(capsys, "climb", boxes, *settings)
    assert code == 0 and "rag, few_shot+rag, lora: the right passage is among those retrieved for" in out, out
    (tmp_path / "docs" / "0.txt").write_text("box0 is gone")
    (tmp_path / "run" / "rungs" / "rag" / "result.json").unlink()
    code, _, err = inside(capsys, "climb", boxes, *settings)
    assert code == 3 and "the documents has changed" not in err and "the documents have changed" in err


def test_shots_of_a_retrieving_rung_carry_their_own_passages(boxes: Path, tmp_path: Path, capsys: Any) -> None:
    shown: list[Any] = []
    from rung.evaluation import evaluate

    ask = evaluate.prompt_ids

    def spy(chat: Any, records: Any, framing: Any, limit: int) -> Any:
        shown.append((framing, [framing.turns(record) for record in records]))
        return ask(chat, records, framing, limit)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "prompt_ids", spy)
        code, _, err = inside(capsys, "climb", boxes, "climb.rungs=[few_shot+rag]", "evaluation.retrieve={top_k: 1}")
    assert code == 0, err
    ((framing, turns),) = shown
    assert len(framing.shots) == 2 and all(shot.context for shot in framing.shots)
    for system, one, _, two, _, asked in turns:
        assert system.content == "Name the fruit."
        for turn in (one, two, asked):
            passage, question = turn.content.split("\n\n")
            assert passage.split()[0] in question, turn  # of its own box


def test_a_run_by_itself_retrieves_in_training_and_in_eval(boxes: Path, tmp_path: Path, capsys: Any) -> None:
    # a limit to what is learned from does not make the search easier
    settings = ["evaluation.context=retrieved", "evaluation.retrieve={top_k: 2}", "data.limit=10"]
    assert inside(capsys, "train", boxes, *settings)[0] == 0
    code, out, err = inside(capsys, "eval", tmp_path / "run", "--json")
    assert code == 0, err
    told = json.loads(out)["retrieval"]
    assert told["hit_rate"]["mean"] == 1.0 and told["documents"] == 40 and told["top_k"] == 2
    code, out, err = inside(capsys, "eval", tmp_path / "run")
    assert code == 0 and "40 of 40" not in out and "retrieved" in out


def test_chat_looks_up_as_in_training(boxes: Path, tmp_path: Path, capsys: Any) -> None:
    """The passage stands in front of the question, and documents that are gone are said to be."""
    from rung.commands import chat

    settings = ["evaluation.context=retrieved", f"evaluation.retrieve={{documents: {tmp_path / 'docs'}, top_k: 1}}"]
    assert inside(capsys, "train", boxes, *settings)[0] == 0
    prompts: list[Any] = []
    answer = chat.generate

    def spy(policy: Any, asked: Any, **more: Any) -> Any:
        prompts.append(policy.base.tokenizer.decode(asked[0]))
        return answer(policy, asked, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "generate", spy)
        code, _, err = inside(capsys, "chat", tmp_path / "run", "--question", "what fruit is in box7?")
        assert code == 0, err
    assert "box7 holds fruit and more\n\nwhat fruit is in box7?" in prompts[0]
    (tmp_path / "docs").rename(tmp_path / "gone")
    code, _, err = inside(capsys, "chat", tmp_path / "run", "--question", "what fruit is in box7?")
    assert code == 2 and "no such file" in err


def test_passages_are_no_contamination(boxes: Path, tmp_path: Path, capsys: Any) -> None:
    """The second passage of a held-out question is another box's, word for word what the run has learned from."""
    kept = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    for row in kept:
        row["context"] += "".join(f" word{row['box']}x{n}" for n in range(15))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    assert inside(capsys, "train", boxes, "evaluation.context=retrieved", "evaluation.retrieve={top_k: 2}")[0] == 0
    code, out, err = inside(capsys, "eval", tmp_path / "run", "--json")
    assert code == 0, err
    items = read_items(tmp_path / "run" / "eval.parquet")[0]
    assert all(item["context"].count("holds fruit") == 2 for item in items)
    seen = json.loads(out)["contamination"]
    assert {tier: own["items"] for tier, own in seen["tiers"].items() if "gram" in tier} == {"13-gram": 0, "8-gram": 0}
    assert json.loads((tmp_path / "run" / "run.json").read_text())["contamination"] == seen
    assert inside(capsys, "report", tmp_path / "run")[0] == 0
    assert "seen in training" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["climb.rungs=[{kind: rag, context: given}]"], "its `context` is retrieved"),
        (["climb.rungs=[few_shot+rag]", "evaluation.shots=0"], "few_shot+rag rung needs evaluation.shots"),
        (["climb.rungs=[{kind: rag, shots: 2}]"], "takes no `shots`"),
        (["climb.rungs=[{kind: zero_shot, example_selection: coverage}]"], "takes no `example_selection`"),
        (["climb.rungs=[zero_shot]", "evaluation.retrieve={top_k: 1}"], "nothing here retrieves"),
        (["climb.rungs=[rag]", "evaluation.retrieve={chunk_words: 5, overlap: 5}"], "overlap is below"),
        (["evaluation.stop=['']"], "an empty text in stop"),
        (["evaluation.stop=['\\n']"], "in double quotes only"),
        (["climb.rungs=[rag]", "evaluation.retrieve={column: body}"], "no documents are named"),
        (["climb.rungs=[rag]", "evaluation.retrieve={documents: nowhere.jsonl}"], "no such file"),
        (["climb.rungs=[{kind: lora, context: retrieved}]", "data.map={context: nothing}"], "no row has a context"),
        (["climb.rungs=[few_shot+rag]", "evaluation.retrieve={top_k: 60}"], "tokens and the model takes"),
        (["climb.instructions=[a, b]", "data.validation=0"], "data.validation is 0"),
        (["climb.instructions=[a, b]", "climb.rungs=[few_shot]"], "to come before other untuned"),
        (["climb.instructions=[a, a]"], "holds one twice"),
        (["climb.instructions=[' ']"], "without a word"),
    ],
)
def test_nonsense_is_refused_before_anything_is_spent(
    settings: list[str], words: str, boxes: Path, tmp_path: Path, capsys: Any
) -> None:
    if "nothing" in settings[-1] and "map" in settings[-1]:
        rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
        bare = [{name: value for name, value in row.items() if name != "context"} for row in rows]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bare))
        settings = settings[:-1]
    code, _, err = inside(capsys, "climb", boxes, *settings)
    assert code == 2 and words in err, err
    assert not (tmp_path / "run").exists()


def test_examples_by_choice(boxes: Path, tmp_path: Path, capsys: Any) -> None:
    rungs = (
        "[few_shot, {kind: few_shot, name: near, example_selection: similarity}, "
        "{kind: few_shot, name: wide, example_selection: coverage}]"
    )
    code, out, err = inside(capsys, "climb", boxes, f"climb.rungs={rungs}", "--json")
    assert code == 0, err
    sees = [row["sees"] for row in json.loads(out)["rows"]]
    assert sees == [
        "instruction, 2 shots, context",
        "instruction, 2 nearest shots, context",
        "instruction, 2 covering shots, context",
    ]
    results = {name: rung(tmp_path, name)[0] for name in ("few_shot", "near", "wide")}
    assert [results[n]["example_selection"] for n in results] == ["random", "similarity", "coverage"]
    assert len(results["few_shot"]["shots"]) == len(results["wide"]["shots"]) == 2 < len(results["near"]["shots"])
    assert results["few_shot"]["shots"] != results["wide"]["shots"]


def test_the_best_instruction_is_chosen_on_validation(boxes: Path, tmp_path: Path, capsys: Any) -> None:
    settings = ["climb.rungs=[zero_shot, few_shot, rag, lora]", "climb.instructions=[Say apples., 'Be brief.']"]
    settings += ["evaluation.metrics=[perplexity]", "data.validation=0.3"]
    code, out, err = inside(capsys, "climb", boxes, *settings, "--json")
    assert code == 0, err
    first, items = rung(tmp_path, "zero_shot")
    tried = first["instructions"]
    assert [one["instruction"] for one in tried] == ["Name the fruit.", "Say apples.", "Be brief."]
    means = [one["scores"]["perplexity"]["mean"] for one in tried]
    assert len(set(means)) == 3 and first["instruction"] == tried[means.index(min(means))]["instruction"]
    assert {rung(tmp_path, name)[0].get("instruction") for name in ("zero_shot", "few_shot", "rag")} == {
        first["instruction"]
    }
    assert "instruction" not in rung(tmp_path, "lora")[0]
    told, _ = read_items(tmp_path / "run" / "rungs" / "zero_shot" / "validation-1.parquet")
    assert not {item["source"] for item in told} & {item["source"] for item in items}
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Say apples." in page and "chosen on the validation split" in page
    # a climb that was stopped goes on: what was tried is not tried again, and the choice stands
    stamps = [
        (tmp_path / "run" / "rungs" / "zero_shot" / f"validation-{n}.parquet").stat().st_mtime_ns for n in range(2)
    ]
    (tmp_path / "run" / "rungs" / "zero_shot" / "validation-2.parquet").unlink()
    for name in ("zero_shot", "few_shot"):
        (tmp_path / "run" / "rungs" / name / "result.json").unlink()
    code, again, err = inside(capsys, "climb", boxes, *settings, "--json")
    assert code == 0, err
    scores = [[row["scores"] for row in json.loads(text)["rows"]] for text in (out, again)]
    assert scores[0] == scores[1]
    assert stamps == [
        (tmp_path / "run" / "rungs" / "zero_shot" / f"validation-{n}.parquet").stat().st_mtime_ns for n in range(2)
    ]
