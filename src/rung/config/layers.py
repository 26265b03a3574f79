"""Which layers are meant, by number or by name."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from rung.config.model import StudentLayers
from rung.errors import ConfigError


def resolve_layers(layers: Iterable[int] | str | None, present: Collection[int]) -> set[int]:
    """Numbers of the layers meant, out of those present: numbers, a range "15-29", a third by name, None for all.

    Raises `ConfigError` for one that is not there.
    """
    top = max(present)
    if layers is None:
        return set(present)
    if isinstance(layers, str):
        third = max(1, (top + 1) // 3)
        thirds = {"first": (0, third - 1), "middle": (third, top - third), "last": (top + 1 - third, top)}
        first, last = thirds.get(layers) or (int(number) for number in layers.split("-"))
        layers = range(first, last + 1)
        if not layers:
            raise ConfigError("no layer lies in this range", where="method.layers", given=f"{first}-{last}")
    if missing := sorted(set(layers) - set(present)):
        raise ConfigError("no such layer", where="method.layers", given=missing, allowed=f"0 to {top}")
    return set(layers)


def student_layers(layers: StudentLayers, count: int) -> tuple[int, ...]:
    """Numbers of a teacher's layers that stay. Raises `ConfigError` for some that are not there, or all of them."""
    half = max(1, count // 2)
    if layers == "every_other":  # evenly, first and last among them: 0, 2, 4, 7, 9, 11 of twelve
        own = tuple(sorted({round(i * (count - 1) / max(1, half - 1)) for i in range(half)}))
    elif layers == "first":
        own = tuple(range(half))
    elif layers == "last":
        own = tuple(range(count - half, count))
    else:
        own = tuple(layers)
    if sorted(set(own)) != list(own) or not own or own[0] < 0 or own[-1] >= count:
        allowed = f"rising numbers from 0 to {count - 1}"
        raise ConfigError("these are no layers of the teacher", where="model.layers", given=layers, allowed=allowed)
    if len(own) == count:
        raise ConfigError("a student with all layers is its teacher", where="model.layers", given=layers)
    return own
