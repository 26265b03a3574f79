"""Pictures of the labeling page for docs/images: `python tests/browser/screenshots.py` after `make browser`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from browser.chromium import chromium_path, context_options, label_page, made  # noqa: E402
from rung.human_labels.store import LabelStore  # noqa: E402
from rung.human_labels.votes import parse_vote  # noqa: E402

GUIDE = "A good answer says what happened, what we do next and when. It is short and polite."
SEARCH = (
    "I am sorry for the wait. Your parcel left us on 3 July and was last scanned in Leipzig on 4 July. Five days "
    "without a scan are unusual, so I have asked the carrier to search for it today. You hear from us by Friday, "
    "12 July. If it is not found by then, we send a new one at no cost."
)
WAIT = (
    "Your parcel was last scanned in Leipzig on 4 July. Please wait a few more days and check the tracking page again."
)
INVENTED = "Your parcel was delivered on 5 July.\n\nCan I help you with anything else today?"
VAGUE = (
    "Thank you so much for reaching out! We truly value you as a customer, and we understand how frustrating it is to "
    "wait. Rest assured that our team does everything in its power."
)
PARCEL = {
    "prompt": "Where is my parcel? I ordered on 1 July, and the tracking page has not changed for five days.",
    "context": "Order 4812, shipped on 3 July.\nLast scan: Leipzig hub, 4 July, 02:14. Today is 9 July.",
    "answers": [SEARCH, WAIT, INVENTED, VAGUE],
}
API = {
    "prompt": "How do I ask your API for the state of an order? A line of Python would help.",
    "context": 'GET /orders/{number} with the header X-Key returns {"state": ...}',
    "answers": [
        'Send a GET request with your key:\n\n```python\nurl = f"{base}/orders/4812"\n'
        'requests.get(url, headers={"X-Key": key})\n```\n\nThe field `state` of the answer has the state.',
        "You can use our API. Please read the documentation, which explains everything that you need to know.",
    ],
}
FORMS = {
    "rank": {f"rank_{place}": str(place + 1) for place in range(4)},
    "compare": {"choice": "left"},
}


def open_task(store: LabelStore, question: str, done: int) -> int:
    """The number of the task with a question, after votes of half a minute on others."""
    slots = store.slots[0]
    wanted = next(i for i, slot in enumerate(slots) if slot.task.item.question == question)
    for position in [i for i in range(len(slots)) if i != wanted][:done]:
        slot = slots[position]
        vote = parse_vote(store.settings.kind, slot.task, slot.shown, 5, FORMS[store.settings.kind])
        store.cast(0, position, 0, vote, "", 31.0)
    return wanted + 1


def rank_two(page: Any) -> None:
    """Rank the best answer and the second, with the mouse over a third."""
    for text in (SEARCH, WAIT):
        page.locator(".answer", has_text=text[:30]).click()
    page.locator(".answer", has_text=VAGUE[:30]).hover()
    page.evaluate("scrollTo(0, 0)")


def take(browser: Any, name: str, kind: str, row: dict[str, Any], options: dict[str, Any]) -> None:
    """One picture; its folder lives no longer."""
    others = [
        {"prompt": f"Question {i}", "answers": [f"{i}, {k}" for k in range(len(row["answers"]))]} for i in range(39)
    ]
    with tempfile.TemporaryDirectory() as folder:
        store = made(Path(folder), kind, rows=[row, *others], guide=GUIDE, names=("Ada",))
        number = open_task(store, row["prompt"], done=14)
        with label_page(store) as (link,):
            context = browser.new_context(**options)
            page = context.new_page()
            page.goto(link)
            page.goto(f"{link.split('/enter')[0]}/task/{number}")
            if kind == "rank":
                rank_two(page)
            page.screenshot(path=ROOT / "docs" / "images" / f"{name}.png")
            context.close()
        store.close()


def main() -> None:
    """All three pictures."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=["--no-sandbox"])
        take(browser, "label-rank", "rank", PARCEL, context_options("desktop", "light"))
        short = {"viewport": {"width": 1280, "height": 720}}
        take(browser, "label-compare", "compare", API, context_options("desktop", "dark") | short)
        take(browser, "label-phone", "compare", API, context_options("phone", "light"))
        browser.close()


if __name__ == "__main__":
    main()
