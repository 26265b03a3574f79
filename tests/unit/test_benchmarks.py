"""What the benchmark counts: operations against torch's own counter, steps that stand in for others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benchmarks.flops import Document, Trained, step_flops
from benchmarks.results_page import RESULTS, replace_section
from benchmarks.rows import make_pairs, read_pairs
from benchmarks.runner import Store
from benchmarks.sides import speed, weights
from benchmarks.study import judge_rules
from benchmarks.workloads import WORKLOADS, Training
from torch.utils.flop_counter import FlopCounterMode

from models import tiny_model
from rung.config.io import parse_config
from rung.planning.architecture import shape_from_config
from rung.results.base import Estimate

LENGTH = 13


def test_operations_are_those_that_torch_counts() -> None:
    """Forward of one document, everything learned; torch counts attention as a square, the bench as a triangle."""
    model = tiny_model()
    model.set_attn_implementation("eager")
    config = model.config
    shape = shape_from_config(config.to_dict())
    document = Document(tuple(range(3, 3 + LENGTH)), (True,) * LENGTH)
    found = step_flops([document], shape, Trained(None))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.tensor([document.ids]), use_cache=False)
    half_square = 2 * config.hidden_size * config.num_hidden_layers * LENGTH**2
    counted = counter.get_total_flops()
    rotary = 2 * LENGTH * config.head_dim // 2  # angles are made by a product
    assert found["block_forward"] + found["head_forward"] + half_square == pytest.approx(counted, abs=rotary)
    assert found["block_weight_grad"] == 2.0 * LENGTH * shape.linear_parameters * shape.layers


def test_shared_beginnings_are_counted_once_where_asked() -> None:
    shape = shape_from_config(tiny_model().config.to_dict())
    documents = [Document((1, 2, 3, 4, 5 + i), (False,) * 4 + (True,)) for i in range(3)]
    whole, once = (step_flops(documents, shape, Trained(4), shared=shared) for shared in (False, True))
    low = 2 * 4 * sum(m.inputs + m.outputs for m in shape.matrices)
    saved = 2.0 * 8 * (2 * shape.linear_parameters + low) + 4.0 * 32 * 2 * (2 * 16 / 2)
    assert whole["block_forward"] - once["block_forward"] == pytest.approx(saved)
    assert whole["head_forward"] == once["head_forward"]


def entry(work: str, seconds: list[float]) -> dict[str, object]:
    return {"work": work, "steps": [{"tokens": 100, "seconds": s} for s in seconds]}


def test_the_first_step_is_cold_and_others_of_its_epoch_stand_in() -> None:
    assert weights(entry("a", [9.0, 2.0, 2.0, 2.0])) == [0.0, 1.0, 1.0, 1.0]
    assert speed(entry("a", [9.0, 2.0, 2.0, 2.0])) == pytest.approx(50.0)
    assert weights(entry("f", [9.0, 2.0, 1.0, 1.0, 1.0, 1.0])) == [0.0, 2.0, 1.0, 1.0, 1.0, 1.0]
    assert speed(entry("f", [9.0, 2.0, 1.0, 1.0, 1.0, 1.0])) == pytest.approx(600 / 8)
    assert speed(entry("a", [9.0, 1.0]), cold=True) == pytest.approx(20.0)
    assert weights(entry("a", [4.0])) == [1.0]


def test_results_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "measured.jsonl", {"quick": True}, resume=False)
    store.add({"kind": "run", "work": "a"})
    assert Store.open(tmp_path / "measured.jsonl", {"quick": True}, resume=True).one(kind="run") is not None
    with pytest.raises(ValueError, match="leave out --resume"):
        Store.open(tmp_path / "measured.jsonl", {"quick": False}, resume=True)


def test_generated_pairs() -> None:
    pairs = make_pairs(40, 3)
    assert pairs[:10] == make_pairs(10, 3)
    assert all(p.chosen != p.rejected and p.prompt[-1]["role"] == "user" for p in pairs)
    assert {len(p.prompt) for p in pairs} == {1, 3}


def test_pairs_of_a_file_and_too_few_of_them(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    row = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    file.write_text(json.dumps(row) + "\n")
    assert read_pairs(file, 1)[0].to_json() == {**row, "prompt": [{"role": "user", "content": "Why?"}]}
    with pytest.raises(ValueError, match="1 rows, 2 are needed"):
        read_pairs(file, 2)


@pytest.mark.parametrize("key", [key for key, work in WORKLOADS.items() if isinstance(work, Training)])
def test_every_training_workload_is_a_valid_config(key: str) -> None:
    work = WORKLOADS[key]
    assert isinstance(work, Training)
    config = parse_config(work.config("rows.jsonl", "run"), key)
    assert config.objective.kind == work.objective and config.training.examples_per_step == work.examples_per_step


def test_thirteen_rules_are_judged_together() -> None:
    """By Holm the second smallest of 13 p-values counts 12 times: 0.0077 is 0.092 and proves nothing."""
    p_values = [0.0001, 0.0077, 0.011, 0.036, *[0.5] * 9]
    gains = [Estimate(mean=0.2, low=0.1, high=0.3, p_value=p) for p in p_values]
    rows = judge_rules([f"rule {i}" for i in range(13)], gains)
    assert [row[-1] for row in rows] == ["holds", *["cannot tell"] * 12]
    assert rows[1][2:4] == ["0.0077", "0.092"]
    worse = Estimate(mean=-0.2, low=-0.3, high=-0.1, p_value=0.001)
    assert judge_rules(["a rule"], [worse])[0][-1] == "does not hold"


def test_a_section_of_the_results_is_replaced_and_the_others_stay(tmp_path: Path) -> None:
    page = tmp_path / "RESULTS.md"
    replace_section("planned memory", "plan", page, head="# Head")
    replace_section("bench AVX2", "one", page)
    replace_section("bench AVX-512", "two", page)
    replace_section("bench AVX2", "three", page)
    parts = [f"<!-- {n} -->\n{t}\n<!-- end of {n} -->" for n, t in SECTION_TEXTS.items()]
    assert page.read_text() == "\n\n".join(["# Head", *parts]) + "\n"
    for text in ("\nafterwards", "\n<!-- bench AVX2 -->\nwithout end", "\n<!-- other -->\nx\n<!-- end of other -->\n"):
        damaged = tmp_path / "damaged.md"
        damaged.write_text(page.read_text() + text)
        with pytest.raises(ValueError, match=r"damaged\.md"):
            replace_section("bench AVX2", "four", damaged)
        assert text.strip() in damaged.read_text()
    committed = tmp_path / "committed.md"
    committed.write_text(RESULTS.read_text())
    replace_section("bench AVX2", "six", committed)
    with pytest.raises(ValueError, match="no such section: bench"):
        replace_section("bench", "five", page)


SECTION_TEXTS = {"bench AVX-512": "two", "bench AVX2": "three", "planned memory": "plan"}
