"""`rung label`: the page as people and attackers meet it, and what is kept."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from label_person import Person, label_command, label_page
from processes import inside
from rung.human_labels.store import LabelStore
from rung.labeling.app import HEADERS
from rung.labeling.run import LabelRequest, PageRequest, is_known_host, open_or_create

KINDS = ("rank", "compare", "rate", "correct")
FORMS: dict[str, dict[str, object]] = {
    "rank": {"rank_0": 1, "rank_1": 2, "rank_2": 2},
    "compare": {"choice": "left"},
    "rate": {"score": 4},
    "correct": {"text": "a better answer"},
}

HOSTILE = (
    *(
        "<script>alert(1)</script>",
        '"><img src=x onerror=alert(1)>',
        "'-alert(1)-'",
        "</textarea><svg onload=alert(1)>",
    ),
    *(
        "javascript:alert(1)",
        "{{7*7}}",
        "{% include 'x' %}",
        "<!--",
        "]]>",
        "</section></form>",
        "&lt;b&gt;",
        "\u202eabc",
    ),
    *("<a href='javascript:1'>x</a>", "<style>*{display:none}</style>", "<base href=//evil>", "\x1b[2J\x00"),
    *(
        "<meta http-equiv=refresh>",
        "<iframe srcdoc='<b>'>",
        "<input name=form_token value=x>",
        "```html\n<b>x</b>\n```",
    ),
)


@pytest.fixture
def candidates(tmp_path: Path) -> Path:
    """Ten prompts with three answers, as `rung generate` writes them."""
    rows = [
        {"prompt": f"question {i}", "context": f"context {i}", "expected": f"expected {i}",
         "answers": [f"answer {k} to {i}" for k in range(3)], "scores": [3.0, 2.0, 1.0]}
        for i in range(10)
    ]  # fmt: skip
    path = tmp_path / "candidates.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def opened(candidates: Path, kind: Any, **changes: Any) -> LabelStore:
    folder = candidates.parent / f"labels-{kind}"
    return open_or_create(folder, LabelRequest(kind, (str(candidates),), **{"repeat": 0.0, **changes}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_person_does_everything_and_goes_back(candidates: Path, kind: str) -> None:
    store = opened(candidates, kind)
    total = len(store.slots[0])
    with label_page(store) as (person,):
        page = person.enter()
        assert page.address == "/task/1" and page.progress == f"0 of {total} done"
        assert "expected" not in page.text and "3.0" not in page.text  # neither decides in place of the person
        for number in range(total):
            slot = store.slots[0][number]
            assert slot.task.item.question in page.prompt
            assert page.answers == [slot.task.item.answers[i].text for i in slot.shown]
            page = person.vote(skip=1) if number == 1 else person.vote(**FORMS[kind], note="why" if number == 0 else "")
        assert page.address == "/done" and "Skipped" in page.text
        page = person.get("/task/2")
        page = person.vote(**FORMS[kind], note="not today")
        assert page.address == "/done" and "Skipped" not in page.text
        page = person.get("/task/1")
        assert "checked" in page.text or "aria-pressed" in page.text or "a better answer" in page.text
        undone = {**page.fields, "last": page.last}
        page = person.undo()  # the last vote was on the second task
        assert page.address == "/task/2" and page.progress.startswith(f"{total - 1} of {total} done")
        assert "not today" in page.text  # the note stays with the task
        again = person.post("/undo", undone)  # sent twice: one vote is taken back
        assert again.address == "/task/2" and again.progress == page.progress
        assert person.post("/undo", {**undone, "last": "9999-1"}).status == 400
    votes = store.votes()
    assert len(votes) == total - 1 and votes[0].note == "why" and votes[0].seconds == 2.5
    assert {vote.vote.kind for vote in votes} == {kind}
    store.close()


def test_two_tabs_do_not_overwrite_one_another(candidates: Path) -> None:
    store = opened(candidates, "compare")
    with label_page(store) as (person,):
        first = person.enter()
        person.vote(choice="left")
        late = person.post("/task/1", {**first.fields, "choice": "right"})
        assert (
            late.status == 409
            and "another tab" in late.message
            and 'value="left" class="choice left" data-key' in late.text
        )
        assert store.vote(0, 0)[1].vote.outcome[2] == preferred(store, 0)  # type: ignore[union-attr, index]
        # the form of the refused page is the current one
        assert person.post("/task/1", {**late.fields, "choice": "right"}).status == 200
        assert store.vote(0, 0)[0] == 2
        # a request that is sent twice is one vote
        again = person.post("/task/1", {**late.fields, "choice": "right"})
        assert again.status == 200 and store.vote(0, 0)[0] == 2
    store.close()


def preferred(store: LabelStore, position: int) -> str:
    return "first" if store.slots[0][position].shown[0] < store.slots[0][position].shown[1] else "second"


def test_who_may_do_what(candidates: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = opened(candidates, "compare", people=2)
    with label_page(store) as (ana, ben):
        stranger = Person(ana.link)
        assert stranger.get("/").status == 401 and stranger.get("/task/1").status == 401
        page = ana.enter()
        ben_page = ben.enter()
        # CSRF: without the secret word of the form, with that of another person, from another page, as JSON
        good = {**page.fields, "choice": "left"}
        assert ana.post("/task/1", {**good, "form_token": ""}).status == 403
        crossed = ana.post("/task/1", {**good, "form_token": ben_page.fields["form_token"]})
        assert crossed.status == 403 and "another person" in crossed.text
        body = "&".join(f"{name}={value}" for name, value in good.items())
        assert ana.raw("POST", "/task/1", body, origin="https://evil.example")[0] == 403
        assert ana.raw("POST", "/task/1", body, **{"content-type": "text/plain"})[0] == 415
        assert ana.raw("POST", "/task/1", json.dumps(good), **{"content-type": "application/json"})[0] == 415
        # DNS rebinding: another name for this machine
        for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
            assert ana.raw("GET", "/task/1", host=host)[0] == 403
        assert ana.raw("GET", "/task/1", host="localhost:99")[0] == 200
        # other paths, methods, numbers, sizes
        for path in (
            "/../labels.sqlite",
            "/%2e%2e/link.key",
            "/label.css/../link.key",
            "/static/x",
            "/task/0",
            "/task/999",
            "/task/x",
        ):
            assert ana.raw("GET", path)[0] == 404, path
        assert ana.raw("DELETE", "/task/1")[0] == 405 and ana.raw("GET", "/undo")[0] == 405
        assert ana.raw("POST", "/task/1", "x" * (5 * 2**20))[0] == 413
        assert ana.post("/task/1", {f"f{i}": i for i in range(200)}).status == 400
        for bad in (
            {**good, "revision": "x"},
            {**good, "revision": "-1"},
            {**good, "choice": "middle"},
            {**good, "choice": ""},
        ):
            assert ana.post("/task/1", bad).status == 400
        assert not store.votes()
        assert ana.post("/task/1", {**good, "seconds": "nan"}).status == 200  # what no clock says is left out
        assert store.votes()[0].seconds is None
        for path in ("/task/1", "/label.css", "/label.js", "/done", "/nothing"):
            headers = ana.raw("GET", path)[1]
            assert all(headers[name] == value for name, value in HEADERS.items() if name != "cache-control"), path
        cookie = ana.raw("GET", f"/enter/{store.token(0)}")[1]["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=lax" in cookie
    store.close()
    printed = "".join(capsys.readouterr())
    assert store.token(0) not in printed and store.form_token(0) not in printed


def test_wrong_links_are_limited(candidates: Path) -> None:
    store = opened(candidates, "compare")
    with label_page(store) as (person,):
        person.enter()
        guesser = Person(person.link)
        statuses = [guesser.get(f"/enter/{'a' * 25}{i}").status for i in range(10)]
        assert statuses == [401] * 10
        assert guesser.get(f"/enter/{store.token(0)}").status == 429  # nor is the right one told from a wrong one
        assert person.get("/task/1").status == 200 and person.vote(choice="left").status == 200  # who is in stays in
    store.close()


def test_answers_are_text_whatever_they_hold(candidates: Path) -> None:
    """200 payloads: the page has the tags that it has for plain answers, and the texts come out as they went in."""
    rows = [
        {"prompt": f"{i} {a}", "context": b, "answers": [f"{a} {b}", f"{b}\n\n{a}", f"x{a}"]}
        for i, (a, b) in enumerate((a, b) for a in HOSTILE for b in HOSTILE[:10])
    ]
    file = candidates.with_name("hostile.jsonl")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(rows) == 200
    for kind in KINDS:
        plain = opened(candidates, kind)
        store = open_or_create(candidates.parent / f"hostile-{kind}", LabelRequest(kind, (str(file),), repeat=0.0))
        with label_page(plain) as (person,):
            person.enter()
            allowed = {*person.get("/task/2").tags, "pre", "code"}
        plain.close()
        with label_page(store) as (person,):
            person.enter()
            for position in range(0, len(store.slots[0]), 1 if kind == "rank" else 7):
                page = person.get(f"/task/{position + 1}")
                assert page.status == 200 and set(page.tags) <= allowed, page.text
                assert page.tags.count("script") == 1 and page.tags.count("form") == 1
                assert page.fields["form_token"] == store.form_token(0)
                assert "\u202e" not in page.text and "\x1b" not in page.text
        store.close()


def test_the_command(candidates: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = candidates.parent / "labels"
    arguments = ("compare", candidates, "-o", folder, "--people", 2, "--names", "Ana,Ben", "--guide", "Short is good.")
    with label_command(*arguments) as (running, (ana, ben)):
        assert "Short is good." in ana.enter().text
        ana.vote(choice="left")
        code, out, err = inside(capsys, "label", "result", folder, "--json")  # while people label
        assert code == 0 and json.loads(out)["votes"] == 1, err
        ben.enter()
        ben.vote(choice="tie", note="the same")
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=30)
        assert running.returncode == 0 and "Traceback" not in err and "30 tasks from 10 items" in err, err
        assert not re.search(r"/enter/|[a-z2-7]{26}", err)
    code, out, err = inside(capsys, "label", "result", folder)
    assert code == 0 and "2 votes of 2 people" in out and "Ana" in out, err
    with label_command("compare", "-o", folder) as (_, (again,)):
        assert again.enter().progress.startswith("1 of")
    output = candidates.parent / "preference.jsonl"
    code, out, err = inside(capsys, "label", "result", folder, "--export", "preference", "-o", output)
    assert code == 0 and "1 rows in" in out and len(output.read_text().splitlines()) == 1, err
    for options, message in (
        (("result", candidates), "no labels of people"),
        (("result", candidates.parent / "nowhere"), "no labels are here"),
        (("result", folder, "--export", "preference", "-o", output), "exists already"),
        (("result", folder, "--export", "sql", "-o", "x"), "no such export"),
        (("compare", candidates, "-o", folder, "--people", "9"), "another people"),
        (("rank", "-o", folder), "another kind"),
        (("rank", candidates, "-o", candidates.parent / "x", "--host", "256.1.1.1"), "listen"),
    ):
        code, _, err = inside(capsys, "label", *options)
        assert code == 2 and message in err, (options, err)
    code, _, err = inside(capsys, "label", "result", candidates.parent)
    assert code == 3 and "holds no labels of people" in err


def test_what_a_full_disk_does(candidates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vote that could not be stored is not acknowledged, and the next one is stored."""
    store = opened(candidates, "compare")
    with label_page(store) as (person,):
        person.enter()
        pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
        store._connection.execute(f"PRAGMA max_page_count = {pages}")
        page = person.vote(choice="left", note="x" * 5000)
        assert page.status == 503 and "could not be stored" in page.text and not store.votes()
        store._connection.execute("PRAGMA max_page_count = 100000")
        person.get("/task/1")
        assert person.vote(choice="left").address == "/task/2" and len(store.votes()) == 1
    store.close()


def test_host_names_that_are_known() -> None:
    local, public = PageRequest(), PageRequest("0.0.0.0", url="https://labels.example.org/x")  # noqa: S104
    assert is_known_host("127.0.0.1", local) and is_known_host("localhost", local) and is_known_host("::1", local)
    assert not is_known_host("10.0.0.7", local) and not is_known_host("labels.example.org", local)
    assert is_known_host("10.0.0.7", public) and is_known_host("labels.example.org", public)
    assert not is_known_host("evil.example", public) and not is_known_host("", public)
