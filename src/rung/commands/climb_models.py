"""The bases of a climb: which rung stands on which, and the one that is in memory.

A ladder may hold several bases, and only one fits into memory beside a training, so a base is kept until a rung changes
it or stands on another. The price is a base loaded anew after every training, and whenever the ladder changes from one
base to the other. Bases are told apart by their settings, and named by their titles in fingerprints and in the ladder.
`climb.py` holds one `ClimbModels`.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

from rung.config.climb import RungConfig
from rung.config.climb_runs import model_titles, rung_model
from rung.config.run import RunConfig
from rung.errors import ConfigError
from rung.models.base_model import BaseModel
from rung.models.license import base_license
from rung.planning.architecture import read_shape
from rung.runs import checks
from rung.runs.checks import DoesNotFitError
from rung.runs.load import device, load_base_on_device, load_base_to_train, with_arithmetic
from rung.training.memory_use import return_freed_memory

HARDWARE = ("compute_dtype", "matmul")
"""Fingerprints that a resumed climb takes its compute type and routine from."""


class ClimbModels:
    """The bases of a climb by their titles, in the order of the rungs. One at a time is in memory."""

    def __init__(self, config: RunConfig, recorded: Mapping[str, str]) -> None:
        """`recorded` holds the fingerprints of the climb that is resumed. Raises `ConfigError` for bad settings."""
        self.config, self._recorded = config, recorded
        self._titles = model_titles(config)
        first_rungs: dict[str, RungConfig] = {}
        for rung in config.climb.rungs:
            first_rungs.setdefault(self._titles[rung.label], rung)
        self._first_rungs = first_rungs
        self._models = {title: rung_model(config, rung) for title, rung in first_rungs.items()}
        self._cached: tuple[str, BaseModel] | None = None

    @property
    def titles(self) -> list[str]:
        """All bases, in the order of the rungs."""
        return list(self._models)

    def title(self, rung: RungConfig) -> str:
        """The base of a rung. A search gives a rung other settings, but no other base."""
        return self._titles[rung.label]

    def config_on(self, title: str) -> RunConfig:
        """The config of the climb with this base."""
        return self.config.model_copy(update={"model": self._models[title]})

    def fingerprint_name(self, title: str, name: str) -> str:
        """The name of a fingerprint of a base; that of the section `model` has no title in it."""
        return name if self._models[title] == self.config.model else f"{name} of {title}"

    def with_recorded_arithmetic(self, config: RunConfig, title: str) -> RunConfig:
        """A config on this base, with the compute type and the matmul routine that a resumed climb began with."""
        names = {name: self.fingerprint_name(title, name) for name in HARDWARE}
        return with_arithmetic(config, {name: self._recorded.get(key) for name, key in names.items()})

    def check_names(self) -> None:
        """Raise `ConfigError` or `PlanError` for a base that cannot be, before the first of several is loaded."""
        for title, model in self._models.items() if len(self._models) > 1 else ():
            try:
                read_shape(model)
            except ConfigError as error:
                raise self._in_rung(error, title) from error

    def load_to_check(self, title: str) -> BaseModel:
        """A base whose tokenizer, context and fingerprint are to be read; one with room for it stays in memory."""
        config = self.with_recorded_arithmetic(self.config_on(title), title)
        try:
            if self._quantizes_always(title) or not self._fits(title):
                self.release()
                return load_base_on_device(config.model, stream_linears=True)
            return self.pristine(title)
        except ConfigError as error:
            raise self._in_rung(error, title) from error

    def _quantizes_always(self, title: str) -> bool:
        """Whether no rung needs this base in full width. That of the climb is loaded as ever."""
        rungs = [rung for rung in self.config.climb.rungs if self.title(rung) == title]
        return all(rung.model and rung.kind == "qlora" for rung in rungs)

    def _fits(self, title: str) -> bool:
        try:
            self.refuse_if_too_large(self._first_rungs[title])
        except DoesNotFitError:
            return False
        return True

    def refuse_if_too_large(self, rung: RungConfig) -> None:
        """Raise `DoesNotFitError` for an untuned rung on a base of its own that does not fit into memory."""
        if rung.model:
            title = self.title(rung)
            model = self.with_recorded_arithmetic(self.config_on(title), title).model
            checks.refuse_base_if_too_large(model, device())

    def release_others(self, title: str) -> None:
        """Forget another base and give its memory back, so that it is not in the peak of a rung on this one."""
        if self._cached is not None and self._cached[0] != title:
            self.release()
            gc.collect()  # a model holds itself in circles
            return_freed_memory()

    def pristine(self, title: str) -> BaseModel:
        """A base that no rung has trained; loaded again if the last one was used, or is another."""
        self.release_others(title)
        if self._cached is None:
            config = self.with_recorded_arithmetic(self.config_on(title), title)
            self._cached = title, load_base_on_device(config.model)
        return self._cached[1]

    def to_train(self, config: RunConfig, title: str) -> BaseModel:
        """A base for one run. Training changes it, so it must not be offered to the next rung."""
        if config.method.kind == "qlora":
            self.release()  # only one base may be in memory, and this one is quantized from its file
            return load_base_to_train(self.with_recorded_arithmetic(config, title))
        base = self.pristine(title)
        self._cached = None
        return base

    def release(self) -> None:
        """Forget the base in memory, before another model is loaded."""
        self._cached = None

    def facts(self, title: str, base: BaseModel) -> dict[str, Any]:
        """Of a base, what the ladder shows and only the model knows."""
        return {"parameters": base.shape.parameters, "license": base_license(self._models[title])}

    def _in_rung(self, error: ConfigError, title: str) -> ConfigError:
        """The error of a base, with the rung that names it."""
        rung = self._first_rungs[title]
        if not rung.model:
            return error
        where = f"climb.rungs {rung.label}: {error.where or 'model'}"
        return type(error)(error.summary, where=where, given=error.given, allowed=error.allowed, hint=error.hint)
