"""Text of data and models reaches a terminal or a page through `rung.console` alone, and is shown, never obeyed."""

from __future__ import annotations

import ast
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerFast

from rung import console as terminal
from rung.commands import chat as chat_command
from rung.commands import data_check as data_check_command
from rung.commands.exit_codes import exit_code_of
from rung.console import ProgressBar, StyledLine, add_text_row, print_lines, print_status, status, visible
from rung.errors import DataError
from rung.models import load
from rung.report.html import page_template
from rung.report.tables import ladder_lines, score_lines
from rung.results.evaluation import EvaluationResult
from rung.results.ladder import Ladder

SOURCE = Path(terminal.__file__).parent
HOSTILE = (
    *("[/INST]", "[red]", "[/]", "\x1b[2J", "\x1b]8;;http://x\x07y\x1b]8;;\x07", "\x9b31m", "a\rb", "\x00", "\x07"),
    *("<script>alert(1)</script>", "</script>", "\u202eabc\u202c", "\u2066", "\u200f", "\ud800", "\x7f", "\x0c"),
)
ALL = " ".join(HOSTILE)
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
COLORS = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")  # what rich itself writes on a terminal


def assert_shown(printed: str, *, own_colors: bool = False) -> None:
    printed = COLORS.sub("", printed).replace("\r", "") if own_colors else printed
    assert not OBEYED.search(printed), repr(OBEYED.search(printed))


# what prints, or makes a renderable of text, may stand in `console.py` only
FORBIDDEN = {"Text", "Panel", "add_row", "print", "echo", "secho", "print_exc", "from_markup", "assemble", "from_ansi"}
# helper processes write JSON to their parent, the example of the package's docstring is text
EXEMPT = {"scoring/math_worker.py", "exporting/llama_cpp_server.py"}


def calls() -> Iterator[tuple[str, ast.Call]]:
    for path in sorted(SOURCE.rglob("*.py")):
        name = path.relative_to(SOURCE).as_posix()
        if name != "console.py" and name not in EXEMPT:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    yield name, node


def called(node: ast.Call) -> tuple[str, str]:
    """The name of the function, and of what it is a method of."""
    if isinstance(node.func, ast.Attribute):
        owner = node.func.value
        return node.func.attr, owner.id if isinstance(owner, ast.Name) else ast.unparse(owner)
    return (node.func.id if isinstance(node.func, ast.Name) else ""), ""


def test_nothing_prints_beside_the_console() -> None:
    """`rung chat --compare` read answers as markup: `[/INST]` ended the program."""
    found = []
    for file, node in calls():
        name, owner = called(node)
        where = f"{file}:{node.lineno} {owner}.{name}"
        if name in FORBIDDEN and not (name == "print" and owner in ("console", "buffer")):
            found.append(where)
        if name == "write" and owner in ("sys.stdout", "sys.stderr"):
            found.append(where)
        # a console takes text through `plain`, or a renderable that a test below renders
        if name in ("print", "status", "rule", "log") and owner == "console":
            found += [where for a in node.args if isinstance(a, ast.Constant | ast.JoinedStr | ast.BinOp)]
        if name == "input" and owner == "console" and not isinstance(node.args[0], ast.Constant):
            found.append(where)
        if name == "Markup" and file != "report/plots.py":
            found.append(where)
    assert not found


TEMPLATES = sorted(file.name for file in (SOURCE / "report").glob("*.html"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_page_has_a_way_around(name: str) -> None:
    template = (SOURCE / "report" / name).read_text()
    assert "| safe" not in template and "|safe" not in template and "autoescape" not in template
    environment = page_template(name).environment
    assert environment.autoescape is True and environment.finalize is not None
    shown = environment.from_string("<p title='{{ x }}'>{{ x }} {{ x | replace('a', 'b') }}</p>").render(x=ALL)
    assert_shown(shown)
    assert "<script" not in shown and "[/INST]" in shown and "\\x1b[2J" in shown


@pytest.mark.parametrize("text", HOSTILE)
def test_visible_text_is_text(text: str) -> None:
    assert_shown(visible(text))
    assert visible(visible(text)) == visible(text)
    if not OBEYED.search(text):
        assert visible(text) == text
    visible(text).encode()


def test_ordinary_text_stays() -> None:
    for text in ("a\n\tb", "naïve שלום مرحبا 🏴\U000e0067\U000e007f می\u200cروم", "[1] (2) {3} \\x1b", "\u2028"):
        assert visible(text) == text


def test_status_lines_and_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    for is_terminal in (False, True):
        buffer = io.StringIO()
        live = Console(file=buffer, force_terminal=is_terminal, width=200, highlight=False)
        monkeypatch.setattr(terminal, "console", live)
        print_status(ALL)
        with status(ALL):
            pass
        with ProgressBar(ALL, 2) as bar:
            bar.advance(2, **{"loss": ALL})
        assert buffer.getvalue().count("[/INST]") >= 3
        assert_shown(buffer.getvalue(), own_colors=is_terminal)


def test_lines_without_a_terminal_show_the_time_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run counts from where it resumed."""
    buffer, now = io.StringIO(), [100.0]
    monkeypatch.setattr(terminal, "console", Console(file=buffer, force_terminal=False, width=200, highlight=False))
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    with ProgressBar("train", 40, 20) as bar:
        for seconds, steps in ((30.0, 4), (30.0, 4), (1.0, 11), (1.0, 1)):
            now[0] += seconds
            bar.advance(steps, loss="1.5")
    assert buffer.getvalue().splitlines() == [
        "train 24/40  loss 1.5  2 min to go",
        "train 28/40  loss 1.5  90 s to go",
        "train 39/40  loss 1.5  3 s to go",
        "train 40/40  loss 1.5",
    ]


def test_errors(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> None:
        raise DataError(ALL, where=ALL, given=ALL, allowed=ALL, hint=ALL)

    def crash() -> None:
        raise ValueError(ALL)

    assert exit_code_of(refuse, as_json=True) == 2
    out, err = capsys.readouterr()
    assert_shown(err)
    assert "[/INST]" in err and ALL in json.loads(out)["error"]  # JSON stays exact
    assert exit_code_of(crash, as_json=False) == 1
    assert_shown(capsys.readouterr().err)


def test_results_are_printed_with_their_own_colors_only(capsys: pytest.CaptureFixture[str]) -> None:
    print_lines([ALL, StyledLine("\x1b[1mbold\x1b[0m")])
    first, second = capsys.readouterr().out.splitlines()
    assert_shown(first)
    assert second == "\x1b[1mbold\x1b[0m"


def test_data_check_of_hostile_rows(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(load, "load_tokenizer", lambda config: tiny_tokenizer)
    monkeypatch.setattr(load, "load_end_ids", lambda config: ())
    rows: list[dict[str, Any]] = [
        {"question": f"{i} {ALL[:-8]}".replace("\ud800", ""), "answer": t} for i, t in enumerate(HOSTILE)
    ]
    rows += [{"question": "q", "answer": 3, "[red]\x1b[2J": 1}, {"question": "\ud800", "answer": "\ud800"}]
    file = tmp_path / "d[red].jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    for show, model in ((0, None), (3, "tiny")):
        report, lines = data_check_command.check_data(str(file), show=show, model=model)
        print_lines(lines)
        out = capsys.readouterr().out
        assert "[red]" in out and report["rejected"]
        assert_shown(out)


def speaker(name: str, answer: str) -> Any:
    return SimpleNamespace(name=name, turns=[], answer=lambda sampling, stream: answer)


def test_compared_answers_are_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    """`[/INST]` ended the program, and `[red]` vanished from the answer."""
    buffer = io.StringIO()
    monkeypatch.setattr(chat_command, "console", Console(file=buffer, width=400, highlight=False))
    conversation = chat_command.Conversation.__new__(chat_command.Conversation)
    conversation.sampling, conversation.library, conversation.system = None, None, []  # type: ignore[assignment]
    conversation.speakers = [speaker(f"base {ALL}"[:60], ALL), speaker("tuned [/INST]", "[red]fine[/red]")]
    conversation.say("q")
    monkeypatch.setattr("builtins.input", lambda *_: "")
    conversation.talk(None)
    assert "[red]fine[/red]" in buffer.getvalue() and "[/INST]" in buffer.getvalue()
    assert_shown(buffer.getvalue())


def test_a_streamed_answer_moves_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.write_text(ALL)
    assert_shown(capsys.readouterr().out)


def test_tables_of_names_from_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    estimate = {"mean": 0.5, "low": 0.4, "high": 0.6, "examples": 60, "clusters": 20}
    rung = {
        "rung": f"lora {ALL}", "kind": "lora", "sees": "context", "gain": None, "scores": {"exact": estimate},
        "trainable_parameters": 1, "train_seconds": 1.0, "peak_memory_bytes": 1, "prompt_tokens": 1.0,
        "seconds_per_query": 0.1, "folder": ALL,
    }  # fmt: skip
    verdict = {"recommended": None, "safe": rung["rung"], "best": rung["rung"], "text": ALL}
    ladder = {"metric": "exact", "examples": 60, "clusters": 20, "folder": ALL, "report": ALL, "rows": [rung]}
    lines = ladder_lines(Ladder.model_validate({**ladder, "verdict": verdict}))
    scores = {"target": ALL, "task": ALL, "examples": 1, "clusters": 1, "scores": {"exact": estimate}}
    result = EvaluationResult.model_validate({**scores, "prompt_tokens": 1.0, "seconds_per_query": 1.0})
    buffer = io.StringIO()
    print_lines([*lines, *score_lines(result)], buffer)
    assert "[/INST]" in buffer.getvalue()
    assert_shown(buffer.getvalue())


def test_cells_of_a_table_are_text() -> None:
    table = Table("head")
    add_text_row(table, ALL)
    buffer = io.StringIO()
    Console(file=buffer, width=300).print(table, terminal.text_panel(ALL, ALL, 300))
    assert buffer.getvalue().count("[/INST]") == 3
    assert_shown(buffer.getvalue())
