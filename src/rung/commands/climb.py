"""How high must I climb? Measures the rungs on one held-out test set and recommends the lowest that is enough."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from rung.commands import search
from rung.commands.climb_prompts import ClimbPrompts
from rung.commands.forgetting import RESULT_FILE, forgetting_task, measure_forgetting, read_forgetting, require_room
from rung.commands.ladder import (
    AnyRung,
    CurvePoint,
    ForgettingResult,
    Ladder,
    MeasuredRung,
    SkippedRung,
    build_ladder,
    read_rung_result,
    rung_folder,
    score_of_rung,
    store_rung_result,
)
from rung.config.climb import UNTUNED, OnTopConfig, RungConfig
from rung.config.evaluation import Context
from rung.config.io import ConfigSource, config_to_dict, on_top_run_config, resolve_config, rung_run_config
from rung.config.method import FullConfig
from rung.config.run import RunConfig
from rung.console import print_status
from rung.data.chat import ChatTemplate
from rung.data.deduplication import prompt_words
from rung.data.splits import Splits
from rung.errors import CheckpointError, ConfigError, DataError, PlanError, RungError
from rung.evaluation.evaluate import PERPLEXITY, Evaluation, evaluate
from rung.evaluation.prompting import PromptFormat
from rung.files import is_run_folder
from rung.models.base_model import BaseModel
from rung.models.policy import NoMethod, Policy
from rung.report.html import write_report
from rung.runs import checks
from rung.runs.checks import DoesNotFitError
from rung.runs.dataset import RunData, read_splits, tokenize_splits
from rung.runs.load import LoadedRun, dequantize_if_configured, device, load_base_on_device, open_run
from rung.runs.train import train_on_data
from rung.training.run_folder import RunFolder, StopCheck, is_climb, read_manifest, reset_peak_memory, write_json
from rung.types import Record

UNTRAINED_COST = ("climb.forgetting",)
"""What a climb may be gone on with otherwise: it is measured beside its rungs."""


class Climb:
    """A climb in its folder. Finished rungs found there are not repeated; an unfinished one goes on."""

    def __init__(self, config: RunConfig, *, overwrite: bool = False) -> None:
        self.config = config
        self.path = Path(config.output)
        if config.objective.kind == "reward":
            raise ConfigError("a reward model writes nothing that a ladder could score", where="objective.kind")
        for rung in config.climb.rungs:  # a rung that cannot be is an error before anything is spent
            if rung.kind not in UNTUNED:
                rung_run_config(config, rung, config.output, config.seed)
        for then in config.climb.on_top:
            on_top_run_config(config, then, config.output, config.output, config.seed)
        resume = is_run_folder(self.path) and not overwrite
        if resume and not is_climb(self.path):
            raise CheckpointError(
                "this folder holds a single run, not a climb", where=str(self.path), hint="name another output=..."
            )
        RunFolder.check(self.path, config_to_dict(config), resume=resume, overwrite=overwrite, free=UNTRAINED_COST)
        self._overwrite = overwrite
        self._fresh: BaseModel | None = None
        self._left: list[SkippedRung] = []

    @property
    def rungs(self) -> tuple[AnyRung, ...]:
        """All of them, lowest first."""
        return *self.config.climb.rungs, *self.config.climb.on_top

    def run(self) -> Ladder:
        """Measure what is missing and judge the whole; with nothing missing, no model is loaded."""
        splits = read_splits(self.config)
        self._refuse_other_fingerprint("data", splits.fingerprint)
        whole = all((place / "result.json").exists() for _, place in self._curve_points)
        whole = whole and all(self._read_json(place) for _, place in self._forgetting_runs)
        if whole and all(map(self._base_rung, self.rungs)) and not self._overwrite:
            return self._ladder()
        asking = ClimbPrompts(self.config, splits)
        for then in self.config.climb.on_top:  # before anything is spent
            self._check_on_top_rows(then, asking)
        named = self.config.climb.forgetting
        other = None if named is None else forgetting_task(self.config, named, self.config.evaluation.limit)
        fingerprints = {"data": splits.fingerprint}
        if asking.library is not None:
            fingerprints["documents"] = asking.library.fingerprint
            self._refuse_other_fingerprint("documents", fingerprints["documents"])
        self._fresh = base = load_base_on_device(self.config.model)
        fingerprints["base"] = base.fingerprint
        self._refuse_other_fingerprint("base", base.fingerprint)
        data = {context: self._shared_data(context, asking, base) for context in asking.contexts}
        own = next(iter(data.values()))
        asking.check_room(own.chat, base.context - self.config.evaluation.max_new_tokens)
        if other is not None:
            require_room(other, own.chat, base.context)
        resume = is_run_folder(self.path) and not self._overwrite
        claimed = RunFolder.acquire(
            self.path, config_to_dict(self.config), resume=resume, overwrite=self._overwrite, free=UNTRAINED_COST
        )
        with closing(claimed) as folder:
            folder.manifest.pop("error", None)  # of an earlier try
            folder.update(
                climb=True,
                status="running",
                config=config_to_dict(self.config),
                data=own.summary(),
                fingerprints=fingerprints,
            )
            return self._climb(folder, data, asking)

    def _shared_data(self, context: Context, asking: ClimbPrompts, base: BaseModel) -> RunData:
        """What rungs of a method without virtual tokens share: those take room, or stand inside the text."""
        evaluate = self.config.evaluation.model_copy(update={"context": context})
        config = self.config.model_copy(update={"method": FullConfig(), "evaluation": evaluate})
        return tokenize_splits(config, asking.splits, base, asking.library)

    def _climb(self, folder: RunFolder, data: dict[Context, RunData], asking: ClimbPrompts) -> Ladder:
        try:
            reached: AnyRung | None = None
            for rung in self.rungs:
                if reached is not None:
                    self._skip_rung(rung.label, f"{reached.label} surely reaches the target")
                elif (
                    self._measure_if_possible(rung, data, asking)
                    and self.config.climb.stop_at_target
                    and self._reaches_target(rung)
                ):
                    reached = rung
            self._measure_curve(asking)
            self._measure_forgetting()
        except KeyboardInterrupt:
            folder.update(status="interrupted")
            raise
        except RungError as error:
            folder.update(status="failed", error=str(error))
            raise
        ladder = self._ladder()
        folder.update(status="finished", ladder=ladder.to_json())
        return ladder

    def _ladder(self) -> Ladder:
        left = {one.rung for one in self._left}
        measured = [self._stored_rung(rung) for rung in self.rungs if rung.label not in left]
        if not measured:
            raise PlanError("no rung could be measured", where=str(self.path), given=self._left[0].why)
        ladder = build_ladder(self.config, measured, self._left)
        return replace(ladder, curve=tuple(self._measured_curve()), forgetting=tuple(self._forgetting_results()))

    def _base_rung(self, rung: AnyRung) -> bool:
        return all((folder / "result.json").exists() for folder in self._folders(rung))

    def _measure_if_possible(self, rung: AnyRung, data: dict[Context, RunData], asking: ClimbPrompts) -> bool:
        """Measure a rung, unless it does not fit or stands on one that was left out."""
        below = rung.base_rung if isinstance(rung, OnTopConfig) else None
        if below in {one.rung for one in self._left}:
            self._skip_rung(rung.label, f"it stands on {below}, which was not measured")
            return False
        try:
            self._measure(rung, data, asking)
        except DoesNotFitError as error:
            self._skip_rung(rung.label, error.summary)
            return False
        return True

    def _skip_rung(self, name: str, why: str) -> None:
        print_status(f"rung {name} is left out: {why}")
        self._left.append(SkippedRung(name, why))

    def _reaches_target(self, rung: AnyRung) -> bool:
        """Whether its whole interval lies beyond the target."""
        metric, target = self.config.evaluation.metrics[0], self.config.climb.target
        score = score_of_rung(self._stored_rung(rung).evaluations, metric)
        return target is not None and (score.high <= target if metric == PERPLEXITY else score.low >= target)

    def _refuse_other_fingerprint(self, what: str, fingerprint: str) -> None:
        """Rungs measured on other data or another base must not stand in one ladder."""
        known = is_run_folder(self.path) and not self._overwrite
        begun = read_manifest(self.path).get("fingerprints", {}) if known else {}
        if begun.get(what, fingerprint) != fingerprint:
            have = "have" if what == "documents" else "has"
            summary = f"the {what} {have} changed since this climb began"
            raise CheckpointError(summary, where=str(self.path), hint="start anew with --overwrite")

    def _folders(self, rung: AnyRung) -> list[Path]:
        """Where a rung's results stand: one folder a training seed."""
        seeds = 1 if rung.kind in UNTUNED else self.config.climb.seeds
        return [rung_folder(self.path, rung, number, seeds) for number in range(seeds)]

    def _stored_rung(self, rung: AnyRung) -> MeasuredRung:
        """A finished rung, from its files."""
        folders = self._folders(rung)
        evaluations = tuple(Evaluation.read(folder / "items.parquet") for folder in folders)
        costs = tuple(map(read_rung_result, folders))
        return MeasuredRung(rung, evaluations, costs)

    def _measure(self, rung: AnyRung, data: dict[Context, RunData], asking: ClimbPrompts) -> None:
        """What is missing of one rung."""
        folders = self._folders(rung)
        for number, folder in enumerate(folders):
            if (folder / "result.json").exists():
                continue
            print_status(f"rung {rung.label}" + (f", seed {number}" if len(folders) > 1 else ""))
            if isinstance(rung, OnTopConfig):
                self._measure_on_top(rung, folder, number, asking)
            elif rung.kind in UNTUNED:
                self._measure_untuned(rung, folder, next(iter(data.values())).chat, asking)
            else:
                self._measure_tuned(rung, folder, number, data[asking.context(rung)], asking)

    def _measure_untuned(self, rung: RungConfig, folder: Path, chat: ChatTemplate, asking: ClimbPrompts) -> None:
        """An untuned rung: the base with the strongest prompt the config has."""
        reset_peak_memory()
        policy = Policy(self._fresh_base(), NoMethod())

        def score(records: Sequence[Record], framing: PromptFormat) -> Evaluation:
            return evaluate(policy, chat, records, framing, self.config.evaluation, title=rung.label)

        cost: dict[str, Any] = {"trainable_parameters": 0, "train_seconds": 0.0}
        instruction = self.config.evaluation.instruction
        if asking.chooser == rung:
            cost |= asking.choose_instruction(rung, folder, score)
            instruction = cost["instruction"]
        elif asking.chooser is not None:
            instruction = read_rung_result(self._folders(asking.chooser)[0])["instruction"]
        asked = asking.for_rung(rung, instruction)
        store_rung_result(folder, score(asked.records, asked.prompt_format), {**cost, **asked.facts})

    def _measure_tuned(self, rung: RungConfig, folder: Path, number: int, data: RunData, asking: ClimbPrompts) -> None:
        """A tuned rung: a run in a folder of its own, then the bare question."""
        begun = is_run_folder(folder)
        if not begun:
            unsearched = rung_run_config(self.config, rung, str(folder), self.config.seed + number)
            checks.refuse_if_too_large(unsearched, device(), beyond=False)
        if self.config.climb.search is not None:
            rung = self._apply_search(rung, data, asking)
        config = rung_run_config(self.config, rung, str(folder), self.config.seed + number)

        def rows(base: BaseModel) -> RunData:
            own_rows = _changes_documents(config)
            return tokenize_splits(config, asking.splits, base, asking.library) if own_rows else data

        model = self._train_or_open(config, rows)
        manifest = read_manifest(folder)
        asked = asking.for_rung(rung, None)
        dequantize_if_configured(model.policy, config)
        result = evaluate(
            model.policy, model.chat, asked.records, asked.prompt_format, config.evaluation, title=rung.label
        )
        tried = search.read_search(self.path / "search" / rung.slug)
        store_rung_result(
            folder, result, {**_training_cost(manifest, folder), **asked.facts, **({"search": tried} if tried else {})}
        )

    def _train_or_open(self, config: RunConfig, data: Callable[[BaseModel], RunData]) -> LoadedRun:
        """The run of a config: opened where it is finished, otherwise trained, or resumed where it was stopped."""
        folder = Path(config.output)
        started = is_run_folder(folder)
        if started and read_manifest(folder)["status"] == "finished":
            return open_run(folder)
        base, self._fresh = self._fresh_base(), None  # training changes this base
        run_data = data(base)
        policy, _ = train_on_data(config, base, run_data, resume=started)
        return LoadedRun(policy, run_data.chat, config, "run")

    def _apply_search(self, rung: RungConfig, data: RunData, asking: ClimbPrompts) -> RungConfig:
        """The rung with settings chosen on the validation split, once for all training seeds."""
        place = self.path / "search" / rung.slug
        if (found := search.read_search(place)) is not None:
            return search.apply_settings(rung, found["chosen"])
        config = rung_run_config(self.config, rung, str(place), self.config.seed)

        def train(trial: RunConfig, stop_check: StopCheck) -> None:
            base, self._fresh = self._fresh_base(), None
            own = tokenize_splits(trial, asking.splits, base, asking.library) if _changes_documents(trial) else data
            train_on_data(trial, base, own, stop_check=stop_check)

        wanted = self.config.climb.search
        assert wanted is not None  # noqa: S101 -- for the type checker: asked by `_tune`
        return search.search_settings(config, wanted, rung, place, len(data.train.rows), train)

    @property
    def _curve_points(self) -> list[tuple[int, Path]]:
        """Points of the learning curve: numbers of rows, and where they stand."""
        return [(rows, self.path / "curve" / str(rows)) for rows in self.config.climb.curve]

    def _measured_curve(self) -> Iterator[CurvePoint]:
        """Those that were measured."""
        for _, place in self._curve_points:
            if (place / "result.json").exists():
                facts = read_rung_result(place)
                score = score_of_rung([Evaluation.read(place / "items.parquet")], self.config.evaluation.metrics[0])
                yield CurvePoint(facts["rung"], facts["rows"], score, facts["train_seconds"])

    def _measure_curve(self, asking: ClimbPrompts) -> None:
        """The highest tuned rung with fewer rows: each number of them a run of its own, scored on the same test."""
        tuned = [r for r in self.config.climb.rungs if r.kind not in UNTUNED and self._base_rung(r)]
        for rows, place in self._curve_points if tuned else ():
            if rows >= len(asking.splits.train):
                print_status(
                    f"learning curve: the rung itself has {len(asking.splits.train):,} rows, {rows:,} are passed over"
                )
            elif not (place / "result.json").exists():
                print_status(f"learning curve of {tuned[-1].label}: {rows:,} rows")
                try:
                    self._measure_curve_point(tuned[-1], rows, place, asking)
                except DoesNotFitError as error:
                    self._skip_rung(f"{tuned[-1].label}, {rows:,} rows", error.summary)

    @property
    def _forgetting_runs(self) -> list[tuple[str, Path]]:
        """Tuned rungs that are to be measured on other data, and where their first run stands."""
        asked = self.config.climb.forgetting is not None
        return [(r.label, self._folders(r)[0]) for r in self.rungs if asked and r.kind not in UNTUNED]

    def _measure_forgetting(self) -> None:
        for name, place in self._forgetting_runs:
            if (place / "result.json").exists() and not self._read_json(place):
                print_status(f"what {name} has forgotten")
                self._fresh = None  # one model at a time
                found = measure_forgetting(
                    str(place), str(self.config.climb.forgetting), limit=self.config.evaluation.limit
                )
                write_json(place / RESULT_FILE, found.to_json())

    def _forgetting_results(self) -> Iterator[ForgettingResult]:
        """What was found."""
        for name, place in self._forgetting_runs:
            if found := self._read_json(place):
                yield ForgettingResult(name, found["forgetting"], found["metrics"])

    def _read_json(self, place: Path) -> dict[str, Any]:
        return read_forgetting(place, self.config.climb.forgetting)

    def _measure_curve_point(self, rung: RungConfig, rows: int, place: Path, asking: ClimbPrompts) -> None:
        """One point of the curve. Its rows are the first of those that more rows would have."""
        found = search.read_search(self.path / "search" / rung.slug)
        own = search.apply_settings(rung, found["chosen"]) if found else rung
        config = rung_run_config(self.config, own, str(place), self.config.seed)
        config = config.model_copy(update={"data": config.data.model_copy(update={"limit": rows})})
        model = self._train_or_open(
            config, lambda base: tokenize_splits(config, read_splits(config), base, asking.library)
        )
        asked, manifest = asking.for_rung(rung, None), read_manifest(place)
        title = f"{rows:,} rows"
        result = evaluate(model.policy, model.chat, asked.records, asked.prompt_format, config.evaluation, title=title)
        learned = manifest["data"]["splits"]["train"]["rows"]
        store_rung_result(
            place, result, {**_training_cost(manifest, place), "rung": rung.label, "rows": learned, **asked.facts}
        )

    def _measure_on_top(self, then: OnTopConfig, folder: Path, number: int, asking: ClimbPrompts) -> None:
        """A run that begins where a tuned rung ended, asked as that one was."""
        own = next(rung for rung in self.config.climb.rungs if rung.label == then.base_rung)
        below = self._folders(own)[number]
        config = on_top_run_config(self.config, then, str(below), str(folder), self.config.seed + number)
        begun = is_run_folder(folder)
        if not begun:
            checks.refuse_if_too_large(config, device(), beyond=False)
        if not (begun and read_manifest(folder)["status"] == "finished"):
            self._fresh = None  # one model at a time
            splits, base = read_splits(config), load_base_on_device(config.model)
            train_on_data(config, base, tokenize_splits(config, splits, base, asking.library), resume=begun)
        manifest, model = read_manifest(folder), open_run(folder)
        asked = asking.for_rung(own, None)
        result = evaluate(
            model.policy, model.chat, asked.records, asked.prompt_format, self.config.evaluation, title=then.label
        )
        # what it stands on was trained as well
        before, cost = read_rung_result(below), _training_cost(manifest, folder)
        both = {name: cost[name] + before[name] for name in ("train_seconds", "disk_bytes")}
        store_rung_result(folder, result, {**cost, **both, **asked.facts})

    def _check_on_top_rows(self, then: OnTopConfig, asking: ClimbPrompts) -> None:
        """Rows of a rung on top can be read, and are none of the test's. Raises `DataError`, `ConfigError`."""
        config = on_top_run_config(
            self.config, then, self.config.model.student_of or self.config.model.name, "unused", self.config.seed
        )
        splits, place = read_splits(config), f"climb.on_top {then.label}"
        if config.objective.kind == "reward":
            raise ConfigError(
                "a reward model writes nothing that a ladder could score", where=f"climb.on_top {then.label}"
            )
        compared = any(record.candidates or record.score is not None for record in splits.train)
        if config.objective.kind == "preference" and not compared:
            raise DataError("these rows compare nothing", where=place, given=str(config.data.path))
        if then.data:
            self._refuse_test_rows(then, splits, asking)

    def _refuse_test_rows(self, then: OnTopConfig, splits: Splits, asking: ClimbPrompts) -> None:
        """Raise `DataError` where a run's own rows ask what the test asks, context and question in one text or not."""
        test = {tuple(prompt_words(record)): record for record in asking.test}
        both = ((record, tuple(prompt_words(record))) for p in (splits.train, splits.validation) for record in p)
        if found := [(own, test[words]) for own, words in both if words in test]:
            own, asked = found[0]
            raise DataError(
                f"{len(found)} rows of this rung ask what the test asks",
                where=str(own.source),
                given=f"the same prompt as {asked.source}",
                hint=f"take them out of {then.data.get('path')}",
            )

    def _fresh_base(self) -> BaseModel:
        """A base that no rung has touched."""
        if self._fresh is None:
            self._fresh = load_base_on_device(self.config.model)
        return self._fresh


def _changes_documents(config: RunConfig) -> bool:
    """Whether a method's virtual tokens make documents longer, or stand inside them."""
    return config.method.virtual_token_count > 0


def _training_cost(manifest: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What a run cost, and what is kept of it."""
    keys = ("trainable_parameters", "train_seconds", "tokens_per_second")
    kept = [file for name in ("adapter", "model") for file in (folder / name).rglob("*") if file.is_file()]
    return {**{key: manifest[key] for key in keys}, "disk_bytes": sum(file.stat().st_size for file in kept)}


def climb(config: ConfigSource, *, overrides: Sequence[str] = (), overwrite: bool = False) -> Ladder:
    """Measure the rungs of a config on one held-out test set and recommend the lowest that is enough.

    A climb that was stopped goes on; finished rungs are not repeated. `overwrite` starts anew. Writes the report.
    Raises as `rung.train`.
    """
    run_config = resolve_config(config, overrides)
    ladder = Climb(run_config, overwrite=overwrite).run()
    write_report(Path(run_config.output))
    return ladder
