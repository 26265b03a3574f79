"""`rung eval --tasks`: what lm-evaluation-harness is told and asks, what becomes of its scores, and what goes wrong.

The tests run a program that asks the server as the harness does; `make soak` installs the harness itself.
"""

from __future__ import annotations

import io
import json
import math
import os
import signal
import stat
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import CHATML
from processes import inside, start
from rung.commands.evaluate import evaluation_task
from rung.data.tokenize import tokenize_records
from rung.runs.load import open_target
from rung.serving import harness

FAKE = Path(__file__).parents[1] / "fake_lm_eval.py"
METRIC = """import math

def process(doc, results):
    nats, greedy = results[0]
    return {"acc": float(greedy), "token_perplexity": (nats, doc["tokens"])}

def token_perplexity(items):
    return math.exp(-sum(nats for nats, _ in items) / sum(tokens for _, tokens in items))
"""


@pytest.fixture
def noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program named lm_eval on PATH; the file in which it writes what it was told."""
    (tmp_path / "bin").mkdir()
    program, noted = tmp_path / "bin/lm_eval", tmp_path / "noted.json"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OPENAI_API_KEY", "of-somebody-else")
    monkeypatch.setenv("NOTED", str(noted))
    monkeypatch.setattr(harness, "find_spec", lambda name: None if name == "lm_eval" else object())
    return noted


@pytest.fixture
def run(config: Path, tmp_path: Path, capsys: Any) -> Path:
    assert inside(capsys, "train", config)[0] == 0
    return tmp_path / "run"


def test_scores_of_the_harness_stand_in_the_run_and_its_report(
    run: Path, noted: Path, tmp_path: Path, capsys: Any
) -> None:
    """Its own numbers of the run's own log-probabilities, with its standard errors."""
    model = open_target(run)
    ids = model.chat.encode(["what is in box 3?"])[0]
    expected = harness_nats(model, ids)
    code, out, err = inside(capsys, "eval", run, "--tasks", "mine", "--include-path", tmp_path, "--json")
    assert code == 0, err
    scores = {score["metric"]: score for score in json.loads(out)["scores"]}
    assert scores["nats"]["value"] == pytest.approx(expected[0], abs=1e-4)
    assert scores["greedy"]["value"] == expected[1]
    assert scores["nats"]["standard_error"] == 0.5 and scores["greedy"]["standard_error"] is None
    assert scores["nats"]["examples"] == 7 and scores["nats"]["shots"] == 2
    told = json.loads(noted.read_text())
    assert told["options"]["max_length"] == "512" and told["key"] != "of-somebody-else" and len(told["key"]) > 20
    assert "--limit" not in told["arguments"] and "--apply_chat_template" not in told["arguments"]
    stored = json.loads((run / "run.json").read_text())["harness"]
    assert [(score["task"], score["metric"]) for score in stored] == [("mine", "nats"), ("mine", "greedy")]
    page = (run / "report.html").read_text()
    assert "Public tasks" in page and f"{scores['nats']['value']:.4f} ± 0.50" in page and "lower is better" in page
    # another task joins them, the same task replaces its scores
    code, out, err = inside(capsys, "eval", run, "--tasks", "other", "--limit", 3, "--shots", 0, "--chat-template")
    assert code == 0 and "lm-evaluation-harness 9.9" in out and "greedy (strict)" in out, err
    assert "7 (--limit 3)" in out and "chat turns" in out
    told = json.loads(noted.read_text())["arguments"]
    assert told[told.index("--limit") + 1] == "3" and told[told.index("--num_fewshot") + 1] == "0"
    assert told[-1] == "--apply_chat_template"
    assert inside(capsys, "eval", run, "--tasks", "mine")[0] == 0
    stored = json.loads((run / "run.json").read_text())["harness"]
    assert sorted({score["task"] for score in stored}) == ["mine", "other"] and len(stored) == 4
    assert {score["task"]: score["limit"] for score in stored} == {"mine": None, "other": 3}
    # asked in another form it is another score
    assert inside(capsys, "eval", run, "--tasks", "mine", "--chat-template")[0] == 0
    stored = json.loads((run / "run.json").read_text())["harness"]
    assert len(stored) == 6 and {score["harness_version"] for score in stored} == {"9.9"}
    page = (run / "report.html").read_text()
    assert "chat turns" in page and "plain text" in page and "7 (--limit 3)" in page


def test_streams_of_other_libraries_stay_open(run: Path, noted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """absl's handler, which rouge-score brings, closes its stream when a logging config replaces all handlers."""
    from absl import logging as absl_logging

    stream = io.StringIO()
    handler = absl_logging.PythonHandler(stream)
    harness.evaluate_tasks(run, harness.HarnessRequest(("mine",)))
    assert not stream.closed
    handler.close()
    assert stream.closed


def harness_nats(model: Any, ids: list[int]) -> tuple[float, int]:
    """Negative log-likelihood of all tokens but the first, and how many of them are the most probable ones."""
    import torch

    with torch.no_grad():
        logprobs = model.policy.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    rows = logprobs[:-1]
    targets = torch.tensor(ids[1:])
    return -float(rows.gather(1, targets[:, None]).sum()), int((rows.argmax(-1) == targets).sum())


def test_what_goes_wrong(run: Path, noted: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    def refused(*arguments: object) -> str:
        code, _, err = inside(capsys, "eval", *arguments)
        assert code in (2, 3) and "Traceback" not in err.replace("Traceback: none", ""), err
        return err

    assert "ValueError: Tasks not found: broken" in refused(run, "--tasks", "broken")
    assert "wrote no results" in refused(run, "--tasks", "silent")
    assert "no folder is here" in refused(run, "--tasks", "x", "--include-path", tmp_path / "nowhere")
    assert "no task is named" in refused(run, "--tasks", " , ")
    for options in (["--config", "x.yaml"], ["--baseline", "x"], ["--forgetting", "x"]):
        assert "bring their own data" in refused(run, "--tasks", "x", *options)
    for options in (["--include-path", tmp_path], ["--shots", 1], ["--chat-template"]):
        assert "--tasks NAMES" in refused(run, *options)
    for target in ("http://localhost:1/v1", tmp_path / "x.gguf"):
        assert "log-probabilities of prompts" in refused(target, "--tasks", "x")
    assert "harness" not in json.loads((run / "run.json").read_text())
    monkeypatch.setenv("PATH", "/nowhere")
    assert "rung[harness]" in refused(run, "--tasks", "x")


def test_a_signal_ends_the_harness_too(run: Path, noted: Path, tmp_path: Path) -> None:
    """It would go on asking for nobody, and its folder would stay."""
    for number in (signal.SIGTERM, signal.SIGINT):
        noted.unlink(missing_ok=True)
        # an environment of its own has the harness: here it is hidden from the process as in the other tests
        running = start("eval", run, "--tasks", "endless", TMPDIR=str(tmp_path), PYTHONFAULTHANDLER="1")
        while not noted.exists() and running.poll() is None:
            time.sleep(0.02)
        harness_pid = int(noted.read_text())
        running.send_signal(number)
        try:
            _, err = running.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            running.send_signal(signal.SIGABRT)  # shows where each thread waits
            pytest.fail(running.communicate()[1])
        assert running.returncode == 130 and "Traceback" not in err, err
        with pytest.raises(ProcessLookupError):
            os.kill(harness_pid, 0)
        assert not list(tmp_path.glob("rung-harness-*"))


@pytest.mark.soak
def test_the_harness_itself_finds_our_perplexity(config: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """Installed from the registry, with a task file on this run's own test questions: equal within 1e-4."""
    venv.create(tmp_path / "harness", with_pip=True)
    pip = [str(tmp_path / "harness/bin/python"), "-m", "pip", "install", "-q", "lm-eval[api]==0.4.13", "transformers"]
    subprocess.run(pip, check=True, capture_output=True)
    monkeypatch.setenv("PATH", f"{tmp_path / 'harness/bin'}{os.pathsep}{os.environ['PATH']}")
    # the harness counts white space at the end of a prompt to the answer: here is none
    tight = CHATML.replace("m['role'] + '\n'", "m['role'] + ':'").replace("assistant\n", "assistant:")
    (tmp_path / "tight.jinja").write_text(tight)
    settings = ("evaluation.metrics=[perplexity]", f"model.template={tmp_path / 'tight.jinja'}")
    assert inside(capsys, "train", config, *settings)[0] == 0
    code, out, err = inside(capsys, "eval", tmp_path / "run", "--json")
    assert code == 0, err
    expected = json.loads(out)["scores"]["perplexity"]["mean"]
    write_task(tmp_path, tmp_path / "run")
    code, out, err = inside(capsys, "eval", tmp_path / "run", "--tasks", "own", "--include-path", tmp_path, "--json")
    assert code == 0, err
    scores = {score["metric"]: score for score in json.loads(out)["scores"]}
    assert scores["token_perplexity"]["value"] == pytest.approx(expected, rel=1e-4)
    assert scores["acc"]["standard_error"] is not None and math.isfinite(scores["acc"]["standard_error"])


def write_task(folder: Path, run: Path) -> None:
    """The run's test questions as its template writes them, and their answers with the token that ends them."""
    chat, rows = open_target(run).chat, []
    records = evaluation_task(str(run), config=None, overrides=(), limit=None).records
    for example in tokenize_records(chat, records, max_length=400, overflow="error").examples:
        learned = np.flatnonzero(example.supervised)
        parts = example.ids[: learned[0]], example.ids[learned[0] : learned[-1] + 1]
        prompt, answer = (chat.tokenizer.decode(part) for part in parts)
        rows.append({"prompt": prompt, "answer": answer, "tokens": len(parts[1])})
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "own.py").write_text(METRIC)
    (folder / "own.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'own.jsonl'}}}}}\n"
        "test_split: test\noutput_type: loglikelihood\n"
        "doc_to_text: '{{prompt}}'\ndoc_to_target: '{{answer}}'\ntarget_delimiter: ''\n"
        "process_results: !function own.process\n"
        "metric_list:\n- {metric: acc, aggregation: mean, higher_is_better: true}\n"
        "- metric: token_perplexity\n  aggregation: !function own.token_perplexity\n  higher_is_better: false\n"
    )
