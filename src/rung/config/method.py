"""The `method` section: which parameters are trained, one class per method.

Each class states its defaults and refuses settings that would have no effect, so that no setting is ignored silently.
Every class answers the same properties (`MethodBase`), which is all that code outside `methods` asks. The classes hold
no code of the method itself; `methods.registry` maps each kind to its implementation.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from rung.config.base import ALL_LINEAR, Config, Fraction, LinearRole, Tasks

LayerNumbers = Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]
LayerRange = Annotated[str, Field(pattern=r"^\d+-\d+$")]
Layers = LayerNumbers | Literal["first", "middle", "last"] | LayerRange | None
"""Layer numbers from 0, a range such as 15-29, or a third of the layers by name; default: all."""


CalibratedInit = Literal["pissa", "olora", "eva", "corda", "corda_knowledge", "lora_ga"]
Init = Literal["default", "gaussian", "orthogonal", CalibratedInit, "loftq"]
# keys of `rank_pattern`: a role, a layer number, or both as 3.down
_RANK_KEY = r"^((q|k|v|o|gate|up|down)|\d+|\d+\.(q|k|v|o|gate|up|down))$"


VirtualTokens = Annotated[int, Field(ge=1, le=500)]


class MethodBase(Config):
    """Properties that every method config has, so that code that builds a run needs no case distinction by method."""

    DEFAULT_LEARNING_RATE: ClassVar[float]

    @property
    def default_learning_rate(self) -> float:
        """Peak learning rate of supervised fine-tuning where the config sets none."""
        return self.DEFAULT_LEARNING_RATE

    @property
    def adapter_rank(self) -> int | None:
        """Rank of the low-rank updates; None for methods without them."""
        return None

    @property
    def adapter_dropout(self) -> float:
        """Dropout rate on the input of the adapters."""
        return 0.0

    @property
    def server_blocker(self) -> str | None:
        """Why a vLLM server cannot answer with the adapter of a run; None: it can."""
        return "it adds plain LoRA updates to its base and nothing else"

    def widens_base(self, compute: str) -> bool:
        """Whether the method holds a base stored in bfloat16 in float32, where products run in `compute`.

        Methods ask it before they widen the base, and plans count by it.
        """
        return False


class WeightMethodBase(MethodBase):
    """A method that trains weights of the base or of adapters, without virtual tokens."""

    tasks: ClassVar[tuple[str, ...]] = ()
    positions: ClassVar[None] = None
    virtual_token_count: ClassVar[int] = 0


class VirtualTokenBase(MethodBase):
    """A method that trains virtual tokens."""

    virtual_tokens: VirtualTokens = 20
    """Virtual tokens per document."""

    @property
    def virtual_token_count(self) -> int:
        """Number of virtual tokens at all positions."""
        return self.virtual_tokens


class FullConfig(WeightMethodBase):
    """Full fine-tuning: every weight of the base is trained."""

    DEFAULT_LEARNING_RATE: ClassVar[float] = 5e-5
    kind: Literal["full"] = "full"

    def widens_base(self, compute: str) -> bool:
        """Always: updates smaller than a rounding step of bfloat16 would be lost."""
        return True


class HeadConfig(WeightMethodBase):
    """Only the output head is trained. A head tied to the embeddings is untied first, also in the saved config."""

    DEFAULT_LEARNING_RATE: ClassVar[float] = 5e-4
    kind: Literal["head"] = "head"


class LowRankConfig(WeightMethodBase):
    """Settings shared by lora, qlora and lottery."""

    DEFAULT_LEARNING_RATE: ClassVar[float] = 5e-4
    kind: str

    @property
    def default_learning_rate(self) -> float:
        """The class default; a fifth of it where the first step is large: B not zero at the start, or LoRA+."""
        # measured: at the full default these starts diverged or forgot (docs/log.md, "Rates that did not work")
        has_large_first_step = self.init in SUBTRACTED_INITS or self.loraplus_lr_ratio > 1.0
        return self.DEFAULT_LEARNING_RATE / (5.0 if has_large_first_step else 1.0)

    @property
    def adapter_rank(self) -> int:
        """The default rank; `rank_pattern` can set others."""
        return self.rank

    @property
    def adapter_dropout(self) -> float:
        """The setting `dropout`."""
        return self.dropout

    @property
    def server_blocker(self) -> str | None:
        """DoRA and fully trained modules, which vLLM refuses, and updates of different scales."""
        if self.dora:
            return "dora: it adds B A and scales no direction"
        if self.modules_to_save:
            return "modules_to_save: it replaces no module of its base"
        # vllm/lora/peft_helper.py reads neither rank_pattern nor alpha_pattern
        if len({self.scale_at(rank) for rank in (self.rank, *self.rank_pattern.values())}) > 1:
            return "rank_pattern with alpha: it multiplies all updates by one scale; without alpha they have one"
        return None

    def widens_base(self, compute: str) -> bool:
        """With DoRA in float32: peft computes the norms of columns in the dtype of the stored weight."""
        return self.dora and compute == "float32"

    def scale_at(self, rank: int) -> float:
        """Factor of B A in a layer of this rank: alpha / rank, or alpha / sqrt(rank) with rsLoRA.

        Where `alpha` is not set, layers of other ranks have the scale of `rank`; with rsLoRA they have its alpha.
        LoRA of rank 16 gives 2, EVA 1/16 and rsLoRA 2.
        """
        divisor_rank = self.rank if self.alpha is None and not self.rslora else rank
        return self.resolved_alpha / (divisor_rank**0.5 if self.rslora else divisor_rank)

    @property
    def resolved_alpha(self) -> float:
        """The setting `alpha`, or its default, for a layer of the default rank."""
        return default_alpha(self.rank, self.init, rslora=self.rslora) if self.alpha is None else self.alpha

    rank: PositiveInt = 16
    """Rank of the update: columns of B. Trainable parameters grow linearly with it."""
    rank_pattern: dict[Annotated[str, Field(pattern=_RANK_KEY)], PositiveInt] = {}
    """Other ranks by role (down), layer (3) or both (3.down); the most specific entry applies."""
    alpha: PositiveFloat | None = None
    """Numerator of the scale: the update is multiplied by alpha / rank. Default by `init`: 1 for eva, 16 for olora,
    the rank for pissa, corda and loftq, else twice the rank, and the same scale in layers of other ranks; with
    `rslora` 8 for every rank."""
    dropout: Fraction = 0.0
    """Dropout on the input of the adapter. Above 0, prefixes are not shared: every copy is dropped differently."""
    targets: tuple[LinearRole, ...] = Field(default=ALL_LINEAR, min_length=1)
    """Roles (q, k, v, o, gate, up, down), not module names. A fused projection matches each of its roles."""
    layers: Layers = None
    """Layers with an adapter: numbers from 0, a range (15-29), or first, middle, last for a third of the layers;
    default: all."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank), with one alpha for every rank (Kalajdzievski 2023, eq. 4)."""
    dora: bool = False
    """Train magnitude and direction of the weights separately (DoRA, Liu et al. 2024, eq. 5)."""
    init: Init = "default"
    """Initialization of A and B: random (default, gaussian, orthogonal), or computed from the weights (pissa, olora),
    activations (eva, corda, corda_knowledge), gradients (lora_ga) or the quantization error (loftq). The base stays
    unchanged: an initial update that is not zero is subtracted by a frozen second half of the adapter."""
    init_examples: PositiveInt = 64
    """Training documents for the activations and gradients of such an initialization."""
    loraplus_lr_ratio: PositiveFloat = 1.0
    """Learning rate of B divided by that of A (LoRA+, Hayou et al. 2024, section 4); the paper uses 16."""
    lisa_n_layers: PositiveInt | None = None
    """Train only this many layers at a time, redrawn every `lisa_step_interval` steps (LISA, Pan et al. 2024)."""
    lisa_step_interval: PositiveInt = 20
    """Optimizer steps between draws of `lisa_n_layers`."""
    modules_to_save: tuple[str, ...] = ()
    """Names of modules that are trained in full and saved with the adapter, for example [lm_head]."""

    def _check(self) -> None:
        if self.rslora and self.alpha is None and self.init in (*FIXED_ALPHAS, *ALPHA_IS_RANK):
            raise ValueError(f"rslora and init {self.init} have different defaults of alpha: set alpha")
        if self.init in SUBTRACTED_INITS and self.dora:
            raise ValueError(f"init {self.init} subtracts its start, which a direction learned apart (dora) has not")
        if self.init in SUBTRACTED_INITS and self.dropout:
            raise ValueError(f"init {self.init} subtracts its start, which dropout would do only at random")
        if self.lisa_n_layers is None and self.lisa_step_interval != 20:
            raise ValueError("lisa_step_interval does nothing without lisa_n_layers")
        if not self._reads_documents() and self.init_examples != 64:
            raise ValueError("init_examples does nothing here: no start or score is read off documents")

    def _reads_documents(self) -> bool:
        # pissa and olora need the weights only
        return self.init in CALIBRATED_INITS - {"pissa", "olora"}


class LoraConfig(LowRankConfig):
    """Low-rank update W + (alpha / rank) * B @ A (Hu et al. 2021, eq. 3)."""

    kind: Literal["lora"] = "lora"

    def _check(self) -> None:
        super()._check()
        if self.init == "loftq":
            raise ValueError("init loftq makes up for what quantizing takes away: it goes with kind: qlora")


class QloraConfig(LowRankConfig):
    """LoRA on a base quantized to 4 or 8 bits (Dettmers et al. 2023)."""

    kind: Literal["qlora"] = "qlora"
    bits: Literal[4, 8] = 4
    """4: NF4 in blocks of 64; 8: int8 with one scale per output."""
    double_quant: bool = True
    """Quantize the scales of 4-bit blocks to 8 bits: 0.127 instead of 0.5 bits per weight."""

    def _check(self) -> None:
        super()._check()
        if self.init in CALIBRATED_INITS:
            raise ValueError(f"init {self.init} is read off matrices in full width: it goes with kind: lora")
        if self.dora:
            raise ValueError("dora takes the norms of whole columns, which a quantized base would widen at every step")
        if self.bits == 8 and not self.double_quant:
            raise ValueError("double_quant is about the scales of 4-bit blocks: it does nothing with bits: 8")
        if self.init == "loftq" and self.rank_pattern:
            raise ValueError("init loftq takes one rank for all: leave ranks out")


LOW_RANK_METHODS = ("lora", "qlora", "lottery")
"""Methods whose result is a LoRA: `rung merge` can merge it into the base."""
BASE_CHANGING_METHODS = ("full", "head")
"""Methods that change the base itself, so that no adapter for the original base fits afterwards."""
SUBTRACTED_INITS = frozenset({"pissa", "olora", "corda", "corda_knowledge", "lora_ga"})
"""Initial updates that are not zero; a frozen half of the adapter subtracts them (decision 0013)."""
CALIBRATED_INITS = frozenset[str](get_args(CalibratedInit))
"""Initializations computed before the first step from weights, activations or gradients."""
# docs/defaults.md has the source of each
FIXED_ALPHAS = {"eva": 1.0, "olora": 16.0}
"""Default `alpha` of initializations whose authors keep it for every rank."""
ALPHA_IS_RANK = frozenset({"pissa", "corda", "corda_knowledge", "loftq"})
"""Initializations that are a part of the weights, or of their error, at scale 1: alpha equals the rank."""
RSLORA_ALPHA = 8.0
"""Default `alpha` with rsLoRA: that of peft, which gives rank 16 the scale of LoRA."""


def default_alpha(rank: int, init: str, *, rslora: bool) -> float:
    """Default of `alpha`. A start of other units has another default: EVA's rows have norm 1, at any width.

    Known values at rank 16: LoRA 32, EVA 1, PiSSA 16, rsLoRA 8.
    """
    if rslora:
        return RSLORA_ALPHA
    return FIXED_ALPHAS.get(init, float(rank) if init in ALPHA_IS_RANK else 2.0 * rank)


class LayerLotteryConfig(Config):
    """Which layers a lottery keeps, and when it decides."""

    scout_steps: PositiveInt = 20
    """Optimizer steps in which all layers are trained."""
    keep: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Share of the layers that are kept, at least one."""
    score: Literal["delta", "energy"] = "delta"
    """`delta`: squared norm of the updates of a layer; `energy`: squared norm of their contribution to the outputs of
    the linear modules on `init_examples` documents (LoRA-drop, Zhou et al. 2024, eq. 3)."""
    choose: Literal["best", "random", "first", "middle", "last"] = "best"
    """Which layers are kept: those with the highest score, or as many others as a baseline."""
    rewind: bool = True
    """Whether the kept layers are reset to their initialization; otherwise they continue with their weights."""


class LotteryConfig(LowRankConfig):
    """LoRA with layer selection: all layers are trained at first, then only the best ones; the others are removed."""

    kind: Literal["lottery"] = "lottery"
    lottery: LayerLotteryConfig = LayerLotteryConfig()
    """Settings of the layer selection."""

    def _reads_documents(self) -> bool:
        return self.lottery.score == "energy"

    def _check(self) -> None:
        super()._check()
        if self.init in CALIBRATED_INITS or self.init == "loftq" or self.dora or self.lisa_n_layers is not None:
            allowed = "init default, gaussian or orthogonal, no dora, no sampling"
            raise ValueError(f"a lottery scores plain updates: {allowed}")


class MixtureConfig(WeightMethodBase):
    """Low-rank experts parallel to each linear module, mixed by a learned router (Dou et al. 2023, eq. 4-5)."""

    DEFAULT_LEARNING_RATE: ClassVar[float] = 5e-4
    kind: Literal["mixture"] = "mixture"
    experts: Annotated[int, Field(ge=2)] = 4
    """Experts (low-rank pairs) per linear module."""
    rank: PositiveInt = 8
    """Rank of each expert."""
    alpha: PositiveFloat | None = None
    """The sum of the experts is multiplied by alpha / rank. Default: twice the rank."""
    top_k: PositiveInt | None = None
    """Experts per token; the others get weight 0. Default: all."""
    balance: NonNegativeFloat | None = None
    """Weight of the loss that balances tokens over experts. Default: 1e-3 with `top_k`; 0 without, where every expert
    gets every token. Above 0, prefixes are not shared, because the loss counts every document."""
    targets: tuple[LinearRole, ...] = Field(default=ALL_LINEAR, min_length=1)
    """As for lora."""
    layers: Layers = None
    """As for lora."""

    def _check(self) -> None:
        if self.top_k == 1:
            raise ValueError("top_k: 1 gives one expert the weight 1 whatever its router says, which learns nothing")
        if self.top_k is not None and self.top_k >= self.experts:
            raise ValueError("top_k is below the number of experts; none takes them all")

    @property
    def adapter_rank(self) -> int:
        """Rank of each expert."""
        return self.rank

    @property
    def balance_weight(self) -> float:
        """The resolved `balance`."""
        return (1e-3 if self.top_k else 0.0) if self.balance is None else self.balance


class PeftTunerConfig(WeightMethodBase):
    """Any other tuner of peft, with its own config."""

    DEFAULT_LEARNING_RATE: ClassVar[float] = 1e-3
    kind: Literal["peft"] = "peft"
    config: dict[str, Any] = Field(min_length=1)
    """Settings of peft, including `peft_type`."""
    targets: tuple[LinearRole, ...] = Field(default=ALL_LINEAR, min_length=1)
    """Roles of its target modules, unless `config` names target_modules."""
    layers: Layers = None
    """As for lora."""
    starts_as_base: bool = True
    """Whether a fresh adapter leaves the base unchanged; the step-0 gate then checks it."""

    def widens_base(self, compute: str) -> bool:
        """Always: peft's tuners compute in the dtype of the stored weights."""
        return True


class BottleneckConfig(WeightMethodBase):
    """A narrow network after or parallel to each block: x + up(activation(down(x))) (Houlsby et al. 2019, sec. 2.1)."""

    DEFAULT_LEARNING_RATE: ClassVar[float] = 1e-3
    kind: Literal["bottleneck"] = "bottleneck"
    placement: Literal["houlsby", "pfeiffer", "parallel"] = "houlsby"
    """`houlsby`: after attention and after the feed-forward block, before each residual sum; `pfeiffer`: once per
    layer, on its output (Pfeiffer et al. 2020); `parallel`: parallel to the feed-forward block, on its input
    (He et al. 2022)."""
    width: PositiveInt = 64
    """Width of the bottleneck. Trainable parameters grow linearly with it."""
    activation: Literal["relu", "gelu", "silu", "tanh"] = "gelu"
    """Activation between down and up projection."""
    scale: PositiveFloat | None = None
    """Factor of the adapter output. Default: 4 for `parallel` (He et al. 2022, section 4.6), else 1."""
    layers: Layers = None
    """As for lora."""

    @property
    def resolved_scale(self) -> float:
        """The resolved `scale`."""
        return (4.0 if self.placement == "parallel" else 1.0) if self.scale is None else self.scale


class PromptConfig(VirtualTokenBase):
    """Prompt tuning: trained embeddings before every document (Lester et al. 2021)."""

    DEFAULT_LEARNING_RATE: ClassVar[float] = 3e-2
    positions: ClassVar[None] = None
    kind: Literal["prompt"] = "prompt"
    virtual_tokens: VirtualTokens = 20
    """Number of trained embeddings."""
    tasks: Tasks = ()
    """Tasks (`data.task`) with a prompt of their own; default: one prompt for all data."""
    init: Literal["random", "vocabulary", "text"] = "vocabulary"
    """`random`: normal with the standard deviation of the base's embeddings; `vocabulary`: embeddings of distinct
    tokens, drawn from the most frequent ones; `text`: the embeddings of `init_text`, repeated or cut to fit."""
    init_text: str | None = None
    """Initial text of the prompt, for `init: text`."""

    def _check(self) -> None:
        if (self.init == "text") != bool(self.init_text):
            raise ValueError("init: text and init_text go together")


class PrefixConfig(VirtualTokenBase):
    """Prefix tuning: trained keys and values before every document, in every layer (Li and Liang 2021, eq. 3)."""

    DEFAULT_LEARNING_RATE: ClassVar[float] = 1e-2
    positions: ClassVar[None] = None
    kind: Literal["prefix"] = "prefix"
    virtual_tokens: VirtualTokens = 20
    """Number of trained keys and values per layer."""
    tasks: Tasks = ()
    """As for prompt."""
    projection: PositiveInt | None = None
    """Width of a network that computes them from trained embeddings during training; only its output is saved (Li and
    Liang 2021, section 4.3). Default: keys and values are trained directly (Liu et al. 2022)."""


class VirtualTokenPositions(Config):
    """Numbers of virtual tokens by position in a conversation."""

    front: NonNegativeInt = 0
    """Before the document."""
    user: NonNegativeInt = 0
    """Before the content of each user turn, including its context."""
    assistant: NonNegativeInt = 0
    """Before each answer, directly after the template's opening of the assistant turn."""


class PTuningConfig(VirtualTokenBase):
    """Virtual tokens from an encoder shared by all tasks; only its output is saved (Liu et al. 2021, section 3.2)."""

    DEFAULT_LEARNING_RATE: ClassVar[float] = 1e-3
    kind: Literal["p_tuning"] = "p_tuning"
    virtual_tokens: VirtualTokens = 20
    """Virtual tokens at all positions together."""
    tasks: Tasks = ()
    """Tasks (`data.task`) with virtual tokens of their own, from one encoder; default: one set for all data."""
    encoder: Literal["lstm", "mlp"] = "mlp"
    """`lstm`: two bidirectional layers, then linear, ReLU, linear; `mlp`: three linear layers with ReLU between."""
    hidden: PositiveInt | None = None
    """Width of the encoder (of an LSTM: per direction); default: half the width of the base."""
    layers: Literal["input", "all"] = "input"
    """`input`: embeddings that run through the model; `all`: keys and values in every layer (Liu et al. 2022)."""
    positions: VirtualTokenPositions | None = None
    """Positions of the virtual tokens; default: all before the document."""

    def _check(self) -> None:
        if self.positions is None:
            return
        if (total := sum(self.positions.model_dump().values())) != self.virtual_tokens:
            raise ValueError(f"positions add up to {total}, and virtual_tokens is {self.virtual_tokens}")
        if self.layers == "all" and self.positions.front != total:
            raise ValueError("keys and values in every layer (layers: all) stand in front alone")


def front_virtual_tokens(config: AnyMethodConfig) -> int:
    """Virtual tokens before every document; tokens at other positions are part of the documents."""
    return config.virtual_token_count if config.positions is None else config.positions.front


def encoder_parameter_count(config: Config, input_width: int, output_width: int) -> int:
    """Parameters of the network that computes virtual tokens of this width during training; 0 without one."""
    lstm_parameters, widths = 0, tuple[int, ...]()
    if isinstance(config, PrefixConfig) and config.projection is not None:
        widths = (input_width, config.projection, output_width)
    elif isinstance(config, PTuningConfig):
        hidden = config.hidden or input_width // 2
        widths = (input_width, hidden, hidden, output_width)
        if config.encoder == "lstm":
            # two layers of 2 directions and 4 gates, with two biases per gate as torch's LSTM
            lstm_parameters = sum(2 * 4 * hidden * (width + hidden + 2) for width in (input_width, 2 * hidden))
            widths = (2 * hidden, 2 * hidden, output_width)
    else:
        return 0
    return lstm_parameters + sum((before + 1) * after for before, after in pairwise(widths))


def inserted_token_ids(config: AnyMethodConfig, first_id: int) -> dict[str, tuple[int, ...]]:
    """Ids of the virtual tokens inside a conversation by role, counted from `first_id`; only roles that have some."""
    if config.positions is None:
        return {}
    # ids beyond the vocabulary, which no text can produce (decision 0016)
    border = first_id + config.positions.user
    spans = {"user": range(first_id, border), "assistant": range(border, border + config.positions.assistant)}
    return {role: tuple(span) for role, span in spans.items() if span}


LoraLikeConfig = LoraConfig | QloraConfig | LotteryConfig
PromptLearningConfig = PromptConfig | PrefixConfig | PTuningConfig
AnyMethodConfig = (
    FullConfig | HeadConfig | LoraLikeConfig | MixtureConfig | BottleneckConfig | PromptLearningConfig | PeftTunerConfig
)
MethodConfig = Annotated[AnyMethodConfig, Field(discriminator="kind")]
_METHODS: tuple[type[AnyMethodConfig], ...] = get_args(AnyMethodConfig)
# for look-ups by name; pydantic chooses by `kind` in the union above
METHOD_CONFIGS = {method.model_fields["kind"].default: method for method in _METHODS}
