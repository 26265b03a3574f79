"""`rung push`: a run or an export as a repository on the Hugging Face hub, with a model card.

A run's adapter or model goes there as the tools of others load it, never its logs, data or answers. Paths of this
machine are taken out of its files and its card. A dry run needs no network and shows every file and the card. `cli`
and `rung.push` call `push`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rung.commands.export import manifest_with_scores
from rung.config.run import RunConfig
from rung.console import status
from rung.errors import ConfigError, PlanError
from rung.exporting.commands import hub_commands
from rung.exporting.model_card import CardFacts, model_card, public_name, with_commands
from rung.files import MANIFEST, require_undamaged
from rung.methods.adapter_files import CONFIG
from rung.models.license import card_license
from rung.models.load import base_files
from rung.planning.hub import hub_is_reachable, is_hub_id
from rung.results.exports import PushedFile, PushResult
from rung.runs.artifact import ORIGIN_FILE
from rung.runs.load import config_of_run, refuse_climb, target_kind
from rung.training.run_folder import finished_artifact, read_json

CARD = "README.md"
ONLY_RUNG = ("RUNG_TASKS", "RUNG_P_TUNING")
"""Adapters that no other tool can load."""


@dataclass(frozen=True)
class PushRequest:
    """How a repository is written."""

    is_public: bool = False
    """Of a repository that is new; one that is there stays as it is."""
    is_dry_run: bool = False
    """Show what would be sent, and send nothing."""


def push(target: str | Path, repository: str, request: PushRequest | None = None) -> PushResult:
    """Send a finished run, or the folder of an export, to OWNER/NAME on the hub.

    Raises `ConfigError` for what is neither and for a name that the hub does not allow, `CheckpointError` for a run
    that is not finished or damaged, `PlanError` for a run that nobody else could load, and where the hub refuses.
    """
    request, path = request or PushRequest(), Path(target)
    _require_name(repository)
    refuse_climb(target)
    files, card, notes = (_run_files if target_kind(target) == "run" else _export_files)(path, repository)
    files[CARD] = card.encode()
    listed = tuple(PushedFile(name=name, bytes=_size(files[name])) for name in sorted(files))
    result = PushResult(repository=repository, files=listed, card=card, notes=tuple(notes))
    if request.is_dry_run:
        return result
    with status(f"sending {len(files)} files to {repository}"), _hub_errors(repository):
        return _send(files, request, result)


def _require_name(repository: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
        is_name = repository.count("/") == 1
    except HFValidationError:
        is_name = False
    if not is_name:
        raise ConfigError("this is no name of a repository", given=repository, allowed="OWNER/NAME")


Files = dict[str, Path | bytes]
"""Contents by the name that they get there."""


def _run_files(run: Path, repository: str) -> tuple[Files, str, list[str]]:
    """The files of a run but for the card, the card, and what to know of them."""
    manifest = manifest_with_scores(run)
    artifact = finished_artifact(run, manifest)
    require_undamaged(artifact)
    config, notes, card_notes = config_of_run(run), list[str](), list[str]()
    settings, is_reward = config.model, config.objective.kind == "reward"
    name = settings.student_of or settings.name
    base = public_name(name)
    files = {p.name: p for p in artifact.iterdir() if p.is_file() and p.name not in (MANIFEST, CARD)}
    peft_type = None
    if artifact.name == "adapter":
        peft_type = _require_loadable(run, artifact, config)
        if not is_hub_id(base):
            summary = f"the base {base} is no repository of the hub, and others need it for the adapter"
            notes.append(f"{summary}: rung export {run} FOLDER --as merged has both")
            card_notes.append(f"T{summary[1:]}.")
    if "scores" not in manifest.get("metrics", {}):
        notes.append(f"the run has no scores to show: rung eval {run} measures them")
    folder = base_files(settings)
    facts = CardFacts(
        title=repository.partition("/")[2],
        base=name,
        manifest=manifest,
        commands=hub_commands(repository, sorted(files), base=base, peft_type=peft_type, gives_scores=is_reward),
        notes=card_notes,
        base_license=None if folder is None else card_license(folder / CARD),
    )
    return _without_paths(files, base), model_card(facts), notes


def _require_loadable(run: Path, adapter: Path, config: RunConfig) -> str:
    """The kind of an adapter. Raises `PlanError` for one that others cannot load."""
    if config.objective.kind == "reward":
        hint = "a reward model of method: {kind: full} is one that transformers loads"
        raise PlanError("no other tool loads the score of a reward model's adapter", where=str(run), hint=hint)
    settings = config.model
    kind = str(read_json(adapter / CONFIG).get("peft_type"))
    if kind in ONLY_RUNG:
        hint = "rung chat, rung generate and rung serve answer with it"
        raise PlanError("no other tool loads such an adapter", where=str(run), given=kind, hint=hint)
    if settings.student_of is not None or (base_files(settings) is None and not is_hub_id(settings.name)):
        summary = "the base of this run is made of another model, so its adapter fits no model that others have"
        hint = f"rung export {run} FOLDER --as merged, then rung push FOLDER"
        raise PlanError(summary, where=str(run), given=settings.student_of or settings.name, hint=hint)
    return kind


def _export_files(folder: Path, repository: str) -> tuple[Files, str, list[str]]:
    """The same of an export."""
    if not (folder / MANIFEST).is_file() or not (folder / CARD).is_file():
        allowed = "a run folder, or what rung export wrote"
        raise ConfigError("this is neither a run nor an export", given=str(folder), allowed=allowed)
    # the card is there to be edited
    require_undamaged(folder, but=(CARD,), hint="export it again")
    files = {name: folder / name for name in read_json(folder / MANIFEST)["files"] if name != CARD}
    base, peft_type = None, None
    if CONFIG in files:
        settings = read_json(folder / CONFIG)
        named = read_json(folder / ORIGIN_FILE)["base"] if ORIGIN_FILE in files else settings["base_model_name_or_path"]
        base, peft_type = public_name(str(named)), str(settings["peft_type"])
    commands = hub_commands(repository, sorted(files), base=base, peft_type=peft_type)
    return _without_paths(files, base), with_commands((folder / CARD).read_text(), repository, commands), []


def _without_paths(files: Mapping[str, Path], base: str | None) -> Files:
    """The files with the base by the name that others know."""
    keys = {CONFIG: "base_model_name_or_path", ORIGIN_FILE: "base"}
    renamed = {name: _replaced(files[name], **{key: base}) for name, key in keys.items() if base and name in files}
    return {**files, **renamed}


def _replaced(file: Path, **values: Any) -> bytes:
    return (json.dumps({**read_json(file), **values}, indent=2) + "\n").encode()


def _size(content: Path | bytes) -> int:
    return content.stat().st_size if isinstance(content, Path) else len(content)


def _send(files: Files, request: PushRequest, result: PushResult) -> PushResult:
    from huggingface_hub import CommitOperationAdd, HfApi

    api, repository = HfApi(library_name="rung"), result.repository
    address = api.create_repo(repository, private=not request.is_public, exist_ok=True)
    others = sorted({*api.list_repo_files(repository)} - {*files, ".gitattributes"})
    additions = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
    commit = api.create_commit(repository, additions, commit_message="Upload by Rung")
    notes = [f"these files were there and stay: {', '.join(others)}"] if others else []
    return result.replace(url=str(address), commit=commit.oid, notes=(*result.notes, *notes))


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """Raise `PlanError` for what the hub, or the way to it, refuses."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    failures: tuple[type[Exception], ...] = (OSError, *_client_errors())
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise _not_sent(repository, "there is no token", "hf auth login, or HF_TOKEN") from error
    except OfflineModeIsEnabled as error:
        raise _not_sent(repository, "HF_HUB_OFFLINE is set", "unset it, or --dry-run") from error
    except HfHubHTTPError as error:
        status_code = error.response.status_code if error.response is not None else None
        reason = error.server_message or (str(error).splitlines() or ["no reason"])[0]
        hint = "a token that may write there: hf auth login, or HF_TOKEN" if status_code in (401, 403, 404) else None
        raise _not_sent(repository, f"{status_code}: {reason}" if status_code else reason, hint) from error
    except RuntimeError as error:  # of a large file, around what happened
        raise _not_sent(repository, f"{error} {error.__cause__ or ''}".strip(), None) from error
    except failures as error:
        reason = str(error) if hub_is_reachable() else "the hub cannot be reached"
        raise _not_sent(repository, reason, "--dry-run shows what would be sent") from error


def _client_errors() -> tuple[type[Exception], ...]:
    """What the HTTP client of huggingface_hub raises: httpx2 since its version 2, httpx before."""
    clients = (name for name in ("httpx2", "httpx") if find_spec(name) is not None)
    return tuple(import_module(name).HTTPError for name in clients)


def _not_sent(repository: str, reason: str, hint: str | None) -> PlanError:
    return PlanError("the hub did not take this", where=repository, given=reason, hint=hint)
