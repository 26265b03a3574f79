"""Which base, and how its text is framed."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, model_validator

from rung.config.base import Config

WITHOUT_RUN_SETTINGS = {"revision": None, "student_of": None, "layers": None}
"""What a model that is named elsewhere in a config has not of the run's own."""
StudentLayers = Literal["every_other", "first", "last"] | tuple[NonNegativeInt, ...]


class ModelConfig(Config):
    """The base a run starts from."""

    name: str = "smollm2-135m"
    """A name from `rung models`, a transformers folder, a GGUF file, a run folder, or a hub id."""
    student_of: str | None = None
    """Instead of `name`: a model, named in the same ways, of which only some layers are taken (Sanh et al. 2019)."""
    layers: StudentLayers | None = None
    """Which: `every_other` (half of them, evenly, with the first and the last), the `first` or the `last` half, or
    their numbers. None is every_other."""
    revision: str | None = None
    """Commit or tag of a hub id; none takes the newest."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type. `auto` is float32 on processors without AVX512-BF16 or AMX, where bfloat16 is many times slower."""
    template: str = "auto"
    """`auto` is the tokenizer's own chat template; `plain` is Rung's own for bases that have none; or a .jinja file."""
    fused: bool = True
    """Compute through Rung's own functions, which keep less and share inputs; false uses transformers' and peft's own
    forward: slower, the same result within rounding. For comparing and for finding faults."""

    sharded: bool = False
    """Of several processes each holds some rows of the layers' weights, and gathers a layer while it computes. Under
    full gradients and moments are in parts as well."""

    @model_validator(mode="after")
    def _layers_are_of_a_teacher(self) -> ModelConfig:
        if self.layers is not None and self.student_of is None:
            raise ValueError("layers are those of a student: name its teacher in model.student_of")
        if self.student_of is not None and self.name not in (ModelConfig.model_fields["name"].default, self.student_of):
            raise ValueError("model.name and model.student_of are two models: give one")
        return self
