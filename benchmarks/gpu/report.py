"""benchmarks/GPU.md from the JSON of `scripts/gpu`: what was measured, beside what the card can do at best.

`python -m benchmarks.gpu.report FILE [--output benchmarks/GPU.md]`. Numbers of a processor are never printed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "GPU.md"
NOT_MEASURED = "**not measured**"
GOALS = {("1B", 2048): "50 %", ("8B", 2048): "60 %", ("8B", 8192): "60 %"}
"""Share of the limit that LoRA aims at, by shape and length."""
CLAIMS = {
    "parity": "log-probabilities and gradients equal the processor's float64, on tiny models of every proved shape",
    "trees": "attention over segment trees equals masks written out, with windows, prefixes and grouped keys",
    "syncs": "the passes of supervised fine-tuning never wait for the card",
    "exactness": "packed or alone, tree or flat, decoded or read: the differences in bfloat16 are rounding",
}


def page(report: dict[str, Any]) -> str:
    """The whole page."""
    machine, sections = report["machine"], {section["name"]: section for section in report["sections"]}
    has_card = machine["device"] == "cuda"
    lines = [
        "# On a graphics card",
        "",
        "Written by `python -m benchmarks.gpu.report FILE` from what `scripts/gpu --output FILE` measured.",
        "",
        *_machine(machine, has_card),
        *_claims(sections, has_card),
    ]
    limits = sections.get("ceilings", {}).get("results", {}) if has_card else {}
    for title, name, table in TABLES:
        lines += ["", f"## {title}", ""]
        section = sections.get(name)
        if section is None or not has_card:
            lines.append(NOT_MEASURED)
        elif "results" not in section:
            failed = section["state"] == "failed"
            lines.append(f"{'Failed' if failed else NOT_MEASURED}: {section.get('error', 'see the JSON')}")
        else:
            lines += table(section["results"], limits)
    return "\n".join(lines) + "\n"


def _machine(machine: dict[str, Any], has_card: bool) -> list[str]:
    libraries = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "peft") if machine.get(name))
    if not has_card:
        return [f"No card was there. What a processor can show was run with {libraries}; all else is {NOT_MEASURED}."]
    return [f"{machine['card']}, {machine['memory'] / 2**30:.0f} GiB, CUDA {machine['cuda']}, {libraries}."]


def _claims(sections: dict[str, dict[str, Any]], has_card: bool) -> list[str]:
    where = "on the card" if has_card else "on a processor"
    lines = ["", "## Right", "", f"| section | claim | {where} |", "|---|---|---|"]
    for name, claim in CLAIMS.items():
        section = sections.get(name)
        lines.append(f"| {name} | {claim} | {section['state'] if section else NOT_MEASURED} |")
    return lines


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    return [
        "| " + " | ".join(heads) + " |",
        "|" + "---|" * len(heads),
        *("| " + " | ".join(map(str, row)) + " |" for row in rows),
    ]


def _speed(row: dict[str, Any]) -> str:
    if "not_measured" in row:
        return f"{NOT_MEASURED}: {row['not_measured']}"
    return f"{row['tokens_per_second']:,.0f}"


def _memory(row: dict[str, Any]) -> str:
    return f"{row['peak_bytes'] / 1e9:.1f} GB" if "peak_bytes" in row else ""


def _ceilings(results: dict[str, Any], limits: dict[str, Any]) -> list[str]:
    rate, copies = results["flops"] / 1e12, results["bytes_per_second"] / 1e12
    return [f"Products in bfloat16: {rate:,.0f} TFLOP/s. Copies: {copies:.2f} TB/s. Both measured, not stated."]


def _lora(results: dict[str, Any], limits: dict[str, Any]) -> list[str]:
    rows = []
    for row in results["rows"]:
        limit = limits["flops"] / row["flops_per_token"] if limits and "flops_per_token" in row else None
        share = f"{row['tokens_per_second'] / limit:.0%}" if limit else ""
        goal = GOALS.get((row["shape"], row["length"]), "") if row["learned"] == 1.0 and row["fused"] else ""
        fused = "yes" if row["fused"] else "no"
        tokens = f"{row['length']:,}", f"{row['step_tokens']:,}"
        cells = (row["shape"], *tokens, row["learned"], fused, _speed(row), _memory(row))
        rows.append((*cells, f"{limit:,.0f}" if limit else "", share, goal))
    heads = ("shape", "tokens of a document", "of a step", "learned", "Rung's functions", "tokens/s", "peak")
    return _table((*heads, "limit tokens/s", "share", "goal"), rows)


def _remedies(results: dict[str, Any], limits: dict[str, Any]) -> list[str]:
    rows = results["rows"]
    best = rows[0].get("tokens_per_second") if rows else None
    cells = [
        (
            *(row["remedy"], _speed(row), _memory(row)),
            f"{row['tokens_per_second'] / best:.2f}" if best and "tokens_per_second" in row else "",
        )
        for row in rows
    ]
    return _table(("switched off", "tokens/s", "peak", "of everything on"), cells)


def _peers(results: dict[str, Any], limits: dict[str, Any]) -> list[str]:
    rows = [
        (
            *(row["shape"], f"{row['length']:,}", f"{row['step_tokens']:,}", _yes(row["checkpointing"])),
            *(_yes(row["liger"]), _speed(row), _memory(row)),
        )
        for row in results["rows"]
    ]
    heads = ("shape", "tokens of a document", "of a step", "checkpointing", "Liger", "tokens/s", "peak")
    return _table(heads, rows)


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"


def _qlora(results: dict[str, Any], limits: dict[str, Any]) -> list[str]:
    rows = [
        (row["shape"], "Rung" if row["fused"] else "peft", f"{row['step_tokens']:,}", _speed(row), _memory(row))
        for row in results["rows"]
    ]
    return _table(("shape", "functions", "tokens of a step", "tokens/s", "peak"), rows)


def _phi2(results: dict[str, Any], limits: dict[str, Any]) -> list[str]:
    rows = [(row["method"], _speed(row), _memory(row), _losses(row)) for row in results["rows"]]
    return _table(("method", "tokens/s", "peak", "loss of six steps"), rows)


def _losses(row: dict[str, Any]) -> str:
    return f"{row['first_loss']:.2f} to {row['last_loss']:.2f}" if "last_loss" in row else ""


def _alignment(results: dict[str, Any], limits: dict[str, Any]) -> list[str]:
    flat = {row["objective"]: row for row in results["rows"] if row["packing"] == "flat"}
    rows = []
    for row in results["rows"]:
        other = flat.get(row["objective"])
        is_measured = other is not None and "milliseconds" in other and "milliseconds" in row
        ratio = f"{other['milliseconds'] / row['milliseconds']:.2f}x" if is_measured else ""
        rows.append((row["objective"], row["packing"], f"{row['computed_tokens']:,}", _speed(row), _memory(row), ratio))
    heads = ("objective", "packing", "tokens computed", "tokens/s of documents", "peak", "beside flat")
    return _table(heads, rows)


def _decoding(results: dict[str, Any], limits: dict[str, Any]) -> list[str]:
    rows = [(row["shape"], row["rows"], row.get("how", ""), _speed(row)) for row in results["rows"]]
    return _table(("shape", "answers at once", "decoded with", "new tokens/s"), rows)


def _profile(results: dict[str, Any], limits: dict[str, Any]) -> list[str]:
    rows = [(row["class"], f"{row['share']:.0%}", f"{row['launches_per_step']:,}") for row in results["rows"]]
    return [f"{results['milliseconds_per_step']} ms a step.", "", *_table(("kernels", "share", "launches"), rows)]


TABLES: tuple[tuple[str, str, Callable[[dict[str, Any], dict[str, Any]], list[str]]], ...] = (
    ("The card's own limits", "ceilings", _ceilings),
    ("LoRA, 16,384 tokens a step, rank 16", "lora", _lora),
    ("What is switched off, 1B, documents of 256 tokens", "remedies", _remedies),
    ("The same with transformers and peft", "peers", _peers),
    ("QLoRA, 4 bits, 2,048 tokens a document", "qlora", _qlora),
    ("Phi-2's shape, one document of 1,024 tokens", "phi-2", _phi2),
    ("Preferences and reinforcement, prompts of 1,024 and answers of 256 tokens", "alignment", _alignment),
    ("Decoding: answers to one prompt of 1,024 tokens", "decoding", _decoding),
    ("Where the time of a LoRA step goes", "profile", _profile),
)


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--output", type=Path, default=PAGE)
    arguments = parser.parse_args()
    arguments.output.write_text(page(json.loads(arguments.file.read_text())))


if __name__ == "__main__":
    main()
