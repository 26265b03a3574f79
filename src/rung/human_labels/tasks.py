"""Tasks of people: what is asked of an item, who is asked, and in which order the answers are shown.

Everything is drawn from a seed, the item and the person, so that two people see other orders and a restart shows the
same. Orders are balanced within a person: of the comparisons of one pair of systems, each system is shown first in half
of them, so that a person who always takes the left answer gives each system 0.5.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import combinations
from typing import Literal, get_args

from rung.human_labels.items import Item

LabelKind = Literal["rank", "compare", "rate", "correct"]
LABEL_KINDS: tuple[LabelKind, ...] = get_args(LabelKind)
LEAST_ANSWERS: dict[LabelKind, int] = {"rank": 2, "compare": 2, "rate": 1, "correct": 1}
"""Distinct answers that an item needs."""


@dataclass(frozen=True, slots=True)
class Task:
    """What is asked: an item, and which of its answers are shown."""

    item: Item
    answers: tuple[int, ...]
    """Indices into the answers of the item."""

    @property
    def id(self) -> str:
        """The item and the indices, for example 0f3a…:0-2."""
        return f"{self.item.id}:{'-'.join(map(str, self.answers))}"


@dataclass(frozen=True, slots=True)
class Slot:
    """A task in the list of a person."""

    task: Task
    shown: tuple[int, ...]
    """The answers of the task in the order in which they are shown, as indices into those of the item."""
    is_repeat: bool = False
    """Whether the person has this task a second time, to measure consistency."""


def make_tasks(kind: LabelKind, items: Sequence[Item]) -> list[Task]:
    """The tasks of items: one an item; of `compare` one for each pair of answers, of `rate` one for each answer.

    Items with fewer distinct answers than the kind needs have no task.
    """
    tasks = []
    for item in items:
        indices = tuple(range(len(item.answers)))
        if len(indices) < LEAST_ANSWERS[kind]:
            continue
        if kind == "compare":
            tasks += [Task(item, pair) for pair in combinations(indices, 2)]
        elif kind == "rate":
            tasks += [Task(item, (index,)) for index in indices]
        else:
            tasks.append(Task(item, indices))
    return tasks


def assign(tasks: Sequence[Task], people: int, overlap: float, repeat: float, seed: int) -> list[list[Slot]]:
    """The list of each person: shared items, a share of the others, and repeats of some of both.

    All tasks of an item go to the same people, so that its answers are judged by one measure. A share of `overlap` of
    all items is given to every person, the others to one person each. Each person has a share
    of `repeat` of the own tasks again, with the answers in the reverse order, as late as possible after the first time.
    """
    by_item: dict[str, list[Task]] = defaultdict(list)
    for task in tasks:
        by_item[task.item.id].append(task)
    drawn = sorted(by_item, key=lambda item: _draw(seed, "item", item))
    shared_count = math.ceil(overlap * len(drawn) - 1e-9) if people > 1 else 0
    shared, others = drawn[:shared_count], drawn[shared_count:]
    lists = [[*shared, *others[person::people]] for person in range(people)]
    return [
        _slots([task for item in items for task in by_item[item]], person, repeat, seed)
        for person, items in enumerate(lists)
    ]


def _slots(tasks: Sequence[Task], person: int, repeat: float, seed: int) -> list[Slot]:
    ordered = sorted(tasks, key=lambda task: _draw(seed, "order", person, task.id))
    slots = [Slot(task, shown) for task, shown in zip(ordered, _shown_orders(ordered, person, seed), strict=True)]
    # rounded: of a list of a few tasks none comes again, which a person would see at once
    n, count = len(slots), math.floor(repeat * len(slots) + 0.5)
    drawn = sorted(range(n), key=lambda i: _draw(seed, "repeat", person, ordered[i].id))[:count]
    # spread over the second half, so that a person cannot tell where the repeats begin
    places = {i: max(i + 0.5, n - number * n / (2 * count)) for number, i in enumerate(sorted(drawn, reverse=True))}
    placed = [(float(i), slot) for i, slot in enumerate(slots)]
    placed += [(place, Slot(slots[i].task, slots[i].shown[::-1], is_repeat=True)) for i, place in places.items()]
    return [slot for _, slot in sorted(placed, key=lambda pair: pair[0])]


def _shown_orders(tasks: Sequence[Task], person: int, seed: int) -> list[tuple[int, ...]]:
    """A random order of each task; of pairs of answers of the same systems half are turned round, drawn by the seed.

    Which half is not to be told from the tasks before: with alternating sides a person would know the systems.
    """
    orders = [tuple(sorted(t.answers, key=lambda i: _draw(seed, "shown", person, t.id, i))) for t in tasks]
    pairs: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, task in enumerate(tasks):
        if len(task.answers) == 2:
            pairs[tuple(sorted(",".join(task.item.answers[i].systems) for i in task.answers))].append(number)
    for names, numbers in pairs.items():
        drawn = sorted(numbers, key=lambda number: _draw(seed, "side", person, tasks[number].id))
        # of an odd number the one that is left goes to either side
        half = (len(drawn) + _draw(seed, "odd", person, *names)[0] % 2) // 2
        for place, number in enumerate(drawn):
            item = tasks[number].item
            pair = sorted(tasks[number].answers, key=lambda i: (item.answers[i].systems, i))
            orders[number] = (pair[1], pair[0]) if place < half else (pair[0], pair[1])
    return orders


def _draw(*key: object) -> bytes:
    """A pseudorandom number of a key, as bytes that sort."""
    return sha256("\0".join(map(str, key)).encode(errors="surrogatepass")).digest()
