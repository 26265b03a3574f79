"""Which numbers may move."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from rung.config.base import ALL_LINEAR, Config, Fraction, LinearRole

Layers = (
    Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]
    | Literal["first", "middle", "last"]
    | Annotated[str, Field(pattern=r"^\d+-\d+$")]
    | None
)
"""Numbers counted from 0, a range such as 15-29, or a third of the layers by name; none is all."""


def _different(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names) or "" in names:
        raise ValueError("tasks have different names, none of them empty")
    return names


Tasks = Annotated[tuple[str, ...], AfterValidator(_different)]
"""Names of tasks of the data."""
Init = Literal[
    "default", "gaussian", "orthogonal", "pissa", "olora", "eva", "corda", "corda_knowledge", "lora_ga", "loftq"
]
_PLACE = r"^((q|k|v|o|gate|up|down)|\d+|\d+\.(q|k|v|o|gate|up|down))$"


VirtualTokens = Annotated[int, Field(ge=1, le=500)]


class MethodBase(Config):
    """What every method answers, whatever its settings: the code that composes a run asks nothing else."""

    DEFAULT_LEARNING_RATE: ClassVar[float]

    @property
    def default_learning_rate(self) -> float:
        """Peak rate of supervised fine-tuning where a config names none."""
        return self.DEFAULT_LEARNING_RATE

    @property
    def adapter_rank(self) -> int | None:
        """Rank of its low-rank updates; None for a method without any."""
        return None

    @property
    def adapter_dropout(self) -> float:
        """Dropout on the input of its adapters."""
        return 0.0


class WeightMethodBase(MethodBase):
    """A method that trains weights, of the base or of adapters beside it, and adds no virtual tokens."""

    tasks: ClassVar[tuple[str, ...]] = ()
    positions: ClassVar[None] = None
    virtual_token_count: ClassVar[int] = 0


class VirtualTokenBase(MethodBase):
    """A method that trains virtual tokens."""

    virtual_tokens: VirtualTokens = 20
    """Virtual tokens of each document."""

    @property
    def virtual_token_count(self) -> int:
        """All of them, wherever they stand."""
        return self.virtual_tokens


class FullConfig(WeightMethodBase):
    """Every weight of the base moves."""

    DEFAULT_LEARNING_RATE: ClassVar[float] = 5e-5
    kind: Literal["full"] = "full"


class HeadConfig(WeightMethodBase):
    """Only the output head moves. A head tied to the embeddings is untied first, and the saved config says so."""

    DEFAULT_LEARNING_RATE: ClassVar[float] = 5e-4
    kind: Literal["head"] = "head"


class LowRankConfig(WeightMethodBase):
    """What lora, qlora and lottery have in common."""

    DEFAULT_LEARNING_RATE: ClassVar[float] = 5e-4
    kind: str

    @property
    def default_learning_rate(self) -> float:
        """Where B does not start at zero the first step is a large one, and a faster B multiplies it: a fifth there."""
        eager = self.init in SUBTRACTED_INITS or self.loraplus_lr_ratio > 1.0
        return self.DEFAULT_LEARNING_RATE / (5.0 if eager else 1.0)

    @property
    def adapter_rank(self) -> int:
        """The rank of all layers without one of their own."""
        return self.rank

    @property
    def adapter_dropout(self) -> float:
        """As set."""
        return self.dropout

    rank: PositiveInt = 16
    """Columns of B. Trainable parameters grow linearly with it."""
    rank_pattern: dict[Annotated[str, Field(pattern=_PLACE)], PositiveInt] = {}
    """Other ranks by role (down), layer (3) or both (3.down); the most specific one counts."""
    alpha: PositiveFloat | None = None
    """Numerator of the scale: the update is multiplied by alpha / rank. None is twice the rank, whatever the rank."""
    dropout: Fraction = 0.0
    """Dropout on the adapter's input. Above 0 prefix sharing is off: copies of a prefix would differ."""
    targets: tuple[LinearRole, ...] = Field(default=ALL_LINEAR, min_length=1)
    """Roles (q, k, v, o, gate, up, down), not module names; a fused projection counts as any of its roles."""
    layers: Layers = None
    """Layers that get an adapter: numbers counted from 0, a range (15-29), or first, middle, last for a third of them;
    none is all."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) (Kalajdzievski 2023, eq. 4)."""
    dora: bool = False
    """Learn magnitude and direction apart (Liu et al. 2024, eq. 5)."""
    init: Init = "default"
    """Start of A and B. From pissa on it is read off the weights (pissa, olora), the activations (eva, corda) or the
    gradient (lora_ga). The base never moves: a start that is not zero is subtracted by a frozen half of the adapter."""
    init_examples: PositiveInt = 64
    """Training documents that activations and gradients of such a start are taken from."""
    loraplus_lr_ratio: PositiveFloat = 1.0
    """Learning rate of B over that of A (LoRA+, Hayou et al. 2024, section 4); 16 is the paper's choice."""
    lisa_n_layers: PositiveInt | None = None
    """Move only so many layers at a time, drawn anew every `lisa_step_interval` steps (LISA, Pan et al. 2024)."""
    lisa_step_interval: PositiveInt = 20
    """Optimizer steps between draws of `lisa_n_layers`."""
    modules_to_save: tuple[str, ...] = ()
    """Names of modules trained whole beside the adapter and saved with it, for example [lm_head]."""

    @model_validator(mode="after")
    def _can_be_combined(self) -> LowRankConfig:
        if self.init in SUBTRACTED_INITS and self.dora:
            raise ValueError(f"init {self.init} subtracts its start, which a direction learned apart (dora) has not")
        if self.init in SUBTRACTED_INITS and self.dropout:
            raise ValueError(f"init {self.init} subtracts its start, which dropout would do only at random")
        if self.lisa_n_layers is None and self.lisa_step_interval != 20:
            raise ValueError("lisa_step_interval does nothing without lisa_n_layers")
        if not self._reads_documents() and self.init_examples != 64:
            raise ValueError("init_examples does nothing here: no start or score is read off documents")
        return self

    def _reads_documents(self) -> bool:
        return self.init in CALIBRATED_INITS - {"pissa", "olora"}


class LoraConfig(LowRankConfig):
    """Low-rank update W + (alpha / rank) * B @ A (Hu et al. 2021, eq. 3)."""

    kind: Literal["lora"] = "lora"

    @model_validator(mode="after")
    def _nothing_is_quantized(self) -> LoraConfig:
        if self.init == "loftq":
            raise ValueError("init loftq makes up for what quantizing takes away: it goes with kind: qlora")
        return self


class QloraConfig(LowRankConfig):
    """The same update beside a base held in 4 or 8 bits (Dettmers et al. 2023)."""

    kind: Literal["qlora"] = "qlora"
    bits: Literal[4, 8] = 4
    """4: NF4 in blocks of 64; 8: int8 with a scale for each output."""
    double_quant: bool = True
    """Hold the scales of 4-bit blocks in 8 bits: 0.127 instead of 0.5 bit a number for them."""

    @model_validator(mode="after")
    def _starts_beside_a_quantized_base(self) -> QloraConfig:
        if self.init in CALIBRATED_INITS:
            raise ValueError(f"init {self.init} is read off matrices in full width: it goes with kind: lora")
        if self.dora:
            raise ValueError("dora takes the norms of whole columns, which a quantized base would widen at every step")
        if self.bits == 8 and not self.double_quant:
            raise ValueError("double_quant is about the scales of 4-bit blocks: it does nothing with bits: 8")
        if self.init == "loftq" and self.rank_pattern:
            raise ValueError("init loftq takes one rank for all: leave ranks out")
        return self


BASE_CHANGING_METHODS = ("full", "head")
"""Methods whose base is no longer there for another adapter."""
SUBTRACTED_INITS = frozenset({"pissa", "olora", "corda", "corda_knowledge", "lora_ga"})
"""Starts that are not zero: a frozen half of the adapter takes them off the base again."""
CALIBRATED_INITS = SUBTRACTED_INITS | {"eva"}
"""Starts made before the first step from weights, activations or gradients."""


class LayerLotteryConfig(Config):
    """Which layers of a lottery stay, and when that is decided."""

    scout_steps: PositiveInt = 20
    """Optimizer steps in which all layers move."""
    keep: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Share of the layers that go on, at least one."""
    score: Literal["delta", "energy"] = "delta"
    """`delta`: squared norm of a layer's updates; `energy`: squared norm of what they add to the linears' outputs on
    `init_examples` documents (LoRA-drop, Zhou et al. 2024, eq. 3)."""
    choose: Literal["best", "random", "first", "middle", "last"] = "best"
    """Which go on: those with the highest score, or as many others, to compare with."""
    rewind: bool = True
    """Whether the winners go back to their start; otherwise they go on from where they are."""


class LotteryConfig(LowRankConfig):
    """LoRA whose layers compete: all move for a while, the best go on, the others leave."""

    kind: Literal["lottery"] = "lottery"
    lottery: LayerLotteryConfig = LayerLotteryConfig()
    """How the layers compete."""

    def _reads_documents(self) -> bool:
        return self.lottery.score == "energy"

    @model_validator(mode="after")
    def _scores_are_plain(self) -> LotteryConfig:
        if self.init in CALIBRATED_INITS or self.init == "loftq" or self.dora or self.lisa_n_layers is not None:
            raise ValueError(
                "a lottery scores plain updates: init default, gaussian or orthogonal, no dora, no sampling"
            )
        return self


class MixtureConfig(WeightMethodBase):
    """Low-rank experts beside each linear, mixed by a learned router (Dou et al. 2023, eq. 4-5)."""

    DEFAULT_LEARNING_RATE: ClassVar[float] = 5e-4
    kind: Literal["mixture"] = "mixture"
    experts: Annotated[int, Field(ge=2)] = 4
    """Low-rank pairs of each linear."""
    rank: PositiveInt = 8
    """Of each expert."""
    alpha: PositiveFloat | None = None
    """The experts' sum is multiplied by alpha / rank. None is twice the rank."""
    top_k: PositiveInt | None = None
    """Experts that act on a token, the others get no weight; none lets all of them act."""
    balance: NonNegativeFloat | None = None
    """Weight of the loss that spreads tokens over experts; none is 1e-3 with `top_k` and 0 without, where no expert can
    run dry. Above 0 beginnings are not shared: the loss is counted for each document."""
    targets: tuple[LinearRole, ...] = Field(default=ALL_LINEAR, min_length=1)
    """As for lora."""
    layers: Layers = None
    """As for lora."""

    @model_validator(mode="after")
    def _some_are_left_out(self) -> MixtureConfig:
        if self.top_k == 1:
            raise ValueError("top_k: 1 gives one expert the weight 1 whatever its router says, which learns nothing")
        if self.top_k is not None and self.top_k >= self.experts:
            raise ValueError("top_k is below the number of experts; none takes them all")
        return self

    @property
    def adapter_rank(self) -> int:
        """The rank of each expert."""
        return self.rank

    @property
    def balance_weight(self) -> float:
        """The weight in use."""
        return (1e-3 if self.top_k else 0.0) if self.balance is None else self.balance


class PeftTunerConfig(WeightMethodBase):
    """Any other tuner of peft."""

    DEFAULT_LEARNING_RATE: ClassVar[float] = 1e-3
    kind: Literal["peft"] = "peft"
    config: dict[str, Any] = Field(min_length=1)
    """peft's own settings, `peft_type` among them."""
    targets: tuple[LinearRole, ...] = Field(default=ALL_LINEAR, min_length=1)
    """Roles whose modules it gets, unless its config names target_modules."""
    layers: Layers = None
    """As for lora."""
    starts_as_base: bool = True
    """Whether this tuner begins as the base, which the step-0 gate then checks."""


class BottleneckConfig(WeightMethodBase):
    """A narrow network beside or behind each block: x + up(activation(down(x))) (Houlsby et al. 2019, section 2.1)."""

    DEFAULT_LEARNING_RATE: ClassVar[float] = 1e-3
    kind: Literal["bottleneck"] = "bottleneck"
    placement: Literal["houlsby", "pfeiffer", "parallel"] = "houlsby"
    """`houlsby`: behind attention and behind the feed-forward block, before each residual sum; `pfeiffer`: once a
    layer, on its output (Pfeiffer et al. 2020); `parallel`: beside the feed-forward block, from its input
    (He et al. 2022)."""
    width: PositiveInt = 64
    """Numbers in the middle. Trainable parameters grow linearly with it."""
    activation: Literal["relu", "gelu", "silu", "tanh"] = "gelu"
    """Between down and up."""
    scale: PositiveFloat = 1.0
    """Factor of the adapter's output; He et al. take 4 for `parallel`."""
    layers: Layers = None
    """As for lora."""


class PromptConfig(VirtualTokenBase):
    """Learned embeddings in front of every document (Lester et al. 2021)."""

    DEFAULT_LEARNING_RATE: ClassVar[float] = 3e-2
    positions: ClassVar[None] = None
    kind: Literal["prompt"] = "prompt"
    virtual_tokens: VirtualTokens = 20
    """Embeddings that are learned."""
    tasks: Tasks = ()
    """Tasks of the data (`data.task`) that get a prompt of their own; none is one for all."""
    init: Literal["random", "vocabulary", "text"] = "vocabulary"
    """`random`: normal, as wide as the base's embeddings; `vocabulary`: embeddings of different tokens, drawn from the
    most frequent; `text`: those of `init_text`, repeated or cut to fit."""
    init_text: str | None = None
    """What the prompt says before it is learned, for `init: text`."""

    @model_validator(mode="after")
    def _text_goes_with_init(self) -> PromptConfig:
        if (self.init == "text") != bool(self.init_text):
            raise ValueError("init: text and init_text go together")
        return self


class PrefixConfig(VirtualTokenBase):
    """Learned keys and values before every document, in every layer (Li and Liang 2021, eq. 3)."""

    DEFAULT_LEARNING_RATE: ClassVar[float] = 1e-2
    positions: ClassVar[None] = None
    kind: Literal["prefix"] = "prefix"
    virtual_tokens: VirtualTokens = 20
    """Keys and values that are learned in each layer."""
    tasks: Tasks = ()
    """As for prompt."""
    projection: PositiveInt | None = None
    """Width of a network that makes them from learned embeddings while training (Li and Liang 2021, section 4.3); its
    output alone is saved. None learns them as they are (Liu et al. 2022)."""


class VirtualTokenPositions(Config):
    """Virtual tokens by where they stand in a conversation."""

    front: NonNegativeInt = 0
    """Before the whole document."""
    user: NonNegativeInt = 0
    """Before what a user says, in every such turn; before its context, where it has one."""
    assistant: NonNegativeInt = 0
    """Before each answer, right after the template has opened it."""


class PTuningConfig(VirtualTokenBase):
    """Virtual tokens made by an encoder that tasks share; its output alone is saved (Liu et al. 2021, section 3.2)."""

    DEFAULT_LEARNING_RATE: ClassVar[float] = 1e-3
    kind: Literal["p_tuning"] = "p_tuning"
    virtual_tokens: VirtualTokens = 20
    """How many there are in all."""
    tasks: Tasks = ()
    """Tasks of the data (`data.task`) that get virtual tokens of their own, from one encoder; none is one for all."""
    encoder: Literal["lstm", "mlp"] = "mlp"
    """`lstm`: two layers in both directions, then linear, ReLU, linear; `mlp`: three linears with ReLU between."""
    hidden: PositiveInt | None = None
    """Width of the encoder, of an LSTM in each direction; none is half the base's width."""
    layers: Literal["input", "all"] = "input"
    """`input`: embeddings that pass through the model; `all`: keys and values in every layer (Liu et al. 2022)."""
    positions: VirtualTokenPositions | None = None
    """Where the virtual tokens stand; none puts all of them in front."""

    @model_validator(mode="after")
    def _every_token_has_a_place(self) -> PTuningConfig:
        if self.positions is None:
            return self
        if (total := sum(self.positions.model_dump().values())) != self.virtual_tokens:
            raise ValueError(f"positions add up to {total}, and virtual_tokens is {self.virtual_tokens}")
        if self.layers == "all" and self.positions.front != total:
            raise ValueError("keys and values in every layer (layers: all) stand in front alone")
        return self


def front_virtual_tokens(config: AnyMethodConfig) -> int:
    """Virtual tokens that stand before every document; those inside are counted in the documents."""
    return config.virtual_token_count if config.positions is None else config.positions.front


def encoder_parameter_count(config: Config, features: int, width: int) -> int:
    """Numbers of the network that makes virtual tokens of this width while they are learned; 0 where there is none."""
    if isinstance(config, PrefixConfig) and (h := config.projection) is not None:
        return (features + 1) * h + (h + 1) * width
    if not isinstance(config, PTuningConfig):
        return 0
    h = config.hidden or features // 2
    if config.encoder == "mlp":
        return (features + 1) * h + (h + 1) * h + (h + 1) * width
    first, second = 2 * 4 * h * (features + h + 2), 2 * 4 * h * (2 * h + h + 2)  # directions, gates, two biases each
    return first + second + (2 * h + 1) * 2 * h + (2 * h + 1) * width


def inserted_token_ids(config: AnyMethodConfig, first: int) -> dict[str, tuple[int, ...]]:
    """Ids by role of those that stand inside, from `first` on; without the roles that have none."""
    if config.positions is None:
        return {}
    ids, start = {}, first
    for role, count in (("user", config.positions.user), ("assistant", config.positions.assistant)):
        if count:
            ids[role] = tuple(range(start, start + count))
            start += count
    return ids


AnyMethodConfig = (
    FullConfig
    | HeadConfig
    | LoraConfig
    | QloraConfig
    | LotteryConfig
    | MixtureConfig
    | BottleneckConfig
    | PromptConfig
    | PrefixConfig
    | PTuningConfig
    | PeftTunerConfig
)
MethodConfig = Annotated[AnyMethodConfig, Field(discriminator="kind")]
METHOD_CONFIGS: dict[str, type[AnyMethodConfig]] = {
    "full": FullConfig,
    "head": HeadConfig,
    "lora": LoraConfig,
    "qlora": QloraConfig,
    "lottery": LotteryConfig,
    "mixture": MixtureConfig,
    "bottleneck": BottleneckConfig,
    "prompt": PromptConfig,
    "prefix": PrefixConfig,
    "p_tuning": PTuningConfig,
    "peft": PeftTunerConfig,
}
