"""Commands by which other tools load what was written, for the terminal and for model cards."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from rung.planning.hub import is_hub_id

ADAPTER_ENDING = "-adapter.gguf"
"""Of the name of a LoRA in GGUF."""


def load_command(
    model: str,
    *,
    adapter: str | None = None,
    gguf: str | None = None,
    model_class: str = "AutoModelForCausalLM",
    registers_tuners: bool = False,
) -> str:
    """How transformers loads a folder, a repository or a GGUF file in it, or peft an adapter on a model.

    `registers_tuners`: of an adapter that peft knows only once `rung.peft` is imported.
    """
    file = "" if gguf is None else f", gguf_file={gguf!r}"
    load = f"{model_class}.from_pretrained({model!r}{file})"
    code, tool = f"from transformers import {model_class}; {load}", "transformers"
    if adapter is not None:
        load, tool = f"PeftModel.from_pretrained({load}, {adapter!r})", "peft"
        imports = "import rung.peft; from peft import PeftModel" if registers_tuners else "from peft import PeftModel"
        code = f"from transformers import {model_class}; {imports}; {load}"
    return f"python -c {shlex.quote(code)}  # in {tool}"


def hub_commands(
    repository: str, files: Sequence[str], *, base: str | None, peft_type: str | None, gives_scores: bool = False
) -> list[str]:
    """How the files of a repository are used from there, by what they are.

    `base` is that of an adapter, and `peft_type` the kind of the adapter. A base that is no repository has the place of
    a folder, which whoever uses the command has to know.
    """
    name = repository.partition("/")[2]
    if gguf := [file for file in files if file.endswith(".gguf")]:
        return _gguf_commands(repository, name, gguf, ollama="Modelfile" in files)
    if gives_scores:
        return [load_command(repository, model_class="AutoModelForSequenceClassification")]
    if peft_type is None or base is None:
        return [load_command(repository), f"vllm serve {repository}  # an OpenAI-compatible server"]
    base = base if is_hub_id(base) else f"path/to/{base}"
    commands = [load_command(base, adapter=repository, registers_tuners=peft_type.startswith("RUNG_"))]
    if peft_type == "LORA":
        options = f"--enable-lora --lora-modules {name}={repository}"
        commands.append(f"vllm serve {base} {options}  # ask for the model {name}")
    return commands


def _gguf_commands(repository: str, name: str, files: Sequence[str], *, ollama: bool) -> list[str]:
    if files[0].endswith(ADAPTER_ENDING):
        download = f"hf download {repository} --local-dir {name}"
        options = f"--lora {name}/{files[0]} --jinja --chat-template-file {name}/chat_template.jinja"
        return [download, f"llama-server -m BASE.gguf {options}  # on its base in GGUF"]
    commands = [f"llama-server --hf-repo {repository} --hf-file {file}" for file in files]
    return [*commands, f"ollama run hf.co/{repository}"] if ollama else commands
