"""The HTML report, built from folders made up here: nothing is trained, `rung.scoring` measures."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rung.errors import CheckpointError
from rung.report.answer_browser import FIRST_ITEMS, ITEMS_PER_FILTER, browse_answers
from rung.report.html import write_report
from rung.report.run_reader import read_report_source
from rung.scoring.recommendation import recommend
from rung.scoring.stats import paired_difference, score_interval
from rung.training.run_folder import read_items, write_items

SCRIPT = "<script>alert('x')</script><img src=x onerror=alert(1)>"
ITEMS, CLUSTERS, STEPS = 60, 20, 40
RUNGS = {"zero_shot": 0.1, "few_shot": 0.4, "lora": 0.85}
VERSIONS = {"python": "3.11.7", "machine": "x86_64", "rung": "0.1.0", "torch": "2.13.0+cpu"}
METHOD = {
    "kind": "lora",
    "rank": 16,
    "alpha": 32.0,
    "targets": ["q", "k", "v", "o", "gate", "up", "down"],
    "layers": None,
}
CONFIG = {
    "model": {"name": "smollm2-135m"},
    "method": METHOD,
    "training": {"examples_per_step": 16, "schedule": "cosine", "warmup_ratio": 0.03},
    "evaluation": {"metrics": ["exact", "numeric"]},
}
DATA = {
    "splits": {
        "train": {"rows": 1293, "groups": 234, "duplicate_prompts": 3},
        "validation": {"rows": 179, "groups": 32, "duplicate_prompts": 0},
        "test": {"rows": 184, "groups": 34, "duplicate_prompts": 0},
        "overlap_dropped": 2,
        "sets": [{"path": "data.jsonl", "weight": 1.0, "kept": 1656, "rejected": 5}],
        "fingerprint": "e9b15bc5",
    },
    "train": {"tokens": 192460, "supervised_tokens": 20132, "longest": 190, "dropped": 0, "trimmed": 0},
}
GATES = [
    {"name": "preflight", "state": "passed", "measured": {"rows": 1293, "failing": 0}, "limit": "0 failing rows"},
    {"name": "step0.packing", "state": "passed", "measured": 2.09808349609375e-05, "limit": 0.002},
    {"name": "movement", "state": "passed", "measured": "420 of 420 tensors moved", "limit": "all, 0"},
]


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def write_lines(path: Path, values: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(v, ensure_ascii=False) + "\n" for v in values), encoding="utf-8")


def a_run(folder: Path, **changes: Any) -> Path:
    """A training run of 40 steps with a validation loss at every tenth."""
    rng = np.random.default_rng(len(str(folder.name)))
    log = []
    for step in range(1, STEPS + 1):
        entry = {"step": step, "loss": 0.6 + 2.0 * np.exp(-step / 9) + 0.1 * rng.normal(), "seconds": 5.1}
        log.append(entry | ({"validation_loss": 0.7 + 1.9 * np.exp(-step / 9)} if step % 10 == 0 else {}))
    log[5]["loss"] = float("nan")  # a skipped step
    write_lines(folder / "log.jsonl", log)
    measured = {
        "steps": STEPS, "train_seconds": 192.4, "tokens_per_second": 124.5, "tokens": 23954, "train_loss": 0.62,
        "trainable_parameters": 4884480, "peak_memory_bytes": 2411261952, "validation_loss": 0.722, "best_step": STEPS,
        "learning_rate": 5e-4,
    }  # fmt: skip
    manifest = {
        "status": "finished", "config": {**CONFIG, "output": folder.name}, "gates": GATES, "versions": VERSIONS,
        "fingerprints": {"base": "6ea0aba9e02ca44f12a019cc", "data": "e9b15bc5"}, "data": DATA, "device": "cpu",
        "compute_dtype": "float32", **measured, "metrics": {"validation_loss": 0.722},
    }  # fmt: skip
    write_json(folder / "run.json", {k: v for k, v in {**manifest, **changes}.items() if v is not ...})
    return folder


def items(right: np.ndarray, number: int, text: Callable[[int], str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for i, well in enumerate(right):
        expected = f"Revenue, FY2016: USD {i + 7} million."
        answer = expected if well else f"{text(i)} USD {i} million"
        scores = {"exact": float(well), "numeric": float(well or i % 7 == 0)}
        rows.append({
            "source": f"data.jsonl line {i + 1}", "group": f"filing-{i % CLUSTERS:03d}", "scores": scores,
            "question": f"{text(i)} revenue {i}?", "expected": expected, "answer": answer,
            "context": f"Company {i}\nRevenue | FY2016 {i + 7} | FY2017 {i + 9}",
            "prompt_tokens": 120 + 500 * (number == 1), "stopped": i % 9 != 3, "nats": None, "answer_tokens": None,
        })  # fmt: skip
    return rows


@dataclass
class Made:
    """How to make up a climb."""

    rungs: Mapping[str, float] = field(default_factory=lambda: dict(RUNGS))
    seeds: int = 1
    text: Callable[[int], str] = lambda i: "What was the"
    change: Callable[[dict[str, Any]], None] = lambda ladder: None

    def write(self, folder: Path) -> Path:
        rng = np.random.default_rng(7)
        clusters = [f"filing-{i % CLUSTERS:03d}" for i in range(ITEMS)]
        luck = rng.random(ITEMS)
        tables, rows = [], []
        for number, (label, skill) in enumerate(self.rungs.items()):
            right = (0.7 * luck + 0.3 * rng.random(ITEMS)) < skill
            tuned = label not in ("zero_shot", "few_shot")
            name = re.sub(r"[^\w.-]", "-", label)
            first = folder / "rungs" / name / ("seed-0" if tuned and self.seeds > 1 else "")
            for seed in range(self.seeds if tuned else 1):
                place = folder / "rungs" / name / (f"seed-{seed}" if tuned and self.seeds > 1 else "")
                made = items(right, number, self.text)
                place.mkdir(parents=True, exist_ok=True)
                write_items(place / "items.parquet", made, {})
                write_json(place / "result.json", {"cut_off": 6})
                if tuned:
                    a_run(place)
            both = {m: np.array([item["scores"][m] for item in made]) for m in ("exact", "numeric")}
            gain = paired_difference(tables[-1][1], both["exact"], clusters).to_json() if tables else None
            tables.append((label, both["exact"]))
            rows.append({
                "rung": label, "kind": "lora" if tuned else label, "sees": "context", "gain": gain,
                "scores": {m: score_interval(s, clusters, binary=True).to_json() for m, s in both.items()},
                "trainable_parameters": 4884480 if tuned else 0, "train_seconds": 192.4 if tuned else 0.0,
                "peak_memory_bytes": 2411261952, "prompt_tokens": [126.6, 623.6, 136.6][number % 3],
                "seconds_per_query": [0.7094, 1.5214, 0.6269][number % 3], "folder": str(first),
            })  # fmt: skip
        ladder = {
            "metric": "exact", "examples": ITEMS, "clusters": CLUSTERS, "rows": rows, "folder": str(folder),
            "verdict": recommend(tables, 0.05, clusters=clusters).to_json(), "report": str(folder / "report.html"),
        }  # fmt: skip
        self.change(ladder)
        climb = {"rungs": [{"kind": "lora", "name": label} for label in self.rungs], "margin": 0.05, "target": 0.9}
        config = {**CONFIG, "climb": {**climb, "seeds": self.seeds}, "output": str(folder)}
        manifest = {
            "status": "finished",
            "config": config,
            "gates": [],
            "versions": VERSIONS,
            "climb": True,
            "data": DATA,
        }
        write_json(folder / "run.json", {**manifest, "fingerprints": {"base": "6ea0aba9"}, "ladder": ladder})
        return folder


class Page(HTMLParser):
    """Tags, attributes and visible text of a page; raises on tags that do not close."""

    VOID = frozenset({"meta", "br", "link", "img", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self._open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def page(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_a_climb_shows_all_of_its_parts(tmp_path: Path) -> None:
    folder = Made().write(tmp_path / "climb")
    shown = page(folder)
    told = json.loads((folder / "run.json").read_text())["ladder"]["verdict"]["text"]
    assert shown.text.index(told) < shown.text.index("The ladder")
    for heading in ("The ladder", "Course", "Answers, side by side", "What was trained", "Gates", "Data", "config"):
        assert heading in shown.text
    costs = ("4.9M", "3 min 12 s", "2.4 GB", "624", "1.5 s", "124 tokens/s")
    data = ("20,132 supervised", "5 rejected", "lora 6 of 60")
    for part in (*costs, *data, "recommended", "LoRA rank 16", "6ea0aba9", "2.1e-05", "3 of 3 passed", "2.13.0+cpu"):
        assert part in shown.text, part
    labels = [value or "" for name, value in shown.attributes if name == "aria-label"]
    assert shown.tags.count("svg") == 5 == len(labels)  # scores, differences, two costs, one loss curve
    assert any("lora: exact 0." in label for label in labels)
    assert any("validation loss from" in label for label in labels)


def test_the_page_is_alone_and_runs_nothing(tmp_path: Path) -> None:
    written = write_report(Made().write(tmp_path / "climb")).read_text(encoding="utf-8")
    shown = Page(written)
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & set(shown.tags)
    assert not re.search(r"https?://|@import|javascript:", written)
    assert not [name for name, _ in shown.attributes if name.startswith("on") or name == "src"]
    assert all((value or "").startswith("#") for name, value in shown.attributes if name.endswith("href"))
    assert len(shown.ids) == len(set(shown.ids))
    assert "default-src 'none'" in written


def test_hostile_data_is_text(tmp_path: Path) -> None:
    label = "<b>lora</b> $x_{"  # neither a tag nor mathematics

    def change(ladder: dict[str, Any]) -> None:
        ladder["verdict"]["text"] = SCRIPT

    rungs = {"zero_shot": 0.1, "few_shot": 0.4, label: 0.8}
    made = Made(rungs, text=lambda i: f"{SCRIPT}{{{{ 7 * 191 }}}}\u2028", change=change)
    shown = page(made.write(tmp_path / "climb"))
    assert not {"script", "img"} & set(shown.tags)
    assert not [name for name, _ in shown.attributes if name == "onerror"]
    assert SCRIPT in shown.text and "{{ 7 * 191 }}" in shown.text and "1337" not in shown.text
    assert label in shown.text


def test_lone_surrogates_do_not_stop_a_report(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "run", status="failed", error="row said \\ud800")
    text = (folder / "run.json").read_text().replace("\\\\ud800", "\\ud800")
    (folder / "run.json").write_text(text)
    assert "row said \\ud800" in page(folder).text


def test_a_single_run_shows_what_applies(tmp_path: Path) -> None:
    shown = page(a_run(tmp_path / "run"))
    assert "Finished" in shown.text and "validation loss 0.722" in shown.text
    assert "rung eval run" in shown.text and "rung chat run --compare" in shown.text
    assert "cosine, warm-up 3%" in shown.text
    assert shown.tags.count("svg") == 1
    for absent in ("The ladder", "Scores", "examples", "gain on", "Verdict"):
        assert absent not in shown.text.replace("rows", "").split("Versions and config")[0], absent


def test_a_scored_run_shows_scores_and_answers(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "run")
    right = np.arange(ITEMS) % 3 == 0
    thoughts = [{**item, "reasoning": "a thought"} for item in items(right, 0, lambda i: "What was the")]
    write_items(folder / "items.parquet", thoughts, {})
    manifest = json.loads((folder / "run.json").read_text())
    scored = {"exact": score_interval(right.astype(float), binary=True).to_json()}
    write_json(folder / "run.json", {**manifest, "metrics": {"scores": scored, "prompt_tokens": 120.0, "cut_off": 4}})
    shown = page(folder)
    assert "some of each 60, 10 here" in shown.text and "right 20" in shown.text and "Answers, side" not in shown.text
    assert "0.33" in shown.text and "[0.22, 0.47]" in shown.text and "this run 4 of 60" in shown.text
    assert "reasoning, not scored" in shown.text and "a thought" in shown.text
    assert "rung eval" not in shown.text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"status": "failed", "error": "gate movement failed\n  given: 3 < 4"},
            ["This run failed", "given: 3 < 4", "--overwrite"],
        ),
        (
            {"status": "failed", "not_finite": {"step": 3, "rows": ["d.jsonl line 9"]}},
            ["This run failed", "d.jsonl line 9"],
        ),
        (
            {"status": "failed", "gates": [{**GATES[2], "state": "failed"}]},
            ["Gate movement did not pass", "0 of 1 passed"],
        ),
        ({"status": "interrupted"}, ["Interrupted", "40 steps", "--resume"]),
        ({"status": "running"}, ["Not finished", "--resume"]),
    ],
)
def test_a_run_that_did_not_finish_says_so_on_top(tmp_path: Path, changes: dict[str, Any], expected: list[str]) -> None:
    shown = page(a_run(tmp_path / "run", **changes))
    for part in expected:
        assert part in shown.text
    assert shown.text.index(expected[0]) < shown.text.index("What was trained")


@pytest.mark.parametrize(
    "changes",
    [
        {"status": None}, {"gates": None}, {"tokens": None}, {"data": None}, {"metrics": None},
        {"versions": {"torch": None}}, {"fingerprints": {"base": None}},
        {"gates": [{"name": "x", "state": "postponed"}]},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_nulls_and_words_of_a_later_version_do_not_stop_a_report(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert "What was trained" in page(a_run(tmp_path / "run", **changes)).text


def test_a_ladder_of_an_earlier_version_is_read_as_not_finished(tmp_path: Path) -> None:
    folder = Made().write(tmp_path / "climb")
    manifest = json.loads((folder / "run.json").read_text())
    manifest["ladder"]["ladder"] = manifest["ladder"].pop("rows")
    write_json(folder / "run.json", manifest)
    shown = page(folder).text
    assert "This climb is not finished" in shown and "rung climb CONFIG" in shown


def test_missing_pieces_are_absent(tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", {"status": "started", "config": {}})
    shown = page(tmp_path)
    assert "Not finished" in shown.text and "svg" not in shown.tags
    for word in ("None", "nan", "Gates", "Data", "Loss", "resolved config"):
        assert word not in shown.text


def test_a_climb_under_way_shows_the_rungs_so_far(tmp_path: Path) -> None:
    folder = Made().write(tmp_path / "climb")
    manifest = json.loads((folder / "run.json").read_text())
    row = manifest.pop("ladder")["rows"][0]
    write_json(folder / "run.json", {**manifest, "status": "running"})
    (folder / "rungs/few_shot/result.json").unlink()
    (folder / "rungs/lora/result.json").unlink()
    write_json(folder / "rungs/zero_shot/result.json", {"scores": row["scores"], "trainable_parameters": 0})
    a_run(folder / "rungs/lora", status="failed", error="the disk is full")
    with (folder / "rungs/lora/log.jsonl").open("a") as log:
        log.write('{"step": 41, "lo')  # killed while writing
    shown = page(folder)
    assert "This climb failed" in shown.text and "1 of 3 rungs are measured" in shown.text
    assert "lora: the disk is full" in shown.text and "gain on" not in shown.text and "svg" in shown.tags


def test_infinite_bounds_and_perplexity(tmp_path: Path) -> None:
    def change(ladder: dict[str, Any]) -> None:
        ladder["metric"] = "perplexity"
        for row in ladder["rows"]:
            row["scores"] = {"perplexity": {**row["scores"]["exact"], "mean": 8.25, "low": 0.0, "high": None}}
            if row["gain"]:
                row["gain"] |= {"low": None, "high": None, "p_value": 0.0004}
        for rung in ladder["verdict"]["rungs"]:
            rung["difference"] |= {"low": None, "high": None}

    shown = page(Made(change=change).write(tmp_path / "climb"))
    assert "[0.00, ∞)" in shown.text and "(−∞, ∞)" in shown.text and "p < 0.001" in shown.text
    assert "nats per token, below 0 is better" in shown.text
    assert not re.search(r"\b(None|inf|nan)\b", shown.text)


def test_the_same_folder_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = Made(seeds=3).write(tmp_path / "climb")
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []


def test_training_seeds_each_stand_in_what_was_trained(tmp_path: Path) -> None:
    shown = page(Made(seeds=3).write(tmp_path / "climb"))
    for seed in range(3):
        assert f"lora, seed {seed}" in shown.text


def test_a_moved_climb_still_finds_its_rungs(tmp_path: Path) -> None:
    Made().write(tmp_path / "climb").rename(tmp_path / "elsewhere")
    assert re.search(r"where they differ \d\d, 10 here", page(tmp_path / "elsewhere").text)


def test_examples_show_every_way_the_rungs_differ(tmp_path: Path) -> None:
    source = read_report_source(Made().write(tmp_path / "climb"))
    shown = [e for e in browse_answers(source.rungs, source.metrics).examples if "differ" in e.filters]
    patterns = [tuple(a.marks[0].tone for a in example.answers) for example in shown]
    every = list(zip(*([item["scores"]["exact"] for item in rung.items] for rung in source.rungs), strict=True))
    differing = {p for p in every if len(set(p)) > 1}
    assert len(set(patterns)) == len(differing) and all(len(set(p)) > 1 for p in patterns)
    assert len({example.group for example in shown}) >= 6 and len(shown) == FIRST_ITEMS
    assert browse_answers(source.rungs, source.metrics) == browse_answers(
        read_report_source(tmp_path / "climb").rungs, source.metrics
    )


def test_filters_show_who_alone_was_right(tmp_path: Path) -> None:
    source = read_report_source(Made({"zero_shot": 0.2, "few_shot": 0.3, "lora": 0.9}).write(tmp_path / "climb"))
    low, middle, tuned = ([item["scores"]["exact"] == 1.0 for item in rung.items] for rung in source.rungs)
    counted = {
        "tuned": sum(t and not a and not b for a, b, t in zip(low, middle, tuned, strict=True)),
        "untuned": sum((a or b) and not t for a, b, t in zip(low, middle, tuned, strict=True)),
        "all": sum(a and b and t for a, b, t in zip(low, middle, tuned, strict=True)),
        "none": sum(not (a or b or t) for a, b, t in zip(low, middle, tuned, strict=True)),
    }
    browser = browse_answers(source.rungs, source.metrics)
    assert {f.key: f.items for f in browser.filters[1:]} == {key: n for key, n in counted.items() if n}
    assert counted["tuned"] > ITEMS_PER_FILTER
    for key in counted:
        shown = [example for example in browser.examples if key in example.filters]
        assert len(shown) == min(ITEMS_PER_FILTER, counted[key])
        for example in shown:
            right = [answer.marks[0].tone == "good" for answer in example.answers]
            wanted = {"tuned": [False, False, True], "all": [True] * 3, "none": [False] * 3}.get(key)
            assert right == wanted if wanted else not right[2] and any(right)
    text = write_report(tmp_path / "climb").read_text(encoding="utf-8")
    assert all(f"#show-{f.key}:checked" in text and f'id="show-{f.key}"' in text for f in browser.filters)


def test_rungs_that_agree_on_everything_do_not_differ(tmp_path: Path) -> None:
    folder = Made({"zero_shot": -1.0, "few_shot": -1.0}).write(tmp_path / "climb")
    assert [(f.label, f.items) for f in browse_answers(read_report_source(folder).rungs, ["exact"]).filters] == [
        ("some of each", ITEMS),
        ("none right", ITEMS),
    ]
    assert "The rungs differ on none of them" in page(folder).text


def test_what_only_looking_up_gets_right(tmp_path: Path) -> None:
    def looked_up(ladder: dict[str, Any]) -> None:
        ladder["rows"][1]["retrieval"] = {
            "hit_rate": {"mean": 0.5, "low": 0.4, "high": 0.6, "examples": ITEMS}, "hits": ITEMS // 2,
            "without_passages": 0, "judged_by_context": ITEMS, "judged_by_answer": 0, "empty_documents": 0,
            "duplicate_passages": 0, "top_k": 1, "passages": 9, "documents": 9, "from": None,
            "chunk_words": 9, "overlap": 0,
        }  # fmt: skip

    source = read_report_source(Made({"zero_shot": 0.1, "few_shot": 0.9}, change=looked_up).write(tmp_path / "climb"))
    browser = browse_answers(source.rungs, source.metrics)
    assert [f.key for f in browser.filters][:2] == ["differ", "found"]
    for example in browser.examples:
        if "found" in example.filters:
            assert [answer.marks[0].tone for answer in example.answers] == ["bad", "good"]
    assert "hit rate" in page(tmp_path / "climb").text, "of a ladder that did not time its search, too"


def test_perplexity_marks_nats_and_calls_no_answer_wrong(tmp_path: Path) -> None:
    folder = Made().write(tmp_path / "climb")
    for nats, label in enumerate(RUNGS):
        kept, about = read_items(folder / f"rungs/{label}/items.parquet")
        scored = [item | {"scores": {}, "nats": 6.0 - nats, "answer_tokens": 4} for item in kept]
        write_items(folder / f"rungs/{label}/items.parquet", scored, about)
    browser = browse_answers(read_report_source(folder).rungs, ["perplexity"])
    assert [f.key for f in browser.filters] == ["differ"], "nobody is right or wrong by it"
    (example, *_) = browser.examples
    assert [mark.text for answer in example.answers for mark in answer.marks] == [
        "1.50 nats per token",
        "1.25 nats per token",
        "1.00 nats per token",
    ]


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a run folder"):
        write_report(tmp_path)


def test_a_page_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "run")
    (folder / "report.html").mkdir()
    with pytest.raises(CheckpointError, match="could not write"):
        write_report(folder)
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []
