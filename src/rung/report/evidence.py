"""Lines for the terminal about two systems on the same items: scores, differences, a judge's verdicts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rung.report.human import bounds, decimals, fixed, p_value
from rung.report.terminal import pairs, sayable

Json = Mapping[str, Any]
FAR = 0.1
"""Points between the raw and the length-controlled win rate that are worth a word."""


def against_lines(result: Json) -> list[str]:
    """One system against another: each metric, then what the judge prefers."""
    size = f"{result['examples']:,} held-out questions in {result['clusters']:,} clusters, 95 % intervals, paired"
    told = ["", sayable(f"{result['target']} against {result['against']}: {size}")]
    told += pairs({name: metric_text(name, found) for name, found in result["metrics"].items()})
    if judge := result.get("judge"):
        told += ["", sayable(f"preferred by the judge {judge['model']}"), *pairs(_judge(judge))]
    return told


def forgetting_lines(result: Json) -> list[str]:
    """A run against its base on data that it did not learn from."""
    size = f"{result['examples']:,} rows in {result['clusters']:,} clusters, 95 % intervals, run minus base"
    told = ["", sayable(f"{result['target']} on {result['forgetting']}: {size}")]
    told += pairs({name: metric_text(name, found) for name, found in result["metrics"].items()})
    if result["dropped"]:
        told.append(f"  {result['dropped']:,} texts were longer than the model's context and left out")
    return told


def metric_text(name: str, found: Json) -> str:
    """Both scores, their difference, and how large one would have shown where none does."""
    before, after, gain = found["before"], found["after"], found["difference"]
    digits = decimals([before, after])
    one, other = (f"{fixed(score['mean'], digits)} {bounds(score, digits)}" for score in (after, before))
    told = p_value(gain["p_value"])
    change = change_text(name, found) + (f", {told}" if told else "")
    if gain["p_value"] is not None and gain["p_value"] > 0.05:
        least = found["detectable"]
        change += "; no sure difference" + (f", one of {least:.2g} would show" if least is not None else "")
    return f"{one} against {other}\n{change}"


def change_text(name: str, found: Json) -> str:
    """After minus before, with its interval; of perplexity in nats."""
    gain = found["difference"]
    exact = decimals([gain])
    unit = " nats a token" if name == "perplexity" else ""
    return f"{fixed(gain['mean'], exact, signed=True)} {bounds(gain, exact)}{unit}"


def _judge(judge: Json) -> dict[str, str]:
    lines = {}
    if judge["win_rate"] is not None:
        told = f"{judge['wins']:,} won, {judge['ties']:,} tied, {judge['losses']:,} lost"
        lines["win rate"] = f"{_rate(judge['win_rate'])}; {told}"
        controlled, raw = judge["length_controlled"], judge["win_rate"]
        far = abs(controlled["mean"] - raw["mean"]) > FAR
        lines["of one length"] = _rate(controlled) + ("; length makes much of the difference" if far else "")
        lines["both orders"] = f"agree in {_rate(judge['consistent'])} of the pairs"
        if judge["shown_first"] is not None:
            lines["shown first"] = f"preferred in {_rate(judge['shown_first'])} of the verdicts"
        if judge["longer"] is not None:
            lines["longer"] = f"preferred in {_rate(judge['longer'])} of the decided pairs"
    first, second = judge["characters"]
    lines["characters"] = f"{first:,.0f} against {second:,.0f} in an answer"
    lines["unreadable"] = f"{judge['unreadable']:,} of {judge['pairs']:,} pairs"
    trust = judge["trust"]
    lines["trusted" if trust["trusted"] else "NOT TRUSTED"] = trust["reason"]
    return lines


def _rate(share: Json) -> str:
    digits = max(2, decimals([share])) if math.isfinite(share["mean"]) else 2
    return f"{fixed(share['mean'], digits)} {bounds(share, digits)}"
