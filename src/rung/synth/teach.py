"""`rung synth teach`: opens the teacher, runs the rounds, and writes rows, rejected rows and a manifest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from rung.config.io import config_to_dict
from rung.config.synth import TeachConfig, TeachRunConfig
from rung.console import ProgressBar, print_status
from rung.data.rows import answer_row, preference_row
from rung.files import SYNTH_FILE, recover_interrupted_writes, write_json_lines
from rung.inference.ask import AnswerModel
from rung.inference.journal import Journal, request_key
from rung.report.synth import write_teach_page
from rung.results.evaluation import JudgeAgreement
from rung.results.synth import SynthResult
from rung.synth.answer_scores import ScoreAnswers, answer_scorer, require_scorable, require_usable_judge
from rung.synth.filters import diversity
from rung.synth.folder import REJECTED_FILE, ROWS_FILE, digest, finished_manifest, forget_rows, kept_result
from rung.synth.rounds import Draft, Teaching, require_rows
from rung.synth.sources import TeachSources
from rung.synth.writer import Writer, journal_path, open_writer, previewed_replies, previews_folder
from rung.training.run_folder import write_json


def teach(config: TeachRunConfig, *, overwrite: bool = False) -> SynthResult:
    """Write the rows of a config into its output folder.

    A finished folder of the same config is returned as it is. Raises `CheckpointError` for a folder with rows of
    another config unless `overwrite` is set, which keeps the journal: what was answered is not asked again.
    """
    folder = Path(config.output)
    finished, sources = finished_manifest(folder), _checked_sources(config.synth)
    about = {"config": config_to_dict(config), "sources": sources.fingerprint}
    if (result := kept_result(folder, finished, about, overwrite=overwrite)) is not None:
        return SynthResult(**result)
    parts = _open(config.synth, sources)
    identity, earlier = parts.teacher.identity, previewed_replies(parts.teacher)
    with closing(Journal(journal_path(folder, parts.teacher), identity, earlier)) as journal:
        recover_interrupted_writes(folder)  # under the lock of the journal
        forget_rows(folder)
        try:
            teaching = _teach(config.synth, parts, journal, config.seed)
        except KeyboardInterrupt:
            print_status(f"{len(journal.results):,} replies are kept in {journal.path}: the same command continues")
            raise
        rejected = list(rejected_rows(teaching.rejected))
        write_json_lines(folder / REJECTED_FILE, rejected)
        require_rows(teaching)
        return _write(folder, config, teaching, parts, rejected)


def preview(config: TeachRunConfig, rows: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The first rows and what was left out before them, without writing anything but replies into the cache.

    `teach` takes over the replies to requests that are its own, whatever else of the config has changed since.
    """
    synth = config.synth.model_copy(update={"rows": min(rows, config.synth.rows or rows)})
    config = config.model_copy(update={"synth": synth})
    parts = _open(synth, _checked_sources(synth))
    identity = parts.teacher.identity
    # a file for each config: two previews of one teacher may run at the same time
    path = previews_folder(parts.teacher) / f"{request_key(config_to_dict(config))}.jsonl"
    with closing(Journal(path, identity, previewed_replies(parts.teacher))) as journal:
        teaching = _teach(synth, parts, journal, config.seed)
    return list(rows_of(teaching.kept, config.synth)), list(rejected_rows(teaching.rejected))


class _Parts(NamedTuple):
    """What a config names, read and opened."""

    sources: TeachSources
    score: ScoreAnswers | None
    teacher: AnswerModel
    judge: JudgeAgreement | None
    """Agreement with people of the judge that scores answers."""


def _checked_sources(config: TeachConfig) -> TeachSources:
    """What needs no model, read and checked."""
    require_usable_judge(config)
    sources = TeachSources.read(config)
    if config.selection.verifier is not None and config.questions == "seeds":
        require_scorable([seed.record for seed in sources.seeds], config.selection.verifier)
    return sources


def _open(config: TeachConfig, sources: TeachSources) -> _Parts:
    """The models of a config, opened before a folder is made."""
    score, agreement = answer_scorer(config)
    return _Parts(sources, score, open_writer(config.teacher), agreement)


def _teach(config: TeachConfig, parts: _Parts, journal: Journal, seed: int) -> Teaching:
    """Run the rounds with a bar of kept rows and their yield."""
    if known := len(journal.results):
        print_status(f"going on with {known:,} replies, kept in {journal.path}")
    total = config.rows or len(parts.sources.seeds)
    with ProgressBar("teach", total) as bar:

        def show(kept: int, tried: int) -> None:
            bar.advance(min(kept, total) - bar.done, kept=f"{kept / tried:.0%} of {tried:,} questions")

        writer = Writer(parts.teacher, config.teacher, journal)
        teaching = Teaching(config, parts.sources, writer, parts.score, seed, show)
        teaching.run()
    return teaching


def rows_of(drafts: Iterable[Draft], config: TeachConfig) -> Iterable[dict[str, Any]]:
    """Rows in formats that `rung train` reads, each with the column `made`, which says how it was made."""
    for draft in drafts:
        made: dict[str, Any] = {"number": draft.number, "parents": list(draft.parents)}
        made |= {"attributes": draft.attributes} if draft.attributes else {}
        made |= {"scores": list(draft.scores)} if draft.scores else {}
        yield {**_columns(draft, config), "made": made}


def _columns(draft: Draft, config: TeachConfig) -> dict[str, Any]:
    answer = draft.answers[0]
    if config.makes.kind == "preferences":
        return preference_row(draft.turns, answer, draft.answers[-1], context=draft.context)
    return answer_row(draft.turns, answer, context=draft.context)


def rejected_rows(drafts: Iterable[Draft]) -> Iterable[dict[str, Any]]:
    """What was left out, with the filter and its reason."""
    for draft in drafts:
        if draft.rejection is not None:
            row: dict[str, Any] = {"number": draft.number, **asdict(draft.rejection)}
            row |= {"question": draft.question, "context": draft.context, "answers": list(draft.answers)}
            yield {name: value for name, value in row.items() if value not in (None, "", [])}


def _write(
    folder: Path, config: TeachRunConfig, teaching: Teaching, parts: _Parts, rejected: Sequence[dict[str, Any]]
) -> SynthResult:
    rows = list(rows_of(teaching.kept, config.synth))
    write_json_lines(folder / ROWS_FILE, rows)
    result = SynthResult(
        output=str(folder / ROWS_FILE),
        rows=len(rows),
        wanted=config.synth.rows,
        tried=teaching.tried,
        rejected=dict(teaching.rejections().most_common()),
        cost=teaching.teacher.cost.result(config.synth.teacher.price),
        **_diversities([s.question for s in teaching.sources.seeds], [draft.question for draft in teaching.kept]),
        judge=parts.judge,
    )
    facts: dict[str, Any] = {"teacher": config.synth.teacher.model, "teacher_identity": dict(parts.teacher.identity)}
    facts |= {"sources": parts.sources.fingerprint, "sha256": digest(folder / ROWS_FILE)}
    settings = config_to_dict(config)
    manifest = {"config": settings, **facts, "result": result.to_json()}
    write_teach_page(folder, result, settings, rows, rejected)
    write_json(folder / SYNTH_FILE, manifest)  # last: it says that all is there
    return result


def _diversities(seeds: Sequence[str], questions: Sequence[str]) -> dict[str, Any]:
    """Diversity of seeds and rows, over equally many: the measure falls with the number of texts."""
    count = min(len(seeds), len(questions)) or len(questions)
    values = {"diversity": diversity(questions[:count]), "compared_questions": count}
    return {**values, "diversity_of_seeds": diversity(seeds[:count])} if seeds else values
