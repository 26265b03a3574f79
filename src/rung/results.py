"""What the verbs return: typed values that mirror the JSON that `--json` prints and that run folders hold.

Each is a pydantic model whose `to_json` gives back what it was made of, fields of an objective's own included, so that
reading a folder and writing it again loses nothing. Results hold numbers and words alone: no tensors, no open files.
They are made by `rung.scoring`, `rung.evaluation` and `rung.commands`, and read by the terminal, the report and Python
programs.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer


class Result(BaseModel):
    """The base of all results. Unknown fields are kept, for example the numbers that only one objective logs."""

    # extra="allow": a manifest that a later version wrote must survive being read and written by this one
    model_config = ConfigDict(frozen=True, extra="allow", populate_by_name=True)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: the fields that were given, under their own names."""
        return self.model_dump(mode="json", exclude_unset=True, by_alias=True)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return self.model_copy(update=changes)


# JSON has no infinity and no NaN: they are null there
_finite_or_null = PlainSerializer(lambda number: number if math.isfinite(number) else None, when_used="json")
Mean = Annotated[float, BeforeValidator(lambda number: math.nan if number is None else number), _finite_or_null]
LowerBound = Annotated[float, BeforeValidator(lambda number: -math.inf if number is None else number), _finite_or_null]
UpperBound = Annotated[float, BeforeValidator(lambda number: math.inf if number is None else number), _finite_or_null]


class Estimate(Result):
    """A mean score, or a paired difference of two, with its 95 % interval."""

    mean: Mean
    """Of a difference: second minus first, in points of the metric."""
    low: LowerBound
    """Minus infinity where these items give no lower bound."""
    high: UpperBound
    """Infinity where these items give no upper bound."""
    examples: int = 0
    clusters: int = 0
    method: str = ""
    """How the interval was computed, for example `clopper-pearson` or `t on clusters`."""
    p_value: float | None = None
    """Of a difference, two-sided: exact McNemar for binary scores without clusters, or a test that replaced it."""

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside the interval."""
        return self.low > 0 or self.high < 0


class GateResult(Result):
    """What a gate measured."""

    name: str
    state: str
    """passed, failed or not_reached; a later version may write others."""
    measured: Any = None
    limit: Any = None


class SplitResult(Result):
    """One split of the data."""

    rows: int = 0
    groups: int = 0
    """Groups that are never cut in two, for example the rows of one document."""
    duplicate_prompts: int = 0


class DataSetResult(Result):
    """One data file."""

    path: str = ""
    weight: float = 1.0
    kept: int = 0
    rejected: int = 0
    removed_end_tokens: dict[str, int] = {}
    """Answers that ended in each end token, which was removed."""


class SplitsResult(Result):
    """The splits of a run's data, and the files they come from."""

    train: SplitResult | None = None
    validation: SplitResult | None = None
    test: SplitResult | None = None
    sets: tuple[DataSetResult, ...] = ()
    overlap_dropped: int = 0
    """Rows dropped because their prompt also occurs in another split."""
    fingerprint: str | None = None

    def by_name(self) -> dict[str, SplitResult]:
        """The splits that exist."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in splits.items() if split is not None}


class TokenResult(Result):
    """Tokens of the training rows."""

    tokens: int = 0
    supervised_tokens: int = 0
    longest: int = 0
    """Tokens of the longest row."""
    dropped: int = 0
    trimmed: int = 0
    control_tokens: dict[str, Any] | None = None
    """Rows with control tokens in their text, by token, and how many were left out; None without such rows."""
    not_rendered: dict[str, Any] | None = None
    """Rows that the template refused or that failed gate 1, under `data.rejects: drop`; None without such rows."""


class DataResult(Result):
    """The data of a run."""

    splits: SplitsResult = SplitsResult()
    train: TokenResult | None = None


class PlanComparison(Result):
    """Planned and measured memory of a run, in bytes."""

    peak_bytes: int
    footprint_bytes: int
    """Resident bytes of the libraries, which no plan can predict."""
    measured: dict[str, int | None]
    """By stage."""

    @property
    def measured_peak(self) -> int:
        """The largest measurement of any stage."""
        return max(value for value in self.measured.values() if value)


class ContaminationTier(Result):
    """Test items that match training rows in one way: exactly, by n-grams, or nearly."""

    items: int
    examples: tuple[dict[str, Any], ...] = ()
    scores_without: dict[str, Estimate] | None = None
    """Scores of all other items; None where no item is left."""
    scores_of_them: dict[str, Estimate] | None = None


class ContaminationResult(Result):
    """Test items that also stand in the training rows."""

    unknown: str | None = None
    """Why it could not be measured."""
    items: int = 0
    train_rows: int = 0
    tiers: dict[str, ContaminationTier] = {}


class RetrievalResult(Result):
    """How often retrieval found the right passage, and over what it searched."""

    hit_rate: Estimate
    hits: int
    without_passages: int
    """Questions that share no word with any passage."""
    judged_by_context: int = 0
    judged_by_answer: int = 0
    seconds_per_query: float | None = None
    top_k: int = 0
    passages: int = 0
    documents: int = 0
    documents_path: str | None = Field(None, alias="from")
    """Where the documents come from; None for the contexts of the data."""
    chunk_words: int = 0
    overlap: int = 0
    empty_documents: int = 0
    duplicate_passages: int = 0


class RewardModelHealth(Result):
    """Health of a reward model on held-out pairs."""

    pairs: int
    """Pairs of which the label prefers one answer: all but those with a probability of 0.5."""
    accuracy: Estimate
    """Share of pairs whose better answer scores higher; a tie counts half."""
    longer: float
    """Accuracy of always preferring the longer answer; equal lengths count half."""
    calibration_error: float
    """Mean distance of predicted and observed accuracy over bins (Naeini et al. 2015), sigmoid(|r_w - r_l|)."""
    length_correlation: float = 0.0
    """Spearman's rank correlation of score and answer length over all answers."""
    spread: float = 0.0
    """Standard deviation of the scores."""
    verdict: Literal["healthy", "length", "unproven", "broken"]
    reason: str

    def __str__(self) -> str:
        a = self.accuracy
        return (
            f"reward model: {self.verdict} ({self.reason}); {a.mean:.2f} [{a.low:.2f}, {a.high:.2f}] of {self.pairs}"
            f" held-out pairs right, {self.longer:.2f} by length alone, calibration error {self.calibration_error:.2f},"
            f" rank correlation with length {self.length_correlation:+.2f}"
        )


class LotteryResult(Result):
    """Layers that a lottery scored, and those that continued."""

    scores: dict[str, float]
    """Share of the score by number of the layer."""
    winners: tuple[int, ...]
    of_layers: int
    """Layers of the model."""
    choose: str


class HarnessScore(Result):
    """A score of lm-evaluation-harness with its standard error."""

    task: str
    metric: str
    filter: str = "none"
    """How the harness reads an answer, where a task has several ways."""
    value: float
    standard_error: float | None = None
    """None where the harness has none for the metric."""
    examples: int | None = None
    shots: int | None = None
    """Worked examples in a prompt."""
    task_version: str = ""
    higher_is_better: bool | None = None


class HarnessResult(Result):
    """A run or base on tasks of lm-evaluation-harness."""

    target: str
    scores: tuple[HarnessScore, ...]
    version: str
    """Of the harness."""
    uses_chat_template: bool = False
    limit: int | None = None
    """Items of each task, where not all were asked."""
    seconds: float = 0.0


class RunResult(Result):
    """A training run as its `run.json` describes it."""

    status: str = "unknown"
    """finished, failed, interrupted or running."""
    path: str = ""
    """The run folder."""
    report: str | None = None
    """The HTML report."""
    config: dict[str, Any] = {}
    """The resolved config, defaults included."""
    metrics: dict[str, Any] = {}
    harness: tuple[HarnessScore, ...] = ()
    """Scores of `rung eval --tasks`."""
    gates: tuple[GateResult, ...] = ()
    data: DataResult = DataResult()
    steps: int | None = None
    best_step: int | None = None
    """Step of the lowest validation loss."""
    tokens: int = 0
    """Tokens trained on."""
    train_loss: float | None = None
    """In the last step, in the objective's unit."""
    validation_loss: float | None = None
    train_seconds: float | None = None
    """From the first forward pass to the last step, without loading, evaluation and saving."""
    tokens_per_second: float | None = None
    """Tokens of the documents, whether or not a prefix was shared, over `train_seconds`."""
    peak_memory_bytes: int | None = None
    trainable_parameters: int | None = None
    moves: str | None = None
    """Trained parameters that change during the run, for example the layers of a lottery."""
    learning_rate: float | None = None
    plan: PlanComparison | None = None
    contamination: ContaminationResult | None = None
    reward: RewardModelHealth | None = None
    """Of a reward run."""
    lottery: LotteryResult | None = None
    router_load: dict[str, tuple[float, ...]] = {}
    """Of a mixture: the share of tokens of each expert, by linear."""
    device: str | None = None
    compute_dtype: str | None = None
    versions: dict[str, str | None] = {}
    fingerprints: dict[str, str | None] = {}
    """Hashes of base, data and chat template."""
    rollout_server: dict[str, str] = {}
    """URL and model of the server that drew the answers of the run; empty where this process did."""
    not_finite: dict[str, Any] = {}
    """Rows of the step whose loss was not finite."""
    error: str | None = None

    @property
    def artifact(self) -> Path:
        """The folder of the trained weights: an adapter, or a whole model."""
        adapter = Path(self.path) / "adapter"
        return adapter if adapter.is_dir() else Path(self.path) / "model"


class PreviewResult(Result):
    """What a dry run finds out before the first step."""

    splits: SplitsResult
    train: TokenResult
    preflight: dict[str, int]
    """Rows and failing rows of the check of the chat template."""
    steps_per_epoch: int
    tokens_per_micro_batch: int
    trainable_parameters: int
    learning_rate: float
    plan: dict[str, Any]
    """The memory estimate, as `rung plan --json` gives it."""


class EvaluationResult(Result):
    """Scores of a run or a base on held-out questions; of a reward run, how well it orders held-out pairs."""

    target: str
    task: str
    server: dict[str, str] = {}
    """URL and model of the server that generated the answers; empty where this process did."""
    examples: int
    clusters: int | None = None
    scores: dict[str, Estimate] = {}
    """By metric; the first one decides."""
    prompt_tokens: float | None = None
    """Mean tokens of a prompt."""
    seconds_per_query: float | None = None
    cut_off: int = 0
    """Answers that were cut at `evaluation.max_new_tokens`."""
    retrieval: RetrievalResult | None = None
    contamination: ContaminationResult | None = None
    """How many test items also stand in the training rows, and the scores without them."""
    reward: RewardModelHealth | None = None
    """Of a reward run: accuracy on pairs, calibration, and the verdict."""
    summary: str | None = None
    """Of a reward run: the same in words."""


class MetricComparison(Result):
    """One metric of two systems on the same items."""

    before: Estimate
    after: Estimate
    difference: Estimate
    """After minus before, paired."""
    detectable: float | None = None
    """The smallest true difference that these items would show with 80 % power."""


class JudgeAgreement(Result):
    """Agreement of a judge with people, and whether it is trusted."""

    trusted: bool
    reason: str
    pairs: int = 0
    """Labelled pairs with a majority and a readable verdict."""
    unreadable: int = 0
    undecided: int = 0
    """Pairs without a majority of people; excluded."""
    kappa: Estimate | None = None
    """Cohen's kappa of the judge and the majority of people."""
    agreement: Estimate | None = None
    """Share of pairs on which they agree."""
    people: Estimate | None = None
    """Krippendorff's alpha among the people, a practical upper limit for a judge. None with one label per pair."""


class Preference(Result):
    """Which answers a judge prefers, over all pairs. Shares are None where no pair counts for them."""

    pairs: int
    unreadable: int
    """Pairs without a readable verdict in one of the orders; excluded from everything below."""
    wins: int
    ties: int
    losses: int
    win_rate: Estimate | None
    """Share of pairs in which the first answer is preferred; a tie counts half."""
    length_controlled: Estimate | None
    """The win rate for answers of equal length, see `scoring.pairwise.length_controlled`."""
    consistent: Estimate | None
    """Share of pairs with the same verdict in both orders."""
    shown_first: Estimate | None
    """Share of single verdicts, without ties, for the answer shown first: 0.5 without position bias."""
    longer: Estimate | None
    """Share of preferences for the longer answer, of pairs with different lengths: 0.5 without length bias."""
    characters: tuple[float, float]
    """Mean lengths of the first and of the second answers."""


class JudgeResult(Preference):
    """Which of two systems a judge prefers; the target's answer is the first of a pair."""

    model: str
    trust: JudgeAgreement


class ComparisonResult(Result):
    """Two systems on the same questions: target minus baseline."""

    target: str
    baseline: str
    task: str
    metrics: dict[str, MetricComparison]
    examples: int
    clusters: int
    judge: JudgeResult | None = None
    """Which answers a judge prefers, and whether the judge agrees with people."""


class ForgettingComparison(Result):
    """A run against its own base on data that it did not learn from: run minus base."""

    target: str
    forgetting: str
    """The data file or config."""
    metrics: dict[str, MetricComparison]
    examples: int
    clusters: int
    dropped: int = 0
    """Texts longer than the model's context, which were left out."""


class GenerationResult(Result):
    """Answers that were sampled and written to a file, one row for each prompt."""

    output: str
    prompts: int
    answers: int
    """Answers written."""
    sampled: int
    """Answers sampled, before equal ones and prompts without a comparison were left out."""
    cut: int
    """Answers that reached no stop."""
    nothing_to_compare: int
    """Prompts left out because all their answers have the same score."""
    means: dict[str, float]


class SynthCost(Result):
    """What the model that wrote was asked."""

    requests: int
    failed: int
    prompt_tokens: int
    answer_tokens: int
    uncounted: int
    """Replies of a server that does not count tokens."""
    seconds: float
    """Times of all requests together."""
    money: float | None = None
    """In the currency of `synth.teacher.price`; None without a price, and where a server counts no tokens."""


class SynthResult(Result):
    """Rows that a model wrote, what the filters left out, and the cost."""

    output: str
    rows: int
    wanted: int | None = None
    """Rows that were asked for; None where every seed was answered."""
    tried: int
    """Questions that were tried."""
    rejected: dict[str, int]
    """Questions that each filter left out."""
    cost: SynthCost
    diversity: float
    """Distinct word bigrams over all bigrams of the first `compared_questions` (Li et al. 2016, distinct-2)."""
    compared_questions: int
    diversity_of_seeds: float | None = None
    """Of equally many seeds."""
    judge: JudgeAgreement | None = None


class CriticAgreement(Result):
    """Agreement of the critic of a constitution with people, and whether it is trusted."""

    trusted: bool
    reason: str
    pairs: int = 0
    """Labeled pairs with a majority for one answer."""
    unreadable: int = 0
    """Of these, pairs without a verdict by some rule in some order, which counts as no preference."""
    by_rule: dict[str, float] = {}
    """Share of the pairs in which the critic agrees by one rule alone; labels may be about another rule."""
    agreement: Estimate | None = None
    """Share of these pairs in which the critic prefers what people prefer; 0.5 is chance."""
    shown_first: float | None = None
    """Mean probability of the answer that is shown first: 0.5 without position bias."""


class RevisionRound(Result):
    """What became of the answers in one round of revisions."""

    number: int
    revised: int
    """Answers that changed."""
    unchanged: int
    """Revisions that equal the answer before them; they add no row."""
    refusing: float
    """Share of the answers after the round that decline; of round 0, of the first answers."""
    words: float
    """Mean words of the answers after the round."""


class ConstitutionResult(Result):
    """Rows by a constitution, what was left out, and what its critic is worth."""

    output: str
    makes: str
    rows: int
    helpful: int = 0
    """Rows that were added unrevised, among `rows`."""
    seeds: int
    """Questions that were asked."""
    rejected: dict[str, int]
    """Answers or pairs that each filter left out."""
    rounds: tuple[RevisionRound, ...] = ()
    """Of revisions, from round 0: the first answers."""
    probability: float | None = None
    """Of preferences: mean probability that the chosen answer is the better one."""
    shown_first: float | None = None
    """Of preferences: mean probability of the answer that is shown first: 0.5 without position bias."""
    consistent: float | None = None
    """Of preferences: share of pairs with the same preference in both orders."""
    critic: CriticAgreement | None = None
    """None where no labels of people were given."""
    costs: dict[str, SynthCost]
    """Of the teacher and of the critic."""


class ImproveRound(Result):
    """What a round's model does on the validation split."""

    number: int
    """0: the model that everything began with."""
    pass_at: dict[int, Estimate]
    """pass@k by k: the probability that at least one of k sampled answers is accepted (Chen et al. 2021, eq. 1)."""
    gain: Estimate | None = None
    """pass@1 minus that of the round before, paired by question; None for round 0."""
    all_right: float
    """Share of the questions of which every sampled answer is accepted: they teach nothing more."""
    all_wrong: float
    """Share of the questions without an accepted answer."""
    distinct: float
    """Distinct answers over all answers."""
    rows: int = 0
    """Accepted answers that the round trained on."""
    questions_with_rows: int = 0
    train_seconds: float = 0.0


class ImproveResult(Result):
    """Rounds of a model that learned from its own accepted answers."""

    output: str
    """Run of the best round, or the model that everything began with."""
    rounds: tuple[ImproveRound, ...]
    best: int
    """Number of the round with the highest pass@1 on the validation split."""
    reason: str
    """Why there was no further round."""
    test: dict[str, Any] | None = None
    """pass@k of the first and of the best model on the test split, and their paired difference; None without one."""
    judge: JudgeAgreement | None = None
    """Agreement with people of the judge that accepted the answers; None without a judge."""


class MergeResult(Result):
    """An adapter folded into its base, and the proof that the written model is the run's."""

    path: str
    measure: str
    """What `difference` measures."""
    difference: float
    limit: float
    moved_from_base: float | None = None
    """Largest difference of log-probabilities between base and merged model, in nats."""
    moved_from_run: float | None = None
    """For a quantized run: between the run and the merged model, in nats."""
    largest_change: float | None = None
    """Merged shard by shard: the largest change of a weight."""
    files: int | None = None
    """Merged shard by shard: safetensors files written."""


class ExportedFile(Result):
    """One file of an export, what proves it, and what it scores where that was measured."""

    file: str
    type: str
    """For example q4_k_m; `adapter` for a LoRA."""
    bytes: int
    kinds: dict[str, int] = {}
    """Bytes of the matrices by the numbers they are stored in: a q4_k_m of a narrow model is mostly Q5_0."""
    gate: GateResult
    """`publish.gguf`; not_reached without llama.cpp."""
    largest_difference: float | None = None
    """Of the log-probabilities of the most probable tokens to those of the run, in nats."""
    mean_difference: float | None = None
    """The same, weighted by the run's probabilities."""
    table_difference: float | None = None
    """Largest difference to the run with GELU from ggml's table in float16, where the model has GELU."""
    ignored_stops: tuple[str, ...] = ()
    """Ends of text of the base at which llama.cpp goes on; requests name them as `stop`."""
    scores: dict[str, MetricComparison] = {}
    """By metric, with --measure: `before` is the run."""
    seconds_per_query: float | None = None


class ExportResult(Result):
    """A run in the form of another tool."""

    path: str
    kind: str
    """gguf, ollama, vllm or merged."""
    files: tuple[ExportedFile, ...] = ()
    commands: tuple[str, ...] = ()
    """How the result is used."""
    notes: tuple[str, ...] = ()
    questions: int | None = None
    """Test questions of --measure."""
    run_seconds_per_query: float | None = None
    """Of the run itself, in Rung and in batches."""


class PushedFile(Result):
    """A file of a repository."""

    name: str
    bytes: int


class PushResult(Result):
    """A run or an export on the hub; without a `commit` nothing was sent."""

    repository: str
    """OWNER/NAME."""
    files: tuple[PushedFile, ...]
    card: str
    """Text of the model card."""
    notes: tuple[str, ...] = ()
    url: str | None = None
    commit: str | None = None


class FuseResult(Result):
    """Several runs combined into one."""

    path: str
    weights: tuple[float, ...]
    ranks: tuple[int, ...] = ()
    """Ranks of the fused modules; empty for whole models."""
    search: dict[str, Any] | None = None
    """How the weights were searched, where they were."""
    lost: float
    """Share of the update's norm that the rank of the result cannot hold."""


class RungVerdict(Result):
    """One rung against the best one."""

    name: str
    score: Estimate
    difference: Estimate
    """This rung minus the best, in points of the metric; all zeros for the best itself."""
    reason: Literal["best", "reaches target", "within margin", "worse", "cannot tell"]
    enough: bool
    """Whether no higher rung is needed."""
    examples_needed: int | None
    """Approximate test items for a decision, if this test set cannot tell; None if it can or no number would."""


class LadderStep(Result):
    """One rung against the one below it."""

    lower: str
    upper: str
    difference: Estimate
    """Upper minus lower, in points of the metric, with its uncorrected p-value."""
    p_holm: float
    """The p-value corrected for all steps of the ladder (Holm 1979)."""
    differs: bool
    """Whether the difference is significant after correction for all steps."""
    detectable: float | None
    """The smallest true difference that these items detect with 80 % power; None if unknown."""


class Verdict(Result):
    """The conclusion from a ladder."""

    recommended: str | None
    """The lowest rung that is enough; None if a lower rung is undecided."""
    safe: str | None
    """The lowest rung that is surely enough, even if a lower one might be too."""
    best: str
    rungs: tuple[RungVerdict, ...] = ()
    examples_needed: int | None = None
    """Approximate test items for a decision, if this test set cannot tell."""
    text: str
    steps: tuple[LadderStep, ...] = ()
    """Each rung against the one below it, lowest first."""


class InstructionResult(Result):
    """An instruction with its scores on the validation split."""

    instruction: str | None
    scores: dict[str, Estimate]


class LadderRow(Result):
    """One rung. Times and tokens of several training seeds are means, memory and disk maxima."""

    rung: str = ""
    kind: str = ""
    model: str = ""
    """The base, where the ladder has several."""
    sees: str = ""
    """Content of the prompt besides the question."""
    cut_off: float = 0.0
    """Share of the answers that were cut at `evaluation.max_new_tokens`."""
    scores: dict[str, Estimate] = {}
    gain: Estimate | None = None
    """Paired difference to the rung below, in points of the deciding metric; None for the lowest."""
    trainable_parameters: int | None = None
    train_seconds: float | None = None
    """Includes the trials of a search."""
    peak_memory_bytes: int | None = None
    prompt_tokens: float | None = None
    seconds_per_query: float | None = None
    """Retrieval and answer together."""
    folder: str = ""
    disk_bytes: int = 0
    """Size of the saved adapter or model."""
    retrieval: RetrievalResult | None = None
    """Hit rate and source of the passages, if any were retrieved."""
    instruction: str | None = None
    """System turn of an untuned rung."""
    instructions: tuple[InstructionResult, ...] = ()
    """The candidates with their scores on the validation split, on the rung that chose the instruction."""


class LadderModel(Result):
    """One base of a ladder that has several: what it is, and what its rungs take."""

    model: str
    """The last part of its name, and settings in which it differs."""
    parameters: int
    license: str | None = None
    """From the list of known bases or the card in its folder or on the hub; None where neither names one."""
    rungs: tuple[str, ...]
    peak_memory_bytes: int
    """The largest of its rungs, training included."""
    prompt_tokens: tuple[float, float]
    """Fewest and most tokens of a prompt among its rungs, in tokens of its own."""
    seconds_per_query: tuple[float, float]
    """Least and most among its rungs."""


class SkippedRung(Result):
    """A rung that was not measured, and the reason."""

    rung: str
    why: str


class NextRung(Result):
    """What the rung right above the recommended one gains, and what it costs at every query and on disk."""

    rung: str
    above: str
    gain: Estimate
    """Paired difference, in points of the deciding metric."""
    seconds_per_query: float
    prompt_tokens: float
    disk_bytes: int
    train_seconds: float
    text: str
    """All of it in one line."""


class Diagnosis(Result):
    """What the model lacks, read from a sure difference between two rungs."""

    lacks: Literal["knowledge", "behaviour"]
    lower: str
    upper: str
    difference: Estimate
    text: str
    """All of it in one line."""


class ForgettingResult(Result):
    """Scores of a tuned rung on other data minus those of the model it started from."""

    rung: str
    data: str
    metrics: dict[str, MetricComparison]
    """For perplexity in nats per token."""
    text: str
    """All of it in one line."""


class CurvePoint(Result):
    """A point of the learning curve: the score of a tuned rung with fewer training rows."""

    rung: str
    rows: int
    score: Estimate
    train_seconds: float | None = None


class Ladder(Result):
    """The result of `rung climb`: the rungs from the lowest to the highest, and the verdict."""

    metric: str
    """The deciding metric."""
    examples: int
    clusters: int
    rows: tuple[LadderRow, ...]
    models: tuple[LadderModel, ...] = ()
    """The bases, where the ladder has several."""
    verdict: Verdict
    skipped_rungs: tuple[SkippedRung, ...] = ()
    next_rung: NextRung | None = None
    """None if the recommended rung is the highest, or none is recommended."""
    diagnoses: tuple[Diagnosis, ...] = ()
    curve: tuple[CurvePoint, ...] = ()
    forgetting: tuple[ForgettingResult, ...] = ()
    folder: str
    report: str
