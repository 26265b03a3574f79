"""People's preference among the rungs of a climb, from `evaluation.human`: beside the scores, and where they disagree.

People labeled answers. A vote counts where the rungs still give these answers to this question, so that labels of an
earlier run of the climb never speak for other answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

from rung.commands.climb_results import MeasuredRung
from rung.config.run import RunConfig
from rung.errors import ConfigError
from rung.evaluation.evaluate import PERPLEXITY
from rung.human_labels.data import LabelData, LabeledVote
from rung.human_labels.items import Item
from rung.human_labels.result import read_labels, system_comparisons, system_strengths
from rung.human_labels.votes import Comparison
from rung.results.base import Estimate
from rung.results.ladder import HumanPreference, Ladder, LadderRow
from rung.scoring.recommendation import paired_gain
from rung.scoring.stats import score_interval

WHERE = "evaluation.human"


def read_people(config: RunConfig) -> LabelData | None:
    """The labels that the config names. Raises an error of `WHERE` where they compare no answers."""
    if config.evaluation.human is None:
        return None
    if not Path(config.evaluation.human).exists():
        hint = "rung label compare CLIMB -o FOLDER lets people compare the answers of rungs"
        raise ConfigError("no labels are here", where=WHERE, given=config.evaluation.human, hint=hint)
    data = read_labels(config.evaluation.human)
    if data.kind == "correct":
        raise ConfigError("corrected answers compare nothing", where=WHERE, given=config.evaluation.human)
    return data


def with_people(
    ladder: Ladder, config: RunConfig, measured: Sequence[MeasuredRung], people: LabelData | None
) -> Ladder:
    """The ladder with people's preference; where no vote is on answers that these rungs give, it says so."""
    if people is None:
        return ladder
    current = current_labels(people, measured)
    strengths = system_strengths(current)
    counted = len({(vote.person, *vote.task) for vote, _ in _comparing(current)})
    preference = HumanPreference(
        source=people.source,
        people=len({vote.person for vote, _ in _comparing(current)}),
        votes=counted,
        other_votes=len({(vote.person, *vote.task) for vote, _ in people.comparisons()}) - counted,
        systems=tuple(strengths),
        conflicts=tuple(_conflicts(config, measured, current)),
    )
    rates = {system.system: system.win_rate for system in strengths}
    rows: list[LadderRow] = [row.replace(human=rates.get(row.rung)) for row in ladder.rows]
    return ladder.replace(human=preference, rows=tuple(rows))


def current_labels(people: LabelData, measured: Sequence[MeasuredRung]) -> LabelData:
    """The labels with the systems that are rungs, and of these with the answers that they give now."""
    answers: dict[tuple[str, str], set[str]] = {}
    for rung in measured:
        for item in rung.evaluations[0].items:
            answers.setdefault((rung.config.label, item.question), set()).add(item.answer.strip())
    items = {item.id: _current(item, answers) for item in people.items.values()}
    return replace(people, items=items)


def _current(item: Item, answers: Mapping[tuple[str, str], set[str]]) -> Item:
    kept = []
    for answer in item.answers:
        systems = tuple(name for name in answer.systems if answer.text in answers.get((name, item.question), ()))
        kept.append(replace(answer, systems=systems))
    return replace(item, answers=tuple(kept))


def _comparing(data: LabelData) -> list[tuple[LabeledVote, Comparison]]:
    """Votes on two answers that both have a rung."""
    return [
        (vote, comparison)
        for vote, comparison in data.comparisons()
        if all(data.items[vote.item].answers[i].systems for i in (comparison.first, comparison.second))
    ]


def _conflicts(config: RunConfig, measured: Sequence[MeasuredRung], people: LabelData) -> list[str]:
    """Pairs of rungs of which people surely prefer one, and the deciding metric the other."""
    comparisons, clusters = system_comparisons(people)
    if comparisons is None:
        return []
    index = {name: i for i, name in enumerate(comparisons.systems)}
    found = []
    for lower, upper in combinations([m for m in measured if m.config.label in index], 2):
        a, b = index[lower.config.label], index[upper.config.label]
        rows = [
            i for i, pair in enumerate(zip(comparisons.first, comparisons.second, strict=True)) if set(pair) == {a, b}
        ]
        if not rows:
            continue
        wins = [comparisons.outcomes[i] if comparisons.first[i] == b else 1.0 - comparisons.outcomes[i] for i in rows]
        share = score_interval(wins, [clusters[i] for i in rows])
        gain = _metric_gain(config, lower, upper)
        prefers_upper = share.low > 0.5
        if (prefers_upper and gain.mean < 0) or (share.high < 0.5 and gain.mean > 0):
            found.append(_conflict_text(config, lower, upper, share, gain))
    return found


def _metric_gain(config: RunConfig, lower: MeasuredRung, upper: MeasuredRung) -> Estimate:
    """Upper minus lower in the deciding metric, so that more is better."""
    metric = config.evaluation.metrics[0]
    first, in_nats = lower.evaluations[0], metric == PERPLEXITY
    tables = (lower.table(metric), upper.table(metric))
    gain = paired_gain(*tables, first.clusters, weights=first.weights(metric), seed=config.seed, in_nats=in_nats)
    return gain.replace(mean=-gain.mean, low=-gain.high, high=-gain.low) if in_nats else gain


def _conflict_text(config: RunConfig, lower: MeasuredRung, upper: MeasuredRung, share: Estimate, gain: Estimate) -> str:
    metric, names = config.evaluation.metrics[0], (lower.config.label, upper.config.label)
    if share.mean < 0.5:  # said of the rung that people prefer
        share = share.replace(mean=1 - share.mean, low=1 - share.high, high=1 - share.low)
        gain, names = gain.replace(mean=-gain.mean, low=-gain.high, high=-gain.low), names[::-1]
    other, preferred = names
    certainty = "surely lower" if gain.high < 0 else "lower, though not surely"
    share_text = f"{share.mean:.2f} [{share.low:.2f}, {share.high:.2f}] of their comparisons"
    gain_text = f"{gain.mean:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}]"
    return f"people prefer {preferred} to {other} ({share_text}), whose {metric} is {certainty} ({gain_text})"
