"""Memory of a run at its peak, term by term, from the shape of its model.

A run has stages (loading, steps, rollouts, saving), and its peak is that of the largest. The formulas follow what the
trainer stores: layers as in `planning/method_cost.py`, the head vectors of width H a supervised token. The memory of
Python and its libraries before a model is loaded is added separately: `BASELINE_RSS`. Constants marked as measured come
from runs on one machine; GPUs were not measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rung.config.method import BASE_CHANGING_METHODS, QloraConfig, front_virtual_tokens
from rung.config.run import RunConfig
from rung.planning.architecture import DTYPE_BYTES, ModelShape
from rung.planning.method_cost import MethodCost, activation_bytes_per_token, method_bytes_per_token, method_cost
from rung.planning.throughput import generates_rollouts

BASELINE_RSS = 560 * 2**20
"""Resident memory of Python, torch, transformers and a tokenizer of 49,152 tokens, without a model (measured)."""
ACTIVATION_BYTES = 512 * 2**20
"""Budget for the activations of one micro-batch on a processor."""
MIN_TOKENS, MAX_TOKENS = 256, 4096
"""Limits of the `auto` budget: products slow down below a few hundred rows and gain nothing beyond a few thousand."""
# A GPU needs more rows per launch than a processor for full rate; not measured here.
CUDA_TOKENS = 16_384
TILE_LOGITS = 512 * 2048
"""Logits in one tile of the head, as in `models/logprobs.py`."""
NF4_BYTES = 0.5 + 1 / 64
"""Bytes per weight of a 4-bit base: half a byte, and a one-byte scale for 64 weights (Dettmers et al. 2023)."""
NF4_FLOAT_SCALES_BYTES = 0.5 + 4 / 64
"""Bytes per weight with scales in float32 (`double_quant: false`)."""

BITSANDBYTES_BYTES = 110 * 10**6
"""Resident memory of the library (measured)."""
FRAGMENTATION, FRAGMENTATION_SINGLE_DOCUMENT = 0.19, 0.65
"""Share of a step's memory that is freed but not reusable, because no later request has its size (measured with glibc
2.36). A single long document leaves more: the temporaries of attention are as large, and differ in the next batch."""
FRAGMENTATION_BY_METHOD = {
    "prompt": 0.43,
    "prefix": 0.43,
    "p_tuning": 0.43,
    "bottleneck": 0.51,
    "qlora": 0.94,
    "mixture": 1.29,
}
"""The same for methods with more temporaries (measured for each). glibc 2.38 and later may leave less: earlier versions
did not reuse an aligned block for a request of the same size."""
UNFUSED_FACTOR = 3.4
"""Factor on stored activations with transformers' and peft's forward (`model.fused: false`) (measured)."""
PRODUCT_BUFFER_BYTES = 105 * 10**6
"""Buffers of matrix products on a processor (measured)."""


@dataclass(frozen=True, slots=True)
class Term:
    """One contribution to memory, in bytes, and the source of the number."""

    name: str
    bytes: int
    source: str
    mapped: bool = False
    """Mapped pages of a file, which the system can reclaim: resident, but not required."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of a run, and all memory at its peak."""

    name: str
    terms: tuple[Term, ...]

    @property
    def bytes(self) -> int:
        """Sum of all terms."""
        return sum(term.bytes for term in self.terms)

    @property
    def required_bytes(self) -> int:
        """Sum of the terms that the system cannot reclaim."""
        return sum(term.bytes for term in self.terms if not term.mapped)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The largest micro-batch of a run, as far as it is known."""

    compute_dtype: str
    """float32 or bfloat16."""
    tokens: int
    """Tokens of the largest micro-batch."""
    supervised_tokens: int
    """Supervised tokens among them."""
    compute_ratio: float = 1.0
    """Tokens computed over tokens of the documents: below 1 if prefixes are shared."""
    documents: int = 2
    """Documents of the largest micro-batch."""
    batches: int = 2
    """Micro-batches of a step; with one, gradients are allocated while activations are freed."""
    device: str = "cpu"
    """Fragmentation was measured for the CPU allocator; other devices take the smallest share."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """A run's stages in order."""

    stages: tuple[Stage, ...]
    footprint: int = BASELINE_RSS

    @property
    def largest_stage(self) -> Stage:
        """The stage with the peak."""
        return max(self.stages, key=lambda stage: stage.bytes)

    @property
    def peak(self) -> int:
        """Resident bytes at the peak, including libraries, while memory is not short."""
        return self.largest_stage.bytes + self.footprint

    @property
    def required_bytes(self) -> int:
        """Bytes that must be available."""
        return max(stage.required_bytes for stage in self.stages) + self.footprint

    def to_json(self) -> dict[str, object]:
        """Plain values, in bytes."""
        stages = {s.name: {"bytes": s.bytes, "terms": {t.name: t.bytes for t in s.terms}} for s in self.stages}
        total = {"peak_bytes": self.peak, "needed_bytes": self.required_bytes}
        return {**total, "footprint_bytes": self.footprint, "at": self.largest_stage.name, "stages": stages}


def tokens_per_micro_batch(shape: ModelShape, device: str) -> int:
    """The `auto` budget. 776 tokens for a 135M model: a few hundred rows keep products near full speed."""
    if device == "cuda":
        return CUDA_TOKENS
    # The float32 count without a method, so that the budget depends only on the base.
    return max(MIN_TOKENS, min(MAX_TOKENS, ACTIVATION_BYTES // activation_bytes_per_token(shape)))


def estimate_memory(
    config: RunConfig, shape: ModelShape, micro_batch: MicroBatch, auxiliary: Mapping[str, ModelShape] | None = None
) -> MemoryEstimate:
    """Memory of the stages of `rung train`; `auxiliary` holds the shapes of further models by purpose."""
    cost = method_cost(config.method, shape)
    resident = _resident_terms(config, shape, cost, micro_batch, auxiliary or {})
    step = _step_terms(config, shape, cost, micro_batch)
    # The allocator does not return what a step has freed: it is still resident while the optimizer runs.
    heap = [term for term in step if term.name in ("activations", "scratch", "holes", "products")]
    stages = [
        Stage("loading", (*_loading_terms(config, shape, micro_batch), *_library_terms(config))),
        Stage("steps", (*resident, *step)),
        Stage("optimizer", (*resident, *_optimizer_terms(cost), *heap)),
    ]
    rollout = config.objective.rollout
    if rollout is not None and generates_rollouts(config):
        # A step never needs more answers at once than it generates.
        rows = min(rollout.batch, rollout.num_generations * config.training.examples_per_step)
        tokens = micro_batch.tokens // max(1, rollout.num_generations) + rollout.max_new_tokens
        stages.append(Stage("rollouts", (*resident, *decoding_terms(shape, rows, tokens, micro_batch.compute_dtype))))
    # After the last step moments and value model are freed.
    trained = [term for term in resident if term.name not in ("moments", "value")]
    stages.append(Stage("saving", (*trained, *_saving_terms(cost))))
    return MemoryEstimate(tuple(stages))


def decoding_terms(shape: ModelShape, rows: int, tokens: int, compute: str) -> Sequence[Term]:
    """Memory of decoding besides the weights: `rows` answers at once, `tokens` long including prompts."""
    width = DTYPE_BYTES[compute]
    cache = rows * tokens * 2 * shape.kv * shape.layers * width
    return (
        Term("kv_cache", cache, f"{rows} rows of {tokens:,} tokens, keys and values of {shape.layers} layers"),
        Term("logits", 2 * 4 * rows * shape.vocabulary, "of one token a row"),
    )


def weight_terms(config: RunConfig, shape: ModelShape, compute: str) -> Sequence[Term]:
    """Memory of the base during training."""
    kind = config.method.kind
    non_linear = shape.layers * shape.norm_parameters + shape.other_parameters
    embeddings = shape.embedding_parameters * (1 if shape.tied else 2)
    linear_parameters = shape.layers * shape.linear_parameters
    if kind == "full":
        return (Term("weights", 4 * shape.parameters, "float32: what moves is never narrower"),)
    # Without fused functions a bfloat16 file is widened at loading (decision 0010).
    is_bfloat16 = compute == "bfloat16" or (shape.stored_dtype == "bfloat16" and config.model.fused)
    width = 2 if is_bfloat16 else 4
    # Norms and biases are widened once; only matrices stay bfloat16.
    vector_width = 2 if compute == "bfloat16" else 4
    non_linear_bytes = width * embeddings + vector_width * non_linear
    if isinstance(config.method, QloraConfig):
        bits, double = config.method.bits, config.method.double_quant
        bytes_each = 1.0 if bits == 8 else NF4_BYTES if double else NF4_FLOAT_SCALES_BYTES
        # 8 bits: one float32 scale for each output.
        scales = 4 * shape.layers * sum(m.outputs for m in shape.matrices) if bits == 8 else 0
        return (
            Term(
                "quantized",
                int(linear_parameters * bytes_each) + scales,
                f"{bits} bits a number of the layers' linears, and scales",
            ),
            Term("weights", non_linear_bytes, "embeddings, head and norms, as they are"),
            *_mapped_file_terms(shape, linear_parameters, width),
        )
    source = (
        "bfloat16 as in the file, widened where it is used"
        if width == 2 and vector_width == 4
        else f"{width} bytes each"
    )
    return (Term("weights", width * linear_parameters + non_linear_bytes, source),)


def _library_terms(config: RunConfig) -> Sequence[Term]:
    """Libraries that not every run imports."""
    if config.method.kind != "qlora" and config.training.optimizer.state_dtype != "int8":
        return ()
    return (Term("bitsandbytes", BITSANDBYTES_BYTES, "the library (measured)"),)


def _mapped_file_terms(shape: ModelShape, linear_parameters: int, width: int) -> Sequence[Term]:
    """The quantized weights' file stays mapped as long as the embeddings are read from it."""
    # Converted weights are copies, so nothing keeps the file mapped.
    if DTYPE_BYTES[shape.stored_dtype] != width or shape.stored_dtype == "float16":
        return ()
    return (Term("file", width * linear_parameters, f"{shape.stored_dtype}, mapped with its embeddings", mapped=True),)


def _resident_terms(
    config: RunConfig, shape: ModelShape, cost: MethodCost, micro_batch: MicroBatch, auxiliary: Mapping[str, ModelShape]
) -> Sequence[Term]:
    """Memory from the first step to the last."""
    terms = [*weight_terms(config, shape, micro_batch.compute_dtype), *_library_terms(config)]
    trainable = cost.trainable or 0
    if config.method.kind != "full":
        terms.append(
            Term("adapter", 4 * (trainable + cost.frozen_parameters), "float32, and the frozen half where there is one")
        )
    # Two moments for each parameter, of one byte or of four.
    moments = 2 if config.training.optimizer.state_dtype == "int8" else 8
    terms.append(Term("moments", moments * trainable, f"{moments // 2} bytes for each of AdamW's two"))
    if config.objective.kind == "ppo" and config.method.kind not in BASE_CHANGING_METHODS:
        terms.append(Term("value", 16 * trainable, "the value model's own adapter, its gradients and moments"))
    for name, auxiliary_shape in auxiliary.items():
        width = (
            2
            if micro_batch.compute_dtype == "bfloat16"
            or (auxiliary_shape.stored_dtype == "bfloat16" and config.model.fused)
            else 4
        )
        terms.append(Term(name, width * auxiliary_shape.parameters, "a second model"))
    return terms


def _step_terms(config: RunConfig, shape: ModelShape, cost: MethodCost, micro_batch: MicroBatch) -> Sequence[Term]:
    """Further memory of a step, at the end of the forward pass of its last micro-batch."""
    lowest = min(cost.lowest_layer, shape.layers - 1)
    bytes_per_token = activation_bytes_per_token(shape, micro_batch.compute_dtype, lowest=lowest)
    bytes_per_token += method_bytes_per_token(config.method, shape, micro_batch.compute_dtype)
    tokens = micro_batch.tokens + front_virtual_tokens(config.method)
    gradients = 4 * (cost.trainable or 0)
    activations = int(bytes_per_token * tokens * (1.0 if config.model.fused else UNFUSED_FACTOR))
    # Gradients are allocated as activations are freed, so only the excess adds to the peak.
    if micro_batch.batches == 1:
        gradients = max(0, gradients - activations)
    dtype_bytes = DTYPE_BYTES[micro_batch.compute_dtype]
    # Temporaries of one layer at a time; the allocator uses the same memory for the next layer.
    scratch = dtype_bytes * tokens * (4 * shape.mlp + 4 * shape.width)
    vectors = 3 * dtype_bytes * shape.width * micro_batch.supervised_tokens
    fragmentation = _fragmentation(config, shape, micro_batch)
    # Gradients of the head, of the embeddings, and their sum if both are one matrix.
    vocabulary_gradients = (
        {"full": 3 if shape.tied else 2, "head": 1}.get(config.method.kind, 0) * 4 * shape.embedding_parameters
    )
    return (
        Term("gradients", gradients, "float32"),
        Term("activations", activations, f"{bytes_per_token:,} bytes for each of {tokens:,} tokens"),
        Term(
            "head",
            vectors + 3 * 4 * TILE_LOGITS + vocabulary_gradients,
            "vectors of the learned tokens, tiles, its gradient where it moves",
        ),
        Term("scratch", scratch, "what one layer makes and forgets"),
        Term(
            "holes",
            int(fragmentation * (activations + scratch)),
            f"{fragmentation:.0%}: what the allocator cannot use again",
        ),
        Term("products", PRODUCT_BUFFER_BYTES, "buffers of matrix products (measured)"),
    )


def _fragmentation(config: RunConfig, shape: ModelShape, micro_batch: MicroBatch) -> float:
    if micro_batch.device != "cpu":
        return FRAGMENTATION
    is_long_document = micro_batch.documents == 1 and micro_batch.tokens > tokens_per_micro_batch(shape, "cpu")
    return max(
        FRAGMENTATION_BY_METHOD.get(config.method.kind, FRAGMENTATION),
        FRAGMENTATION_SINGLE_DOCUMENT if is_long_document else 0.0,
    )


def _optimizer_terms(cost: MethodCost) -> Sequence[Term]:
    """Further memory of AdamW: two temporaries as large as the tensor it updates."""
    return (
        Term("gradients", 4 * (cost.trainable or 0), "float32"),
        Term("temporaries", 2 * 4 * cost.largest_tensor, "twice the largest tensor that moves"),
    )


def _loading_terms(config: RunConfig, shape: ModelShape, micro_batch: MicroBatch) -> Sequence[Term]:
    """Memory of loading. Files are mapped: weights in the requested dtype are not copied, but read when needed."""
    is_bfloat16 = micro_batch.compute_dtype == "bfloat16" or (shape.stored_dtype == "bfloat16" and config.model.fused)
    loaded_dtype = "bfloat16" if is_bfloat16 else "float32"
    final = tuple(weight_terms(config, shape, micro_batch.compute_dtype))
    file = Term(
        "file",
        DTYPE_BYTES[shape.stored_dtype] * shape.parameters,
        f"{shape.stored_dtype}, as it is mapped",
        mapped=True,
    )
    if shape.stored_dtype != loaded_dtype:
        copies = Term("copies", DTYPE_BYTES[loaded_dtype] * shape.parameters, f"of all of it, as {loaded_dtype}")
        return (file, copies) if config.method.kind not in ("full", "qlora") else (copies, *final)
    # Every page of the file is read while its weights are converted.
    if config.method.kind == "qlora" or (config.method.kind == "full" and loaded_dtype == "bfloat16"):
        return (file, *final)
    return final


def _saving_terms(cost: MethodCost) -> Sequence[Term]:
    """Memory of saving: tensors are copied and verified one at a time."""
    return (Term("copies", 2 * 4 * cost.largest_tensor, "of the largest tensor, written and looked at again"),)


def estimate_follow_up_commands(
    config: RunConfig, shape: ModelShape, micro_batch: MicroBatch, length: float
) -> tuple[Stage, ...]:
    """Memory of `rung eval` and `rung merge`, each a separate process; `length` is that of a prompt in tokens."""
    cost, tokens = method_cost(config.method, shape), int(config.data.max_length or length)
    changes_base = config.method.kind in BASE_CHANGING_METHODS
    adapter = 0 if changes_base else 4 * ((cost.trainable or 0) + cost.frozen_parameters)
    rows, width = config.evaluation.batch, DTYPE_BYTES[micro_batch.compute_dtype]
    evaluation = Stage(
        "evaluation",
        (
            *weight_terms(config, shape, micro_batch.compute_dtype),
            Term("adapter", adapter, "float32"),
            *decoding_terms(shape, rows, tokens + config.evaluation.max_new_tokens, micro_batch.compute_dtype),
            Term(
                "scratch", width * rows * tokens * 4 * (shape.mlp + shape.width), "what one layer makes of the prompts"
            ),
        ),
    )
    if changes_base:
        return (evaluation,)
    merge_terms = (
        Term("weights", 4 * shape.parameters, "float32, once as a run and then once as it is read back"),
        Term("adapter", adapter, "float32"),
        Term("file", DTYPE_BYTES[shape.stored_dtype] * shape.parameters, "the base's, as it is mapped", mapped=True),
        Term("written", 4 * shape.parameters, "looked at again, as it is mapped", mapped=True),
        Term("copies", 2 * 4 * shape.embedding_parameters, "of the largest tensor, as it is written"),
    )
    return (evaluation, Stage("merging", merge_terms))
