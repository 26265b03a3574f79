"""All votes of a labeling folder or of a file of another tool, in one form, and the units that people agree on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rung.human_labels.items import Item
from rung.human_labels.store import LabelStore
from rung.human_labels.tasks import LabelKind
from rung.human_labels.votes import Comparison, Vote


@dataclass(frozen=True, slots=True)
class LabeledVote:
    """One vote of one person on an item."""

    person: str
    item: str
    shown: tuple[int, ...]
    """The answers in the order in which they were shown; empty where a file does not say."""
    vote: Vote
    note: str = ""
    seconds: float | None = None
    at: str = ""
    is_repeat: bool = False

    @property
    def task(self) -> tuple[str, tuple[int, ...]]:
        """The item and the answers that were shown, in any order."""
        return self.item, tuple(sorted(self.shown))


@dataclass(frozen=True)
class LabelData:
    """The votes of a folder or a file."""

    source: str
    kind: LabelKind
    items: Mapping[str, Item]
    people: Sequence[str]
    votes: Sequence[LabeledVote]
    open_tasks: Mapping[str, int] = field(default_factory=dict)
    """Tasks of each person without a vote."""

    @property
    def first_votes(self) -> list[LabeledVote]:
        """The votes that count: not skipped, and of a task that a person had twice the first."""
        counted: dict[object, LabeledVote] = {}
        for vote in sorted(self.votes, key=lambda vote: vote.is_repeat):
            if vote.vote.kind != "skipped":
                # a file may hold several votes of a person on an item, each of other answers
                counted.setdefault((vote.person, *vote.task, vote.vote.outcome and vote.vote.outcome[:2]), vote)
        return list(counted.values())

    def comparisons(self) -> Iterator[tuple[LabeledVote, Comparison]]:
        """Every pair of answers that a counted vote compares; ratings of one item by one person compare its answers."""
        for vote in self.first_votes:
            for comparison in vote.vote.comparisons():
                yield vote, comparison
        if self.kind == "rate":
            yield from self._rated_pairs()

    def _rated_pairs(self) -> Iterator[tuple[LabeledVote, Comparison]]:
        by_item: dict[tuple[str, str], list[LabeledVote]] = defaultdict(list)
        for vote in self.first_votes:
            by_item[vote.person, vote.item].append(vote)
        for votes in by_item.values():
            ranks = {vote.shown[0]: -int(vote.vote.score or 0) for vote in votes}
            for comparison in Vote("rank", ranks=ranks).comparisons():
                yield votes[0], comparison


Unit = tuple[str, tuple[int, ...]]
"""What people agree on: an item and a pair of its answers, or one answer that is rated."""


def labels_by_unit(data: LabelData) -> dict[Unit, dict[str, object]]:
    """What each person said of each unit: an outcome, or a score. Corrections have none."""
    units: dict[Unit, dict[str, object]] = defaultdict(dict)
    if data.kind == "rate":
        for vote in data.first_votes:
            units[vote.item, vote.shown[:1]][vote.person] = vote.vote.score
    else:
        for vote, comparison in data.comparisons():
            units[vote.item, comparison[:2]][vote.person] = comparison.outcome
    return dict(units)


def read_label_folder(folder: Path) -> LabelData:
    """The votes of a folder, which may be labeled at the same time. Raises `CheckpointError` where there is none."""
    store = LabelStore.open(folder, is_read_only=True)
    try:
        votes = []
        for cast in store.votes():
            slot, person = store.slots[cast.person][cast.position], store.people[cast.person]
            details = (cast.note, cast.seconds, cast.at, slot.is_repeat)
            votes.append(LabeledVote(person, slot.task.item.id, slot.shown, cast.vote, *details))
        done = [len(store.progress(person)[0]) for person in range(len(store.people))]
        counts = zip(store.people, store.slots, done, strict=True)
        open_tasks = {name: len(slots) - count for name, slots, count in counts}
        return LabelData(str(folder), store.settings.kind, store.items, store.people, votes, open_tasks)
    finally:
        store.close()
