"""`rung synth constitution`: answers are revised by written rules, or compared by them, and become rows.

Bai et al. 2022 (arXiv 2212.08073): revisions are rows for fine-tuning (section 3), comparisons preferences with soft
labels (section 4). Whether the critic's view is worth anything is measured on pairs that people labeled; small models
often agree with people no more than chance does, and their rows then say NOT TRUSTED.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

from rung.config.constitution import ConstitutionRunConfig, PreferencesConfig, RevisionsConfig
from rung.config.io import config_to_dict
from rung.console import ProgressBar, print_status
from rung.errors import DataError
from rung.files import SYNTH_FILE, recover_interrupted_writes, write_json_lines
from rung.inference.ask import AnswerModel
from rung.inference.journal import Journal, request_key
from rung.report.synth import write_constitution_page
from rung.results.synth import ConstitutionResult, CriticAgreement
from rung.synth.constitution_rows import (
    helpful_row,
    preference_facts,
    preference_rows,
    rejected_rows,
    revision_rows,
    round_summaries,
    shown_pair,
    shown_revisions,
)
from rung.synth.constitution_sources import ConstitutionSources
from rung.synth.feedback import FeedbackModel, LabeledPair, agreement_with_people, label_pairs
from rung.synth.folder import REJECTED_FILE, ROWS_FILE, digest, finished_manifest, forget_rows, kept_result
from rung.synth.revisions import RevisedAnswer, RevisionRounds
from rung.synth.writer import Writer, journal_path, open_writer, previewed_replies, previews_folder
from rung.training.run_folder import write_json

_HELPFUL_STAGE = 10**6
"""Part of the seed of helpful answers: no round of revisions has this number."""


class Constitution:
    """The work of one config: its models opened, its rows made."""

    def __init__(
        self,
        config: ConstitutionRunConfig,
        sources: ConstitutionSources,
        journal_of: Callable[[AnswerModel], Path],
        stack: ExitStack,
    ) -> None:
        """Journals are opened by the paths of `journal_of`, and closed by `stack`."""
        self.config, self.synth, self.sources = config, config.synth, sources
        teacher_config, critic_config = self.synth.teacher, self.synth.critic or self.synth.teacher
        teacher = open_writer(teacher_config)
        # one model for both, unless another one is named or it ends its answers by other texts
        names = {"model", "server", "stop", "concurrency"}
        is_same = teacher_config.model_dump(include=names) == critic_config.model_dump(include=names)
        critic = teacher if is_same else open_writer(critic_config)
        journals: dict[Path, Journal] = {}

        def journal(model: AnswerModel) -> Journal:
            path = journal_of(model)
            if path not in journals:
                earlier = previewed_replies(model)
                journals[path] = stack.enter_context(closing(Journal(path, model.identity, earlier)))
            return journals[path]

        self.teacher = Writer(teacher, teacher_config, journal(teacher))
        self.critic = Writer(critic, critic_config, journal(critic))
        self.feedback = FeedbackModel(self.synth, self.critic, sources.transcripts, config.seed)

    def agreement(self) -> CriticAgreement | None:
        """What the critic's preferences are worth; None without labels of people."""
        if not self.sources.labeled:
            return None
        print_status("the critic compares the pairs that people labeled")
        return agreement_with_people(self.feedback, self.sources.labeled, self.sources.people, self.config.seed)

    def revised(self, makes: RevisionsConfig) -> list[RevisedAnswer]:
        """The answers to all seeds with their revisions."""
        writers = (self.teacher, self.critic)
        with ProgressBar("revise", len(self.sources.seeds)) as bar:

            def show(done: int, revisions: int) -> None:
                bar.advance(done - bar.done, revisions=f"{revisions:,}")

            return RevisionRounds(self.synth, makes, self.sources, writers, self.config.seed, show).run()

    def labeled(self, makes: PreferencesConfig) -> list[LabeledPair]:
        """The pairs of answers to all seeds with their probabilities."""
        with ProgressBar("compare", len(self.sources.seeds)) as bar:

            def show(done: int, pairs: int) -> None:
                bar.advance(done - bar.done, pairs=f"{pairs:,}")

            return label_pairs(self.feedback, makes, self.teacher, self.sources, show)

    def helpful(self) -> list[dict[str, Any]]:
        """Rows that are added unrevised; the teacher answers those without an answer."""
        helpful = self.sources.helpful
        missing = [i for i, seed in enumerate(helpful) if not seed.answer]
        replies = self.teacher.answers([helpful[i].conversation for i in missing], [self.config.seed, _HELPFUL_STAGE])
        answers = [seed.answer for seed in helpful]
        for i, reply in zip(missing, replies, strict=True):
            if not isinstance(reply, str) and reply[0].stopped:
                answers[i] = reply[0].text.strip()
        if lost := answers.count(""):
            print_status(f"{lost:,} helpful rows are left out: the teacher gave no whole answer")
        return [helpful_row(seed, answer) for seed, answer in zip(helpful, answers, strict=True) if answer]


def constitution(config: ConstitutionRunConfig, *, overwrite: bool = False) -> ConstitutionResult:
    """Write the rows of a config into its output folder.

    A finished folder of the same config is returned as it is. Raises `CheckpointError` for a folder with rows of
    another config unless `overwrite` is set, which keeps the journals: what was answered is not asked again.
    """
    folder = Path(config.output)
    finished, sources = finished_manifest(folder), ConstitutionSources.read(config.synth, config.seed)
    about = {"config": config_to_dict(config), "sources": sources.fingerprint}
    if (result := kept_result(folder, finished, about, overwrite=overwrite)) is not None:
        return ConstitutionResult(**result)
    with ExitStack() as stack:
        work = Constitution(config, sources, partial(journal_path, folder), stack)
        recover_interrupted_writes(folder)  # under the locks of the journals
        forget_rows(folder)
        try:
            agreement = work.agreement()
            makes = config.synth.makes
            outcome: list[RevisedAnswer] | list[LabeledPair]
            outcome = work.revised(makes) if isinstance(makes, RevisionsConfig) else work.labeled(makes)
            helpful = work.helpful()
        except KeyboardInterrupt:
            print_status(f"all replies so far are kept in {folder}: the same command continues")
            raise
        return _write(folder, work, outcome, helpful, agreement, about)


def preview(config: ConstitutionRunConfig, seeds: int) -> list[dict[str, Any]]:
    """What becomes of the answers to the first seeds; nothing is written but replies into the cache.

    `constitution` takes over the replies to requests that are its own.
    """
    most = min(seeds, config.synth.limit or seeds)
    config = config.model_copy(update={"synth": config.synth.model_copy(update={"limit": most})})
    sources = ConstitutionSources.read(config.synth, config.seed)
    # a file for each config: two previews of one model may run at the same time
    name = f"{request_key(config_to_dict(config))}.jsonl"
    with ExitStack() as stack:
        work = Constitution(config, sources, lambda model: previews_folder(model) / name, stack)
        makes = config.synth.makes
        if isinstance(makes, RevisionsConfig):
            return [shown_revisions(answer) for answer in work.revised(makes)]
        return [shown_pair(pair) for pair in work.labeled(makes)]


def _write(
    folder: Path,
    work: Constitution,
    outcome: list[RevisedAnswer] | list[LabeledPair],
    helpful: Sequence[dict[str, Any]],
    agreement: CriticAgreement | None,
    about: dict[str, Any],
) -> ConstitutionResult:
    synth, config = work.synth, about["config"]
    answers = [item for item in outcome if isinstance(item, RevisedAnswer)]
    pairs = [item for item in outcome if isinstance(item, LabeledPair)]
    rows = [*revision_rows(answers), *preference_rows(pairs)]
    rejected = list(rejected_rows(outcome))
    counts = Counter(row["filter"] for row in rejected)
    write_json_lines(folder / REJECTED_FILE, rejected)
    if not rows:
        reasons = ", ".join(f"{name}: {count:,}" for name, count in counts.items()) or "every revision is unchanged"
        hint = "look at rejected.jsonl, or at rung synth constitution --preview 5"
        raise DataError("no answer was revised" if answers else "no pair was labeled", given=reasons, hint=hint)
    write_json_lines(folder / ROWS_FILE, [*rows, *helpful])
    costs = {"teacher": work.teacher.cost.result(synth.teacher.price)}
    costs["critic"] = work.critic.cost.result((synth.critic or synth.teacher).price)
    result = ConstitutionResult(
        output=str(folder / ROWS_FILE),
        makes=synth.makes.kind,
        rows=len(rows) + len(helpful),
        helpful=len(helpful),
        seeds=len(work.sources.seeds),
        rejected=dict(counts.most_common()),
        rounds=round_summaries(answers, synth.makes.rounds) if isinstance(synth.makes, RevisionsConfig) else (),
        critic=agreement,
        costs=costs,
        **preference_facts(pairs),
    )
    facts: dict[str, Any] = {"teacher": synth.teacher.model, "teacher_identity": dict(work.teacher.model.identity)}
    facts |= {"critic": (synth.critic or synth.teacher).model, "critic_identity": dict(work.critic.model.identity)}
    facts |= {"trusted": None if agreement is None else agreement.trusted, "sha256": digest(folder / ROWS_FILE)}
    write_constitution_page(folder, result, config, rows, rejected)
    write_json(folder / SYNTH_FILE, {**about, **facts, "result": result.to_json()})  # last: it says that all is there
    return result
