"""Resolves layer settings (numbers, ranges, names) to layer numbers. Used by methods, models and the planner."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from rung.config.model import StudentLayers
from rung.errors import ConfigError


def resolve_layers(layers: Iterable[int] | str | None, available: Collection[int]) -> set[int]:
    """Layer numbers for a setting: numbers, a range such as "15-29", a third of the layers by name, or None for all.

    Raises `ConfigError` for layers that are not in `available`.
    """
    last = max(available)
    if layers is None:
        return set(available)
    if isinstance(layers, str):
        third = max(1, (last + 1) // 3)
        # the middle third takes the rest where the count is not a multiple of 3
        thirds = {"first": (0, third - 1), "middle": (third, last - third), "last": (last + 1 - third, last)}
        start, end = thirds.get(layers) or (int(number) for number in layers.split("-"))
        layers = range(start, end + 1)
        if not layers:
            raise ConfigError("no layer lies in this range", where="method.layers", given=f"{start}-{end}")
    if missing_layers := sorted(set(layers) - set(available)):
        raise ConfigError("no such layer", where="method.layers", given=missing_layers, allowed=f"0 to {last}")
    return set(layers)


def student_layers(layers: StudentLayers, count: int) -> tuple[int, ...]:
    """Layers of the teacher that the student keeps. Raises `ConfigError` for missing layers, and for all of them."""
    half_count = max(1, count // 2)
    if layers == "every_other":  # evenly spaced with first and last, as DistilBERT: 0, 2, 4, 7, 9, 11 of twelve
        kept_layers = tuple(sorted({round(i * (count - 1) / max(1, half_count - 1)) for i in range(half_count)}))
    elif layers == "first":
        kept_layers = tuple(range(half_count))
    elif layers == "last":
        kept_layers = tuple(range(count - half_count, count))
    else:
        kept_layers = tuple(layers)
    # rising: a student keeps the order of its teacher's layers
    is_rising = sorted(set(kept_layers)) == list(kept_layers)
    if not is_rising or not kept_layers or kept_layers[0] < 0 or kept_layers[-1] >= count:
        allowed = f"rising numbers from 0 to {count - 1}"
        raise ConfigError("these are no layers of the teacher", where="model.layers", given=layers, allowed=allowed)
    if len(kept_layers) == count:
        raise ConfigError("a student with all layers is its teacher", where="model.layers", given=layers)
    return kept_layers
