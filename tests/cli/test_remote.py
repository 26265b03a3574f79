"""Answers of a server on this machine: asked again where it stumbles, kept as they come, and what failed is said."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from loopback import Local
from processes import inside, start
from rung.errors import CheckpointError, ConfigError
from rung.inference.ask import Conversation
from rung.inference.journal import Journal
from rung.inference.openai_client import Server, _api_key, _check_url
from rung.models.generate import Sampling
from rung.types import Message


@pytest.fixture
def ten(tmp_path: Path) -> Path:
    file = tmp_path / "ten.jsonl"
    rows = [{"question": f"what is in box {i} ?", "answer": "pears", "context": f"shelf {i}"} for i in range(10)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def asking(local: Local, ten: Path, output: Path, *further: object) -> tuple[object, ...]:
    return ("generate", local.url, "--model", "big", "--data", ten, "-o", output, *further)


def test_what_stumbles_is_asked_again(local: Local, ten: Path, tmp_path: Path, capsys: Any) -> None:
    local.rule(fail={"1": [2, 500], "2": [1, 429], "3": [1, "drop"], "4": [1, 503]})
    code, out, err = inside(capsys, *asking(local, ten, tmp_path / "a.jsonl", "--n", 2, "--temperature", 0.5, "--json"))
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [f"what is in box {i} ?" for i in range(10)]
    said = "to shelf 3\n\nwhat is in box 3 ?"
    assert rows[3]["answers"] == [f"0 {said}", f"1 {said}"] and rows[3]["stopped"] == [True, False]
    assert rows[3]["expected"] == "pears" and rows[3]["context"] == "shelf 3"
    assert json.loads(out)["cut"] == 10 and json.loads(out)["answers"] == 20
    asked = [r["asked"] for r in local.requests()]
    assert len(asked) == 15 and {(a["n"], a["temperature"], a["max_tokens"], a["model"]) for a in asked} == {
        (2, 0.5, 256, "big")
    }
    assert inside(capsys, "data", "check", tmp_path / "a.jsonl")[0] in (0, 2)


def test_no_more_at_once_than_asked_for(local: Local, ten: Path, tmp_path: Path, capsys: Any) -> None:
    local.rule(slow=0.05)
    assert inside(capsys, *asking(local, ten, tmp_path / "a.jsonl", "--concurrency", 3))[0] == 0
    assert max(r["at_once"] for r in local.requests()) == 3


def test_a_kill_at_eight_of_ten_leaves_two_to_ask(local: Local, ten: Path, tmp_path: Path, capsys: Any) -> None:
    local.rule(slow=0.3)
    output, journal = tmp_path / "a.jsonl", tmp_path / ".a.jsonl.journal"
    with start(*asking(local, ten, output, "--concurrency", 1)) as running:
        while running.poll() is None and not (journal.exists() and journal.read_text().count("\n") >= 9):
            time.sleep(0.01)
        running.send_signal(signal.SIGKILL)
    assert not output.exists()
    time.sleep(0.5)  # what was on its way is no longer waited for
    before = len(local.requests())
    local.rule()
    code, _, err = inside(capsys, *asking(local, ten, output))
    assert code == 0 and "going on after 8 of 10 requests" in err
    assert len(local.requests()) - before == 2 and len(output.read_text().splitlines()) == 10 and not journal.exists()


def test_what_fails_for_good_is_named_and_the_rest_kept(local: Local, ten: Path, tmp_path: Path, capsys: Any) -> None:
    local.rule(fail={"2": [9, 400], "5": [9, "garbage"], "7": [9, "empty"]})
    output = tmp_path / "a.jsonl"
    code, _, err = inside(capsys, *asking(local, ten, output))
    assert code == 3 and "3 of 10 prompts got no answer" in err and "line 3: BadRequestError" in err
    assert "line 8: 0 answers where 4 were asked for" in err and "line 6:" in err and not output.exists()
    before = len(local.requests())
    local.rule()
    assert inside(capsys, *asking(local, ten, output))[0] == 0
    assert len(local.requests()) - before == 3 and len(output.read_text().splitlines()) == 10


def test_a_key_goes_to_the_server_and_nowhere_else(
    local: Local, ten: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.rule(key="sk-secret-1")
    monkeypatch.setenv("RUNG_API_KEY", "sk-wrong-22")
    code, out, err = inside(capsys, *asking(local, ten, tmp_path / "a.jsonl"))
    assert code == 2 and "refuses the key" in err and "sk-wrong-22" not in out + err
    monkeypatch.setenv("RUNG_API_KEY", "sk-secret-1")
    local.rule(key="sk-secret-1", fail={"3": [9, 400]})
    code, out, err = inside(capsys, *asking(local, ten, tmp_path / "a.jsonl"))
    assert code == 3 and "***" in err
    written = "".join(p.read_text() for p in tmp_path.rglob("*a.jsonl*"))
    assert "sk-secret-1" not in out + err + written and len(written) > 100


def test_what_belongs_to_openai_goes_to_no_other_server(
    local: Local, ten: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A config or a run folder of somebody else may name the server; the client reads these variables by itself."""
    monkeypatch.delenv("RUNG_API_KEY", raising=False)
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, f"secret-{name}")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "x-team: secret-team\nAuthorization: Bearer secret-key")
    assert inside(capsys, *asking(local, ten, tmp_path / "a.jsonl"))[0] == 0
    assert len(local.requests()) == 10
    for request in local.requests():
        assert {k.lower(): v for k, v in request["headers"].items()}["authorization"] == "Bearer none"
        assert "secret" not in json.dumps(request["headers"])
    local.rule(key="sk-1")
    code, _, err = inside(capsys, *asking(local, ten, tmp_path / "b.jsonl"))
    assert code == 2 and "RUNG_API_KEY=..." in err and "secret" not in err


@pytest.mark.parametrize(
    ("url", "own", "openai", "sent"),
    [
        ("https://api.openai.com/v1", None, "open", "open"),
        ("https://api.openai.com/v1", "own", "open", "own"),
        ("https://eu.api.openai.com/v1", None, "open", "open"),
        ("https://evilapi.openai.com.example.org/v1", None, "open", None),
        ("https://xapi.openai.com/v1", None, "open", None),
        ("http://api.openai.com/v1", None, "open", None),
        ("https://api.openai.com.example.org/v1", None, "open", None),
        ("https://example.org/api.openai.com/v1", None, "open", None),
        ("https://api.openai.com@example.org/v1", None, "open", None),
        ("https://example.org/v1", "own", "open", "own"),
        ("http://localhost:8000/v1", None, "open", None),
    ],
)
def test_which_key_a_server_gets(
    url: str, own: str | None, openai: str | None, sent: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RUNG_API_KEY", own), ("OPENAI_API_KEY", openai)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert _api_key(url) == sent


@pytest.mark.parametrize("host", ["10.0.0.5", "example.org", "localhost.example.org", "[fe80::1]", "127.0.0.1.nip.io"])
def test_plain_http_stays_on_this_machine(
    host: str, ten: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RUNG_ALLOW_HTTP", raising=False)
    arguments = ("generate", f"http://{host}:9/v1", "--model", "big", "--data", ten, "-o", tmp_path / "a.jsonl")
    code, _, err = inside(capsys, *arguments)
    assert code == 2 and "plain http to another machine" in err and "RUNG_ALLOW_HTTP=1" in err, err
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.1.2.3", "[::1]", "localhost", "localhost.", "model.localhost", "0.0.0.0"],  # noqa: S104
)
def test_plain_http_to_this_machine_needs_no_leave(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUNG_ALLOW_HTTP", raising=False)
    _check_url(f"http://{host}:8000/v1")
    with pytest.raises(ConfigError):
        _check_url("http://10.0.0.5:8000/v1")
    monkeypatch.setenv("RUNG_ALLOW_HTTP", "1")
    _check_url("http://10.0.0.5:8000/v1")


def test_a_redirect_is_not_followed(local: Local, ten: Path, tmp_path: Path, capsys: Any) -> None:
    """It would take the prompts to a server that nobody named."""
    local.rule(fail={"2": [9, "http://127.0.0.1:9/v1/chat/completions"]})
    code, _, err = inside(capsys, *asking(local, ten, tmp_path / "a.jsonl"))
    assert code == 2 and "redirects" in err and "127.0.0.1:9" in err, err


def test_answers_that_come_with_a_refusal_are_kept(local: Local, ten: Path, tmp_path: Path, capsys: Any) -> None:
    """The third request ends everything while others are on their way: those are paid for."""
    local.rule(slow=0.3, fail={"2": [9, 404]})
    code, _, err = inside(capsys, *asking(local, ten, tmp_path / "a.jsonl", "--concurrency", 5))
    assert code == 2 and "no such model" in err
    answered = {r["question"] for r in local.requests() if r["how"] is None}
    kept = (tmp_path / ".a.jsonl.journal").read_text().splitlines()[1:]
    assert len(kept) == len(answered) >= 4


def _body(content: object) -> dict[str, str]:
    return {"body": json.dumps({"choices": [{"finish_reason": "stop", "message": {"content": content}}]})}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "two"}], "two"),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
        ("half \ud800 a character", "half \ufffd a character"),
    ],
)
def test_answers_in_parts_or_with_halves_of_characters_are_text(
    content: object, text: str, local: Local, ten: Path, tmp_path: Path, capsys: Any
) -> None:
    """Parts were written as their Python form, and half a character ended the command after all answers were paid."""
    local.rule(fail={"2": [9, _body(content)]})
    code, _, err = inside(capsys, *asking(local, ten, tmp_path / "a.jsonl", "--n", 1))
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert rows[2]["answers"] == [text]


@pytest.mark.parametrize("body", [_body(5), _body([]), _body([5]), {"body": '{"choices": 5}'}, {"body": "[" * 99999}])
def test_an_answer_of_another_form_fails_its_request_alone(
    body: dict[str, str], local: Local, ten: Path, tmp_path: Path, capsys: Any
) -> None:
    local.rule(fail={"2": [9, body]})
    code, _, err = inside(capsys, *asking(local, ten, tmp_path / "a.jsonl", "--n", 1))
    assert code == 3 and "1 of 10 prompts got no answer" in err, err


@pytest.mark.parametrize("url", ["http://[::1", "http://127.0.0.1:9/v1\n", "http://", "https://", "http://h:99999/v1"])
def test_what_is_no_url_is_refused(url: str, ten: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = ("generate", url, "--model", "big", "--data", ten, "-o", tmp_path / "a.jsonl")
    code, _, err = inside(capsys, *arguments)
    assert code == 2 and "this is no URL" in err and "http://localhost:8000/v1" in err, err


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    server = Server("http://127.0.0.1:9/v1", "big", retries=1)
    journal = Journal(tmp_path / "j", {})
    with pytest.raises(CheckpointError, match="cannot be reached, after 1 further tries"):
        server.ask([Conversation((Message("user", "q"),))] * 3, Sampling(4), journal)
    journal.close()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("http://127.0.0.1:9/v1",), "--model"),
        (("smollm2-135m", "--model", "big"), "only a server"),
        (("smollm2-135m", "--concurrency", "3"), "only a server"),
        (("http://127.0.0.1:9/v1", "--model", "big", "--reward", "runs/x"), "a server gives text"),
    ],
)
def test_what_does_not_go_together(given: tuple[str, ...], words: str, ten: Path, tmp_path: Path, capsys: Any) -> None:
    code, _, err = inside(capsys, "generate", *given, "--data", ten, "-o", tmp_path / "a.jsonl")
    assert code == 2 and words in err and not (tmp_path / "a.jsonl").exists()
