"""One system against another on the same questions, and a judge that is checked against people."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from processes import inside


@pytest.fixture
def trained(config: Path, capsys: Any) -> Path:
    assert inside(capsys, "train", config)[0] == 0
    return config


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The process of tests/server.py: its URL and its log."""
    log, rules = tmp_path / "requests.jsonl", tmp_path / "rules.json"
    log.touch()
    rules.write_text(json.dumps({"judge": True, "fail": {"43?": [99, 400]}}))
    script = Path(__file__).parents[1] / "server.py"
    with subprocess.Popen(
        [sys.executable, str(script), str(log), str(rules)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1", log
        process.kill()


def with_judge(config: Path, judge: str) -> Path:
    file = config.with_name("judged.yaml")
    file.write_text(config.read_text().replace("evaluation: {", f"evaluation: {{judge: {judge}, "))
    return file


def test_differences_are_paired_and_signed(trained: Path, tiny_base: Path, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    code, out, err = inside(capsys, "eval", run, "--baseline", tiny_base, "--json")
    assert code == 0, err
    found = json.loads(out)
    nats = found["metrics"]["perplexity"]
    assert nats["after"]["mean"] < nats["before"]["mean"] and nats["difference"]["mean"] < 0
    code, out, _ = inside(capsys, "eval", run, "--json")
    assert json.loads(out)["scores"]["perplexity"] == nats["after"]
    code, out, _ = inside(capsys, "eval", run, "--baseline", run)
    assert code == 0 and "no sure difference" in out and "p = 1" in out
    assert "judge" not in found


def test_a_judge_at_hand_is_not_believed_unchecked(trained: Path, tiny_base: Path, tmp_path: Path, capsys: Any) -> None:
    task = with_judge(trained, f"{{model: {tiny_base}}}")
    pairs = tmp_path / "pairs.jsonl"
    code, out, err = inside(
        capsys, "eval", tmp_path / "run", "--baseline", tiny_base, "--config", task, "--json", "-o", pairs
    )
    assert code == 0, err
    judge = json.loads(out)["judge"]
    assert judge["wins"] + judge["ties"] + judge["losses"] == judge["pairs"] == json.loads(out)["examples"]
    assert judge["trust"]["trusted"] is False and "not measured" in judge["trust"]["reason"]
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    assert len(rows) == judge["pairs"] and set(rows[0]["first_shown_first"]["basis"]) == {"A", "B", "C"}
    code, _, err = inside(capsys, "eval", tmp_path / "run", "--baseline", tiny_base, "--config", task, "-o", pairs)
    assert code == 2 and "exists already" in err


def test_a_judge_behind_a_server_is_asked_once_and_checked(
    trained: Path, tiny_base: Path, server: tuple[str, Path], tmp_path: Path, capsys: Any
) -> None:
    """This judge prefers the answer with more apples in it, writes no verdict on box 6, and refuses question 43."""
    url, log = server
    rows = [
        {"question": f"which {i}?", "first": "apples", "second": "stones", "human": ["first", "first", "tie"]}
        if i % 2
        else {"question": f"which {i}?", "first": "stones", "second": "apples", "human": ["second", "second", None]}
        for i in range(40)
    ]
    (tmp_path / "people.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = with_judge(
        trained, f"{{model: big, server: '{url}', human_labels: {tmp_path / 'people.jsonl'}, concurrency: 3}}"
    )
    asking = ("eval", tmp_path / "run", "--baseline", tiny_base, "--config", task)
    code, out, err = inside(capsys, *asking, "--json")
    assert code == 0, err
    found = json.loads(out)
    judge, requests = found["judge"], [json.loads(line) for line in log.read_text().splitlines()]
    assert judge["trust"]["trusted"] is True and judge["trust"]["kappa"]["mean"] == 1.0
    assert judge["trust"]["people"]["mean"] < 1.0
    asked = [r["question"] for r in requests if "box" in r["question"]]
    assert len(asked) == 2 * found["examples"]
    assert judge["unreadable"] == 4  # three questions on box 6 and number 43, in either order
    assert judge["wins"] + judge["ties"] + judge["losses"] == judge["pairs"] - 4
    assert max(r["at_once"] for r in requests) <= 3
    code, out, err = inside(capsys, *asking)
    assert code == 0 and "going on after" in err
    assert "trusted" in out and "NOT TRUSTED" not in out and "of one length" in out
    again = log.read_text().splitlines()[len(requests) :]
    assert [json.loads(line)["how"] for line in again] == [400, 400]  # only what failed is asked again


@pytest.mark.parametrize(
    ("given", "words"),
    [(("-o", "x.jsonl"), "--baseline"), (("--baseline", "{run}", "-o", "x.jsonl"), "evaluation.judge")],
)
def test_what_does_not_go_together(
    given: tuple[str, ...], words: str, trained: Path, tmp_path: Path, capsys: Any
) -> None:
    code, _, err = inside(capsys, "eval", tmp_path / "run", *(g.format(run=tmp_path / "run") for g in given))
    assert code == 2 and words in err, err
