"""The page of a folder of made rows."""

from __future__ import annotations

from pathlib import Path

from rung.report.synth import write_teach_page
from rung.results.synth import SynthCost, SynthResult


def test_what_a_model_writes_is_text_in_the_page(tmp_path: Path) -> None:
    """Markup and escape sequences are shown, not obeyed, and the same folder gives the same bytes."""
    cost = SynthCost(requests=3, failed=0, prompt_tokens=9, answer_tokens=9, uncounted=0, seconds=1.0)
    counts = {"rows": 1, "wanted": 2, "tried": 3, "rejected": {"length": 1, "refusals": 1}}
    result = SynthResult(output="made/rows.jsonl", cost=cost, diversity=1.0, compared_questions=1, **counts)
    evil = "<script>alert(1)</script> \x1b[31m \ud800"
    rows = [{"question": evil, "answer": evil, "context": evil, "made": {"number": 0, "attributes": {"reader": evil}}}]
    rows.append(
        {"messages": [{"role": "user", "content": evil}, {"role": "assistant", "content": evil}], "made": {"number": 3}}
    )
    rejected = [{"number": 1, "filter": "length", "reason": evil, "question": evil, "answers": [evil]}]
    config = {"synth": {"teacher": {"model": evil}, "task": evil}}
    pages = []
    for _ in range(2):
        write_teach_page(tmp_path, result, config, rows, rejected)
        pages.append((tmp_path / "report.html").read_bytes())
    page = pages[0].decode()
    assert pages[0] == pages[1] and "<script" not in page and "\x1b" not in page
    assert page.count("&lt;script&gt;alert(1)") >= 9 and "Fewer rows than were asked for" in page
