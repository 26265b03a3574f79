"""How high must I climb? Measures the rungs on one held-out test set and recommends the lowest that is enough."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from rung.commands import search
from rung.commands.climb_prompts import Asking
from rung.commands.forgetting import KEPT, forgotten, other_task, read_forgotten, require_room
from rung.commands.ladder import (
    AnyRung,
    Forgotten,
    Ladder,
    Left,
    Measured,
    Point,
    judge,
    result_of,
    rung_folder,
    score_of_rung,
    store,
)
from rung.config.climb import UNTUNED, RungSpec, ThenSpec
from rung.config.evaluation import Context
from rung.config.io import config_to_dict, for_rung, for_then
from rung.config.method import FullSpec
from rung.config.run import RunSpec
from rung.console import say
from rung.data.chat import Chat
from rung.data.deduplication import asked_in_words
from rung.data.splits import Splits
from rung.errors import CheckpointError, ConfigError, DataError, PlanError, RungError
from rung.evaluation.evaluate import PERPLEXITY, Evaluation, evaluate
from rung.evaluation.prompting import Framing
from rung.models.base_model import Base
from rung.models.policy import Policy, Untouched
from rung.runs import checks
from rung.runs.checks import DoesNotFitError
from rung.runs.dataset import Data, read_splits, tokenise
from rung.runs.load import device, load_base_on_device, open_run, widen_if_asked
from rung.runs.train import train_on
from rung.training.run_folder import RunFolder, Watch, is_climb, read_manifest, reset_peak_memory, write_json
from rung.types import Record

FREE = ("climb.forgetting",)
"""What a climb may be gone on with otherwise: it is measured beside its rungs."""


class Climb:
    """A climb in its folder. Finished rungs found there are not repeated; an unfinished one goes on."""

    def __init__(self, spec: RunSpec, *, overwrite: bool = False) -> None:
        self.spec = spec
        self.path = Path(spec.output)
        if spec.objective.kind == "reward":
            raise ConfigError("a reward model writes nothing that a ladder could score", where="objective.kind")
        for rung in spec.climb.rungs:  # a rung that cannot be is an error before anything is spent
            if rung.kind not in UNTUNED:
                for_rung(spec, rung, spec.output, spec.seed)
        for then in spec.climb.then:
            for_then(spec, then, spec.output, spec.output, spec.seed)
        resume = (self.path / "run.json").exists() and not overwrite
        if resume and not is_climb(self.path):
            raise CheckpointError(
                "this folder holds a single run, not a climb", where=str(self.path), hint="name another output=..."
            )
        RunFolder.check(self.path, config_to_dict(spec), resume=resume, overwrite=overwrite, free=FREE)
        self._overwrite = overwrite
        self._fresh: Base | None = None
        self._left: list[Left] = []

    @property
    def rungs(self) -> tuple[AnyRung, ...]:
        """All of them, lowest first."""
        return *self.spec.climb.rungs, *self.spec.climb.then

    def run(self) -> Ladder:
        """Measure what is missing and judge the whole; with nothing missing, no model is loaded."""
        splits = read_splits(self.spec)
        self._refuse_other("data", splits.fingerprint)
        whole = all((place / "result.json").exists() for _, place in self._curve)
        whole = whole and all(self._found_in(place) for _, place in self._forgetting)
        if whole and all(map(self._stands, self.rungs)) and not self._overwrite:
            return self._judge()
        asking = Asking(self.spec, splits)
        for then in self.spec.climb.then:  # before anything is spent
            self._check_rows(then, asking)
        named = self.spec.climb.forgetting
        other = None if named is None else other_task(self.spec, named, self.spec.evaluate.limit)
        fingerprints = {"data": splits.fingerprint}
        if asking.library is not None:
            fingerprints["documents"] = asking.library.fingerprint
            self._refuse_other("documents", fingerprints["documents"])
        self._fresh = base = load_base_on_device(self.spec.model)
        fingerprints["base"] = base.fingerprint
        self._refuse_other("base", base.fingerprint)
        data = {context: self._shared(context, asking, base) for context in asking.contexts}
        own = next(iter(data.values()))
        asking.check_room(own.chat, base.context - self.spec.evaluate.max_new_tokens)
        if other is not None:
            require_room(other, own.chat, base.context)
        resume = (self.path / "run.json").exists() and not self._overwrite
        claimed = RunFolder.claim(
            self.path, config_to_dict(self.spec), resume=resume, overwrite=self._overwrite, free=FREE
        )
        with closing(claimed) as folder:
            folder.manifest.pop("error", None)  # of an earlier try
            folder.update(
                climb=True,
                status="running",
                spec=config_to_dict(self.spec),
                data=own.summary(),
                fingerprints=fingerprints,
            )
            return self._climb(folder, data, asking)

    def _shared(self, context: Context, asking: Asking, base: Base) -> Data:
        """What rungs of a method without virtual tokens share: those take room, or stand inside the text."""
        evaluate = self.spec.evaluate.model_copy(update={"context": context})
        spec = self.spec.model_copy(update={"method": FullSpec(), "evaluate": evaluate})
        return tokenise(spec, asking.splits, base, asking.library)

    def _climb(self, folder: RunFolder, data: dict[Context, Data], asking: Asking) -> Ladder:
        try:
            reached: AnyRung | None = None
            for rung in self.rungs:
                if reached is not None:
                    self._leave_out(rung.label, f"{reached.label} surely reaches the target")
                elif self._try(rung, data, asking) and self.spec.climb.stop and self._reaches(rung):
                    reached = rung
            self._learn_curve(asking)
            self._see_what_is_forgotten()
        except KeyboardInterrupt:
            folder.update(status="interrupted")
            raise
        except RungError as error:
            folder.update(status="failed", error=str(error))
            raise
        ladder = self._judge()
        folder.update(status="finished", ladder=ladder.to_json())
        return ladder

    def _judge(self) -> Ladder:
        left = {one.rung for one in self._left}
        measured = [self._stored(rung) for rung in self.rungs if rung.label not in left]
        if not measured:
            raise PlanError("no rung could be measured", where=str(self.path), given=self._left[0].why)
        ladder = judge(self.spec, measured, self._left)
        return replace(ladder, curve=tuple(self._points()), forgotten=tuple(self._lost()))

    def _stands(self, rung: AnyRung) -> bool:
        return all((folder / "result.json").exists() for folder in self._folders(rung))

    def _try(self, rung: AnyRung, data: dict[Context, Data], asking: Asking) -> bool:
        """Measure a rung, unless it does not fit or stands on one that was left out."""
        below = rung.above if isinstance(rung, ThenSpec) else None
        if below in {one.rung for one in self._left}:
            self._leave_out(rung.label, f"it stands on {below}, which was not measured")
            return False
        try:
            self._measure(rung, data, asking)
        except DoesNotFitError as error:
            self._leave_out(rung.label, error.summary)
            return False
        return True

    def _leave_out(self, name: str, why: str) -> None:
        say(f"rung {name} is left out: {why}")
        self._left.append(Left(name, why))

    def _reaches(self, rung: AnyRung) -> bool:
        """Whether its whole interval lies beyond the target."""
        metric, target = self.spec.evaluate.metrics[0], self.spec.climb.target
        score = score_of_rung(self._stored(rung).evaluations, metric)
        return target is not None and (score.high <= target if metric == PERPLEXITY else score.low >= target)

    def _refuse_other(self, what: str, fingerprint: str) -> None:
        """Rungs measured on other data or another base must not stand in one ladder."""
        known = (self.path / "run.json").exists() and not self._overwrite
        begun = read_manifest(self.path).get("fingerprints", {}) if known else {}
        if begun.get(what, fingerprint) != fingerprint:
            have = "have" if what == "documents" else "has"
            summary = f"the {what} {have} changed since this climb began"
            raise CheckpointError(summary, where=str(self.path), hint="start anew with --overwrite")

    def _folders(self, rung: AnyRung) -> list[Path]:
        """Where a rung's results stand: one folder a training seed."""
        seeds = 1 if rung.kind in UNTUNED else self.spec.climb.seeds
        return [rung_folder(self.path, rung, number, seeds) for number in range(seeds)]

    def _stored(self, rung: AnyRung) -> Measured:
        """A finished rung, from its files."""
        folders = self._folders(rung)
        evaluations = tuple(Evaluation.read(folder / "items.parquet") for folder in folders)
        costs = tuple(map(result_of, folders))
        return Measured(rung, evaluations, costs)

    def _measure(self, rung: AnyRung, data: dict[Context, Data], asking: Asking) -> None:
        """What is missing of one rung."""
        folders = self._folders(rung)
        for number, folder in enumerate(folders):
            if (folder / "result.json").exists():
                continue
            say(f"rung {rung.label}" + (f", seed {number}" if len(folders) > 1 else ""))
            if isinstance(rung, ThenSpec):
                self._on_top(rung, folder, number, asking)
            elif rung.kind in UNTUNED:
                self._ask(rung, folder, next(iter(data.values())).chat, asking)
            else:
                self._tune(rung, folder, number, data[asking.context(rung)], asking)

    def _ask(self, rung: RungSpec, folder: Path, chat: Chat, asking: Asking) -> None:
        """An untuned rung: the base with the strongest prompt the config has."""
        reset_peak_memory()
        policy = Policy(self._base(), Untouched())

        def score(records: Sequence[Record], framing: Framing) -> Evaluation:
            return evaluate(policy, chat, records, framing, self.spec.evaluate, title=rung.label)

        cost: dict[str, Any] = {"trainable_parameters": 0, "train_seconds": 0.0}
        instruction = self.spec.evaluate.instruction
        if asking.chooser == rung:
            cost |= asking.choose(rung, folder, score)
            instruction = cost["instruction"]
        elif asking.chooser is not None:
            instruction = result_of(self._folders(asking.chooser)[0])["instruction"]
        asked = asking.of(rung, instruction)
        store(folder, score(asked.records, asked.framing), {**cost, **asked.facts})

    def _tune(self, rung: RungSpec, folder: Path, number: int, data: Data, asking: Asking) -> None:
        """A tuned rung: a run in a folder of its own, then the bare question."""
        begun = (folder / "run.json").exists()
        if not begun:
            unsearched = for_rung(self.spec, rung, str(folder), self.spec.seed + number)
            checks.refuse_hopeless(unsearched, device(), beyond=False)
        if self.spec.climb.search is not None:
            rung = self._searched(rung, data, asking)
        spec = for_rung(self.spec, rung, str(folder), self.spec.seed + number)
        if begun and read_manifest(folder)["status"] == "finished":
            policy, chat, _ = open_run(folder)
        else:
            base = self._base()
            own = data
            if _takes_room(spec):
                own = tokenise(spec, asking.splits, base, asking.library)
            policy, _ = train_on(spec, base, own, resume=begun)
            self._fresh = None  # its model has been tuned
            chat = own.chat
        manifest = read_manifest(folder)
        asked = asking.of(rung, None)
        widen_if_asked(policy, spec)
        result = evaluate(policy, chat, asked.records, asked.framing, spec.evaluate, title=rung.label)
        tried = search.read(self.path / "search" / rung.slug)
        store(folder, result, {**_training(manifest, folder), **asked.facts, **({"search": tried} if tried else {})})

    def _searched(self, rung: RungSpec, data: Data, asking: Asking) -> RungSpec:
        """The rung with settings chosen on the validation split, once for all training seeds."""
        place = self.path / "search" / rung.slug
        if (found := search.read(place)) is not None:
            return search.with_settings(rung, found["chosen"])
        spec = for_rung(self.spec, rung, str(place), self.spec.seed)

        def train(trial: RunSpec, watch: Watch) -> None:
            base, self._fresh = self._base(), None
            own = tokenise(trial, asking.splits, base, asking.library) if _takes_room(trial) else data
            train_on(trial, base, own, watch=watch)

        wanted = self.spec.climb.search
        assert wanted is not None  # noqa: S101 -- for the type checker: asked by `_tune`
        return search.settings(spec, wanted, rung, place, len(data.train.rows), train)

    @property
    def _curve(self) -> list[tuple[int, Path]]:
        """Points of the learning curve: numbers of rows, and where they stand."""
        return [(rows, self.path / "curve" / str(rows)) for rows in self.spec.climb.curve]

    def _points(self) -> Iterator[Point]:
        """Those that were measured."""
        for _, place in self._curve:
            if (place / "result.json").exists():
                facts = result_of(place)
                score = score_of_rung([Evaluation.read(place / "items.parquet")], self.spec.evaluate.metrics[0])
                yield Point(facts["rung"], facts["rows"], score, facts["train_seconds"])

    def _learn_curve(self, asking: Asking) -> None:
        """The highest tuned rung with fewer rows: each number of them a run of its own, scored on the same test."""
        tuned = [r for r in self.spec.climb.rungs if r.kind not in UNTUNED and self._stands(r)]
        for rows, place in self._curve if tuned else ():
            if rows >= len(asking.splits.train):
                say(f"learning curve: the rung itself has {len(asking.splits.train):,} rows, {rows:,} are passed over")
            elif not (place / "result.json").exists():
                say(f"learning curve of {tuned[-1].label}: {rows:,} rows")
                try:
                    self._learn(tuned[-1], rows, place, asking)
                except DoesNotFitError as error:
                    self._leave_out(f"{tuned[-1].label}, {rows:,} rows", error.summary)

    @property
    def _forgetting(self) -> list[tuple[str, Path]]:
        """Tuned rungs that are to be measured on other data, and where their first run stands."""
        asked = self.spec.climb.forgetting is not None
        return [(r.label, self._folders(r)[0]) for r in self.rungs if asked and r.kind not in UNTUNED]

    def _see_what_is_forgotten(self) -> None:
        for name, place in self._forgetting:
            if (place / "result.json").exists() and not self._found_in(place):
                say(f"what {name} has forgotten")
                self._fresh = None  # one model at a time
                found = forgotten(str(place), str(self.spec.climb.forgetting), limit=self.spec.evaluate.limit)
                write_json(place / KEPT, found)

    def _lost(self) -> Iterator[Forgotten]:
        """What was found."""
        for name, place in self._forgetting:
            if found := self._found_in(place):
                yield Forgotten(name, found["forgetting"], found["metrics"])

    def _found_in(self, place: Path) -> dict[str, Any]:
        return read_forgotten(place, self.spec.climb.forgetting)

    def _learn(self, rung: RungSpec, rows: int, place: Path, asking: Asking) -> None:
        """One point of the curve. Its rows are the first of those that more rows would have."""
        found = search.read(self.path / "search" / rung.slug)
        own = search.with_settings(rung, found["chosen"]) if found else rung
        spec = for_rung(self.spec, own, str(place), self.spec.seed)
        spec = spec.model_copy(update={"data": spec.data.model_copy(update={"limit": rows})})
        begun = (place / "run.json").exists()
        if begun and read_manifest(place)["status"] == "finished":
            policy, chat, _ = open_run(place)
        else:
            base, self._fresh = self._base(), None
            fewer = tokenise(spec, read_splits(spec), base, asking.library)
            policy, _ = train_on(spec, base, fewer, resume=begun)
            chat = fewer.chat
        asked, manifest = asking.of(rung, None), read_manifest(place)
        result = evaluate(policy, chat, asked.records, asked.framing, spec.evaluate, title=f"{rows:,} rows")
        learned = manifest["data"]["splits"]["train"]["rows"]
        store(place, result, {**_training(manifest, place), "rung": rung.label, "rows": learned, **asked.facts})

    def _on_top(self, then: ThenSpec, folder: Path, number: int, asking: Asking) -> None:
        """A run that begins where a tuned rung ended, asked as that one was."""
        own = next(rung for rung in self.spec.climb.rungs if rung.label == then.above)
        below = self._folders(own)[number]
        spec = for_then(self.spec, then, str(below), str(folder), self.spec.seed + number)
        begun = (folder / "run.json").exists()
        if not begun:
            checks.refuse_hopeless(spec, device(), beyond=False)
        if not (begun and read_manifest(folder)["status"] == "finished"):
            self._fresh = None  # one model at a time
            splits, base = read_splits(spec), load_base_on_device(spec.model)
            train_on(spec, base, tokenise(spec, splits, base, asking.library), resume=begun)
        manifest, (policy, chat, _) = read_manifest(folder), open_run(folder)
        asked = asking.of(own, None)
        result = evaluate(policy, chat, asked.records, asked.framing, self.spec.evaluate, title=then.label)
        # what it stands on was trained as well
        before, cost = result_of(below), _training(manifest, folder)
        both = {name: cost[name] + before[name] for name in ("train_seconds", "disk_bytes")}
        store(folder, result, {**cost, **both, **asked.facts})

    def _check_rows(self, then: ThenSpec, asking: Asking) -> None:
        """Rows of a rung on top can be read, and are none of the test's. Raises `DataError`, `ConfigError`."""
        spec = for_then(self.spec, then, self.spec.model.student_of or self.spec.model.name, "unused", self.spec.seed)
        splits, place = read_splits(spec), f"climb.then {then.label}"
        if spec.objective.kind == "reward":
            raise ConfigError(
                "a reward model writes nothing that a ladder could score", where=f"climb.then {then.label}"
            )
        compared = any(record.rivals or record.score is not None for record in splits.train)
        if spec.objective.kind == "preference" and not compared:
            raise DataError("these rows compare nothing", where=place, given=str(spec.data.path))
        if then.data:
            self._refuse_test_rows(then, splits, asking)

    def _refuse_test_rows(self, then: ThenSpec, splits: Splits, asking: Asking) -> None:
        """Raise `DataError` where a run's own rows ask what the test asks, context and question in one text or not."""
        test = {tuple(asked_in_words(record)): record for record in asking.test}
        both = ((record, tuple(asked_in_words(record))) for p in (splits.train, splits.validation) for record in p)
        if found := [(own, test[words]) for own, words in both if words in test]:
            own, asked = found[0]
            raise DataError(
                f"{len(found)} rows of this rung ask what the test asks",
                where=str(own.source),
                given=f"the same prompt as {asked.source}",
                hint=f"take them out of {then.data.get('path')}",
            )

    def _base(self) -> Base:
        """A base that no rung has touched."""
        if self._fresh is None:
            self._fresh = load_base_on_device(self.spec.model)
        return self._fresh


def _takes_room(spec: RunSpec) -> bool:
    """Whether a method's virtual tokens make documents longer, or stand inside them."""
    return hasattr(spec.method, "virtual_tokens")


def _training(manifest: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What a run cost, and what is kept of it."""
    keys = ("trainable_parameters", "train_seconds", "tokens_per_second")
    kept = [file for name in ("adapter", "model") for file in (folder / name).rglob("*") if file.is_file()]
    return {**{key: manifest[key] for key in keys}, "disk_bytes": sum(file.stat().st_size for file in kept)}
