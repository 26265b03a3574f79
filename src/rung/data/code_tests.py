"""Tests of programs: the columns `tests`, `test_setup` and `entry_point` of a row as Python that can be run.

They have the shapes of MBPP (a list of assertions, and imports before them) and HumanEval (a function `check`, and the
name of the function that it is called with). Tests that cannot run, or that run nothing, are refused when the row is
read: every program, or none, would pass them. `formats` calls `parse_code_tests`.
"""

from __future__ import annotations

import ast
import warnings
from typing import Any

from rung.data.messages import Getter, short_repr
from rung.errors import DataError
from rung.types import CodeTests

_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)


def parse_code_tests(get: Getter) -> CodeTests | None:
    """The tests of a row; None without the column `tests`.

    Raises:
        DataError: they are no Python, or run nothing.
    """
    source = _source_text(get("tests"), "tests")
    if not source:
        return None
    setup = _source_text(get("test_setup"), "test_setup")
    if (entry_point := get("entry_point")) not in (None, ""):
        if not isinstance(entry_point, str) or not entry_point.isidentifier():
            raise DataError(f"entry_point is {short_repr(entry_point)}, not the name of a function")
        source += f"\ncheck({entry_point})"
    _parse(setup, "test_setup")
    module = _parse(source, "tests")
    if runner := _test_runner(module):
        remedy = "write assertions, which end the program where one fails"
        raise DataError(f"tests call {runner}, which counts failures and raises nothing: {remedy}")
    if not _runs_something(module):
        remedy = "write assertions, or functions that are called; a function `check` is called with `entry_point`"
        raise DataError(f"tests run nothing, so that every program would pass them: {remedy}")
    return CodeTests(source, setup)


def _source_text(value: object, name: str) -> str:
    """Python source: a text, or a list of texts, which become one with line breaks between them."""
    if value is None:
        return ""
    lines: list[Any] = value if isinstance(value, list) else [value]
    if not all(isinstance(line, str) for line in lines):
        raise DataError(f"{name} is {short_repr(value)}, not Python source or a list of it")
    return "\n".join(lines)


def _parse(source: str, name: str) -> ast.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in their texts
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        remedy = f"a column of another meaning needs another name than {name}"
        raise DataError(f"{name} is no Python: {error} ({remedy})") from error


def _runs_something(module: ast.Module) -> bool:
    """Whether a statement outside of definitions asserts, raises or calls."""
    nodes: list[ast.AST] = list(module.body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Assert | ast.Raise | ast.Call):
            return True
        if not isinstance(node, _DEFINITIONS):
            nodes.extend(ast.iter_child_nodes(node))
    return False


_RUNNERS = frozenset({"main", "TextTestRunner", "testmod", "testfile", "run_docstring_examples"})
"""Functions of unittest, doctest and pytest that report failures, so that a wrong program would pass."""


def _test_runner(module: ast.Module) -> str | None:
    """The call of a test runner; None without one."""
    for node in ast.walk(module):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            first, _, last = name.rpartition(".")
            is_of_runner = first in ("unittest", "doctest", "pytest", "nose") or not first
            if last in _RUNNERS and is_of_runner and (first or last != "main"):
                return name
    return None
