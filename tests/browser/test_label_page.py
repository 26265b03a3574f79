"""People at the labeling page in a real browser: mouse, touch and keyboard alone, both themes, and what axe finds.

`make browser` installs Playwright and axe and runs these tests with a Chromium of this machine.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is missing: make browser")
axe_package = pytest.importorskip("axe_playwright_python", reason="axe is missing: make browser")

import uvicorn  # noqa: E402 -- after the modules without which nothing here runs

from label_person import label_page  # noqa: E402
from rung.human_labels.store import LabelStore  # noqa: E402
from rung.labeling.app import make_app  # noqa: E402
from rung.labeling.run import LabelRequest, open_or_create  # noqa: E402
from rung.web.server import server_options  # noqa: E402

SIZES = {"phone": {"width": 390, "height": 844}, "desktop": {"width": 1280, "height": 900}}
VARIANTS = [(size, theme) for size in SIZES for theme in ("light", "dark")]
AXE_RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
AXE = (Path(axe_package.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
LONG = "A long answer has many words, and a person reads all of them. " * 150
SPECIAL = (
    "أين طردي؟ طلبي رقم 4812.\n\nThe order was sent: $E = mc^2$ and \\(a^2 + b^2\\).",
    "```python\ndef f(x):\n    return x * 2  # " + "a very long line " * 12 + "\n```\nThat is all.",
    LONG,
    "x" * 3000,
)
HOSTILE = (
    "<script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">",
    "</textarea></form><form action='https://evil.example'><button>Skip</button>",
    "<style>*{display:none}</style><meta http-equiv=refresh content='0;url=https://evil.example'>",
    "javascript:alert(1) \u202e txet neddih " + "y" * 100_000,
)


class Watched:
    """A page whose faults fail the test: dialogs, errors of scripts, and what the policy of the page forbids."""

    def __init__(self, page: Any) -> None:
        self.page, self.faults, self.received = page, [], 0
        page.on("dialog", lambda dialog: (self.faults.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("pageerror", lambda error: self.faults.append(f"error {error}"))
        page.on("console", self._console)
        page.on("response", self._response)

    def _console(self, message: Any) -> None:
        # a refused vote and a server that is away are shown by the page and noted by the browser
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.faults.append(message.text)

    def _response(self, response: Any) -> None:
        if response.status == 200:
            self.received += int(response.headers.get("content-length", 0))

    def violations(self) -> list[str]:
        """What axe finds on the page."""
        self.page.evaluate(AXE)
        run = "rules => axe.run(document, {runOnly: {type: 'tag', values: rules}})"
        found = self.page.evaluate(run, AXE_RULES)["violations"]
        return [f"{each['id']}: {each['help']}: {[node['html'][:150] for node in each['nodes']]}" for each in found]

    def is_wider_than_its_window(self) -> bool:
        """Whether one would have to scroll sideways."""
        return bool(self.page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"))


Open = Callable[..., AbstractContextManager[Watched]]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = os.environ.get("CHROMIUM") or next((path for path in map(shutil.which, names) if path), None)
    if path is None:
        pytest.skip("there is no Chromium: apt-get install chromium, or set CHROMIUM to its path")
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any) -> Open:
    """A page in a context of its own: cookies and storage are those of one person."""

    @contextmanager
    def opened(size: str = "desktop", theme: str = "light", **options: Any) -> Iterator[Watched]:
        touch = {"has_touch": True, "is_mobile": True} if size == "phone" else {}
        context = browser.new_context(viewport=SIZES[size], color_scheme=theme, **touch, **options)
        context.set_default_timeout(10_000)
        watched = Watched(context.new_page())
        yield watched
        context.close()
        assert not watched.faults, watched.faults

    return opened


def made(
    folder: Path, kind: Any, *, prompts: int = 20, answers: int = 4, texts: tuple[str, ...] = (), **changes: Any
) -> LabelStore:
    """A labeling folder whose answers say how good they are."""
    rows = [
        {
            "prompt": f"Question {i}: where is my parcel?",
            "context": f"Order {1000 + i}, shipped on 3 July.",
            "answers": [f"Quality {k}: answer to question {i}." for k in range(answers)] if not texts else list(texts),
        }
        for i in range(prompts)
    ]
    folder.mkdir(exist_ok=True)
    (folder / "candidates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    request = LabelRequest(kind, (str(folder / "candidates.jsonl"),), **{"repeat": 0.0, **changes})
    return open_or_create(folder / f"labels-{kind}", request)


def qualities(page: Any) -> list[int]:
    """How good each answer says it is, in the order in which they are shown."""
    return [int(re.search(r"Quality (\d)", text)[1]) for text in page.locator(".answer").all_inner_texts()]  # type: ignore[index]


def goes_on(page: Any, act: Callable[[], object]) -> None:
    """Do something, and wait for the page that follows."""
    before = page.url
    act()
    page.wait_for_url(lambda url: url != before)


def press(page: Any, size: str, locator: Any) -> None:
    """A tap on a phone, a click elsewhere."""
    locator.tap() if size == "phone" else locator.click()


@pytest.mark.parametrize(("size", "theme"), VARIANTS)
def test_two_people_rank_twenty_items_each(open_page: Open, tmp_path: Path, size: str, theme: str) -> None:
    """One with the mouse or a finger, one with the keyboard alone; qualities 2 and 3 tie for the second."""
    store = made(tmp_path, "rank", people=2, overlap=1.0)
    with label_page(store) as people:
        with open_page(size, theme) as watched:
            page = watched.page
            page.goto(people[0].link)
            for _ in range(20):
                for place, quality in enumerate(qualities(page)):
                    press(page, size, page.locator(f"input[name=rank_{place}][value='{4 - quality}']").locator(".."))
                goes_on(page, lambda: press(page, size, page.get_by_role("button", name="Store and go on")))
            assert page.url.endswith("/done") and "20 of 20" in page.inner_text("header")
        with open_page(size, theme) as watched:
            page = watched.page
            page.goto(people[1].link)
            for _ in range(20):
                letters = dict(zip(qualities(page), "abcd", strict=True))
                for key in (letters[3], f"Shift+{letters[2].upper()}", letters[1], letters[0]):
                    page.keyboard.press(key)
                goes_on(page, lambda: page.keyboard.press("Control+Enter"))
            assert page.url.endswith("/done")
    votes = store.votes()
    assert len(votes) == 40
    for vote in votes:
        item = store.slots[vote.person][vote.position].task.item
        ranks = {int(item.answers[i].text[8]): rank for i, rank in vote.vote.ranks.items()}  # type: ignore[union-attr]
        assert ranks == ({3: 1, 2: 2, 1: 3, 0: 4} if vote.person == 0 else {3: 1, 2: 1, 1: 2, 0: 3})
        assert vote.seconds is not None and vote.seconds < 60
    store.close()


def better(page: Any) -> str:
    """The key of the better answer."""
    first, second = qualities(page)
    return "1" if first > second else "2"


@pytest.mark.parametrize(("size", "theme"), VARIANTS[::3])
def test_comparing_with_notes_skips_and_ways_back(open_page: Open, tmp_path: Path, size: str, theme: str) -> None:
    store = made(tmp_path, "compare", prompts=6, answers=2)
    with label_page(store) as (person,), open_page(size, theme) as watched:
        page = watched.page
        page.goto(person.link)
        goes_on(page, lambda: page.keyboard.press(better(page)))
        name = {"1": "A is better", "2": "B is better"}[better(page)]
        goes_on(page, lambda: press(page, size, page.get_by_role("button", name=name)))
        goes_on(page, lambda: page.keyboard.press("3"))
        goes_on(page, lambda: press(page, size, page.get_by_role("button", name="Both bad")))
        page.get_by_text("Note", exact=True).click()
        page.get_by_label("A note on this task").fill("1 2 3 s u: keys are text here")
        goes_on(page, lambda: press(page, size, page.get_by_role("button", name="Skip")))
        goes_on(page, lambda: page.keyboard.press(better(page)))
        assert page.url.endswith("/done")
        goes_on(page, lambda: page.get_by_role("link", name="Task 5").click())
        goes_on(page, lambda: page.keyboard.press(better(page)))
        goes_on(page, lambda: page.goto(page.url.replace("/done", "/task/1")))
        assert page.locator("[aria-pressed=true]").count() == 1  # what is stored is marked
        goes_on(page, lambda: page.keyboard.press("u"))
        assert page.url.endswith("/task/5") and len(store.votes()) == 5
    said = [vote.vote.outcome for vote in sorted(store.votes(), key=lambda vote: vote.position)]
    assert [v.outcome if v.outcome == "tie" else v.outcome == "second" for v in said if v] == [
        True,
        True,
        "tie",
        "tie",
        True,
    ]
    assert [vote.vote.is_bad for vote in sorted(store.votes(), key=lambda v: v.position)] == [
        False,
        False,
        False,
        True,
        False,
    ]
    store.close()


@pytest.mark.parametrize(("size", "theme"), VARIANTS[::3])
def test_rating(open_page: Open, tmp_path: Path, size: str, theme: str) -> None:
    store = made(tmp_path, "rate", prompts=2, answers=2)
    with label_page(store) as (person,), open_page(size, theme) as watched:
        page = watched.page
        page.goto(person.link)
        for way in ("key", "press", "key", "press"):
            score = qualities(page)[0] + 4
            if way == "key":
                goes_on(page, lambda: page.keyboard.press(str(score)))  # noqa: B023 -- called at once
            else:
                goes_on(page, lambda: press(page, size, page.get_by_role("button", name=f"{score} of 5")))  # noqa: B023
    texts = {
        store.slots[0][v.position].task.item.answers[store.slots[0][v.position].shown[0]].text[8]: v.vote.score
        for v in store.votes()
    }
    assert texts == {"0": 4, "1": 5}
    store.close()


@pytest.mark.parametrize(("size", "theme"), VARIANTS[::3])
def test_correcting_keeps_drafts(open_page: Open, tmp_path: Path, size: str, theme: str) -> None:
    store = made(tmp_path, "correct", prompts=2, answers=2)
    with label_page(store) as (person,), open_page(size, theme) as watched:
        page = watched.page
        page.goto(person.link)
        page.get_by_role("button", name="Edit this answer").last.click()
        box = page.get_by_label("Your answer")
        assert box.input_value() == page.locator(".answer .text").last.inner_text()
        box.fill("Right.\nSecond line, أين")
        page.reload()
        assert box.input_value() == "Right.\nSecond line, أين"  # the draft
        goes_on(page, lambda: page.keyboard.press("Control+Enter"))
        assert box.input_value() != "Right.\nSecond line, أين"
        goes_on(page, lambda: press(page, size, page.get_by_role("button", name="Store and go on")))
    assert store.votes()[0].vote.text == "Right.\nSecond line, أين" and len(store.votes()) == 2
    store.close()


def test_two_tabs_and_two_people_in_one_browser(open_page: Open, tmp_path: Path) -> None:
    store = made(tmp_path, "compare", prompts=4, answers=2, people=2, overlap=1.0)
    with label_page(store) as people, open_page() as watched:
        page = watched.page
        page.goto(people[0].link)
        other = page.context.new_page()
        other.goto(page.url)
        goes_on(page, lambda: page.keyboard.press("1"))
        other.keyboard.press("2")
        other.get_by_role("alert").get_by_text("another tab").wait_for()
        assert len(store.votes()) == 1 and store.vote(0, 0)[0] == 1
        page.goto(people[1].link)  # the cookie is that of the second person now
        other.reload()
        third = page.context.new_page()
        third.goto(people[0].link)
        page.keyboard.press("1")
        page.get_by_role("alert").get_by_text("another person").wait_for()
        assert len(store.votes()) == 1
    store.close()


def test_a_server_that_is_away_gets_the_vote_later(open_page: Open, tmp_path: Path) -> None:
    store = made(tmp_path, "compare", prompts=4, answers=2)
    with open_page() as watched:
        page = watched.page
        with label_page(store) as (person,):
            page.goto(person.link)
            port = int(person.link.split(":")[2].split("/")[0])
        page.keyboard.press("1")
        page.get_by_role("alert").get_by_text("Not stored yet").wait_for()
        assert not store.votes()
        server = uvicorn.Server(uvicorn.Config(make_app(store), port=port, **server_options(5)))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        page.wait_for_url("**/task/2", timeout=30_000)
        server.should_exit = True
        thread.join()
    assert len(store.votes()) == 1 and store.vote(0, 0)[0] == 1
    store.close()


@pytest.mark.parametrize(("size", "theme"), VARIANTS)
def test_axe_finds_nothing_and_nobody_scrolls_sideways(open_page: Open, tmp_path: Path, size: str, theme: str) -> None:
    """Tasks of each kind with long, right-to-left, code and unbroken answers; messages; the end."""
    for kind in ("rank", "compare", "rate", "correct"):
        store = made(tmp_path / kind, kind, prompts=1, texts=SPECIAL, guide="Short and right is good.\n\nLong is not.")
        with label_page(store) as (person,), open_page(size, theme) as watched:
            page = watched.page
            if kind == "rank":
                page.goto(person.link.replace("/enter/", "/enter/x"))
                assert "wrong" in page.inner_text("h1") and not watched.violations()
            page.goto(person.link)
            count = len(store.slots[0])
            for number in range(1, count + 1):
                page.goto(f"{person.link.split('/enter')[0]}/task/{number}")
                assert not watched.violations()
                widths = [SIZES[size]["width"], *([320] if size == "phone" else [])]
                for width in widths:
                    page.set_viewport_size({"width": width, "height": 800})
                    assert not watched.is_wider_than_its_window(), (kind, number, width)
                if kind == "compare":
                    break
            page.goto(page.url.rpartition("/task")[0] + "/done")
            assert not watched.violations()
        store.close()


def test_hostile_answers_are_text(open_page: Open, tmp_path: Path) -> None:
    for kind in ("rank", "correct"):
        store = made(tmp_path / kind, kind, prompts=1, texts=HOSTILE)
        with label_page(store) as (person,), open_page() as watched:
            page = watched.page
            page.goto(person.link)
            shown = " ".join(page.locator(".answer").all_inner_texts())
            assert all(
                part in shown for part in ("<script>", "onerror", "</textarea>", "<style>", "javascript:alert(1)")
            )
            assert "\u202e" not in shown and "\\u202e" in shown and page.title().startswith("Task 1")
            assert page.locator("form").count() == 1 and page.locator("img, iframe, style").count() == 0
            assert watched.received < 10**6
            time.sleep(0.2)
            assert page.url.endswith("/task/1")
        store.close()


def test_a_visit_is_light_and_blind(open_page: Open, tmp_path: Path) -> None:
    store = made(tmp_path, "rank", prompts=3)
    with label_page(store) as (person,), open_page() as watched:
        watched.page.goto(person.link)
        watched.page.wait_for_load_state("networkidle")
        assert 5_000 < watched.received < 100_000
        assert "system" not in watched.page.content() and "candidates" not in watched.page.content()
    store.close()


def test_without_scripts(open_page: Open, tmp_path: Path) -> None:
    for kind in ("rank", "compare", "rate", "correct"):
        store = made(tmp_path / kind, kind, prompts=2, answers=2)
        with label_page(store) as (person,), open_page(java_script_enabled=False) as watched:
            page = watched.page
            page.goto(person.link)
            if kind == "rank":
                page.get_by_role("button", name="Store and go on").click()
                assert page.url.endswith("/task/1")  # the browser asks for the ranks
                for place in range(2):
                    page.locator(f"input[name=rank_{place}][value='{place + 1}']").check()
                page.get_by_role("button", name="Store and go on").click()
            elif kind == "compare":
                page.get_by_role("button", name="B is better").click()
            elif kind == "rate":
                page.get_by_role("button", name="3 of 5").click()
            else:
                page.get_by_label("Your answer").fill("right")
                page.get_by_role("button", name="Store and go on").click()
            page.wait_for_url("**/task/2")
            page.get_by_role("button", name="Skip").click()
            assert len(store.votes()) == 2
            page.goto(page.url.rpartition("/")[0].removesuffix("/task") + "/task/2")
            page.get_by_role("button", name="Undo").click()
            assert len(store.votes()) == 1
        store.close()
