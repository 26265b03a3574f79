"""People at the labeling page in a real browser: mouse, touch and keyboard alone, both themes, and what axe finds.

`make browser` installs Playwright and axe and runs these tests with a Chromium of this machine.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is missing: make browser")
axe_package = pytest.importorskip("axe_playwright_python", reason="axe is missing: make browser")

from browser.chromium import (  # noqa: E402 -- after the modules without which nothing here runs
    SIZES,
    VARIANTS,
    Watched,
    chromium_path,
    context_options,
    goes_on,
    label_command,
    label_page,
    made,
    press,
    qualities,
    until_read,
)
from rung.human_labels.store import CastVote, LabelStore  # noqa: E402

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
STORE = "Store and go on"
Open = Callable[..., AbstractContextManager[Watched]]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if (path := chromium_path()) is None:
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
        context = browser.new_context(**context_options(size, theme), **options)
        context.set_default_timeout(10_000)
        watched = Watched(context.new_page())
        yield watched
        context.close()
        assert not watched.faults, watched.faults

    return opened


def one_row(*answers: str) -> list[dict[str, Any]]:
    return [{"prompt": "Where is my parcel?", "context": "Order 4812, shipped on 3 July.", "answers": answers}]


def by_position(store: LabelStore) -> list[CastVote]:
    return sorted(store.votes(), key=lambda vote: (vote.person, vote.position))


def quality_of_answer(store: LabelStore, vote: CastVote, answer: int) -> int:
    return int(store.slots[vote.person][vote.position].task.item.answers[answer].text[8])


@pytest.mark.parametrize(("size", "theme"), VARIANTS)
def test_two_people_rank_twenty_items_each(open_page: Open, tmp_path: Path, size: str, theme: str) -> None:
    """One with clicks on the answers or a finger on the ranks, one with the keyboard alone, who has 3 and 2 tie."""
    store = made(tmp_path, "rank", people=2, overlap=1.0)
    with label_page(store) as people:
        with open_page(size, theme) as watched:
            page = watched.page
            page.goto(people[0])
            for _ in range(20):
                shown = qualities(page)
                for rank, quality in enumerate((3, 2, 1, 0), 1):
                    place = shown.index(quality)
                    if size == "phone":
                        page.locator(f"input[name=rank_{place}][value='{rank}']").locator("..").tap()
                    else:
                        page.locator(".answer .text").nth(place).click()
                goes_on(page, lambda: press(page, size, page.get_by_role("button", name=STORE)))
            assert page.url.endswith("/done") and "20 of 20" in page.inner_text("header")
        with open_page(size, theme) as watched:
            page = watched.page
            page.goto(people[1])
            for _ in range(20):
                letters = dict(zip(qualities(page), "abcd", strict=True))
                for key in (letters[3], f"Shift+{letters[2].upper()}", letters[1], letters[0]):
                    page.keyboard.press(key)
                goes_on(page, lambda: page.keyboard.press("Control+Enter"))
            assert page.url.endswith("/done")
    votes = store.votes()
    assert len(votes) == 40
    for vote in votes:
        ranks = {quality_of_answer(store, vote, i): rank for i, rank in vote.vote.ranks.items()}  # type: ignore[union-attr]
        assert ranks == ({3: 1, 2: 2, 1: 3, 0: 4} if vote.person == 0 else {3: 1, 2: 1, 1: 2, 0: 3})
        assert vote.seconds is not None and 0 < vote.seconds < 60
    store.close()


@pytest.mark.parametrize(("size", "theme"), VARIANTS[1:3])
def test_comparing(open_page: Open, tmp_path: Path, size: str, theme: str) -> None:
    """Keys and buttons, a note, a skipped task and back to it, what is stored is marked, and undo."""

    def better(page: Any) -> str:
        first, second = qualities(page)
        return "1" if first > second else "2"

    store = made(tmp_path, "compare", prompts=6, answers=2)
    with label_page(store) as (link,), open_page(size, theme) as watched:
        page = watched.page
        page.goto(link)
        goes_on(page, lambda: page.keyboard.press(better(page)))
        name = {"1": "A is better", "2": "B is better"}[better(page)]
        goes_on(page, lambda: press(page, size, page.get_by_role("button", name=name)))
        goes_on(page, lambda: page.keyboard.press("3"))
        goes_on(page, lambda: press(page, size, page.get_by_role("button", name="Both bad")))
        page.get_by_text("Note", exact=True).click()
        page.get_by_label("A note on this task").press_sequentially("1 2 3 s u: keys are text here")
        page.reload()
        assert page.get_by_label("A note on this task").input_value() == "1 2 3 s u: keys are text here"
        goes_on(page, lambda: press(page, size, page.get_by_role("button", name="Skip")))
        goes_on(page, lambda: page.keyboard.press(better(page)))
        assert page.url.endswith("/done")
        assert by_position(store)[4].vote.kind == "skipped"
        goes_on(page, lambda: page.get_by_role("link", name="Task 5").click())
        assert page.get_by_role("button", name="Skip").get_attribute("aria-pressed") == "true"
        assert page.get_by_label("A note on this task").input_value().startswith("1 2 3 s u")
        goes_on(page, lambda: page.keyboard.press(better(page)))
        assert [vote.note for vote in by_position(store)] == ["", "", "", "", "1 2 3 s u: keys are text here", ""]
        goes_on(page, lambda: page.goto(page.url.replace("/done", "/task/1")))
        assert page.locator("[aria-pressed=true]").get_attribute("data-key") == better(page)
        goes_on(page, lambda: page.get_by_role("link", name="Next task").click())
        goes_on(page, lambda: page.keyboard.press("u"))
        assert page.url.endswith("/task/5") and len(store.votes()) == 5
        goes_on(page, lambda: press(page, size, page.get_by_role("button", name="Undo")))
        assert page.url.endswith("/task/6") and len(store.votes()) == 4
        goes_on(page, lambda: page.keyboard.press(better(page)))
        assert page.url.endswith("/task/5")
        goes_on(page, lambda: page.keyboard.press(better(page)))
    assert page.url.endswith("/done")
    for position, vote in enumerate(by_position(store)):
        said = vote.vote.outcome
        assert said is not None and vote.vote.is_bad == (position == 3)
        if position in (2, 3):
            assert said.outcome == "tie"
        else:
            preferred = said.first if said.outcome == "first" else said.second
            assert quality_of_answer(store, vote, preferred) == 1
    store.close()


@pytest.mark.parametrize(("size", "theme"), VARIANTS[::3])
def test_rating_and_correcting(open_page: Open, tmp_path: Path, size: str, theme: str) -> None:
    store = made(tmp_path, "rate", prompts=2, answers=2)
    with label_page(store) as (link,), open_page(size, theme) as watched:
        page = watched.page
        page.goto(link)
        for way in ("key", "press", "key", "press"):
            score = qualities(page)[0] + 4
            if way == "key":
                goes_on(page, lambda: page.keyboard.press(str(score)))  # noqa: B023 -- called at once
            else:
                goes_on(page, lambda: press(page, size, page.get_by_role("button", name=f"{score} of 5")))  # noqa: B023
    for vote in store.votes():
        (answer,) = store.slots[0][vote.position].shown
        assert vote.vote.score == quality_of_answer(store, vote, answer) + 4
    assert len(store.votes()) == 4
    store.close()

    store = made(tmp_path, "correct", prompts=2, answers=2)
    with label_page(store) as (link,), open_page(size, theme) as watched:
        page = watched.page
        page.goto(link)
        page.get_by_role("button", name="Edit this answer").last.click()
        box = page.get_by_label("Your answer")
        assert box.input_value() == page.locator(".answer .text").last.inner_text()
        box.fill("Right.\nSecond line, أين")
        page.reload()
        assert box.input_value() == "Right.\nSecond line, أين"  # the draft
        goes_on(page, lambda: page.keyboard.press("Control+Enter"))
        assert box.input_value() != "Right.\nSecond line, أين"
        goes_on(page, lambda: press(page, size, page.get_by_role("button", name=STORE)))
    assert by_position(store)[0].vote.text == "Right.\nSecond line, أين" and len(store.votes()) == 2
    store.close()


def test_what_nobody_meant_is_no_vote(open_page: Open, tmp_path: Path) -> None:
    """A double click, a key that is held down, Enter on a box, and keys that are switched off."""
    store = made(tmp_path, "compare", prompts=6, answers=2)
    with label_page(store) as (link,), open_page() as watched:
        page = watched.page
        page.goto(link)
        goes_on(page, lambda: page.get_by_role("button", name="A is better").dblclick())
        page.keyboard.down("1")  # in the same place of time: the page has just come
        for _ in range(20):
            page.keyboard.down("1")
            time.sleep(0.03)
        page.keyboard.up("1")
        assert page.url.endswith("/task/2") and len(store.votes()) == 1
        page.get_by_label("Keyboard shortcuts").press("Enter")
        page.get_by_label("Keyboard shortcuts").uncheck()
        page.keyboard.press("1")
        page.reload()
        assert not page.get_by_label("Keyboard shortcuts").is_checked()
        until_read(page)
        page.keyboard.press("1")
        time.sleep(0.2)
        assert page.url.endswith("/task/2") and len(store.votes()) == 1
    store.close()


def test_ranks_are_taken_back_and_stored_ranks_are_shown(open_page: Open, tmp_path: Path) -> None:
    def ranks(page: Any) -> list[str | None]:
        checked = [page.locator(f"input[name=rank_{place}]:checked") for place in range(4)]
        return [each.get_attribute("value") if each.count() else None for each in checked]

    store = made(tmp_path, "rank", prompts=2)
    with label_page(store) as (link,), open_page() as watched:
        page = watched.page
        page.goto(link)
        for key in "cab":
            page.keyboard.press(key)
        assert ranks(page) == ["2", "3", "1", None]
        page.locator(".answer .text").first.click()  # once more: without a rank, which is the next one again
        page.keyboard.press("d")
        assert ranks(page) == [None, "3", "1", "2"]
        page.keyboard.press("Backspace")
        page.locator("input[name=rank_3][value='1']").check(force=True)
        assert ranks(page) == [None, "3", "1", "1"]
        until_read(page)
        page.keyboard.press("Control+Enter")  # one rank is missing, and the browser says so
        assert page.locator("input:invalid").count() and not store.votes()
        page.keyboard.press("a")
        page.get_by_label("None of them is good").check()
        page.reload()
        assert ranks(page) == ["2", "3", "1", "1"]  # the draft
        goes_on(page, lambda: page.keyboard.press("Control+Enter"))
        goes_on(page, lambda: page.get_by_role("link", name="Previous task").click())
        assert ranks(page) == ["2", "3", "1", "1"] and page.get_by_label("None of them is good").is_checked()
        assert page.locator(".answer.ranked").count() == 4 and "You answered this task" in page.inner_text("main")
        page.keyboard.press("Backspace")
        assert ranks(page) == ["2", None, "1", "1"]
    store.close()


def test_two_tabs_and_two_people_in_one_browser(open_page: Open, tmp_path: Path) -> None:
    store = made(tmp_path, "compare", prompts=4, answers=2, people=2, overlap=1.0)
    with label_page(store) as people, open_page() as watched:
        page = watched.page
        page.goto(people[0])
        other = page.context.new_page()
        other.goto(page.url)
        goes_on(page, lambda: page.keyboard.press("1"))
        until_read(other)
        other.keyboard.press("2")
        other.get_by_role("alert").get_by_text("another tab").wait_for()
        assert len(store.votes()) == 1 and store.vote(0, 0)[0] == 1
        assert other.locator("[aria-pressed=true]").get_attribute("data-key") == "1"
        goes_on(other, lambda: other.keyboard.press("2"))  # now it is known what is replaced
        assert store.vote(0, 0)[0] == 2
        page.goto(people[1])  # the cookie is that of the second person now
        until_read(other)
        other.keyboard.press("1")
        other.get_by_role("alert").get_by_text("another person").wait_for()
        assert len(store.votes()) == 1
    store.close()


def test_a_text_that_is_refused_is_kept(open_page: Open, tmp_path: Path) -> None:
    store = made(tmp_path, "correct", prompts=2, answers=1)
    with label_page(store) as (link,), open_page() as watched:
        page = watched.page
        page.goto(link)
        other = page.context.new_page()
        other.goto(page.url)
        page.get_by_label("Your answer").fill("first")
        goes_on(page, lambda: page.keyboard.press("Control+Enter"))
        other.get_by_label("Your answer").fill("second")
        until_read(other)
        other.keyboard.press("Control+Enter")
        other.get_by_role("alert").get_by_text("another tab").wait_for()
        assert other.get_by_label("Your answer").input_value() == "first"
        other.get_by_role("button", name="Put it back").click()
        assert other.get_by_label("Your answer").input_value() == "second"
        goes_on(other, lambda: other.keyboard.press("Control+Enter"))
    assert [vote.vote.text for vote in store.votes()] == ["second"]
    store.close()


def test_a_server_that_is_away_gets_the_vote_later(open_page: Open, tmp_path: Path) -> None:
    """`rung label` is stopped and started again on its port; the vote arrives, once, and the links are still good."""
    made(tmp_path, "compare", prompts=4, answers=2).close()
    folder = tmp_path / "labels-compare"
    with open_page() as watched:
        page = watched.page
        with label_command("compare", "-o", folder) as (process, link):
            page.goto(link)
            until_read(page)
            process.send_signal(signal.SIGTERM)
            process.wait(20)
        page.keyboard.press("1")
        page.get_by_role("alert").get_by_text("Not stored yet").wait_for()
        port = link.split(":")[2].split("/")[0]
        with label_command("compare", "-o", folder, "--port", port) as (_, again):
            assert again == link
            page.wait_for_url("**/task/2", timeout=30_000)
            store = LabelStore.open(folder, is_read_only=True)
            assert len(store.votes()) == 1 and store.vote(0, 0)[0] == 1
            store.close()


def test_a_reply_that_is_lost(open_page: Open, tmp_path: Path) -> None:
    """The vote is sent again and is one vote; undo is not, for it would take back the vote before as well."""
    store = made(tmp_path, "compare", prompts=4, answers=2)
    lost = []

    def lose_first(route: Any) -> None:
        if not lost:
            lost.append(route.fetch(max_redirects=0).status)
            route.abort()
        else:
            route.continue_()

    with label_page(store) as (link,), open_page() as watched:
        page = watched.page
        page.goto(link)
        page.route(
            "**/task/1", lambda route: lose_first(route) if route.request.method == "POST" else route.continue_()
        )
        goes_on(page, lambda: page.keyboard.press("1"))
        assert lost == [303] and len(store.votes()) == 1 and store.vote(0, 0)[0] == 1
        goes_on(page, lambda: page.keyboard.press("1"))
        lost.clear()
        page.route("**/undo", lose_first)
        until_read(page)
        page.keyboard.press("u")
        page.get_by_role("alert").get_by_text("Reload the page").wait_for()
        time.sleep(1.2)
        assert lost == [303] and len(store.votes()) == 1
    store.close()


@pytest.mark.parametrize(("size", "theme"), VARIANTS)
def test_axe_finds_nothing_and_nobody_scrolls_sideways(open_page: Open, tmp_path: Path, size: str, theme: str) -> None:
    """Tasks of each kind with long, right-to-left, code and unbroken answers; messages; the end."""
    for kind in ("rank", "compare", "rate", "correct"):
        store = made(tmp_path / kind, kind, rows=one_row(*SPECIAL), guide="Short and right is good.\n\nLong is not.")
        with label_page(store) as (link,), open_page(size, theme) as watched:
            page = watched.page
            home = link.split("/enter")[0]

            def is_good(watched: Watched = watched, page: Any = page) -> None:
                for width in (SIZES[size]["width"], *([320] if size == "phone" else [])):
                    page.set_viewport_size({"width": width, "height": 800})
                    assert not watched.is_wider_than_its_window(), (page.url, width)
                assert not watched.violations(AXE)

            if kind == "rank":
                for path, title in (("/", "Who are you?"), ("/enter/x", "wrong"), ("/nothing", "No such page")):
                    page.goto(home + path)
                    assert title in page.inner_text("h1")
                    is_good()
            page.goto(link)
            for number in range(1, min(len(store.slots[0]), 4) + 1):
                page.goto(f"{home}/task/{number}")
                is_good()
            page.goto(f"{home}/done")
            assert "Not done yet" in page.inner_text("h1")
            page.goto(f"{home}/task/1")
            goes_on(page, lambda page=page: page.keyboard.press("s"))  # type: ignore[misc]
            page.goto(f"{home}/task/1")
            assert "You skipped" in page.inner_text("main")
            is_good()
            page.goto(f"{home}/done")
            is_good()
        store.close()


SMALL_TARGETS = (
    "[...document.querySelectorAll('button, summary, nav a, .ranks label, .check')].filter(each => "
    "each.checkVisibility() && each.getBoundingClientRect().height < 44).map(each => each.outerHTML)"
)
LAYOUT_SHIFT = (
    "window.shift = 0; new PerformanceObserver(list => list.getEntries().forEach(entry => "
    "{ window.shift += entry.value; })).observe({type: 'layout-shift', buffered: true});"
)
FOCUS_AND_ACTIONS = (
    "(() => { const active = document.activeElement, box = active.getBoundingClientRect();"
    " return [Boolean(active.closest('.actions')), box.top, box.bottom,"
    " document.querySelector('.actions').getBoundingClientRect().top]; })()"
)


def test_nothing_moves_and_targets_are_large(open_page: Open, tmp_path: Path) -> None:
    for kind in ("rank", "compare", "rate", "correct"):
        store = made(tmp_path / kind, kind, rows=one_row(*SPECIAL), guide="Short is good.")
        with label_page(store) as (link,), open_page("phone") as watched:
            page = watched.page
            page.add_init_script(LAYOUT_SHIFT)
            page.goto(link)
            page.wait_for_load_state("networkidle")
            time.sleep(0.2)
            assert page.evaluate("window.shift") == 0
            assert not page.evaluate(SMALL_TARGETS)
        store.close()


def test_the_actions_hide_no_focus(open_page: Open, tmp_path: Path) -> None:
    store = made(tmp_path, "rank", prompts=1)
    with label_page(store) as (link,), open_page("phone") as watched:
        page = watched.page
        for height in range(560, 760, 40):
            page.set_viewport_size({"width": 390, "height": height})
            page.goto(link)
            for _ in range(9):  # the context, four answers, the box, the note, two actions
                page.keyboard.press("Tab")
                page.evaluate("new Promise(requestAnimationFrame)")
                is_action, top, bottom, bar = page.evaluate(FOCUS_AND_ACTIONS)
                assert is_action or (top >= 0 and bottom <= bar)
        page.set_viewport_size({"width": 320, "height": 256})  # 1280 pixels at 400 %
        assert page.evaluate("getComputedStyle(document.querySelector('.actions')).position") == "static"
    store.close()


def test_hostile_answers_are_text(open_page: Open, tmp_path: Path) -> None:
    for kind in ("rank", "correct"):
        store = made(tmp_path / kind, kind, rows=one_row(*HOSTILE))
        with label_page(store) as (link,), open_page() as watched:
            page = watched.page
            page.goto(link)
            shown = " ".join(page.locator(".answer").all_inner_texts())
            for part in ("<script>", "onerror", "</textarea>", "<style>", "javascript:alert(1)"):
                assert part in shown
            assert "\u202e" not in shown and "\\u202e" in shown and page.title().startswith("Task 1")
            assert page.locator("form").count() == 1 and page.locator("img, iframe, style").count() == 0
            assert watched.received < 10**6
            time.sleep(0.2)
            assert page.url.endswith("/task/1")
        store.close()


def test_a_text_to_edit_has_no_escapes(open_page: Open, tmp_path: Path) -> None:
    """What the page shows as an escape would become a part of the corrected answer."""
    store = made(
        tmp_path,
        "correct",
        rows=one_row(
            "a\r\nb \u202eend\x07 \u200fשלום\u200f \U0001f469\u200d\U0001f4bb",
        ),
    )
    with label_page(store) as (link,), open_page() as watched:
        watched.page.goto(link)
        goes_on(watched.page, lambda: watched.page.keyboard.press("Control+Enter"))
    assert store.votes()[0].vote.text == "a\nb end \u200fשלום\u200f \U0001f469\u200d\U0001f4bb"
    store.close()


def test_a_visit_is_light_and_blind(open_page: Open, tmp_path: Path) -> None:
    store = made(tmp_path, "rank", prompts=3)
    with label_page(store) as (link,), open_page() as watched:
        watched.page.goto(link)
        watched.page.wait_for_load_state("networkidle")
        assert 5_000 < watched.received < 100_000
        assert "system" not in watched.page.content() and "candidates" not in watched.page.content()
    store.close()


def test_without_scripts(open_page: Open, tmp_path: Path) -> None:
    for kind in ("rank", "compare", "rate", "correct"):
        store = made(tmp_path / kind, kind, prompts=2, answers=2)
        with label_page(store) as (link,), open_page(java_script_enabled=False) as watched:
            page = watched.page
            page.goto(link)
            assert page.locator("kbd:visible, .scripted:visible").count() == 0  # no hint of what does not work
            if kind == "rank":
                page.get_by_role("button", name=STORE).click()
                assert page.url.endswith("/task/1")  # the browser asks for the ranks
                for place in range(2):
                    page.locator(f"input[name=rank_{place}][value='{place + 1}']").check()
                page.get_by_role("button", name=STORE).click()
            elif kind == "compare":
                page.get_by_role("button", name="B is better").click()
            elif kind == "rate":
                page.get_by_role("button", name="3 of 5").click()
            else:
                page.get_by_label("Your answer").fill("right")
                page.get_by_role("button", name=STORE).click()
            page.wait_for_url("**/task/2")
            page.get_by_role("button", name="Skip").click()
            page.wait_for_url("**/task/*" if len(store.slots[0]) > 2 else "**/done")
            assert len(store.votes()) == 2
            page.goto(link.split("/enter")[0] + "/task/2")
            page.get_by_role("button", name="Undo").click()
            assert len(store.votes()) == 1
        store.close()


def test_torch_is_not_loaded() -> None:
    """Neither by the page nor by these tests."""
    code = "import sys; sys.path[:0] = ['tests']; import browser.chromium; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
