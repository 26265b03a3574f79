"""Does the plan hold? `.venv/bin/python -m benchmarks.plan`: predicted and measured peaks of whole processes.

Each configuration trains a few steps in a fresh process, on the embedded base and on larger random ones. The plan is
the one that `rung train` itself makes and writes into `run.json`; the measured peak is the largest resident memory of
the process, from its start to its end, watched from outside and read from VmHWM. What the libraries hold is measured
once, with a model of no size, and taken off both before they are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.results_page import replace_section
from benchmarks.runner import OURS, RunError
from benchmarks.runner import run as run_process

EACH, MEAN = 0.10, 0.05
"""How far a prediction may be off, of what the libraries do not hold, and all of them in the mean."""
WORDS = (
    "alpha beta gamma delta house river money stock price growth cash year report company market share value "
    "total income net gross tax"
).split()
BASES: dict[str, dict[str, Any]] = {
    "nothing": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "dtype": "float32",
    },
    "360M": {
        "hidden_size": 960,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "intermediate_size": 2560,
        "dtype": "float32",
    },
    "360M-bf16": {
        "hidden_size": 960,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "intermediate_size": 2560,
        "dtype": "bfloat16",
    },
    "1B": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "dtype": "float32",
    },
    "1B-bf16": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "dtype": "bfloat16",
    },
}


@dataclass(frozen=True)
class Case:
    """One configuration: words in a question and in an answer, and what differs from a LoRA of rank 16."""

    name: str
    base: str = "smollm2-135m"
    words: tuple[int, int] = (150, 100)
    rows: str = "sft"
    settings: dict[str, Any] = field(default_factory=dict)


CASES = (
    Case("lora, 300 tokens", settings={"training.tokens_per_micro_batch": 300}),
    Case("lora, auto"),
    Case("lora, 2,400 tokens", settings={"training.tokens_per_micro_batch": 2400, "training.examples_per_step": 8}),
    Case("lora, upper half", settings={"method.layers": "15-29"}),
    Case("lora, documents of 2,000", words=(1200, 700), settings={"training.examples_per_step": 2}),
    Case("lora, bfloat16", settings={"model.dtype": "bfloat16"}),
    Case("lora, not fused", settings={"model.fused": False}),
    Case("lora, dropout", settings={"method": {"kind": "lora", "dropout": 0.1}}),
    Case("full", settings={"method": {"kind": "full"}}),
    Case(
        "full, 1,500 tokens",
        settings={"method": {"kind": "full"}, "training.tokens_per_micro_batch": 1500, "training.examples_per_step": 6},
    ),
    Case("full, 8-bit moments", settings={"method": {"kind": "full"}, "training.optimizer.state_dtype": "int8"}),
    Case("head", settings={"method": {"kind": "head"}}),
    Case("prompt", settings={"method": {"kind": "prompt"}}),
    Case("prefix", settings={"method": {"kind": "prefix"}}),
    Case("bottleneck", settings={"method": {"kind": "bottleneck"}}),
    Case("mixture", settings={"method": {"kind": "mixture"}}),
    Case("qlora, 4 bits", settings={"method": {"kind": "qlora"}}),
    Case("qlora, 8 bits", settings={"method": {"kind": "qlora", "bits": 8}}),
    Case("lora, dpo", rows="pairs", settings={"objective": {"kind": "preference"}}),
    Case("full, dpo", rows="pairs", settings={"objective": {"kind": "preference"}, "method": {"kind": "full"}}),
    Case("lora, reward", rows="pairs", settings={"objective": {"kind": "reward"}}),
    Case(
        "lora, grpo",
        words=(60, 1),
        settings={
            "objective": {
                "kind": "grpo",
                "reward": {"kind": "regex", "pattern": "a"},
                "rollout": {"max_new_tokens": 32},
            },
        },
    ),
    Case(
        "full, distilled",
        settings={
            "model": {"student_of": "smollm2-135m", "dtype": "float32"},
            "method": {"kind": "full"},
            "objective": {"kind": "distill", "teacher": "smollm2-135m"},
        },
    ),
    Case("lora, 360M", "360M"),
    Case("lora, 360M in bfloat16", "360M-bf16"),
    Case("full, 360M", "360M", settings={"method": {"kind": "full"}, "training.examples_per_step": 3}),
    Case("qlora, 360M", "360M", settings={"method": {"kind": "qlora"}, "training.examples_per_step": 3}),
    Case("lora, 1B", "1B", settings={"training.examples_per_step": 3}),
    Case("lora, 1B in bfloat16", "1B-bf16", settings={"training.examples_per_step": 3}),
)


def main() -> int:
    """0 when every prediction is within the limits."""
    parser = argparse.ArgumentParser(prog="plan", description="Predicted and measured memory.")
    parser.add_argument("--only", help="names of cases, separated by ;")
    parser.add_argument("--work", type=Path, help="keeps what was measured, to go on with; none is a temporary one")
    asked = parser.parse_args()
    work = asked.work or Path(tempfile.mkdtemp(prefix="rung-plan-"))
    work.mkdir(parents=True, exist_ok=True)
    cases = [c for c in CASES if not asked.only or c.name in asked.only.split(";")]
    complete = False
    try:
        footprint = measure(work, Case("nothing", "nothing"))["measured"]
        print(f"libraries: {footprint / 1e6:,.0f} MB", flush=True)
        for case in cases:
            if not asked.only and (work / f"{slug(case)}.json").exists():
                print(f"{case.name}: measured already", flush=True)
                continue
            (work / f"{slug(case)}.json").write_text(json.dumps({**measure(work, case), "name": case.name}))
        kept = [work / f"{slug(case)}.json" for case in CASES]
        complete = all(file.exists() for file in kept)
        shown = kept if complete else [work / f"{slug(case)}.json" for case in cases]
        found = [json.loads(file.read_text()) for file in shown]
    except RunError as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        if asked.work is None:
            shutil.rmtree(work)
    errors = [error_of(one, footprint) for one in found]
    for one, error in zip(found, errors, strict=True):
        print(
            f"{one['name']:28s} planned {one['planned'] / 1e9:6.2f} GB, measured {one['measured'] / 1e9:6.2f} GB, "
            f"{error:+.1%}, {one['at']}"
        )
    mean = statistics.fmean(map(abs, errors))
    print(f"mean error {mean:.1%} of {len(errors)}; largest {max(map(abs, errors)):.1%}")
    if complete:
        write(found, errors, footprint)
    return int(mean > MEAN or max(map(abs, errors)) > EACH)


def slug(case: Case) -> str:
    """Of its files."""
    return "".join(c if c.isalnum() else "-" for c in case.name)


def error_of(one: Mapping[str, Any], footprint: int) -> float:
    """Of what the libraries do not hold: planned over measured, minus one. Each has its own footprint taken off."""
    return float((one["planned"] - one["footprint"]) / (one["measured"] - footprint) - 1)


def measure(work: Path, case: Case) -> dict[str, Any]:
    """Train in a process of its own."""
    folder = work / slug(case)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    rows, config = folder / "rows.jsonl", folder / "run.yaml"
    write_rows(rows, case)
    run_config: dict[str, Any] = {
        "model": {"name": base_of(work, case.base), "dtype": "float32"},
        "data": {"path": str(rows), "validation": 0, "test": 0},
        "training": {"examples_per_step": 4, "max_steps": 4},
        "output": str(folder / "run"),
    }
    config.write_text(yaml.safe_dump(run_config))
    given = [f"{name}={json.dumps(value)}" for name, value in case.settings.items()]
    log = folder / "log.txt"
    done = run_process([OURS / "rung", "train", config, *given], log, {**os.environ, "HF_HUB_OFFLINE": "1"})
    plan = json.loads((folder / "run" / "run.json").read_text())["plan"]
    shutil.rmtree(folder / "run")
    parts = {name: value for name, value in plan["measured"].items()}
    print(
        f"{case.name}: planned {plan['peak_bytes'] / 1e9:.2f}, measured {done.peak_bytes / 1e9:.2f} GB; "
        f"{ {k: round(v / 1e6) for k, v in parts.items() if v} }; "
        f"{ {k: round(v['bytes'] / 1e6) for k, v in plan['stages'].items()} }",
        flush=True,
    )
    return {
        "planned": plan["peak_bytes"],
        "footprint": plan["footprint_bytes"],
        "measured": done.peak_bytes,
        "at": plan["at"],
    }


def base_of(work: Path, name: str) -> str:
    """The embedded base, or a random one, made once."""
    if name not in BASES:
        return name
    folder = work / f"base-{name}"
    if not (folder / "config.json").exists():
        code = "from benchmarks.plan import make; import sys; make(sys.argv[1], sys.argv[2])"
        subprocess.run([sys.executable, "-c", code, name, str(folder)], check=True)  # its memory goes with it
    return str(folder)


def make(name: str, folder: str) -> None:
    """A random model with the embedded base's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rung.config.model import ModelConfig
    from rung.models.load import load_tokenizer

    shape = dict(BASES[name])
    torch.set_default_dtype(getattr(torch, shape.pop("dtype")))
    tokenizer = load_tokenizer(ModelConfig())
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=49152, tie_word_embeddings=True, **ends, **shape))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(path: Path, case: Case) -> None:
    """Rows of random words, all about as long."""
    draw = random.Random(1)

    def words(count: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(count))

    question, answer = case.words
    with path.open("w") as lines:
        for number in range(24):
            asked = f"{number} {words(question)}"
            row = {"question": asked, "answer": words(answer)}
            if case.rows == "pairs":
                row = {"prompt": asked, "chosen": words(answer), "rejected": words(answer)}
            lines.write(json.dumps(row) + "\n")


def write(found: list[dict[str, Any]], errors: list[float], footprint: int) -> None:
    """Replace this part of the results."""
    lines = [
        "## Planned and measured memory",
        "",
        "```",
        ".venv/bin/python -m benchmarks.plan",
        "```",
        "",
        f"Peaks of whole processes. The libraries hold {footprint / 1e6:,.0f} MB, measured with a model of no size "
        f"and planned as {found[0]['footprint'] / 1e6:,.0f} MB; the difference is of what lies above. "
        f"Mean {statistics.fmean(map(abs, errors)):.1%} [{MEAN:.0%}], "
        f"largest {max(map(abs, errors)):.1%} [{EACH:.0%}].",
        "",
        "| run | planned | measured | difference | planned peak in |",
        "|---|---|---|---|---|",
    ]
    for one, error in zip(found, errors, strict=True):
        planned, measured = (f"{one[name] / 1e9:.2f} GB" for name in ("planned", "measured"))
        lines.append(f"| {one['name']} | {planned} | {measured} | {error:+.1%} | {one['at']} |")
    replace_section("planned memory", "\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
