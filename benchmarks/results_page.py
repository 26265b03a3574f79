"""RESULTS.md as sections: each command replaces its own and leaves the others.

Processors with AVX-512 and without it differ by a factor of three, so that what depends on it has one section a class.
"""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.runner import ROOT
from benchmarks.workloads import GROUPS

RESULTS = ROOT / "benchmarks/RESULTS.md"
CLASSES = ("AVX-512", "AVX2")
SECTIONS = (
    *(f"{part} {name}" for name in CLASSES for part in ("bench", *GROUPS)),
    *(f"beside other work {name}" for name in CLASSES),
    *(f"serving {name}" for name in CLASSES),
    "planned memory",
)
"""In the order of the page."""
_SECTION = re.compile(r"<!-- (?P<name>[^>]+) -->\n(?P<text>.*?)\n<!-- end of (?P=name) -->", re.DOTALL)


def machine_class(instructions: list[str]) -> str:
    """The class of a processor with these instruction sets, one of `CLASSES`."""
    return "AVX-512" if "avx512f" in instructions else "AVX2"


def replace_section(name: str, text: str, page: Path = RESULTS, head: str | None = None) -> None:
    """Write a section, and what stands before all sections where `head` is given.

    Raises `ValueError` for a name that is not one of `SECTIONS`, and for a page with text that would be lost.
    """
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    sections = {match["name"]: match["text"] for match in _SECTION.finditer(old)}
    if unknown := {name, *sections} - set(SECTIONS):
        raise ValueError(f"{page}: no such section: {', '.join(sorted(unknown))}")
    if "<!--" in (rest := _SECTION.sub("", old)) or rest.strip() != old.partition("<!--")[0].strip():
        raise ValueError(f"{page}: text between or after the sections, or a section without its end")
    sections[name] = text.strip()
    parts = [old.partition("<!--")[0].strip() if head is None else head.strip()]
    parts += [f"<!-- {n} -->\n{sections[n]}\n<!-- end of {n} -->" for n in SECTIONS if n in sections]
    page.write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8")
