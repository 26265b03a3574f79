"""What the commands after a run hold: answering its test, and folding its adapter into the base."""

from __future__ import annotations

from rung.plan.memory import Stage, Term, Work, answering, weights
from rung.plan.shape import BYTES, Shape
from rung.plan.trained import trained
from rung.spec.method import MOVES_BASE
from rung.spec.run import RunSpec


def afterwards(spec: RunSpec, shape: Shape, work: Work, length: float) -> tuple[Stage, ...]:
    """`rung eval` and `rung merge`, each a process of its own; `length` is of a prompt in tokens."""
    own, tokens = trained(spec.method, shape), int(spec.data.max_length or length)
    whole = spec.method.kind in MOVES_BASE
    adapter = 0 if whole else 4 * ((own.moving or 0) + own.frozen)
    rows, width = spec.evaluate.batch, BYTES[work.compute]
    evaluation = Stage(
        "evaluation",
        (
            *weights(spec, shape, work.compute),
            Term("adapter", adapter, "float32"),
            *answering(shape, rows, tokens + spec.evaluate.max_new_tokens, work.compute),
            Term(
                "scratch", width * rows * tokens * 4 * (shape.mlp + shape.width), "what one layer makes of the prompts"
            ),
        ),
    )
    if whole:
        return (evaluation,)
    merged = (
        Term("weights", 4 * shape.parameters, "float32, once as a run and then once as it is read back"),
        Term("adapter", adapter, "float32"),
        Term("file", BYTES[shape.stored] * shape.parameters, "the base's, as it is mapped", mapped=True),
        Term("written", 4 * shape.parameters, "looked at again, as it is mapped", mapped=True),
        Term("copies", 2 * 4 * shape.embedding, "of the largest tensor, as it is written"),
    )
    return (evaluation, Stage("merging", merged))
