"""What the terminal says, at the widths people have."""

from __future__ import annotations

import copy
import io
import sys
from typing import Any

import pytest

from rung.config.method import LoraConfig, LotteryConfig
from rung.console import print_lines
from rung.report import plots
from rung.report.formatting import (
    decimals,
    format_bounds,
    format_bytes,
    format_count,
    format_duration,
    format_fixed,
    format_p_value,
    format_significant,
)
from rung.report.summaries import gates_text, lottery_text, measured_text, method_text, validation_pairs_text
from rung.report.tables import dry_run_lines, ladder_lines, run_lines, score_lines
from rung.results.base import Estimate, GateResult
from rung.results.evaluation import EvaluationResult
from rung.results.ladder import Ladder
from rung.results.training import LotteryResult, PreviewResult, RunResult


def estimate(mean: float, low: float | None, high: float | None, **more: Any) -> dict[str, Any]:
    return {"mean": mean, "low": low, "high": high, "examples": 60, "clusters": 20, **more}


def an_estimate(mean: float, low: float | None, high: float | None) -> Estimate:
    return Estimate.model_validate(estimate(mean, low, high))


def row(kind: str, score: float, gain: dict[str, Any] | None, tokens: float) -> dict[str, Any]:
    tuned = kind == "lora"
    return {
        "rung": kind, "kind": kind, "sees": "context", "gain": gain,
        "scores": {"exact": estimate(score, score - 0.09, score + 0.09), "numeric": estimate(0.7, 0.6, 0.8)},
        "trainable_parameters": 4884480 if tuned else 0, "train_seconds": 192.4 if tuned else 0.0,
        "peak_memory_bytes": 2411261952, "prompt_tokens": tokens, "seconds_per_query": 0.6269,
        "folder": f"runs/c/rungs/{kind}",
    }  # fmt: skip


LADDER: dict[str, Any] = {
    "metric": "exact", "examples": 60, "clusters": 20, "folder": "runs/c", "report": "runs/c/report.html",
    "rows": [
        row("zero_shot", 0.1, None, 126.58),
        row("few_shot", 0.3, estimate(0.2, -0.01, 0.41), 623.58),
        row("lora", 0.8, estimate(0.5, 0.4, 0.6, p_value=0.0004), 136.58),
    ],
    "verdict": {"recommended": "lora", "safe": "lora", "best": "lora", "text": "lora is enough."},
}  # fmt: skip
RUN: dict[str, Any] = {
    "status": "finished", "steps": 6, "train_seconds": 71.825, "tokens_per_second": 124.5, "tokens": 8943,
    "peak_memory_bytes": 3129454592, "trainable_parameters": 4884480, "train_loss": 1.6997, "validation_loss": 1.4527,
    "config": {"method": {"kind": "lora", "rank": 16, "alpha": 32.0, "targets": ["q", "v"], "layers": None}},
    "gates": [{"name": "preflight", "state": "passed"}, {"name": "movement", "state": "not_reached"}], "metrics": {},
    "data": {"splits": {"train": {"rows": 1293}}, "train": {"supervised_tokens": 20132}},
}  # fmt: skip


@pytest.fixture(params=[120, 100, 80])
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("COLUMNS", str(request.param))
    return int(request.param)


def test_the_ladder_fits_and_loses_nothing(width: int) -> None:
    lines = ladder_lines(Ladder.model_validate(LADDER))
    text = "\n".join(lines)
    assert all(len(line) <= width for line in lines)
    estimates = ("0.80", "[0.71, 0.89]", "0.70", "[0.60, 0.80]", "+0.50", "[0.40, 0.60]", "[-0.01, 0.41]")
    costs = ("4.9M", "3 min 12 s", "2.4 GB", "624", "0.63 s")
    words = ("exact", "numeric", "lora is enough.", "60 held-out questions in 20 clusters")
    for part in (*estimates, *costs, *words):
        assert part in text, part
    assert "> lora" in text and "  zero_shot" in text and "\x1b" not in text


def test_cut_answers_stand_in_the_ladder(width: int) -> None:
    """A model that thinks was cut inside its reasoning, and nothing in the terminal said so."""
    rows = [{**row, "cut_off": share} for row, share in zip(LADDER["rows"], (0.5, 0.0, 0.02), strict=True)]
    text = "\n".join(ladder_lines(Ladder.model_validate({**LADDER, "rows": rows})))
    assert "answers cut at evaluation.max_new_tokens: zero_shot 50%, lora 2%" in text
    assert "answers cut" not in "\n".join(ladder_lines(Ladder.model_validate(LADDER)))


def test_a_wide_ladder_is_one_line_a_rung(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    (line,) = [line for line in ladder_lines(Ladder.model_validate(LADDER)) if line.startswith("> lora")]
    assert line.split() == (
        "> lora 0.80 [0.71, 0.89] 0.70 [0.60, 0.80] +0.50 [0.40, 0.60] 4.9M 3 min 12 s 2.4 GB 137 0.63 s".split()
    )


@pytest.mark.parametrize("columns", [20, 40, 60])
def test_a_narrow_terminal_still_gets_scores(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = "\n".join(ladder_lines(Ladder.model_validate(LADDER)))
    assert "lora is enough." in text
    assert columns == 20 or "[0.71, 0.89]" in text


def test_the_outlook_fits_the_verdict(width: int) -> None:
    def outlook(**verdict: Any) -> str:
        ladder = copy.deepcopy(LADDER)
        ladder["verdict"] |= verdict
        return "\n".join(ladder_lines(Ladder.model_validate(ladder)))

    tuned = outlook()
    assert "report  runs/c/report.html" in tuned and "rung chat runs/c/rungs/lora --compare" in tuned
    assert "rung merge runs/c/rungs/lora runs/c-merged" in tuned
    untuned = outlook(recommended="few_shot", safe="few_shot")
    assert "> few_shot" in untuned and "rung merge" not in untuned and "rung chat runs/c/rungs/lora" in untuned
    undecided = outlook(recommended=None, examples_needed=260)
    assert "rung climb CONFIG evaluation.limit=260 output=runs/c-260" in undecided and "rung merge" not in undecided
    assert "safe" in undecided or width >= 120


def test_infinite_bounds_hostile_names_and_one_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    ladder = copy.deepcopy(LADDER)
    ladder["rows"][2] |= {"rung": "[bold]lora[/] \u4e2d", "gain": estimate(0.5, None, None)}
    for one in ladder["rows"]:
        del one["scores"]["numeric"]
    ladder["rows"][1]["scores"]["exact"] |= {"high": None}
    text = "\n".join(ladder_lines(Ladder.model_validate(ladder)))
    assert "[bold]lora[/] \u4e2d" in text and "+0.50 (-∞, ∞)" in text and "[0.21, ∞)" in text


def test_color_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert "\x1b[1;32m" in "\n".join(ladder_lines(Ladder.model_validate(LADDER)))


def test_a_result_is_not_lost_to_an_ascii_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    for lines in (
        ladder_lines(Ladder.model_validate(LADDER)),
        run_lines(RunResult.model_validate({**RUN, "error": "naïve"}), "runs/é", "runs/é/report.html"),
    ):
        print_lines(lines)  # raised UnicodeEncodeError


def test_run_lines_say_what_was_measured_and_what_is_next() -> None:
    text = "\n".join(run_lines(RunResult.model_validate(RUN), "runs/my run", "runs/my run/report.html"))
    measured = ("1.700 in the last step, validation 1.453 nats", "124 tokens/s", "1 min 12 s", "3.1 GB")
    trained = ("4.9M parameters, LoRA rank 16, alpha 32, on q v", "20,132 supervised", "1 passed, movement not reached")
    ahead = ("runs/my run/adapter", "rung eval 'runs/my run'", "rung chat 'runs/my run' --compare")
    for part in ("finished: runs/my run", *measured, *trained, *ahead):
        assert part in text, part
    failed = "\n".join(run_lines(RunResult(status="failed", error="no\n  given: 3"), "r", "r/report.html"))
    assert "failed: r" in failed and "--resume" in failed and "adapter" not in failed and "None" not in failed


def test_rows_that_their_length_left_out_or_changed_are_told() -> None:
    data = {"splits": {"train": {"rows": 35}}, "train": {"supervised_tokens": 56, "dropped": 7, "trimmed": 2}}
    text = "\n".join(run_lines(RunResult.model_validate({**RUN, "data": data}), "r", "r/report.html"))
    assert "35 rows, 56 supervised tokens; 7 too long and left out; 2 with a shortened prompt" in " ".join(text.split())


def test_dry_run_lines() -> None:
    found = {
        "splits": {
            **{"train": {"rows": 90}, "validation": {"rows": 4}, "test": {"rows": 6}},
            "sets": [{"kept": 100, "rejected": 2}],
        },
        "train": {"tokens": 1000, "supervised_tokens": 250, "longest": 40}, "preflight": {"rows": 90, "failing": 0},
        "steps_per_epoch": 6, "tokens_per_micro_batch": 776, "trainable_parameters": 4884480, "learning_rate": 5e-4,
        "plan": {"needed_bytes": 1_800_000_000},
    }  # fmt: skip
    text = "\n".join(dry_run_lines(PreviewResult.model_validate(found)))
    for part in (
        "100 read, 2 rejected; 90 train, 4 validation, 6 test",
        "250 supervised (25%)",
        "0 of 90 rows fail",
        "4,884,480",
        "1.8 GB at the peak",
    ):
        assert part in text


def test_score_lines() -> None:
    result = {
        "target": "runs/x", "task": "runs/x",
        "scores": {"exact": estimate(0.5, 0.38, 0.62), "perplexity": estimate(8.21, None, None)},
        "examples": 60, "clusters": 20, "prompt_tokens": 136.6, "seconds_per_query": 0.6269, "cut_off": 7,
    }  # fmt: skip
    text = "\n".join(score_lines(EvaluationResult.model_validate(result)))
    for part in ("0.50 [0.38, 0.62]", "8.21 (-∞, ∞)", "137 prompt tokens, 0.63 s", "7 answers were cut"):
        assert part in text
    whole = EvaluationResult.model_validate({**result, "cut_off": 0})
    assert "cut" not in "\n".join(score_lines(whole))


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (format_count(4884480), "4.9M"), (format_count(999_950), "1.0M"), (format_count(126), "126"),
        (format_count(1.5e9), "1.5B"),
        (format_count(None), "–"), (format_bytes(2411261952), "2.4 GB"), (format_bytes(98e6), "98 MB"),
        (format_bytes(12), "12 B"),
        (format_bytes(None), "–"), (format_duration(192.4), "3 min 12 s"), (format_duration(59.7), "1 min 0 s"),
        (format_duration(7265), "2 h 1 min"), (format_duration(18.7), "19 s"), (format_duration(0.6269), "0.63 s"),
        (format_duration(9.96), "10 s"), (format_duration(90000), "1 d 1 h"), (format_duration(None), "–"),
        (format_significant(2.098e-05), "2.1e-05"), (format_significant(1234.5), "1234"), (format_significant(0), "0"),
        (format_significant(0.63), "0.63"), (format_fixed(-0.001, 2), "0.00"),
        (format_fixed(0.25, 2, signed=True), "+0.25"),
        (format_fixed(0.0, 2, signed=True), "0.00"), (format_p_value(None), ""), (format_p_value(0.0004), "p < 0.001"),
        (format_p_value(0.0215), "p = 0.021"), (format_bounds(Estimate(mean=0.5, low=None, high=1.0), 1), "(-∞, 1.0]"),
        (decimals([an_estimate(0.5, 0.38, 0.62)]), 2), (decimals([an_estimate(0.5, 0.49, 0.51)]), 3),
        (decimals([an_estimate(12.3, 11.1, 13.6)]), 1), (decimals([an_estimate(1.0, None, None), None]), 2),
        (decimals([an_estimate(0.5, 0.49, 0.51), an_estimate(0.5, 0.4, 0.6)]), 2),
        (decimals([an_estimate(250, 200, 300)]), 0),
        (measured_text({"rows": 1293, "failing_rows": 0}), "rows 1,293, failing rows 0"),
        (measured_text(0.002), "0.002"), (method_text({"kind": "full"}), "full: every weight"),
        (method_text({"kind": "other"}), "other"),
        (method_text({"kind": "lora", "rank": 4, "alpha": 8, "targets": ["q"], "layers": [0, 2], "dora": True}),
         "LoRA rank 4, alpha 8, on q, layers 0, 2, dora"),
        (gates_text([GateResult(name="a", state="failed"), GateResult(name="b", state="passed")]),
         "a failed, 1 passed"),
        (gates_text([]), "none reached"),
    ],
)  # fmt: skip
def test_numbers_and_words(said: object, expected: object) -> None:
    assert said == expected


def test_a_lottery_says_whether_its_middle_won() -> None:
    """Nine layers, three of them in the middle; all three winners from there happens by chance once in 84."""
    found = {"scores": {str(n): 0.3 if n in (3, 4, 5) else 1 / 60 for n in range(9)}, "winners": [3, 4, 5]}
    said = lottery_text(LotteryResult(**found, of_layers=9, choose="best"))
    assert "3 of the 3 from the middle third, 1.0 by chance (p = 0.01)" in said and "middle third 90%" in said
    assert "p =" not in lottery_text(LotteryResult(**found, of_layers=9, choose="random"))
    upper = {"scores": {"6": 0.5, "7": 0.25, "8": 0.25}, "winners": [6], "of_layers": 9, "choose": "best"}
    assert "first third 0%, middle third 0%, last third 100%" in lottery_text(LotteryResult(**upper))
    drawn = plots.layer_scores("run", found["scores"], found["winners"])
    assert "3: 30.0%" in drawn and drawn.count("<path") > 9


def test_preferences_are_told_from_the_last_measurement() -> None:
    pairs = {"validation_margin": 0.25, "validation_accuracy": 0.9, "validation_length_correlation": -0.1}
    pairs["validation_length_ratio"] = 1.1
    log = [{"step": 1, "validation_margin": 0.0}, {"step": 2, **pairs}, {"step": 3, "loss": 0.5}]
    assert validation_pairs_text(log) == "90% the right way round, margin +0.250, margin goes with length by -0.10"
    twice = {**pairs, "validation_length_ratio": 2.0}
    assert "2.0 times as long" in validation_pairs_text([twice])
    assert "length alone" in validation_pairs_text([{**pairs, "validation_length_correlation": 0.7}])
    assert validation_pairs_text(log[:1]) == "margin +0.000" and validation_pairs_text([{"step": 1, "loss": 1.0}]) == ""


def test_what_the_report_reads_of_a_config_is_what_a_config_holds() -> None:
    """Every setting of a LoRA that its line names, from the config class itself: a renamed one would be left out."""
    config = LoraConfig(
        **{"rank": 8, "alpha": 4.0, "rank_pattern": {"down": 4}, "layers": "last", "loraplus_lr_ratio": 16.0},
        **{"lisa_n_layers": 2, "dropout": 0.1, "rslora": True, "targets": ("q", "down"), "init": "orthogonal"},
    )
    text = method_text(config.model_dump(mode="json"))
    for words in (
        "rank 8, alpha 4",
        "down: 4",
        "layers last",
        "16 times",
        "2 layers at a time",
        "dropout 0.1",
        "rslora",
    ):
        assert words in text, text
    assert "on q down" in text and "started by orthogonal" in text
    lottery = LotteryConfig(lottery={"choose": "middle"})
    assert "LoRA on the middle layers" in method_text(lottery.model_dump(mode="json"))
