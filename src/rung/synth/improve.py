"""`rung synth improve`: a model learns from those of its own answers that a verifier accepts.

ReST-EM (Singh et al. 2023, arXiv 2312.06585, algorithm 1): a round samples answers to the training questions with the
model of the round before, keeps the accepted ones, and trains the base anew on them, so that no round builds on the
overfitting of another. Rounds are compared on the validation split by the share of sampled answers that are accepted,
paired by question; the test split is asked once, at the end. Samples are in a journal a round, runs resume, and what a
round measured is on disk, so the same command continues after a stop.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from rung.config.io import config_to_dict
from rung.config.synth import ImproveRunConfig
from rung.console import print_status
from rung.data.records import Records, distinct_conversations
from rung.data.rows import answer_row, columns_of, preference_row
from rung.errors import CheckpointError, DataError
from rung.evaluation.prompting import PromptFormat
from rung.files import SYNTH_FILE, is_run_folder, lock_file, recover_interrupted_writes, write_json_lines
from rung.inference.ask import Conversation
from rung.inference.journal import Journal
from rung.inference.local_model import LocalModel
from rung.models.generate import Sampling
from rung.report.synth import write_improve_page
from rung.results.synth import ImproveResult, ImproveRound
from rung.runs.dataset import read_splits, with_contexts
from rung.runs.judge import AnsweredQuestion, JudgeScorer
from rung.runs.load import (
    LoadedRun,
    load_base_to_train,
    open_target,
    settle_arithmetic,
    test_records,
    validation_records,
    weight_fingerprints,
)
from rung.runs.teacher import tokenize_run
from rung.runs.train import StartMode, train_on_data
from rung.scoring.stats import paired_difference, pass_at_k, score_interval
from rung.synth.answer_scores import ScoreAnswers, require_scorable, verifier_scorer
from rung.training.run_folder import LOCK_FILE, LOCK_FILES, read_json, read_manifest, write_json
from rung.types import Message, Record

HINT = "The answer is: {answer}\n\nExplain how one gets there, and end with the answer."
"""What stands behind a question for which no answer was accepted (Zelikman et al. 2022, section 3.3)."""
# the parts of a round that draw samples, each with a seed of its own
_TRAIN, _VALIDATION, _TEST, _HINT = range(4)


@dataclass(frozen=True)
class SampledQuestion:
    """A question with the answers that a model sampled, and which of them the verifier accepts."""

    record: Record
    answers: tuple[str, ...]
    accepted: tuple[bool, ...]
    """A cut answer is never accepted."""
    stopped: tuple[bool, ...]
    """False for an answer that was cut."""

    @property
    def passed(self) -> int:
        """Number of accepted answers."""
        return sum(self.accepted)

    def kept(self, most: int) -> list[str]:
        """Distinct accepted answers, the most frequent first, then in the order of sampling."""
        accepted = [answer for answer, right in zip(self.answers, self.accepted, strict=True) if right]
        return sorted(dict.fromkeys(accepted), key=lambda answer: -accepted.count(answer))[:most]


class Improvement:
    """The rounds of one `rung synth improve`."""

    def __init__(self, config: ImproveRunConfig, verdicts: Path | None = None) -> None:
        """Raises `DataError` for rows that the verifier cannot judge.

        `verdicts` is the folder that keeps those of a judge behind a server; by default they are in the user's cache.
        """
        self.config, self.synth, self.path = config, config.synth, Path(config.output)
        self._verdicts = verdicts
        self.run_config = config.run_config(str(self.path / "run"))
        self.splits = read_splits(self.run_config)
        # as the model sees them; a row with a weight is asked once
        train = with_contexts(self.run_config.evaluation.context, self.splits.train, None)
        self.questions = [train[int(i)] for i in distinct_conversations(train)]
        self.validation = self._seen(validation_records(self.run_config, self.splits))
        require_scorable([*self.questions, *self.validation], self.synth.verifier)

    @cached_property
    def score(self) -> ScoreAnswers:
        """The verifier, opened when it is first needed. Raises `PlanError` for a judge that is not trusted."""
        return verifier_scorer(self.synth.verifier, "synth.verifier", self._verdicts)

    def run(self) -> ImproveResult:
        """Take the rounds and measure the best one on the test split."""
        settle_arithmetic(self.run_config)
        rounds = [self._measured_round(0, None)]
        for number in range(1, self.synth.rounds + 1):
            rounds.append(self._measured_round(number, rounds[-1]))
            gain = rounds[-1].gain
            if gain is not None and gain.low <= 0.0:
                reason = f"round {number} shows no sure gain on the validation split"
                break
        else:
            reason = f"{self.synth.rounds} rounds were asked for"
        print_status(f"the last round was {len(rounds) - 1}: {reason}")
        best = max(range(len(rounds)), key=lambda i: (rounds[i].pass_at[1].mean, -i))
        return ImproveResult(
            output=str(self._model_name(best)),
            rounds=tuple(rounds),
            best=best,
            reason=reason,
            test=self._test(best) if len(self.splits.test) else None,
            judge=self.score.agreement if isinstance(self.score, JudgeScorer) else None,
        )

    def preview(self, count: int) -> list[SampledQuestion]:
        """Answers of the first model to a few questions, with what the verifier said; nothing is written."""
        model = self._local(open_target(self._model_name(0), self.run_config.model), 0)
        with TemporaryDirectory() as folder, closing(Journal(Path(folder) / "journal", model.identity)) as journal:
            return self._sampled(model, self.questions[:count], journal, 0, _TRAIN)

    def _measured_round(self, number: int, before: ImproveRound | None) -> ImproveRound:
        """What a round's model does on the validation split; round 0 is the model that everything began with."""
        folder = self.path / f"round-{number}"
        if (folder / "round.json").exists():
            return ImproveRound(**read_json(folder / "round.json"))
        print_status(f"round {number}" if number else "round 0: the model as it is")
        facts = self._trained_round(number, folder) if number else {}
        model = self._local(open_target(self._model_name(number), self.run_config.model), number)
        with closing(Journal(folder / "validation.jsonl", model.identity)) as journal:
            sampled = self._sampled(model, self.validation, journal, number, _VALIDATION)
        measured = self._summary(number, sampled, folder)
        if before is not None:
            shares_before = json.loads((self.path / f"round-{number - 1}" / "shares.json").read_text())
            measured["gain"] = paired_difference(shares_before, _shares(sampled), _clusters(sampled), self.config.seed)
        result = ImproveRound(**measured, **facts)
        write_json(folder / "round.json", result.to_json())
        print_status(_round_line(result))
        return result

    def _summary(self, number: int, sampled: Sequence[SampledQuestion], folder: Path) -> dict[str, Any]:
        shares = _shares(sampled)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "shares.json", shares.tolist())
        return {"number": number, "pass_at": self._pass_at(sampled), **_distribution(sampled)}

    def _pass_at(self, sampled: Sequence[SampledQuestion]) -> dict[int, Any]:
        """pass@k with its interval, for k = 1, 2, 4, ... up to the number of samples."""
        n, clusters = self.synth.samples, _clusters(sampled)
        powers = [2**i for i in range(n.bit_length()) if 2**i <= n]
        return {k: score_interval([pass_at_k(n, q.passed, k) for q in sampled], clusters) for k in powers}

    def _trained_round(self, number: int, folder: Path) -> dict[str, Any]:
        """Sample with the model of the round before, and train the base on what was accepted; what was made."""
        manifest = read_manifest(folder / "run") if is_run_folder(folder / "run") else {}
        made = self._made_rows(number, folder)
        counts = {"rows": len(made), "questions_with_rows": len({record.source for record in made})}
        if not made:
            hint = "raise synth.samples or temperature, set hint: true, or start from a run that gives right answers"
            raise DataError(f"round {number}: no answer was accepted", where="synth.verifier", hint=hint)
        if manifest.get("status") != "finished":
            self._train(folder / "run", made, number, is_started=bool(manifest))
        return counts | {"train_seconds": float(read_manifest(folder / "run").get("train_seconds", 0.0))}

    def _train(self, output: Path, made: Sequence[Record], number: int, *, is_started: bool) -> None:
        config = self.run_config.model_copy(update={"output": str(output)})
        originals = [record for record in self.splits.train if record.answer] if self.synth.mix else []
        note = {"round": number, "rows": len(made), "verifier": self.synth.verifier.kind}
        train = Records.from_records([*originals, *made])
        splits = replace(self.splits, train=train, notes={**self.splits.notes, "made": note})
        base = load_base_to_train(config)
        data = tokenize_run(config, splits, base)
        train_on_data(config, base, data, StartMode(resume=is_started))

    def _made_rows(self, number: int, folder: Path) -> list[Record]:
        """The training questions with accepted answers of the model of the round before, which are also written."""
        model = self._local(open_target(self._model_name(number - 1), self.run_config.model), number - 1)
        with closing(Journal(folder / "journal.jsonl", model.identity)) as journal:
            sampled = self._sampled(model, self.questions, journal, number, _TRAIN)
            made = [(q.record, answer, False) for q in sampled for answer in q.kept(self.synth.per_question)]
            if self.synth.hint:
                failed = [q.record for q in sampled if not q.passed and q.record.answer]
                hinted = self._sampled(model, failed, journal, number, _HINT, hint=True)
                made += [(q.record, answer, True) for q in hinted for answer in q.kept(self.synth.per_question)]
        rows = []
        for record, answer, hint in made:
            row = answer_row(record.messages[:-1], answer, **columns_of(record))
            rows.append({**row, "made": {"round": number, "hint": hint}})
        write_json_lines(folder / "rows.jsonl", rows)
        if self.synth.pairs:
            write_json_lines(folder / "pairs.jsonl", [pair for q in sampled if (pair := _pair(q)) is not None])
        return [_with_answer(record, answer) for record, answer, _ in made]

    def _sampled(
        self,
        model: LocalModel,
        records: Sequence[Record],
        journal: Journal,
        number: int,
        part: int,
        *,
        hint: bool = False,
    ) -> list[SampledQuestion]:
        """Sample answers and verify them. Raises `DataError` for a question that leaves no room for an answer."""
        if not records:
            return []
        conversations = [_conversation(record, hint=hint) for record in records]
        seed = int(np.random.SeedSequence([self.config.seed, number, part]).generate_state(1)[0])
        tokens = self.run_config.evaluation.max_new_tokens
        sampling = Sampling(tokens, self.synth.temperature, seed, self.synth.samples)
        title = ("train", "validation", "test", "hints")[part]
        replies, failures = model.ask(conversations, sampling, journal, title=title)
        if failures:
            record = records[failures[0].index]
            raise DataError(f"a question cannot be asked: {failures[0].reason}", where=str(record.source))
        answers = [[(a.text.strip(), a.stopped) for a in reply.answers] for reply in replies if reply is not None]
        asked = [AnsweredQuestion(r, [text for text, _ in texts]) for r, texts in zip(records, answers, strict=True)]
        scores = self.score(asked)
        return [
            SampledQuestion(
                record,
                tuple(text for text, _ in texts),
                self._accepted(texts, values),
                tuple(stopped for _, stopped in texts),
            )
            for record, texts, values in zip(records, answers, scores, strict=True)
        ]

    def _accepted(self, answers: Sequence[tuple[str, bool]], scores: Sequence[float]) -> tuple[bool, ...]:
        threshold = self.synth.threshold
        pairs = zip(answers, scores, strict=True)
        return tuple(bool(text) and stopped and score > threshold for (text, stopped), score in pairs)

    def _test(self, best: int) -> dict[str, Any]:
        """pass@k of the first and of the best model on the test split, and their paired difference."""
        path = self.path / "test.json"
        if path.exists():
            return read_json(path)
        records = self._seen(test_records(self.run_config, self.splits))
        require_scorable(records, self.synth.verifier)
        results, shares, clusters = {}, {}, []
        for name, number in (("start", 0), ("best", best)):
            model = self._local(open_target(self._model_name(number), self.run_config.model), number)
            with closing(Journal(self.path / f"test-{name}.jsonl", model.identity)) as journal:
                sampled = self._sampled(model, records, journal, number, _TEST)
            results[name] = {str(k): estimate.to_json() for k, estimate in self._pass_at(sampled).items()}
            shares[name], clusters = _shares(sampled), _clusters(sampled)
        gain = paired_difference(shares["start"], shares["best"], clusters, self.config.seed)
        result = {**results, "gain": gain.to_json(), "questions": len(records)}
        write_json(path, result)
        return result

    def _seen(self, records: Records) -> list[Record]:
        return list(with_contexts(self.run_config.evaluation.context, records, None))

    def _model_name(self, number: int) -> str:
        """The run or base that answers after so many rounds."""
        if number:
            return str(self.path / f"round-{number}" / "run")
        return self.synth.start or self.run_config.model.name

    def _local(self, model: LoadedRun, number: int) -> LocalModel:
        weights = weight_fingerprints(self._model_name(number), model.policy)
        return LocalModel(model.policy, model.chat, weights, self.run_config.evaluation.stop)


def improve(config: ImproveRunConfig) -> ImproveResult:
    """Take the rounds of a config in its output folder; the same call continues after a stop.

    Raises `CheckpointError` for a folder of another config.
    """
    folder = Path(config.output)
    if folder.is_file():
        raise CheckpointError("this is a file", where=str(folder), hint="name another output=...")
    # before anything is read: what another process begins here meanwhile must not pass as ours
    with _locked(folder):
        improvement = Improvement(config, folder)
        about: dict[str, Any] = {"config": config_to_dict(config), "data": improvement.splits.fingerprint}
        if (finished := _finished(folder, about)) is not None:
            return finished
        _ = improvement.score  # a verifier that cannot be used leaves no folder
        for place in (folder, *folder.glob("round-*")):
            recover_interrupted_writes(place)
        write_json(folder / SYNTH_FILE, about)
        result = improvement.run()
        write_improve_page(folder, result, about["config"])
        write_json(folder / SYNTH_FILE, {**about, "result": result.to_json()})
    return result


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made where it is missing, and removed again where nothing was written."""
    is_new, lock = not folder.exists(), lock_file(folder / LOCK_FILE)
    try:
        yield
    finally:
        lock.remove()
        if is_new:
            with suppress(OSError):  # it holds something
                folder.rmdir()


def _finished(folder: Path, about: dict[str, Any]) -> ImproveResult | None:
    """The result of a finished folder. Raises `CheckpointError` for a folder of another config or of something else."""
    if all(path.name in LOCK_FILES for path in folder.iterdir()):
        return None
    manifest = read_json(folder / SYNTH_FILE) if (folder / SYNTH_FILE).exists() else {}
    if changed := [name for name, value in about.items() if manifest.get(name) != value]:
        what = f"rounds of another {' and other '.join(changed)}" if manifest else "something else"
        raise CheckpointError(f"this folder holds {what}", where=str(folder), hint="name another output=...")
    return ImproveResult(**manifest["result"]) if "result" in manifest else None


def _conversation(record: Record, *, hint: bool) -> Conversation:
    """The bare question, as a tuned model is asked; with the expected answer behind it as a hint."""
    *before, last = PromptFormat().turns(record)
    if hint:
        last = replace(last, content=f"{last.content}\n\n{HINT.format(answer=record.answer)}")
    return Conversation((*before, last), record.tools, record.task)


def _with_answer(record: Record, answer: str) -> Record:
    message = Message("assistant", answer)
    return replace(record, messages=(*record.messages[:-1], message), references=(), candidates=(), score=None)


def _pair(sampled: SampledQuestion) -> dict[str, Any] | None:
    """The most frequent accepted and the most frequent other answer of a question; None without both."""
    # a cut answer is wrong for its length alone
    answers = zip(sampled.answers, sampled.accepted, sampled.stopped, strict=True)
    is_other = tuple(bool(text) and stopped and not accepted for text, accepted, stopped in answers)
    others = replace(sampled, accepted=is_other)
    chosen, rejected = sampled.kept(1), others.kept(1)
    if not chosen or not rejected:
        return None
    record = sampled.record
    return preference_row(record.messages[:-1], chosen[0], rejected[0], **columns_of(record))


def _shares(sampled: Sequence[SampledQuestion]) -> np.ndarray:
    """Share of accepted answers of each question."""
    return np.array([q.passed / len(q.answers) for q in sampled])


def _clusters(sampled: Sequence[SampledQuestion]) -> list[str]:
    return [q.record.group if q.record.group is not None else str(q.record.source) for q in sampled]


def _distribution(sampled: Sequence[SampledQuestion]) -> dict[str, float]:
    """Shares of questions whose answers are all or none accepted, and distinct answers over all answers."""
    total = len(sampled)
    return {
        "all_right": sum(q.passed == len(q.answers) for q in sampled) / total,
        "all_wrong": sum(q.passed == 0 for q in sampled) / total,
        "distinct": sum(len(set(q.answers)) for q in sampled) / sum(len(q.answers) for q in sampled),
    }


def _round_line(result: ImproveRound) -> str:
    first = result.pass_at[1]
    gain = "" if result.gain is None else f", {result.gain.mean:+.3f} [{result.gain.low:+.3f}, {result.gain.high:+.3f}]"
    return f"round {result.number}: pass@1 {first.mean:.3f} [{first.low:.3f}, {first.high:.3f}]{gain}"
