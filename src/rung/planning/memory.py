"""Memory of a run at its peak, term by term, from the shape of its model.

A run has stages (loading, steps, rollouts, saving), and its peak is that of the largest. The formulas follow what the
trainer stores: layers as in `planning/method_cost.py`, the head vectors of width H a supervised token. The memory of
Python and its libraries before a model is loaded is added separately: `BASELINE_RSS`, and on a graphics card
`CUDA_CONTEXT_BYTES`. Constants marked as measured come from runs on one machine, a processor; no card was measured. For
a card only its own memory is planned, not that of the host.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rung.config.method import BASE_CHANGING_METHODS, MixtureConfig, QloraConfig, front_virtual_tokens
from rung.config.run import RunConfig
from rung.planning.architecture import DTYPE_BYTES, ModelShape
from rung.planning.hub import is_hub_id
from rung.planning.method_cost import (
    MethodCost,
    activation_bytes_per_token,
    has_row_kernel,
    layer_bytes_per_token,
    method_bytes_per_token,
    method_cost,
)
from rung.planning.recomputation import (
    CUDA_FRAGMENTATION,
    UNFUSED_FACTOR,
    RecomputeRule,
    document_limit,
    scratch_bytes_per_token,
)
from rung.planning.throughput import generates_rollouts

BASELINE_RSS = 560 * 2**20
"""Resident memory of Python, torch, transformers and a tokenizer of 49,152 tokens, without a model (measured)."""
ACTIVATION_BYTES = 512 * 2**20
"""Budget for the activations of one micro-batch on a processor."""
SUPERVISED_SHARE = 0.5
"""Assumed share of supervised tokens in a micro-batch, before anything has been tokenized."""
MIN_TOKENS, MAX_TOKENS = 256, 4096
"""Limits of the `auto` budget: products slow down below a few hundred rows and gain nothing beyond a few thousand."""
CUDA_CONTEXT_BYTES = 600 * 2**20
"""Memory of the CUDA context, its kernels and the workspaces of cuBLAS (assumed, not measured)."""
CUDA_TOKENS = 16_384
"""Largest `auto` budget on a card. Products reach full rate with a few thousand rows (assumed, not measured)."""
CUDA_RESERVE = 0.05
"""Share of a card's available memory that the `auto` budget leaves free: the plan is an estimate (not measured)."""
CUDA_TOKENS_STEP = 256
"""The `auto` budget of a card is a multiple of this many tokens."""
PREFILL_TOKENS = 16_384
"""Prompt tokens that decoding encodes at once: long prompts run in smaller batches, so that memory does not grow."""
TILE_LOGITS = 512 * 2048
"""Logits in one tile of the head, as in `models/logprobs.py`."""
CARD_TILE_LOGITS = 2048 * 16_384
"""The same on a card."""
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
    **dict.fromkeys(("prompt", "prefix", "p_tuning"), 0.43),
    **{"bottleneck": 0.51, "qlora": 0.94, "mixture": 1.29},
}
"""The same for methods with more temporaries (measured for each). glibc 2.38 and later may leave less: earlier versions
did not reuse an aligned block for a request of the same size."""
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
    """Device type: cpu or cuda."""
    processes: int = 1
    """Processes that share the run, each on its own device."""
    context_tokens: int = 0
    """Shared tokens before each segment of a tree, summed over its segments: a card copies their keys and values."""
    document_bytes: int | None = None
    """Activation bytes that one document may take before its lowest layers are recomputed; None: no limit."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """A run's stages in order."""

    stages: tuple[Stage, ...]
    cost: MethodCost
    """What the method adds, from which the stages were computed."""
    footprint: int = BASELINE_RSS
    footprint_source: str = "Python, torch, transformers, a tokenizer (measured)"

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

    def follow_up_stages(self, config: RunConfig, shape: ModelShape, compute: str, length: float) -> tuple[Stage, ...]:
        """Memory of `rung eval` and `rung merge`, each in a new process; `length` is that of a prompt."""
        changes_base = config.method.kind in BASE_CHANGING_METHODS
        adapter = Term("adapter", 0 if changes_base else 4 * self.cost.stored_parameters, "float32")
        tokens = int(config.data.max_length or length)
        # Decoding takes no more prompts at once than this many tokens.
        rows = min(config.evaluation.batch, max(1, PREFILL_TOKENS // max(1, tokens)))
        scratch = DTYPE_BYTES[compute] * rows * tokens * 4 * (shape.mlp + shape.width)
        evaluation_terms = (
            *(*weight_terms(config, shape, compute), adapter),
            *decoding_terms(shape, rows, tokens + config.evaluation.max_new_tokens, compute),
            Term("scratch", scratch, "what one layer makes of the prompts"),
        )
        evaluation = Stage("evaluation", evaluation_terms)
        if changes_base:
            return (evaluation,)
        file_bytes = DTYPE_BYTES[shape.stored_dtype] * shape.parameters
        merge_terms = (
            Term("weights", 4 * shape.parameters, "float32, once as a run and then once as it is read back"),
            adapter,
            Term("file", file_bytes, "the base's, as it is mapped", mapped=True),
            Term("written", 4 * shape.parameters, "looked at again, as it is mapped", mapped=True),
            Term("copies", 2 * 4 * shape.embedding_parameters, "of the largest tensor, as it is written"),
        )
        return (evaluation, Stage("merging", merge_terms))


def tokens_per_micro_batch(shape: ModelShape, device: str) -> int:
    """The `auto` budget of a processor, and that of scoring on a card, where no activations are stored.

    776 tokens for a 135M model: a few hundred rows keep products near full speed.
    """
    if device == "cuda":
        return CUDA_TOKENS
    # The float32 count without a method, so that the budget depends only on the base.
    return max(MIN_TOKENS, min(MAX_TOKENS, ACTIVATION_BYTES // activation_bytes_per_token(shape)))


def tokens_that_fit(
    config: RunConfig,
    shape: ModelShape,
    micro_batch: MicroBatch,
    available: int,
    auxiliary: Mapping[str, ModelShape] | None = None,
    *,
    most: int = CUDA_TOKENS,
) -> int:
    """The `auto` budget of a card: up to `most` tokens whose plan fits into `available` bytes, at least `MIN_TOKENS`.

    `micro_batch` gives everything but the tokens. Half of them count as supervised, and `CUDA_RESERVE` is left free.
    """
    limit = available * (1.0 - CUDA_RESERVE)

    def is_too_large(steps: int) -> bool:
        tokens = steps * CUDA_TOKENS_STEP
        batch = replace(micro_batch, tokens=tokens, supervised_tokens=int(tokens * SUPERVISED_SHARE))
        return estimate_memory(config, shape, batch, auxiliary).required_bytes > limit

    # Memory grows with the tokens, so the first budget that is too large can be bisected.
    first_too_large = bisect_left(range(most // CUDA_TOKENS_STEP + 1), True, lo=1, key=is_too_large)
    return max(MIN_TOKENS, (first_too_large - 1) * CUDA_TOKENS_STEP)


def estimate_memory(
    config: RunConfig, shape: ModelShape, micro_batch: MicroBatch, auxiliary: Mapping[str, ModelShape] | None = None
) -> MemoryEstimate:
    """Memory of the stages of `rung train`; `auxiliary` holds the shapes of further models by purpose."""
    cost, compute = method_cost(config.method, shape), micro_batch.compute_dtype
    on_card = micro_batch.device == "cuda"
    resident = _resident_terms(config, shape, cost, compute, auxiliary or {})
    step = _step_terms(config, shape, cost, micro_batch)
    gradients = Term("gradients", 4 * (cost.trainable or 0), "float32")
    loading = _card_loading_terms(config, shape, compute) if on_card else _loading_terms(config, shape, compute)
    if micro_batch.processes > 1 and config.model.sharded:
        resident, gradients = _sharded(config, shape, micro_batch.processes, [*resident, gradients])
        # Each process reads its rows from the files, and nothing else.
        loading = [term for term in resident if term.name in ("weights", "reference")]
        step = (
            *(gradients if term.name == "gradients" else term for term in step),
            _gathered_term(config, shape, compute),
        )
    # The allocator does not return what a step has freed: it is still resident while the optimizer runs.
    heap = [term for term in step if term.name in ("activations", "scratch", "holes", "products", "gathered")]
    # AdamW's two temporaries are as large as the tensor it updates. On a card it is one fused kernel without any.
    temporaries = Term("temporaries", 2 * 4 * cost.largest_tensor, "twice the largest tensor that moves")
    stages = [
        Stage("loading", (*loading, *_library_terms(config))),
        Stage("steps", (*resident, *step)),
        Stage("optimizer", (*resident, gradients, *(() if on_card else (temporaries,)), *heap)),
    ]
    rollout = config.objective.rollout
    if rollout is not None and rollout.server is None and generates_rollouts(config):
        # A step never needs more answers at once than it generates.
        rows = min(rollout.batch, rollout.num_generations * config.training.examples_per_step)
        tokens = micro_batch.tokens // max(1, rollout.num_generations) + rollout.max_new_tokens
        stages.append(Stage("rollouts", (*resident, *decoding_terms(shape, rows, tokens, compute))))
    # After the last step moments and value model are freed; tensors are copied and verified one at a time.
    trained = [term for term in resident if term.name not in ("moments", "value")]
    copies = Term("copies", 2 * 4 * cost.largest_tensor, "of the largest tensor, written and looked at again")
    stages.append(Stage("saving", tuple(trained) if on_card else (*trained, copies)))
    if not on_card:
        return MemoryEstimate(tuple(stages), cost)
    # Files are mapped and libraries loaded in the memory of the host, which is not planned.
    of_card = (replace(s, terms=tuple(t for t in s.terms if t.name not in ("file", "bitsandbytes"))) for s in stages)
    return MemoryEstimate(tuple(of_card), cost, CUDA_CONTEXT_BYTES, "CUDA context, kernels, workspaces (assumed)")


def decoding_terms(shape: ModelShape, rows: int, tokens: int, compute: str) -> Sequence[Term]:
    """Memory of decoding besides the weights: `rows` answers at once, `tokens` long including prompts."""
    cache = rows * tokens * 2 * shape.kv * shape.layers * DTYPE_BYTES[compute]
    return (
        Term("kv_cache", cache, f"{rows} rows of {tokens:,} tokens, keys and values of {shape.layers} layers"),
        Term("logits", 2 * 4 * rows * shape.vocabulary, "of one token a row"),
    )


def weight_terms(config: RunConfig, shape: ModelShape, compute: str) -> Sequence[Term]:
    """Memory of the base during training."""
    if config.method.widens_base(compute):
        moves = config.method.kind == "full"
        source = "float32: what moves is never narrower" if moves else "float32: the method widens its base"
        return (Term("weights", 4 * shape.parameters, source),)
    width, vector_width = DTYPE_BYTES[_resident_dtype(config, shape, compute)], 2 if compute == "bfloat16" else 4
    linear_parameters, non_linear_bytes = shape.matrix_parameters, shape.other_bytes(width, vector_width)
    if not isinstance(config.method, QloraConfig):
        is_widened = width == 2 and vector_width == 4
        source = "bfloat16 as in the file, widened where it is used" if is_widened else f"{width} bytes each"
        return (Term("weights", width * linear_parameters + non_linear_bytes, source),)
    bits, double = config.method.bits, config.method.double_quant
    bytes_each = 1.0 if bits == 8 else NF4_BYTES if double else NF4_FLOAT_SCALES_BYTES
    # 8 bits: one float32 scale for each output.
    scales = 4 * shape.layers * sum(m.outputs for m in shape.matrices) if bits == 8 else 0
    source, quantized = f"{bits} bits a number of the layers' linears, and scales", int(linear_parameters * bytes_each)
    terms = [
        Term("quantized", quantized + scales, source),
        Term("weights", non_linear_bytes, "embeddings, head and norms, as they are"),
    ]
    # The file stays mapped as long as embeddings are read from it; converted weights are copies of it.
    if DTYPE_BYTES[shape.stored_dtype] == width and shape.stored_dtype != "float16":
        source = f"{shape.stored_dtype}, mapped with its embeddings"
        terms.append(Term("file", width * linear_parameters, source, mapped=True))
    return terms


def _resident_dtype(config: RunConfig, shape: ModelShape, compute: str) -> str:
    """The dtype of a base in memory: without fused functions a bfloat16 file is widened at loading (decision 0010)."""
    stays_bfloat16 = compute == "bfloat16" or (shape.stored_dtype == "bfloat16" and config.model.fused)
    return "bfloat16" if stays_bfloat16 else "float32"


def _base_dtype(config: RunConfig, shape: ModelShape, compute: str) -> str:
    """The dtype of the run's own base, which its method may hold wider than it was loaded."""
    return "float32" if config.method.widens_base(compute) else _resident_dtype(config, shape, compute)


def _library_terms(config: RunConfig) -> Sequence[Term]:
    """Libraries that not every run imports."""
    if config.method.kind != "qlora" and config.training.optimizer.state_dtype != "int8":
        return ()
    return (Term("bitsandbytes", BITSANDBYTES_BYTES, "the library (measured)"),)


def _resident_terms(
    config: RunConfig, shape: ModelShape, cost: MethodCost, compute: str, auxiliary: Mapping[str, ModelShape]
) -> Sequence[Term]:
    """Memory from the first step to the last."""
    terms, trainable = [*weight_terms(config, shape, compute), *_library_terms(config)], cost.trainable or 0
    terms += _shared_base_terms(config, shape, compute)
    if config.method.kind != "full":
        terms.append(Term("adapter", 4 * cost.stored_parameters, "float32, and the frozen half where there is one"))
    # Two moments for each parameter, of one byte or of four.
    moments = 2 if config.training.optimizer.state_dtype == "int8" else 8
    terms.append(Term("moments", moments * trainable, f"{moments // 2} bytes for each of AdamW's two"))
    if config.objective.kind == "ppo" and config.method.kind not in BASE_CHANGING_METHODS:
        terms.append(Term("value", 16 * trainable, "the value model's own adapter, its gradients and moments"))
    for name, other in auxiliary.items():
        width = DTYPE_BYTES[_resident_dtype(config, other, compute)]
        size = width * other.matrix_parameters + other.other_bytes(width, 2 if compute == "bfloat16" else 4)
        terms.append(Term(name, size, "a second model"))
    return terms


def _shared_base_terms(config: RunConfig, shape: ModelShape, compute: str) -> Sequence[Term]:
    """The layers as they were loaded, where a value or reward model needs them beside the quantized ones."""
    if config.method.kind != "qlora" or not config.shares_base:
        return ()
    width = DTYPE_BYTES[_resident_dtype(config, shape, compute)]
    size = width * shape.layers * shape.linear_parameters
    return (Term("shared base", size, "the layers as they were loaded, for the value or the reward model"),)


def _step_terms(config: RunConfig, shape: ModelShape, cost: MethodCost, micro_batch: MicroBatch) -> Sequence[Term]:
    """Further memory of a step, at the end of the forward pass of its last micro-batch."""
    method, compute = config.method, micro_batch.compute_dtype
    lowest, device = min(cost.lowest_layer, shape.layers - 1), micro_batch.device
    bytes_per_token = activation_bytes_per_token(shape, compute, lowest=lowest, device=device)
    method_bytes = method_bytes_per_token(method, shape, compute)
    bytes_per_token += method_bytes
    tokens, width = micro_batch.tokens + front_virtual_tokens(method), DTYPE_BYTES[compute]
    factor = 1.0 if config.model.fused else UNFUSED_FACTOR
    activations = int(bytes_per_token * tokens * factor)
    # Temporaries of one layer at a time; the allocator uses the same memory for the next layer.
    scratch = tokens * scratch_bytes_per_token(shape, compute, device)
    if device != "cpu" and has_row_kernel(shape, compute):
        # keys and values of all paths and their gradients, of one layer at a time
        scratch += 4 * width * shape.kv * micro_batch.context_tokens
    elif device != "cpu":
        copies = 2 * shape.query * width * micro_batch.context_tokens
        activations += (shape.layers - lowest) * copies
    source = f"{bytes_per_token:,} bytes for each of {tokens:,} tokens"
    recomputed, offloaded = _recomputed_layers(config, shape, cost, micro_batch)
    if recomputed:
        # A recomputed layer stores its input alone, also of what the method adds to it.
        layer_bytes = layer_bytes_per_token(shape, compute, device) + method_bytes // (shape.layers - cost.lowest_layer)
        saved_bytes = int(layer_bytes * factor) - width * shape.width
        activations = max(0, activations - recomputed * saved_bytes * tokens - offloaded * width * shape.width * tokens)
        source += f", {recomputed} layers recomputed"
        source += f", the inputs of {offloaded} of them in the memory of the host" if offloaded else ""
        if device != "cpu":  # the layer that is computed again stores everything meanwhile
            activations += int(layer_bytes * factor) * tokens
    gradients = 4 * (cost.trainable or 0)
    # Gradients are allocated as activations are freed, so only the excess adds to the peak.
    if micro_batch.batches == 1:
        gradients = max(0, gradients - activations)
    head = 3 * width * shape.width * micro_batch.supervised_tokens
    head += 3 * 4 * (CARD_TILE_LOGITS if micro_batch.device == "cuda" else TILE_LOGITS)
    # Gradients of the head, of the embeddings, and their sum if both are one matrix.
    head += {"full": 3 if shape.tied else 2, "head": 1}.get(method.kind, 0) * 4 * shape.embedding_parameters
    # A tile of the kernel on a card has the whole vocabulary, so a trained head is converted as a whole.
    if device == "cuda" and compute == "bfloat16" and method.kind in ("full", "head"):
        head += 2 * shape.embedding_parameters
    share = _fragmentation(config, shape, micro_batch)
    # cuBLAS's workspaces count as part of the context.
    products = Term("products", PRODUCT_BUFFER_BYTES, "buffers of matrix products (measured)")
    return (
        Term("gradients", gradients, "float32"),
        Term("activations", activations, source),
        Term("head", head, "vectors of the learned tokens, tiles, its gradient where it moves"),
        Term("scratch", scratch, "what one layer makes and forgets"),
        Term("holes", int(share * (activations + scratch)), f"{share:.0%}: what the allocator cannot use again"),
        *(() if device == "cuda" else (products,)),
    )


def _recomputed_layers(
    config: RunConfig, shape: ModelShape, cost: MethodCost, micro_batch: MicroBatch
) -> tuple[int, int]:
    """Layers that a single document recomputes, and those of them whose inputs go to the host.

    None where a router's load is balanced.
    """
    balances = isinstance(config.method, MixtureConfig) and config.method.balance_weight > 0.0
    if balances or micro_batch.documents > 1 or micro_batch.document_bytes is None:
        return 0, 0
    compute, device, tokens = micro_batch.compute_dtype, micro_batch.device, micro_batch.tokens
    limit = document_limit(config, shape, compute, micro_batch.document_bytes, device)
    rule = RecomputeRule(shape, limit, compute, device, lowest=min(cost.lowest_layer, shape.layers))
    return len(rule.layers_to_recompute(tokens)), len(rule.layers_to_offload(tokens))


def _sharded(
    config: RunConfig, shape: ModelShape, processes: int, terms: Sequence[Term]
) -> tuple[Sequence[Term], Term]:
    """Memory of one of several processes that share the model by rows (`training/fsdp.py`); the last term: gradients.

    Under `full` weights, gradients and moments are divided, and otherwise only the layers' weights.
    """
    layers, outside = shape.layers * shape.linear_parameters, shape.embedding_parameters * (1 if shape.tied else 2)
    trained = {"weights", "gradients", "moments"} if config.method.kind == "full" else set[str]()

    def rows(term: Term) -> Term:
        if term.name not in {*trained, "weights", "reference"}:
            return term
        # Embeddings and head are whole where they do not move.
        whole = 0.0 if term.name in trained else outside / (layers + outside)
        size = int(term.bytes * (whole + (1.0 - whole) / processes))
        return replace(term, bytes=size, source=f"{term.source}; its rows in one of {processes} processes")

    *resident, gradients = map(rows, terms)
    return resident, gradients


def _gathered_term(config: RunConfig, shape: ModelShape, compute: str) -> Term:
    """What is gathered at once: a layer that computes and the next one, under `full` also gradients and embeddings."""
    if config.method.kind != "full":
        width = DTYPE_BYTES[_base_dtype(config, shape, compute)]
        return Term("gathered", 2 * width * shape.linear_parameters, "two layers")
    # In bfloat16 layers and their gradients have two bytes, and the gradient is copied to be summed in float32.
    layer_bytes = (3 * 2 + 4 if compute == "bfloat16" else 3 * 4) * shape.linear_parameters
    size = layer_bytes + 2 * 4 * shape.embedding_parameters
    return Term("gathered", size, "two layers, the gradient of one; the embeddings and their gradient")


def _fragmentation(config: RunConfig, shape: ModelShape, micro_batch: MicroBatch) -> float:
    if micro_batch.device == "cuda":
        return CUDA_FRAGMENTATION
    share = FRAGMENTATION_BY_METHOD.get(config.method.kind, FRAGMENTATION)
    is_long_document = micro_batch.documents == 1 and micro_batch.tokens > tokens_per_micro_batch(shape, "cpu")
    return max(share, FRAGMENTATION_SINGLE_DOCUMENT) if is_long_document else share


def _card_loading_terms(config: RunConfig, shape: ModelShape, compute: str) -> Sequence[Term]:
    """Memory of a card while the base is loaded: weights go there one by one, under `full` widened there."""
    resident = weight_terms(config, shape, compute)
    if config.method.kind != "qlora":
        return resident
    # A matrix arrives as it is in the file, is widened and quantized: 8-bit copies are as large at most.
    largest = max(m.inputs * m.outputs for m in shape.matrices)
    return (
        *resident,
        *_shared_base_terms(config, shape, compute),
        Term("copies", 8 * largest, "the matrix that is quantized, as it is read and in float32"),
    )


def _loading_terms(config: RunConfig, shape: ModelShape, compute: str) -> Sequence[Term]:
    """Memory of loading. Files are mapped: weights in the requested dtype are not copied, but read when needed."""
    kind, stored, loaded = config.method.kind, shape.stored_dtype, _resident_dtype(config, shape, compute)
    is_widened = loaded == "bfloat16" and config.method.widens_base(compute)
    resident = weight_terms(config, shape, compute)
    file = Term("file", DTYPE_BYTES[stored] * shape.parameters, f"{stored}, as it is mapped", mapped=True)
    is_converted = config.model.name.endswith(".gguf") or is_hub_id(config.model.name) or config.shares_base
    if kind == "qlora" and not is_converted:
        # Each matrix is read from the mapped file, widened and quantized before the next.
        largest = max(m.inputs * m.outputs for m in shape.matrices)
        return (file, *resident, Term("copies", 2 * 4 * largest, "of the matrix that is quantized"))
    if stored != loaded:
        copies = Term("copies", DTYPE_BYTES[loaded] * shape.parameters, f"of all of it, as {loaded}")
        return (copies, *resident) if is_widened or kind == "qlora" else (file, copies)
    # Every page of the file is read while its weights are converted.
    reads_file = kind == "qlora" or is_widened
    return (file, *resident) if reads_file else resident
