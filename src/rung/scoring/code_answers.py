"""Answers that are programs: the program in an answer, and its score against the tests of the row.

The reward `code` (`verifiers`) and the metric `code` (`evaluation.evaluate`) are 1 where all tests pass, else 0, so the
mean of the metric over greedy answers is pass@1; `stats.pass_at_k` estimates pass@k from several answers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from rung.config.code import CodeLimitsConfig
from rung.errors import DataError
from rung.scoring.code_sandbox import Program, ProgramResult, run_programs
from rung.types import CodeTests, Record

CODE = "code"
"""Name of the metric and of the reward."""
PYTHON_LABELS = frozenset({"", "python", "python3", "py"})
"""What stands behind the opening fence of a block that is a program, in lower case."""
_DEFINITION = re.compile(r"^\s*(?:async\s+def|def|class)\s+\w", re.MULTILINE)
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})[ \t]*([^`\s]*)[^`]*")


def extract_program(answer: str) -> str:
    """The program of an answer: the last fenced block that defines a function or a class.

    Models often write an example of use or its output behind it. Where no block defines anything it is the last one
    that is labeled as Python, else the last without a label; without any block the whole answer.
    """
    blocks = list(_blocks(answer))
    defining = [text for _, text in blocks if _DEFINITION.search(text)]
    labeled = [text for label, text in blocks if label]
    for candidates in (defining, labeled, [text for _, text in blocks]):
        if candidates:
            return candidates[-1]
    return answer


def _blocks(answer: str) -> Iterator[tuple[str, str]]:
    """Label and text of each fenced block that is labeled as Python or not at all.

    A block that is never closed ends with the answer: it was truncated, or a stop text took its closing fence.
    """
    block: list[str] = []
    fence = label = ""
    for line in answer.splitlines():
        match = _FENCE.fullmatch(line)
        if not fence:
            if match is not None:
                fence, label, block = match[1], match[2].lower(), []
        elif match is not None and match[1].startswith(fence) and not match[2]:
            fence = ""
            if label in PYTHON_LABELS:
                yield label, "\n".join(block) + "\n"
        else:
            block.append(line)
    if fence and label in PYTHON_LABELS:
        yield label, "\n".join(block) + "\n"


def run_answers(answers: Sequence[str], tests: Sequence[CodeTests], limits: CodeLimitsConfig) -> list[ProgramResult]:
    """Run the program of each answer against the tests beside it. Raises `PlanError` where nothing can be isolated."""
    pairs = zip(answers, tests, strict=True)
    return run_programs([Program(extract_program(a), t.source, t.setup) for a, t in pairs], limits)


def require_tests(records: Iterable[Record], where: str) -> None:
    """Raise `DataError` for a row without tests; `where` is the setting that needs them."""
    if record := next((record for record in records if record.tests is None), None):
        summary = "this row has no tests, and the programs of answers are run against them"
        hint = "name their column with data.map, for example {tests: test_list}"
        raise DataError(summary, where=str(record.source), given=f"{where}: {CODE}", hint=hint)
