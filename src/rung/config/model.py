"""The `model` section: the base model, its compute type and its chat template."""

from __future__ import annotations

from datetime import date
from typing import Any, Literal

from pydantic import Field, NonNegativeInt

from rung.config.base import Config

WITHOUT_RUN_SETTINGS = {"revision": None, "student_of": None, "layers": None}
"""Settings of the base of a run that do not apply to other models named in its config."""
StudentLayers = Literal["every_other", "first", "last"] | tuple[NonNegativeInt, ...]


ComputeType = Literal["auto", "float32", "bfloat16"]
"""Type that a base computes in; `auto`: what the processor or card is fast in."""


class ModelConfig(Config):
    """The base model that a run starts from."""

    name: str = "smollm2-135m"
    """A name from `rung models`, a transformers folder, a GGUF file, a run folder, or a Hugging Face hub id."""
    student_of: str | None = None
    """Instead of `name`: a teacher, named in the same ways, of which only some layers are kept (Sanh et al. 2019)."""
    layers: StudentLayers | None = None
    """Layers kept from `student_of`: `every_other` (half of them, evenly spaced, including first and last), the `first`
    or the `last` half, or layer numbers. Default: every_other."""
    revision: str | None = None
    """Commit or tag of a hub id; default: the newest."""
    dtype: ComputeType = "auto"
    """Compute type. `auto`: float32 on CPUs without AVX512-BF16 or AMX, where bfloat16 is many times slower."""
    template: str = "auto"
    """Chat template. `auto`: that of the tokenizer; `plain`: Rung's own, for bases without one; or a .jinja file."""
    template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables of the chat template, for example {enable_thinking: false}. Saved with the run as part of its
    template."""
    template_date: date | None = None
    """Date in place of today's, where the template writes it; default: 2024-07-26. A date that changes with the day
    would make training and serving differ."""
    fused: bool = True
    """Use Rung's fused functions, which keep fewer activations and share inputs. false: the forward of transformers and
    peft, slower, with the same result within rounding; for comparisons and debugging."""

    matmul: Literal["auto", "onednn", "blas"] = "auto"
    """Routine of float32 products on a processor. `auto`: the faster one, measured once a machine; `onednn`; `blas`:
    torch's own, MKL on x86. They round differently, so a resumed run keeps the routine that it began with."""

    sharded: bool = False
    """With several processes: each holds some rows of the weights of the layers and gathers a layer while it computes.
    With method full, gradients and optimizer state are sharded too."""

    def _check(self) -> None:
        if self.layers is not None and self.student_of is None:
            raise ValueError("layers are those of a student: name its teacher in model.student_of")
        # the default name counts as not set: pydantic fills it in before this check
        if self.student_of is not None and self.name not in (ModelConfig.model_fields["name"].default, self.student_of):
            raise ValueError("model.name and model.student_of are two models: give one")
