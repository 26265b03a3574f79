"""The configs of the runs of a climb: what each rung takes from the sections of the climb, and what is its own.

A rung is a mapping of settings that differ, so its sections are merged as plain values and validated as a whole config:
an error in one names the rung and the setting. The price is that every run of a climb carries the whole config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rung.config.climb import DISTILLED_PROMPT, UNTUNED, WITH_SHOTS, OnTopConfig, RungConfig, base_title
from rung.config.data import DataConfig
from rung.config.io import config_to_dict, parse_config
from rung.config.model import WITHOUT_RUN_SETTINGS, ModelConfig
from rung.config.run import RunConfig

_OF_ONE_BASE = ("name", *WITHOUT_RUN_SETTINGS, "template", "template_kwargs")
"""Settings of the section `model` that say nothing of another base."""


def rung_run_config(
    config: RunConfig, rung: RungConfig, output: str, seed: int, instruction: str | None = None
) -> RunConfig:
    """The config of the run of a tuned rung.

    A rung with the method of the config takes over the sections `method` and `training`. A rung with another method
    starts from the defaults of that method, including its learning rate: a rate that suits one method can ruin another
    (decision 0006). `instruction` is the one that the climb chose, for a rung that distills a prompt.
    """
    base, kind = config_to_dict(config), rung.method_kind
    is_same_method = kind == config.method.kind
    method = {**(base["method"] if is_same_method else {"kind": kind}), **rung.method, "kind": kind}
    training = {**base["training"], **({} if is_same_method else {"learning_rate": None}), **rung.training}
    # labels of people are on the answers of rungs, which no run can see
    evaluation = {**base["evaluation"], "context": rung.context_of(config.evaluation.context), "human": None}
    sections = {"method": method, "training": training, "evaluation": evaluation, **_own_sections(base, rung)}
    if rung.data:
        # they are chosen on the validation split of the climb, which this run does not have
        sections["climb"] = {**base["climb"], "instructions": ()}
    if rung.kind == DISTILLED_PROMPT:
        evaluation["instruction"] = instruction or next(iter(_instructions(config)), None)
        sections["objective"] = _prompt_distillation(config, rung)
    return parse_config({**base, **sections, "output": output, "seed": seed}, f"climb.rungs {rung.label}")


def rung_model(config: RunConfig, rung: RungConfig) -> ModelConfig:
    """The base of a rung: the section `model`, with the rung's own settings."""
    return _with_own_sections(config, rung).model


def rung_data(config: RunConfig, rung: RungConfig) -> DataConfig:
    """The rows that a rung learns from or shows: the section `data`, or its own."""
    return _with_own_sections(config, rung).data


def model_titles(config: RunConfig) -> dict[str, str]:
    """Of each rung, by its label, a short name of its base; equal names are equal settings.

    The last part of the model's name, or all of it where two bases would be called the same; where one base stands in
    the ladder with several settings, those of the rung behind it.
    """
    models = {rung.label: rung_model(config, rung) for rung in config.climb.rungs}
    distinct = {model.model_dump_json(): _base_name(model) for model in models.values()}
    titles: dict[str, str] = {}  # by the settings, as JSON
    for rung in config.climb.rungs:
        model = models[rung.label]
        base, names = _base_name(model), set(distinct.values())
        is_short = [name for name in names if base_title(name) == base_title(base)] == [base]
        title = ("student of " if model.student_of else "") + (base_title(base) if is_short else base)
        own = [f"{name} {value}" for name, value in rung.model.items() if name not in ("name", "student_of")]
        has_variants = list(distinct.values()).count(base) > 1
        titles.setdefault(model.model_dump_json(), ", ".join([title, *(own if has_variants else ())]))
    return {label: titles[model.model_dump_json()] for label, model in models.items()}


def _base_name(model: ModelConfig) -> str:
    return model.student_of or model.name


def on_top_run_config(config: RunConfig, on_top: OnTopConfig, base_run: str, output: str, seed: int) -> RunConfig:
    """The config of a run on top of a tuned run in folder `base_run`. Data of its own gets no test split."""
    base = config_to_dict(config)
    rung = next(r for r in config.climb.rungs if r.label == on_top.base_rung)
    data = base["data"] if not on_top.data else _own_data(base, on_top.data)
    training = {**base["training"], "learning_rate": None, **on_top.training}
    model = {**_own_model(base, rung.model), "name": base_run, **WITHOUT_RUN_SETTINGS}
    sections = {"model": model, "data": data, "method": on_top.method, "objective": on_top.objective}
    context = rung.context_of(config.evaluation.context)
    evaluation = {**base["evaluation"], "context": context, "dequantize": False}
    # validation looks at `climb` too, for example whether anything retrieves: give it this run alone
    climb = {"rungs": [{"kind": "rag" if context == "retrieved" else "zero_shot"}]}
    sections |= {"training": training, "evaluation": evaluation, "climb": climb, "output": output, "seed": seed}
    if context != "retrieved":
        evaluation.pop("retrieve", None)
    return parse_config({**base, **sections}, f"climb.on_top {on_top.label}")


def _with_own_sections(config: RunConfig, rung: RungConfig) -> RunConfig:
    if not (rung.data or rung.model):
        return config
    base = config_to_dict(config)
    # without the other sections: nothing in them is about a rung that trains nothing
    sections = {"model": base["model"], "data": base["data"], "output": config.output, **_own_sections(base, rung)}
    return parse_config(sections, f"climb.rungs {rung.label}")


def _own_sections(base: Mapping[str, Any], rung: RungConfig) -> dict[str, Any]:
    """The sections `model` and `data` of a rung, as far as they are its own."""
    sections = {"model": _own_model(base, rung.model)} if rung.model else {}
    if rung.data:
        # nothing is chosen on rows of which only worked examples are shown
        sections["data"] = _own_data(base, {**({"validation": 0.0} if rung.kind in UNTUNED else {}), **rung.data})
    return sections


def _own_model(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The section `model` with settings of a rung, which may name another base."""
    section, (name, student_of) = base["model"], (own.get("name"), own.get("student_of"))
    is_other_name = name is not None and (section["student_of"] is not None or name != section["name"])
    if is_other_name or student_of not in (None, section["student_of"]):
        section = {key: value for key, value in section.items() if key not in _OF_ONE_BASE}
    return {**section, **own}


def _own_data(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The section `data` of rows that only one rung has: all of them are for training and its validation."""
    return {"validation": base["data"]["validation"], "test": 0.0, **own}


def _instructions(config: RunConfig) -> list[str]:
    """All instructions of a climb, that of the evaluation first."""
    return [*filter(None, [config.evaluation.instruction]), *config.climb.instructions]


def _prompt_distillation(config: RunConfig, rung: RungConfig) -> dict[str, Any]:
    """The section `objective` of a rung that distills the prompt of an untuned rung."""
    replaced = config.climb.replaced_rung(rung)
    shots = (replaced.shots or config.evaluation.shots) if replaced.kind in WITH_SHOTS else 0
    sees = {
        "instruction": bool(_instructions(config)),
        "shots": shots,
        "example_selection": replaced.example_selection,
        "context": replaced.context_of(config.evaluation.context),
    }
    return {"kind": "distill", "teacher": "base", "teacher_sees": sees}
