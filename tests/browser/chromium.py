"""A Chromium of this machine, a page whose faults are collected, and labeling folders with their pages.

`label_person` has such a server too, but loads torch.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from rung.human_labels.store import LabelStore
from rung.labeling.app import make_app
from rung.labeling.run import LabelRequest, open_or_create
from rung.web.server import server_options

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SIZES = {"phone": {"width": 390, "height": 844}, "desktop": {"width": 1280, "height": 900}}
VARIANTS = [(size, theme) for size in SIZES for theme in ("light", "dark")]
AXE_RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
UNREAD_MS = 300
"""label.js takes no vote on a task that is younger: the second click of a double click is meant for the task before."""


def chromium_path() -> str | None:
    """The Chromium that `CHROMIUM` names, or the first in the path; Playwright's own is never downloaded."""
    return os.environ.get("CHROMIUM") or next((path for path in map(shutil.which, NAMES) if path), None)


def context_options(size: str, theme: str) -> dict[str, Any]:
    """The window, the touch screen and the theme of a browser context."""
    touch = {"has_touch": True, "is_mobile": True} if size == "phone" else {}
    return {"viewport": SIZES[size], "color_scheme": theme, **touch}


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

    def violations(self, axe: str) -> list[str]:
        """What axe finds on the page."""
        self.page.evaluate(axe)
        run = "rules => axe.run(document, {runOnly: {type: 'tag', values: rules}})"
        found = self.page.evaluate(run, AXE_RULES)["violations"]
        return [f"{each['id']}: {each['help']}: {[node['html'][:150] for node in each['nodes']]}" for each in found]

    def is_wider_than_its_window(self) -> bool:
        """Whether one would have to scroll sideways."""
        return bool(self.page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"))


def made(
    folder: Path, kind: Any, *, rows: Sequence[dict[str, Any]] = (), prompts: int = 20, answers: int = 4, **changes: Any
) -> LabelStore:
    """A labeling folder of rows, or else of prompts whose answers say how good they are."""
    rows = rows or [
        {
            "prompt": f"Question {i}: where is my parcel?",
            "context": f"Order {1000 + i}, shipped on 3 July.",
            "answers": [f"Quality {k}: answer to question {i}." for k in range(answers)],
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


def until_read(page: Any) -> None:
    """Wait until the page takes votes."""
    # no wait_for_function: it would need the eval that the policy of the page forbids
    page.wait_for_timeout(max(0.0, UNREAD_MS + 10 - page.evaluate("performance.now()")))


def goes_on(page: Any, act: Callable[[], object]) -> None:
    """Do something once the page takes votes, and wait for the page that follows."""
    before = page.url
    until_read(page)
    act()
    page.wait_for_url(lambda url: url != before)


def press(page: Any, size: str, locator: Any) -> None:
    """A tap on a phone, a click elsewhere."""
    locator.tap() if size == "phone" else locator.click()


@contextmanager
def label_page(store: LabelStore) -> Iterator[list[str]]:
    """The page of a folder on a free port in a thread of this process: a link for each person."""
    server = uvicorn.Server(uvicorn.Config(make_app(store), port=0, **server_options(5)))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield [f"http://127.0.0.1:{port}/enter/{store.token(i)}" for i in range(len(store.people))]
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def label_command(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`rung label` as a process, and the first link that it prints."""
    command = [sys.executable, "-m", "rung", "label", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as running:
        assert running.stdout is not None
        try:
            yield running, running.stdout.readline().rpartition(": ")[2].strip()
        finally:
            running.terminate()
            running.wait(20)
