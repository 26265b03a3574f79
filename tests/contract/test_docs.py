"""What the pages show works: every config in them loads, every method and objective has its page."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

import rung
from rung.cli import app
from rung.config.io import SynthRunConfig, load_config, load_synth_config
from rung.config.run import RunConfig
from rung.methods.registry import METHODS
from rung.objectives.registry import OBJECTIVES

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"]
BLOCKS = [(page, block) for page in PAGES for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.S)]
PYTHON = [(page, block) for page in PAGES for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S)]
EXAMPLES = sorted((ROOT / "examples").rglob("*.yaml"))


def load_any(file: Path) -> RunConfig | SynthRunConfig:
    """A config of a run, or of `rung synth`."""
    if re.search(r"^synth:", file.read_text(), re.M):
        return load_synth_config(file)
    return load_config(file).config


@pytest.mark.parametrize(("page", "block"), BLOCKS, ids=[f"{p.stem}-{i}" for i, (p, _) in enumerate(BLOCKS)])
def test_configs_in_the_docs_load(page: Path, block: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(block)
    assert load_any(file).output


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda f: f"{f.parent.name}-{f.stem}")
def test_examples_load_and_stay_short(file: Path) -> None:
    assert load_any(file).output.startswith("runs/")
    assert len(file.read_text().splitlines()) <= 25


@pytest.mark.parametrize("kind", METHODS)
def test_every_method_has_a_page(kind: str) -> None:
    assert f"kind: {kind}" in (ROOT / "docs" / "methods" / f"{kind}.md").read_text()


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_every_objective_has_a_page(kind: str) -> None:
    assert f"kind: {kind}" in (ROOT / "docs" / "objectives" / f"{kind}.md").read_text()


def test_every_verb_in_the_docs_exists() -> None:
    known = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback} | {
        "data",
        "label",
        "models",
        "synth",
    }
    said = {verb for page in PAGES for verb in re.findall(r"`rung ([a-z]+)", page.read_text())}
    assert said and said <= known, said - known


def test_code_named_in_the_docs_exists() -> None:
    """`path.py::name` in a page is a function, class, method or constant of that file."""
    for page in PAGES:
        for path, name in re.findall(r"`([\w/]+\.py)::([\w.]+)`", page.read_text()):
            file = next((f for f in (ROOT / path, ROOT / "src" / "rung" / path) if f.exists()), None)
            assert file is not None, f"{page.name}: {path}"
            body: list[ast.stmt] = ast.parse(file.read_text()).body
            for part in name.split("."):
                found = [node for node in body if part in _names(node)]
                assert found, f"{page.name}: {path}::{name}"
                body = getattr(found[0], "body", [])


def _names(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {leaf.id for target in targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name)}


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_setting_explains_itself() -> None:
    schema = RunConfig.model_json_schema()
    for config in [schema, *schema["$defs"].values()]:
        for name, field in config.get("properties", {}).items():
            assert name in ("kind",) or field.get("description"), f"{config['title']}.{name}"
    assert json.dumps(schema)


def test_proved_architectures_are_the_tested_ones() -> None:
    from models import SHAPES
    from rung.config.support import TESTED_MODELS

    assert set(TESTED_MODELS) == set(SHAPES)


@pytest.mark.parametrize(("page", "block"), PYTHON, ids=lambda x: x.stem if isinstance(x, Path) else "block")
def test_python_in_the_docs_uses_the_public_api(page: Path, block: str) -> None:
    nodes = list(ast.walk(ast.parse(block)))
    imported = {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
    imported |= {name.name for n in nodes if isinstance(n, ast.Import) for name in n.names}
    assert imported <= {"rung"}, page
    attributes = [n for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)]
    assert {n.attr for n in attributes if n.value.id == "rung"} <= set(rung.__all__), page
