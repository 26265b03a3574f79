"""The pictures of docs/label.md: python tests/browser/screenshots.py docs/images"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from playwright.sync_api import sync_playwright

from label_person import label_page
from rung.labeling.run import LabelRequest, open_or_create

ROWS = [
    {
        "prompt": "Hello, my order 4812 has not arrived. I need it before Friday, otherwise please cancel it.",
        "context": "Order 4812 | Mara | desk lamp | EUR 24 | shipped | arrives on 9 July (Wednesday)",
        "answers": [
            "Hi Mara, order 4812 arrives on Wednesday, 9 July, so you have it before Friday. You need not cancel it.",
            "Dear customer, thank you for contacting us! We value your patience. Your parcel is on its way and will be "
            "with you as soon as possible. Please do not hesitate to contact us again.",
            "Order 4812 is cancelled. EUR 42 are on their way to your account.",
            "It arrives on 9 July.",
        ],
    },
    {
        "prompt": "How do I ask your API for the state of an order? A line of Python would help.",
        "context": 'GET /orders/{number} with the header X-Key returns {"state": ...}',
        "answers": [
            "Send a GET request with your key:\n\n```python\n"
            'requests.get(f"{base}/orders/4812", headers={"X-Key": key})\n```\n\n'
            "The field `state` of the answer has the state.",
            "You can use our API. Please read the documentation, which explains everything that you need to know.",
        ],
    },
]
GUIDE = "The answer is right, says what the customer asked, and is short. Friendliness counts last."


def pictures(folder: Path, kinds: dict[str, tuple[str, str, dict[str, int], int]]) -> None:
    """Write one picture for each name: kind, theme, size of the window, and the item that is shown."""
    folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as scratch:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        for name, (kind, theme, size, item) in kinds.items():
            file = Path(scratch) / f"{name}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
            request: Any = LabelRequest(kind, (str(file),), names=("Ana",), guide=GUIDE)  # type: ignore[arg-type]
            store = open_or_create(Path(scratch) / name, request)
            with label_page(store) as (person,):
                touch = {"has_touch": True, "is_mobile": True} if size["width"] < 500 else {}
                page = browser.new_context(viewport=size, color_scheme=theme, **touch).new_page()  # type: ignore[arg-type]
                page.goto(person.link)
                positions = [
                    i for i, slot in enumerate(store.slots[0]) if ROWS[item]["prompt"] == slot.task.item.question
                ]
                page.goto(page.url.rpartition("/")[0] + f"/{positions[0] + 1}")
                if kind == "rank":
                    for key in ("b", "a"):
                        page.keyboard.press(key)
                page.screenshot(path=folder / f"{name}.png")
            store.close()
        browser.close()


DESKTOP, PHONE = {"width": 1200, "height": 900}, {"width": 390, "height": 844}
PICTURES = {
    "label-rank": ("rank", "light", DESKTOP, 0),
    "label-compare": ("compare", "dark", DESKTOP, 1),
    "label-phone": ("compare", "light", PHONE, 1),
}

if __name__ == "__main__":
    pictures(Path(sys.argv[1]), PICTURES)
