"""Size budgets of src: functions, parameters, fields of a config. What exceeds them exits 1; long files only warn."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

FILE_LINES, FUNCTION_LINES, PARAMETERS, FIELDS = 500, 60, 8, 15
MORE_FIELDS = {"DataConfig": 16, "EvaluationConfig": 16}
"""Configs with more fields: what becomes of a row, and how an answer is made and judged, is one decision after the
other, and a group of some of them would only hide where the others are."""
SOURCE = Path(__file__).parent.parent / "src" / "rung"
BASES = {
    *("Protocol", "PolicyMethod", "Method", "Objective", "Config", "Result", "BaseModel", "Module", "Function"),
    *("MethodBase", "WeightMethodBase", "VirtualTokenBase", "LowRankConfig", "ObjectiveBase", "ReinforcementBase"),
    "CodeLimitsConfig",
    "JudgeConfig",
    "ModelServerConfig",
    "TeacherConfig",
    "GenerationRequest",
    *("NamedTuple", "TypedDict", "DynamicLayer", "SafeLoader", "Sequence", "LazySequence", "PeftConfig"),
    *("BaseTuner", "BaseTunerLayer", "StrEnum", "Exception", "Preference"),
    *("H11Protocol", "Response"),
    *("float", "str"),
}
"""Inheritance stays with protocols (sequences are), configs, torch modules and functions, peft's tuners, what a web
server calls, exceptions, one number that keeps its digits, and `str` for a line that is safe to print as it is: every
table gives lines, which are joined and searched as text."""


def main() -> int:
    """0 when everything is within budget."""
    files = sorted(SOURCE.rglob("*.py"))
    for file in files:
        if (lines := len(file.read_text().splitlines())) > FILE_LINES:
            subjects = ", ".join(n.name for n in ast.parse(file.read_text()).body if isinstance(n, ast.ClassDef))
            print(f"warning: {file.relative_to(SOURCE.parent)} has {lines} lines; its subjects: {subjects}")
    problems = [problem for file in files for problem in check(file)]
    print("\n".join(problems) or "all within budget")
    return int(bool(problems))


def check(file: Path) -> Iterator[str]:
    """Problems of one file."""
    text = file.read_text()
    name = str(file.relative_to(SOURCE.parent))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from check_function(name, node)
        if isinstance(node, ast.ClassDef):
            yield from check_class(name, node)


def check_function(name: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """Length and parameters, `self` and `cls` not counted."""
    length = (node.end_lineno or node.lineno) - node.lineno + 1
    if length > FUNCTION_LINES:
        yield f"{name}:{node.lineno} {node.name}: {length} lines, at most {FUNCTION_LINES}"
    taken = [
        a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs) if a.arg not in ("self", "cls")
    ]
    decorators = tuple(ast.unparse(decorator) for decorator in node.decorator_list)
    # the options of a verb are named where they are given; a kernel takes pointers and numbers and no objects
    is_exempt = any(
        decorator.startswith(("app.command", "label_app.command", "triton.jit")) for decorator in decorators
    )
    if len(taken) > PARAMETERS and not is_exempt:
        yield f"{name}:{node.lineno} {node.name}: {len(taken)} parameters, at most {PARAMETERS}"


def check_class(name: str, node: ast.ClassDef) -> Iterator[str]:
    """Fields of a config, and bases."""
    bases = {ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases}
    if bases & {
        "Config",
        "WeightMethodBase",
        "VirtualTokenBase",
        "LowRankConfig",
        "ObjectiveBase",
        "ReinforcementBase",
    }:
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and "ClassVar" not in ast.unparse(n.annotation)]
        limit = MORE_FIELDS.get(node.name, FIELDS)
        if len(fields) > limit:
            yield f"{name}:{node.lineno} {node.name}: {len(fields)} fields, at most {limit}"
    strange = {b for b in bases if b not in BASES and not b.startswith("_") and not b.endswith("Error")}
    if strange - {"KeyboardInterrupt"}:
        yield f"{name}:{node.lineno} {node.name} inherits from {', '.join(sorted(strange))}"


if __name__ == "__main__":
    sys.exit(main())
