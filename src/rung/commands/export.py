"""`rung export`: a run as a GGUF file, an Ollama or vLLM folder, or a merged model, each with a model card.

What is written is proved before it gets its name: GGUF files in llama.cpp (`publish.gguf`), merged models in a fresh
process (`publish.parity`). A failure leaves nothing behind. `cli` and `rung.export` call `export`.
"""

from __future__ import annotations

import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rung.commands.export_gguf import ExportSource, GgufRequest, no_proof_reason, write_gguf_files
from rung.commands.merge import merge
from rung.config.model_catalog import CATALOG
from rung.config.run import RunConfig
from rung.errors import CheckpointError, ConfigError, PlanError
from rung.evaluation.evaluate import Evaluation
from rung.exporting.commands import load_command
from rung.exporting.model_card import CardFacts, model_card, public_name
from rung.exporting.ollama import modelfile, read_frames
from rung.exporting.quantization import require_writable
from rung.files import MANIFEST, require_undamaged, write_folder, write_text
from rung.methods.adapter_files import CONFIG
from rung.models.license import card_license
from rung.models.load import base_files
from rung.planning.hub import is_hub_id
from rung.results.exports import ExportedFile, ExportResult
from rung.runs.load import config_of_run, refuse_climb, target_kind
from rung.training.run_folder import finished_artifact, is_climb, read_json, read_manifest

TEMPLATE_FILE = "chat_template.jinja"
"""The name that transformers gives to the template of a tokenizer."""
ExportKind = Literal["gguf", "ollama", "vllm", "merged"]
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes for --max-lora-rank."""


@dataclass(frozen=True)
class ExportRequest:
    """What is written."""

    kind: ExportKind = "gguf"
    gguf: GgufRequest | None = None
    """Only for `gguf` and `ollama`."""


def export(target: str | Path, folder: str | Path, request: ExportRequest | None = None) -> ExportResult:
    """Write a run, or a base, into a new folder in the form of another tool.

    Raises `CheckpointError` for a run that is not finished and for a folder that exists, `PlanError` for what the other
    tool cannot hold, `GateError` where the written model is not the run.
    """
    request, target, folder = request or ExportRequest(), str(target), Path(folder)
    gguf = request.gguf or GgufRequest()
    _require_matching_options(request)
    source = _open_source(target, folder, gguf)
    manifest = manifest_with_scores(Path(target)) if source.config is not None else {}
    if request.kind in ("vllm", "merged"):
        write = _write_vllm if request.kind == "vllm" else _write_merged
        return write(source, folder, manifest)
    return (_write_ollama if request.kind == "ollama" else _write_gguf)(source, folder, gguf, manifest)


def _require_matching_options(request: ExportRequest) -> None:
    """Raise `ConfigError` for options that the kind of export would not follow."""
    gguf = request.gguf
    if gguf is not None and request.kind in ("vllm", "merged"):
        summary = f"--as {request.kind} writes no GGUF file"
        raise ConfigError(summary, where="--type, --adapter, --measure", allowed="--as gguf, or --as ollama")
    if gguf is not None and gguf.adapter and gguf.types:
        raise ConfigError("an adapter is written in f32", where="--type", hint="leave --type out")
    if request.kind == "ollama" and gguf is not None and (gguf.adapter or len(gguf.types) > 1):
        raise ConfigError("an Ollama folder holds one model", where="--as ollama", allowed="one --type, no --adapter")


def manifest_with_scores(run: Path) -> dict[str, Any]:
    """The manifest of a run; the rung of a climb has its scores in the ladder."""
    manifest, climb = read_manifest(run), run.absolute().parent.parent
    if "scores" in manifest.get("metrics", {}) or run.absolute().parent.name != "rungs" or not is_climb(climb):
        return manifest
    rows = read_manifest(climb).get("ladder", {}).get("rows", [])
    row = next((row for row in rows if Path(row.get("folder") or "").name == run.name), None)
    if row is None:
        return manifest
    measured = {name: row.get(name) for name in ("scores", "prompt_tokens", "seconds_per_query")}
    return {**manifest, "metrics": {**manifest.get("metrics", {}), **measured}}


def _open_source(target: str, folder: Path, gguf: GgufRequest) -> ExportSource:
    """Everything that can be refused before a model is loaded."""
    refuse_climb(target)
    if target_kind(target) == "server":
        raise ConfigError("a server cannot be exported", given=target, allowed="a run or a base")
    if folder.exists():
        raise CheckpointError("this folder exists already", where=str(folder))
    is_run = target_kind(target) == "run"
    config = config_of_run(Path(target)) if is_run else None
    if config is not None:
        _require_exportable(target, config)
    for name in gguf.types:
        require_writable(name)
    if gguf.measure is not None:
        if config is None:
            raise ConfigError("a base has no test questions of its own", where="--measure", given=target)
        if reason := no_proof_reason(ExportSource(target, config)):
            raise PlanError("nothing can be measured in llama.cpp here", where="--measure", given=reason)
    source = ExportSource(target, config)
    if gguf.adapter:
        if source.adapter is None:
            raise ConfigError("only a run with an adapter has one to write", where="--adapter", given=target)
        _require_served_as_adapter(source, "--adapter", "without --adapter the merged model is written")
    if config is None and not (Path(target).exists() or target in CATALOG or is_hub_id(target)):
        raise ConfigError("no run and no base is here", given=target)
    return source


def _require_served_as_adapter(source: ExportSource, where: str, hint: str) -> None:
    """Raise `PlanError` for an adapter that is more than a plain LoRA, or on a base that no other tool can load."""
    if not source.updates:
        kind = None if source.config is None else source.config.method.kind
        raise PlanError("other tools serve only a plain LoRA as an adapter", where=where, given=kind, hint=hint)
    source.require_same_base()
    name = source.model_config.name
    if source.model_config.student_of is not None or (base_files(source.model_config) is None and not is_hub_id(name)):
        summary = "the base of this run is made of another one, so no other tool can load it"
        raise PlanError(summary, where=where, given=source.model_config.student_of or name, hint=hint)
    base = source.base_chat()
    chat = source.chat()
    if chat.generation_stop_ids[:1] != base.generation_stop_ids[:1]:
        summary = "the run ends its answers with another token than its base, which an adapter cannot say"
        raise PlanError(summary, where=where, hint=hint)


def _require_exportable(target: str, config: RunConfig) -> None:
    """Raise `CheckpointError` or `PlanError` for a run that no other tool can serve, with what it can be used for."""
    finished_artifact(Path(target), read_manifest(Path(target)))
    if config.objective.kind == "reward":
        hint = "transformers loads its model/ folder for sequence classification; rung eval measures it"
        raise PlanError("a reward model gives scores and writes nothing", where=target, hint=hint)
    if config.method.virtual_token_count:
        hint = "peft loads its adapter/ folder; rung chat and rung generate answer with it"
        summary = "virtual tokens cannot be merged: they stand in the input, not in the weights"
        raise PlanError(summary, where=target, given=config.method.kind, hint=hint)
    if config.method.tasks:
        hint = "rung chat and rung generate answer with it"
        raise PlanError(
            "one file cannot hold an adapter for each task", where=target, given=config.method.kind, hint=hint
        )


def _write_gguf(source: ExportSource, folder: Path, request: GgufRequest, manifest: dict[str, Any]) -> ExportResult:
    results: list[ExportResult] = []

    def fill(staging: Path) -> None:
        files, evaluation = write_gguf_files(source, request, staging, _name(folder), _facts(source))
        if request.adapter:
            # the base in GGUF has a template of its own
            write_text(staging / TEMPLATE_FILE, source.chat().template)
        commands = _gguf_commands(source, folder, files)
        results.append(_gguf_result(source, folder, "gguf", files, evaluation).replace(commands=tuple(commands)))
        _write_card(staging, source, manifest, results[0])

    write_folder(folder, fill, replaces=False)
    return results[0]


def _gguf_result(
    source: ExportSource, folder: Path, kind: ExportKind, files: list[ExportedFile], evaluation: Evaluation | None
) -> ExportResult:
    is_proved = all(file.gate.state == "passed" for file in files)
    notes = [] if is_proved else [f"not proved: {no_proof_reason(source)}"]
    if ignored := sorted({stop for file in files for stop in file.ignored_stops}):
        notes.append(f"llama.cpp goes on after these ends of the base, so name them as `stop`: {' '.join(ignored)}")
    result = ExportResult(path=str(folder), kind=kind, files=tuple(files), notes=tuple(notes))
    if evaluation is None:
        return result
    return result.replace(questions=len(evaluation.items), run_seconds_per_query=evaluation.seconds_per_query)


def _gguf_commands(source: ExportSource, folder: Path, files: list[ExportedFile]) -> list[str]:
    smallest = min(files, key=lambda file: file.bytes)
    path = shlex.quote(str(folder / smallest.file))
    if smallest.type == "adapter":
        base, template = shlex.quote(source.model_config.name), shlex.quote(str(folder / TEMPLATE_FILE))
        base_folder = f"{folder}-base"
        base_file = shlex.quote(str(Path(base_folder) / f"{Path(base_folder).name}-f16.gguf"))
        return [
            f"rung export {base} {shlex.quote(base_folder)} --type f16  # the base, once",
            f"llama-server -m {base_file} --lora {path} --jinja --chat-template-file {template}  # with the LoRA on it",
        ]
    target, ollama = shlex.quote(source.target), shlex.quote(f"{folder}-ollama")
    return [
        f"llama-server -m {path}  # an OpenAI-compatible server",
        f"llama-cli -m {path}  # chat in the terminal",
        load_command(str(folder), gguf=smallest.file),
        f"rung export {target} {ollama} --as ollama --type {smallest.type}  # for Ollama, which reads no Jinja",
    ]


def _write_ollama(source: ExportSource, folder: Path, request: GgufRequest, manifest: dict[str, Any]) -> ExportResult:
    chat = source.chat()
    # llama.cpp puts it in front where the tokenizer does; elsewhere it stays in the template
    bos = str(chat.tokenizer.convert_ids_to_tokens(chat.bos_id)) if chat.adds_bos else None
    frames = read_frames(lambda turns, opens_answer: chat.prompt_text(turns, opens_answer=opens_answer), bos)
    stops = [*chat.stop_texts, *(source.config.evaluation.stop if source.config else ())]
    (type_name,) = request.file_types
    text = modelfile(f"{_name(folder)}-{type_name}.gguf", frames, stops)
    notes = ("the chat template trims turns, Ollama does not",) if frames.trims else ()
    results: list[ExportResult] = []

    def fill(staging: Path) -> None:
        files, evaluation = write_gguf_files(source, request, staging, _name(folder), _facts(source))
        write_text(staging / "Modelfile", text)
        name, place = shlex.quote(_name(folder)), shlex.quote(str(folder / "Modelfile"))
        commands = [f"ollama create {name} -f {place}  # once", f"ollama run {name}  # chat in the terminal"]
        result = _gguf_result(source, folder, "ollama", files, evaluation)
        results.append(result.replace(commands=tuple(commands), notes=(*result.notes, *notes)))
        _write_card(staging, source, manifest, results[0])

    write_folder(folder, fill, replaces=False)
    return results[0]


def _write_vllm(source: ExportSource, folder: Path, manifest: dict[str, Any]) -> ExportResult:
    """A copy of the adapter or model that vLLM loads as it is."""
    if source.config is None:
        raise ConfigError("vLLM loads a base by its own name", where="--as vllm", given=source.target)
    if source.adapter is not None:
        _require_served_as_adapter(source, "--as vllm", f"rung export {source.target} {folder} --as merged")
    path, name = shlex.quote(str(folder)), shlex.quote(_name(folder))
    if source.adapter is None:
        commands = [f"vllm serve {path}  # an OpenAI-compatible server", load_command(str(folder))]
    else:
        rank = _largest_rank(source.adapter)
        base = _loadable_name(source)
        options = f"--enable-lora --max-lora-rank {rank} --lora-modules {name}={path}"
        if (source.adapter / TEMPLATE_FILE).is_file():
            options += f" --chat-template {shlex.quote(str(folder / TEMPLATE_FILE))}"
        commands = [f"vllm serve {shlex.quote(base)} {options}  # ask for the model {name}"]
        commands.append(load_command(base, adapter=str(folder)))
    artifact = source.adapter or Path(source.target) / "model"
    require_undamaged(artifact)
    result = ExportResult(path=str(folder), kind="vllm", commands=tuple(commands))

    def fill(staging: Path) -> None:
        _copy(artifact, staging)
        _write_card(staging, source, manifest, result)

    write_folder(folder, fill, replaces=False)
    return result


def _copy(artifact: Path, target: Path) -> None:
    # the manifest of hashes is written anew
    shutil.copytree(artifact, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))


def _largest_rank(adapter: Path) -> int:
    """The smallest --max-lora-rank that holds every matrix. Raises `PlanError` where vLLM has none so large."""
    config = read_json(adapter / CONFIG)
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    if (allowed := next((size for size in VLLM_RANKS if size >= rank), None)) is None:
        raise PlanError("vLLM has no rank so large", given=rank, allowed=f"up to {VLLM_RANKS[-1]}", hint="--as merged")
    return allowed


def _loadable_name(source: ExportSource) -> str:
    """The base's id on the hub, or the folder of its files."""
    name = source.model_config.name
    known = CATALOG.get(name)
    if known is not None and known.hub_id is not None:
        return known.hub_id
    return str(base_files(source.model_config) or name)


def _write_merged(source: ExportSource, folder: Path, manifest: dict[str, Any]) -> ExportResult:
    """A transformers folder: the merge of an adapter, or a copy of a run that is a whole model."""
    if source.config is None:
        raise ConfigError("a base has nothing to merge", where="--as merged", given=source.target)
    commands = [load_command(str(folder)), f"vllm serve {shlex.quote(str(folder))}  # an OpenAI-compatible server"]
    result = ExportResult(path=str(folder), kind="merged", commands=tuple(commands))
    if source.adapter is None:
        model = Path(source.target) / "model"
        require_undamaged(model)

        def fill(staging: Path) -> None:
            _copy(model, staging)
            _write_card(staging, source, manifest, result)

        write_folder(folder, fill, replaces=False)
        return result
    merged = merge(Path(source.target), folder)
    result = result.replace(notes=(f"{merged.measure}: {merged.difference:.2e} (limit {merged.limit:g})",))
    _write_card(folder, source, manifest, result)
    return result


def _write_card(target: Path, source: ExportSource, manifest: dict[str, Any], result: ExportResult) -> None:
    base = _base_name(source)
    title = Path(result.path).name
    license = _license_of_folder(source)
    facts = CardFacts(title, base, manifest, result.commands, result.files, result.notes, license)
    write_text(target / "README.md", model_card(facts))


def _license_of_folder(source: ExportSource) -> str | None:
    """The license that the card of the base's own folder names."""
    folder = base_files(source.model_config)
    return None if folder is None else card_license(folder / "README.md")


def _base_name(source: ExportSource) -> str:
    if source.config is None:
        return source.target
    return source.config.model.student_of or source.config.model.name


def _name(folder: Path) -> str:
    return folder.name or "model"


def _facts(source: ExportSource) -> dict[str, str]:
    """General keys of a GGUF file."""
    base = _base_name(source)
    facts = {"description": f"exported by Rung; base {public_name(base)}"}
    known = CATALOG.get(base)
    return {**facts, "license": known.license.lower()} if known is not None else facts
