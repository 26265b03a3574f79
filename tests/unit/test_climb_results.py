"""The ladder of several bases: what is compared, and what the text says."""

from __future__ import annotations

from typing import Any

import numpy as np

from rung.commands.climb_results import MeasuredRung, build_ladder
from rung.config.io import parse_config
from rung.evaluation.evaluate import Evaluation, ScoredItem
from rung.results.ladder import Ladder

FACTS = {"small": {"parameters": 100, "license": None}, "big": {"parameters": 900, "license": "mit"}}


def ladder_of(*rungs: tuple[dict[str, Any], float, str | None], items: int = 200) -> Ladder:
    """A ladder of rungs, each with its share of right answers and the context of its prompts."""
    climb = {"rungs": [{"name": f"rung {i}", **rung} for i, (rung, _, _) in enumerate(rungs)]}
    config = parse_config(
        {
            **{"model": {"name": "small"}, "data": {"path": "a.jsonl"}, "output": "o", "climb": climb},
            "evaluation": {"metrics": ["exact"]},
        }
    )
    measured = []
    for rung, (_, share, context) in zip(config.climb.rungs, rungs, strict=True):
        # another order for each rung, so that rungs with one share still differ item by item
        right = np.random.default_rng(len(measured)).permutation(items) < share * items
        scored = tuple(
            ScoredItem(str(i), None, scores={"exact": float(r)}, prompt_tokens=7) for i, r in enumerate(right)
        )
        cost = {"trainable_parameters": 0, "train_seconds": 1.0, "peak_memory_bytes": 5, "context": context}
        measured.append(MeasuredRung(rung, (Evaluation(scored, 0.5, ("exact",)),), (cost,)))
    return build_ladder(config, measured, model_facts=FACTS)


def on_big(kind: str) -> dict[str, Any]:
    return {"kind": kind, "model": {"name": "big"}}


def test_what_a_model_lacks_is_read_from_rungs_of_that_model() -> None:
    """Tuning the big one is no better than asking it, and far better than asking the small one."""
    untuned = ({"kind": "zero_shot"}, 0.1, None), (on_big("zero_shot"), 0.8, None)
    assert ladder_of(*untuned, (on_big("lora"), 0.8, None)).diagnoses == ()
    (diagnosis,) = ladder_of(*untuned, ({"kind": "lora"}, 0.6, None)).diagnoses
    assert (diagnosis.lacks, diagnosis.lower, diagnosis.upper) == ("behaviour", "rung 0", "rung 2")
    rag = (on_big("rag"), 0.8, "retrieved")
    assert ladder_of(({"kind": "zero_shot"}, 0.1, "withheld"), rag).diagnoses == ()
    both = ({"kind": "zero_shot"}, 0.1, "withheld"), (on_big("zero_shot"), 0.2, "withheld"), rag
    (diagnosis,) = ladder_of(*both, ({"kind": "rag"}, 0.1, "retrieved")).diagnoses
    assert (diagnosis.lacks, diagnosis.lower, diagnosis.upper) == ("knowledge", "rung 1", "rung 2")


def test_knowledge_is_read_from_prompts_with_the_same_examples() -> None:
    made = {"data": {"path": "made.jsonl"}}
    plain, retrieving = ({"kind": "few_shot"}, 0.1, "withheld"), ({"kind": "few_shot+rag", **made}, 0.8, "retrieved")
    assert ladder_of(plain, retrieving).diagnoses == ()
    assert len(ladder_of(({"kind": "few_shot", **made}, 0.1, "withheld"), retrieving).diagnoses) == 1


def test_the_order_of_the_config_decides_what_is_lower() -> None:
    small, big = ({"kind": "zero_shot"}, 0.8, None), (on_big("zero_shot"), 0.8, None)
    first, second = ladder_of(small, big, items=20_000), ladder_of(big, small, items=20_000)
    assert first.rows[0].model == "small" and second.rows[0].model == "big"
    for ladder in (first, second):
        assert ladder.verdict.recommended == "rung 0" and ladder.verdict.text.startswith("rung 0 is enough: ")
    assert first.next_rung is not None and first.next_rung.text.endswith("and the model big in place of small")
    assert second.next_rung is not None and second.next_rung.text.endswith("and the model small in place of big")


def test_the_table_of_models() -> None:
    ladder = ladder_of(({"kind": "zero_shot"}, 0.5, None), (on_big("lora"), 0.5, None), ({"kind": "lora"}, 0.5, None))
    small, big = ladder.models
    assert (small.model, small.parameters, small.license, small.rungs) == ("small", 100, None, ("rung 0", "rung 2"))
    assert (big.model, big.license, big.peak_memory_bytes, big.prompt_tokens) == ("big", "mit", 5, (7.0, 7.0))
    alone = ladder_of(({"kind": "zero_shot"}, 0.5, None), ({"kind": "lora"}, 0.5, None))
    assert alone.models == () and alone.rows[0].model == ""
