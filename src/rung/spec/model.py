"""Which base, and how its text is framed."""

from __future__ import annotations

from typing import Literal

from rung.spec.base import Spec


class ModelSpec(Spec):
    """The base a run starts from."""

    name: str = "smollm2-135m"
    """A name from `rung models`, a transformers folder, a GGUF file, a run folder, or a hub id."""
    revision: str | None = None
    """Commit or tag of a hub id; none takes the newest."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type. `auto` is float32 on processors without AVX512-BF16 or AMX, where bfloat16 is many times slower."""
    template: str = "auto"
    """`auto` is the tokenizer's own chat template; `plain` is Rung's own for bases that have none; or a .jinja file."""
    fused: bool = True
    """Compute through Rung's own functions, which keep less and share inputs; false uses transformers' and peft's own
    forward: slower, the same result within rounding. For comparing and for finding faults."""
