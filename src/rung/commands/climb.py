"""`rung climb`: measures every rung of a ladder on one held-out test set and recommends the lowest that is enough.

All rungs of a climb answer the same questions, so their differences are paired. Each result is written to the climb's
folder as soon as it exists, and the ladder is always built from these files: a stopped climb repeats no finished rung,
and a finished climb is judged again without a model. The price is one model in memory at a time and a base loaded anew
after every training. `climb_results.py` builds the ladder, `climb_prompts.py` decides what a rung is asked,
`climb_data.py`, `climb_models.py` and `climb_tokens.py` what it learns from and stands on, `hyperparameter_search.py`
tries settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from rung.commands.climb_data import ClimbData
from rung.commands.climb_models import ClimbModels
from rung.commands.climb_people import read_people, with_people
from rung.commands.climb_prompts import ClimbPrompts, RungPrompts
from rung.commands.climb_results import AnyRung, MeasuredRung, build_ladder, read_result, rung_folder, store_result
from rung.commands.climb_tokens import ClimbTokens
from rung.commands.forgetting import (
    RESULT_FILE,
    ForgettingTask,
    check_room,
    forgetting_task,
    measure_forgetting,
    read_forgetting,
)
from rung.commands.hyperparameter_search import apply_settings, read_search_result, search_settings
from rung.config.climb import DISTILLED_PROMPT, UNTUNED, OnTopConfig, RungConfig
from rung.config.climb_runs import on_top_run_config, rung_data, rung_run_config
from rung.config.io import ConfigSource, config_to_dict, resolve_config
from rung.config.run import RunConfig
from rung.console import print_status
from rung.data.records import Records
from rung.errors import CheckpointError, ConfigError, PlanError
from rung.evaluation.choices import with_labels
from rung.evaluation.evaluate import PERPLEXITY, Evaluation, evaluate
from rung.evaluation.prompting import PromptFormat
from rung.files import is_run_folder
from rung.models.base_model import BaseModel
from rung.models.policy import NoMethod, Policy
from rung.report.html import write_report
from rung.report.tables import change_text
from rung.results.evaluation import ForgettingComparison
from rung.results.ladder import CurvePoint, ForgettingResult, Ladder, SkippedRung
from rung.runs import checks
from rung.runs.checks import DoesNotFitError
from rung.runs.dataset import RunData, read_splits
from rung.runs.load import (
    LoadedRun,
    dequantize_if_configured,
    device,
    hardware_fingerprints,
    load_base_on_device,
    open_run,
    settle_arithmetic,
)
from rung.runs.server import MOVABLE_SETTINGS, check_climb_server, evaluation_answers
from rung.runs.teacher import tokenize_run
from rung.runs.train import StartMode, train_on_data
from rung.training.memory_use import reset_peak_memory
from rung.training.run_folder import RunFolder, StopCheck, is_climb, read_manifest, write_json

CHANGEABLE_SETTINGS = ("climb.forgetting", "evaluation.human", *MOVABLE_SETTINGS)
"""Settings that may differ when a climb is resumed: no finished rung depends on them."""


class Climb:
    """A climb and its folder. Finished rungs in the folder are read, an unfinished one is resumed."""

    def __init__(self, config: RunConfig, *, overwrite: bool = False) -> None:
        self.config = config
        self.path = Path(config.output)
        if config.objective.kind == "reward":
            raise ConfigError("a reward model writes nothing that a ladder could score", where="objective.kind")
        # Only the validation of the run configs counts here: an impossible rung must fail before the first one is
        # trained. The base of a rung on top does not exist yet, so the climb's own folder takes its place.
        for rung in config.climb.rungs:
            rung_data(config, rung)
            if rung.kind not in UNTUNED:
                rung_run_config(config, rung, config.output, config.seed)
        for on_top in config.climb.on_top:
            on_top_run_config(config, on_top, config.output, config.output, config.seed)
        resume = is_run_folder(self.path) and not overwrite
        if resume and not is_climb(self.path):
            summary = "this folder holds a single run, not a climb"
            raise CheckpointError(summary, where=str(self.path), hint="name another output=...")
        RunFolder.check(self.path, config_to_dict(config), resume=resume, overwrite=overwrite, free=CHANGEABLE_SETTINGS)
        self._resume, self._overwrite = resume, overwrite
        self._fingerprints: dict[str, str] = {}
        # A climb killed while it took its folder has recorded none yet.
        self._recorded: dict[str, str] = read_manifest(self.path).get("fingerprints", {}) if resume else {}
        self._data, self._models = ClimbData(config), ClimbModels(config, self._recorded)
        self._skipped_rungs: list[SkippedRung] = []
        self._people = read_people(config)

    @property
    def rungs(self) -> tuple[AnyRung, ...]:
        """All rungs, lowest first: those on top of a tuned rung follow all others."""
        return *self.config.climb.rungs, *self.config.climb.on_top

    def run(self) -> Ladder:
        """Measure what is missing, then build the ladder. If nothing is missing, no model is loaded."""
        self._check_fingerprint("data", self._data.splits.fingerprint)
        for rung in self.config.climb.rungs:
            if rung.data:
                self._check_fingerprint(f"data of {rung.label}", self._data.splits_of(rung).fingerprint)
        if self._is_complete() and not self._overwrite:
            with closing(self._acquire_folder()) as folder:
                return self._finish(folder)  # an earlier process may have been killed before it wrote the ladder
        # Everything that can be refused is refused before the first training step, and what needs no model before a
        # model is loaded.
        check_climb_server(self.config)
        prompts = self._prompts
        for on_top in self.config.climb.on_top:
            self._data.check_on_top_rows(on_top)
        forgetting = self.config.climb.forgetting
        task = None if forgetting is None else forgetting_task(self.config, forgetting, self.config.evaluation.limit)
        if prompts.library is not None:
            self._check_fingerprint("documents", prompts.library.fingerprint)
        facts = self._check_models(task)
        with closing(self._acquire_folder()) as folder:
            folder.update(climb=True, status="running", **facts, fingerprints=self._fingerprints)
            return self._measure_all(folder)

    def _check_models(self, task: ForgettingTask | None) -> dict[str, Any]:
        """Load every base once, check what it has to read, and return the facts of data and bases for `run.json`."""
        models = self._models
        models.check_names()
        for title in models.titles:
            settle_arithmetic(models.with_recorded_arithmetic(models.config_on(title), title))
        facts, vocabularies = {}, []
        # The base of the first rung comes last and stays in memory.
        for title in reversed(models.titles):
            base = models.load_to_check(title)
            for name, value in {"base": base.fingerprint, **hardware_fingerprints(base)}.items():
                self._check_fingerprint(models.fingerprint_name(title, name), value)
            self._check_room(title, base, task)
            if len(models.titles) > 1:
                facts[title] = models.facts(title, base)
                vocabularies.append(base.tokenizer.get_vocab())
            del base  # or it would stay in memory beside the next one
        if any(vocabulary != vocabularies[0] for vocabulary in vocabularies):
            self._require_comparable_metric()
        return {"data": self._tokens.of_climb.summary(), **({"models": facts} if facts else {})}

    def _check_room(self, title: str, base: BaseModel, task: ForgettingTask | None) -> None:
        """Tokenize the rows of the rungs on a base. Raises `DataError` for prompts without room for an answer."""
        chat = self._tokens.tokenize_for(title, base)
        rungs = [rung for rung in self.config.climb.rungs if self._models.title(rung) == title]
        self._prompts.check_room(rungs, chat, base.context - self.config.evaluation.max_new_tokens)
        if task is not None and any(rung.kind not in UNTUNED for rung in rungs):
            check_room(task, chat, base.context)

    def _require_comparable_metric(self) -> None:
        if self.config.evaluation.metrics[0] == PERPLEXITY:
            summary = "perplexity a token decides nothing between models with other tokens"
            hint = "put another metric first, or give these models ladders of their own"
            raise ConfigError(summary, where="evaluation.metrics", given=", ".join(self._models.titles), hint=hint)

    def _acquire_folder(self) -> RunFolder:
        settings, how = config_to_dict(self.config), {"resume": self._resume, "overwrite": self._overwrite}
        folder = RunFolder.acquire(self.path, settings, **how, free=CHANGEABLE_SETTINGS)
        folder.manifest["config"] = settings  # `CHANGEABLE_SETTINGS` may differ from those of an earlier attempt
        folder.manifest.pop("error", None)  # of an earlier attempt
        return folder

    def _finish(self, folder: RunFolder) -> Ladder:
        ladder = self._ladder()
        folder.update(status="finished", ladder=ladder.to_json())
        return ladder

    @cached_property
    def _prompts(self) -> ClimbPrompts:
        return ClimbPrompts(self.config, self._data)

    @cached_property
    def _tokens(self) -> ClimbTokens:
        return ClimbTokens(self.config, self._data, self._models, self._prompts)

    @property
    def _tuned_rungs(self) -> list[RungConfig]:
        return [rung for rung in self.config.climb.rungs if rung.kind not in UNTUNED]

    def _is_complete(self) -> bool:
        """Whether every rung, point of the curve and forgetting result is on disk."""
        # A point of the curve with as many rows as the rung itself is passed over, so no result is missing.
        train_rows = len(self._data.splits_of(self._tuned_rungs[-1]).train) if self._curve_points else 0
        folders = [folder for rows, folder in self._curve_points if rows < train_rows]
        points = all((folder / "result.json").exists() for folder in folders)
        forgetting = all(self._read_forgetting(folder) for _, folder in self._forgetting_runs)
        return points and forgetting and all(map(self._is_measured, self.rungs))

    def _measure_all(self, folder: RunFolder) -> Ladder:
        try:
            target_rung: AnyRung | None = None
            for rung in self.rungs:
                if target_rung is not None:
                    self._skip_rung(rung.label, f"{target_rung.label} surely reaches the target")
                elif self._measure_if_possible(rung):
                    target_rung = rung if self.config.climb.stop_at_target and self._reaches_target(rung) else None
            # The curve needs the settings of the highest tuned rung, forgetting needs the finished runs.
            self._measure_curve()
            self._measure_forgetting()
        except KeyboardInterrupt:
            folder.update(status="interrupted")
            raise
        except Exception as error:
            folder.record_failure(error)
            raise
        return self._finish(folder)

    def _ladder(self) -> Ladder:
        """The ladder from the files in the folder."""
        skipped_names = {skipped.rung for skipped in self._skipped_rungs}
        measured_rungs = [self._stored_rung(rung) for rung in self.rungs if rung.label not in skipped_names]
        if not measured_rungs:
            raise PlanError("no rung could be measured", where=str(self.path), given=self._skipped_rungs[0].why)
        model_facts = read_manifest(self.path).get("models")
        ladder = build_ladder(self.config, measured_rungs, self._skipped_rungs, model_facts)
        ladder = with_people(ladder, self.config, measured_rungs, self._people)
        return ladder.replace(curve=tuple(self._measured_curve()), forgetting=tuple(self._forgetting_results()))

    def _is_measured(self, rung: AnyRung) -> bool:
        return all((folder / "result.json").exists() for folder in self._rung_folders(rung))

    def _measure_if_possible(self, rung: AnyRung) -> bool:
        """Whether a rung was measured: it is skipped if it does not fit into memory or its base rung was skipped."""
        base_rung = rung.base_rung if isinstance(rung, OnTopConfig) else None
        if base_rung in {skipped.rung for skipped in self._skipped_rungs}:
            self._skip_rung(rung.label, f"it stands on {base_rung}, which was not measured")
            return False
        try:
            self._measure(rung)
        except DoesNotFitError as error:
            # One rung too large for the machine says nothing about the others, so the climb goes on.
            self._skip_rung(rung.label, error.summary)
            return False
        return True

    def _skip_rung(self, name: str, why: str) -> None:
        print_status(f"rung {name} is left out: {why}")
        self._skipped_rungs.append(SkippedRung(rung=name, why=why))

    def _reaches_target(self, rung: AnyRung) -> bool:
        """Whether the rung's whole interval, not only its mean, is at or beyond the target."""
        metric, target = self.config.evaluation.metrics[0], self.config.climb.target
        score = self._stored_rung(rung).score(metric)
        return target is not None and (score.high <= target if metric == PERPLEXITY else score.low >= target)

    def _check_fingerprint(self, name: str, fingerprint: str) -> None:
        """Raise `CheckpointError` if data, documents or base differ from those of the finished rungs."""
        self._fingerprints[name] = fingerprint
        if self._recorded.get(name, fingerprint) != fingerprint:
            verb = "have" if name == "documents" else "has"
            summary = f"the {name} {verb} changed since this climb began"
            given = f"{self._recorded[name]} at its start, {fingerprint} now"
            raise CheckpointError(summary, where=str(self.path), given=given, hint="start anew with --overwrite")

    def _rung_folders(self, rung: AnyRung) -> list[Path]:
        """The folders of a rung's results, one for each training seed."""
        # Untuned rungs decode greedily, so a second seed would repeat the first.
        seeds = 1 if rung.kind in UNTUNED else self.config.climb.seeds
        return [rung_folder(self.path, rung, seed_index, seeds) for seed_index in range(seeds)]

    def _stored_rung(self, rung: AnyRung) -> MeasuredRung:
        """A finished rung, read from its files."""
        folders = self._rung_folders(rung)
        evaluations = tuple(Evaluation.read(folder / "items.parquet") for folder in folders)
        return MeasuredRung(rung, evaluations, tuple(map(read_result, folders)))

    def _measure(self, rung: AnyRung) -> None:
        """Measure the training seeds of a rung that have no result yet."""
        folders = self._rung_folders(rung)
        for seed_index, folder in enumerate(folders):
            if (folder / "result.json").exists():
                continue
            print_status(f"rung {rung.label}" + (f", seed {seed_index}" if len(folders) > 1 else ""))
            if isinstance(rung, OnTopConfig):
                self._measure_on_top(rung, folder, seed_index)
            elif rung.kind in UNTUNED:
                self._measure_untuned(rung, folder)
            else:
                self._measure_tuned(rung, folder, seed_index)

    def _measure_untuned(self, rung: RungConfig, folder: Path) -> None:
        """Score the base with the rung's prompt. The instruction rung also chooses the instruction, on validation."""
        title = self._models.title(rung)
        self._models.refuse_if_too_large(rung)
        self._models.release_others(title)
        # Without a reset the peak would include the training of an earlier rung.
        reset_peak_memory(device())
        model = LoadedRun(Policy(self._models.pristine(title), NoMethod()), self._tokens.chats[title])

        cost: dict[str, Any] = {"trainable_parameters": 0, "train_seconds": 0.0}
        prompts = self._prompts
        if prompts.instruction_rung == rung:
            cost |= prompts.choose_instruction(rung, folder, partial(self._evaluate, model, title=rung.label))
        instruction = cost["instruction"] if "instruction" in cost else self._instruction
        self._score(model, prompts.for_rung(rung, instruction), folder, rung.label, cost)

    @property
    def _instruction(self) -> str | None:
        """The instruction of the untuned rungs: the chosen one, or else that of the config."""
        if (rung := self._prompts.instruction_rung) is None:
            return self.config.evaluation.instruction
        # Read from disk, since a resumed climb did not choose it in this process.
        return read_result(self._rung_folders(rung)[0])["instruction"]  # type: ignore[no-any-return]

    def _rung_config(self, rung: RungConfig, folder: Path, seed_index: int = 0) -> RunConfig:
        """The config of the run of a tuned rung, with the chosen instruction where it distills a prompt."""
        instruction = self._instruction if rung.kind == DISTILLED_PROMPT else None
        return rung_run_config(self.config, rung, str(folder), self.config.seed + seed_index, instruction)

    def _evaluate(self, model: LoadedRun, records: Records, prompt_format: PromptFormat, *, title: str) -> Evaluation:
        # The questions are the climb's, whatever setting the rung's own rows were read with.
        chat = model.chat.with_control_tokens(self.config.data.control_tokens)
        server = evaluation_answers(self.config, model.config, model.folder)
        evaluation = with_labels(self.config.evaluation, self._prompts.choices)
        return evaluate(model.policy, chat, records, prompt_format, evaluation, title=title, server=server)

    def _score(self, model: LoadedRun, prompts: RungPrompts, folder: Path, title: str, cost: Mapping[str, Any]) -> None:
        """Score a model on the questions of a rung and write the result."""
        result = self._evaluate(model, prompts.records, prompts.prompt_format, title=title)
        server = self.config.evaluation.server
        facts = {} if server is None else {"server": server.address}
        store_result(folder, result, {**cost, **prompts.facts, **facts})

    def _measure_tuned(self, rung: RungConfig, folder: Path, seed_index: int) -> None:
        """Train a run in the rung's folder, or open the finished one, and score it on the bare questions."""
        is_started = is_run_folder(folder)
        if not is_started:
            # Checked before the search, so that no trial starts for a rung that does not fit.
            default_config = self._rung_config(rung, folder, seed_index)
            checks.refuse_if_too_large(default_config, device(), beyond=False)
        rung = self._apply_search(rung)
        config = self._rung_config(rung, folder, seed_index)
        model = self._train_or_open(config, rung, lambda base: self._tokens.for_run(config, rung, base))
        dequantize_if_configured(model.policy, config)
        search_result = read_search_result(self.path / "search" / rung.slug)
        trials = {"search": search_result} if search_result else {}
        self._score(model, self._prompts.for_rung(rung, None), folder, rung.label, {**_training_cost(folder), **trials})

    def _train_or_open(self, config: RunConfig, rung: RungConfig, data: Callable[[BaseModel], RunData]) -> LoadedRun:
        """Open the run of a config if it is finished; otherwise train it, or resume it if it was stopped."""
        folder = Path(config.output)
        is_started = is_run_folder(folder)
        if is_started and read_manifest(folder)["status"] == "finished":
            self._models.release()  # the run brings a base of its own
            return open_run(folder)
        base = self._models.to_train(config, self._models.title(rung))
        run_data = data(base)
        policy, _ = train_on_data(config, base, run_data, StartMode(resume=is_started))
        return LoadedRun(policy, run_data.chat, config, "run", folder)

    def _apply_search(self, rung: RungConfig) -> RungConfig:
        """The rung with settings chosen on the validation split, once for all training seeds."""
        if (search := self.config.climb.search) is None:
            return rung
        folder = self.path / "search" / rung.slug
        if (search_result := read_search_result(folder)) is not None:
            return apply_settings(rung, search_result["chosen"])
        config = self._rung_config(rung, folder)

        def train(trial: RunConfig, stop_check: StopCheck) -> None:
            base = self._models.to_train(trial, self._models.title(rung))
            train_on_data(trial, base, self._tokens.for_run(trial, rung, base), stop_check=stop_check)

        return search_settings(config, search, rung, folder, self._tokens.row_count(rung), train)

    @property
    def _curve_points(self) -> list[tuple[int, Path]]:
        """Points of the learning curve: number of training rows, and folder."""
        return [(rows, self.path / "curve" / str(rows)) for rows in self.config.climb.curve]

    def _measured_curve(self) -> Iterator[CurvePoint]:
        """The points of the learning curve that have a result."""
        for _, folder in self._curve_points:
            if (folder / "result.json").exists():
                facts = read_result(folder)
                score = Evaluation.read(folder / "items.parquet").interval(self.config.evaluation.metrics[0])
                yield CurvePoint(**{n: facts[n] for n in ("rung", "rows", "train_seconds")}, score=score)

    def _measure_curve(self) -> None:
        """Train the highest tuned rung on fewer rows: one run for each number of rows, scored on the same test."""
        tuned_rungs = [rung for rung in self._tuned_rungs if self._is_measured(rung)]
        train_rows = len(self._data.splits_of(tuned_rungs[-1]).train) if tuned_rungs else 0
        for rows, folder in self._curve_points if tuned_rungs else ():
            if rows >= train_rows:
                print_status(f"learning curve: the rung itself has {train_rows:,} rows, {rows:,} are passed over")
            elif not (folder / "result.json").exists():
                print_status(f"learning curve of {tuned_rungs[-1].label}: {rows:,} rows")
                try:
                    self._measure_curve_point(tuned_rungs[-1], rows, folder)
                except DoesNotFitError as error:
                    self._skip_rung(f"{tuned_rungs[-1].label}, {rows:,} rows", error.summary)

    def _measure_curve_point(self, rung: RungConfig, rows: int, folder: Path) -> None:
        """Measure one point of the curve. Its rows are a subset of those of a larger point."""
        # The settings chosen with all rows: a search for each point would measure the search as well.
        search_result = read_search_result(self.path / "search" / rung.slug)
        tuned_rung = apply_settings(rung, search_result["chosen"]) if search_result else rung
        config = self._rung_config(tuned_rung, folder)
        config = config.model_copy(update={"data": config.data.model_copy(update={"limit": rows})})

        def data(base: BaseModel) -> RunData:
            # The splits are read again: the limit of rows is applied when they are read.
            where = f"climb.rungs {rung.label}"
            splits = self._data.read_own_splits(config.data, where) if rung.data else read_splits(config)
            return self._tokens.tokenize(config, rung, splits, base)

        model = self._train_or_open(config, rung, data)
        point = {"rung": rung.label, "rows": read_manifest(folder)["data"]["splits"]["train"]["rows"]}
        cost = {**_training_cost(folder), **point}
        self._score(model, self._prompts.for_rung(rung, None), folder, f"{rows:,} rows", cost)

    @property
    def _forgetting_runs(self) -> list[tuple[str, Path]]:
        """Label and folder of every tuned rung, if forgetting is measured at all."""
        # The first training seed stands for the rung: forgetting costs two evaluations for each run.
        is_enabled = self.config.climb.forgetting is not None
        return [(r.label, self._rung_folders(r)[0]) for r in self.rungs if is_enabled and r.kind not in UNTUNED]

    def _measure_forgetting(self) -> None:
        for label, folder in self._forgetting_runs:
            if (folder / "result.json").exists() and not self._read_forgetting(folder):
                print_status(f"what {label} has forgotten")
                # `measure_forgetting` loads models of its own; the cached base would be one too many in memory.
                self._models.release()
                limit = self.config.evaluation.limit
                comparison = measure_forgetting(str(folder), str(self.config.climb.forgetting), limit=limit)
                write_json(folder / RESULT_FILE, comparison.to_json())

    def _forgetting_results(self) -> Iterator[ForgettingResult]:
        """The forgetting results that are on disk."""
        for label, folder in self._forgetting_runs:
            if result := self._read_forgetting(folder):
                changes = [f"{name} {change_text(name, change)}" for name, change in result.metrics.items()]
                text = f"{label} on {result.forgetting}: {', '.join(changes)}"
                yield ForgettingResult(rung=label, data=result.forgetting, metrics=result.metrics, text=text)

    def _read_forgetting(self, folder: Path) -> ForgettingComparison | None:
        return read_forgetting(folder, self.config.climb.forgetting)

    def _measure_on_top(self, on_top: OnTopConfig, folder: Path, seed_index: int) -> None:
        """Train a run that starts from a finished tuned rung, and score it with the prompts of that rung."""
        base_rung = next(rung for rung in self.config.climb.rungs if rung.label == on_top.base_rung)
        # Seed by seed: each run on top continues the run of its own training seed.
        base_folder = self._rung_folders(base_rung)[seed_index]
        config = on_top_run_config(self.config, on_top, str(base_folder), str(folder), self.config.seed + seed_index)
        self._train_on_top(config, on_top, self._models.title(base_rung))
        # To have this rung one must also train and keep the one below it.
        base_cost, cost = read_result(base_folder), _training_cost(folder)
        totals = {name: cost[name] + base_cost[name] for name in ("train_seconds", "disk_bytes")}
        self._score(open_run(folder), self._prompts.for_rung(base_rung, None), folder, on_top.label, {**cost, **totals})

    def _train_on_top(self, config: RunConfig, on_top: OnTopConfig, title: str) -> None:
        """Train a run on top of one on this base, unless it is finished. No model stays in memory."""
        is_started = is_run_folder(Path(config.output))
        if not is_started:
            checks.refuse_if_too_large(config, device(), beyond=False)
        # The model of the base rung is another than the cached base, and only one may be in memory.
        self._models.release()
        if not (is_started and read_manifest(Path(config.output))["status"] == "finished"):
            load_config = self._models.with_recorded_arithmetic(config, title)
            splits, base = self._data.read_on_top(config, on_top), load_base_on_device(load_config.model)
            data = tokenize_run(config, splits, base, self._prompts.library)
            train_on_data(config, base, data, StartMode(resume=is_started))


def _training_cost(folder: Path) -> dict[str, Any]:
    """The cost of a run from its manifest, and the bytes of its saved weights."""
    manifest, keys = read_manifest(folder), ("trainable_parameters", "train_seconds", "tokens_per_second")
    files = [file for name in ("adapter", "model") for file in (folder / name).rglob("*") if file.is_file()]
    return {**{key: manifest[key] for key in keys}, "disk_bytes": sum(file.stat().st_size for file in files)}


def climb(config: ConfigSource, *, overrides: Sequence[str] = (), overwrite: bool = False) -> Ladder:
    """Measure the rungs of a config on one held-out test set, recommend the lowest that is enough, write the report.

    A stopped climb is resumed and repeats no finished rung; `overwrite` starts anew. Raises as `rung.train`.
    """
    run_config = resolve_config(config, overrides)
    ladder = Climb(run_config, overwrite=overwrite).run()
    write_report(Path(run_config.output))
    return ladder
