"""The training loop: windows of rows, steps, validation, checkpoints, early stopping and resume.

Everything that a step depends on is a function of seed and step number, or is stored in `Progress`; a resumed run
therefore takes the same steps as an uninterrupted one. One class holds the loop instead of callbacks: the order of
saving, stopping and validating matters, and it is readable in `run`. `runs.train` builds a `Trainer` and calls `run`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from rung.config.training import TrainingConfig
from rung.console import Interrupted, ProgressBar, interruptible, print_status
from rung.errors import DataError, NoSignalError
from rung.files import find_damage
from rung.methods.protocol import Method, TrainableSet
from rung.models.layers import lowest_trainable_layer
from rung.models.packing import largest_first, pack, pack_lazily, pack_separately, pack_together
from rung.models.policy import Policy
from rung.models.threads import contention_notice
from rung.objectives.protocol import Objective
from rung.planning.recomputation import CPU_DOCUMENT_BYTES, DocumentLimit, RecomputeRule
from rung.training import checkpoint
from rung.training.distributed import SINGLE_PROCESS, World
from rung.training.early_stopping import EarlyStopping
from rung.training.frozen_layer_cache import DeviceStore, FrozenLayerCache, has_device_space, has_disk_space
from rung.training.gates import MovementGate, enforce, skip_step
from rung.training.optimizer import OptimizerState, learning_rate_at, train_only
from rung.training.prefetch import BatchPrefetcher
from rung.training.rollout import RolloutSource
from rung.training.run_folder import (
    Gate,
    Progress,
    RunFolder,
    StopCheck,
    never_stop,
    progress_summary,
    read_log,
    row_indices_of_step,
    total_steps,
)
from rung.training.step import accumulate, mean_loss
from rung.types import Example, PackedBatch

Row = Sequence[Example]
"""The documents of one data row."""


@dataclass(frozen=True)
class StepMetrics:
    """Measurements of one optimizer step."""

    loss: float
    """In nats per unit of the objective (tokens, sequences or pairs)."""
    learning_rate: float
    grad_norm: float = 0.0
    """Before clipping."""
    tokens: int = 0
    """Document tokens of all ranks; a shared prefix counts for every document."""
    seconds: float = 0.0
    objective: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the objective and of the rollout."""
    skipped: bool = False
    """Whether loss or gradient was not finite, so that no parameter was updated."""
    stop_reason: str | None = None
    """Why the objective ended the rollout at this step; None where it did not."""

    def log_entry(self, step: int) -> dict[str, Any]:
        """The log.jsonl entry of this step."""
        entry = {name: getattr(self, name) for name in ("loss", "learning_rate", "grad_norm", "tokens")}
        entry = {"step": step, **entry, "seconds": round(self.seconds, 4), **self.objective}
        if self.skipped:
            entry["skipped"] = True
        return entry if self.stop_reason is None else {**entry, "halted": self.stop_reason}


@dataclass
class Trainer:
    """Takes the steps of one run. `peak_rate` is the resolved learning rate, `budget` the tokens per micro-batch."""

    policy: Policy
    method: Method
    objective: Objective
    config: TrainingConfig
    peak_rate: float
    budget: int
    seed: int
    folder: RunFolder
    progress: Progress = field(default_factory=Progress)
    rollouts: RolloutSource | None = None
    """Source of the documents where the policy generates them; None for documents of the data."""
    world: World = SINGLE_PROCESS
    """The ranks that share the steps; `sharded` where they share the model too (`fsdp.shard_policy`)."""
    first_example: Sequence[Example] = ()
    """The first training row, used as filler; set by `run`."""
    stop_check: StopCheck = never_stop
    """Called with every validation loss; returns the reason to end the run, or None."""
    spare_device_bytes: int = 0
    """Bytes of a card that the plan of the run leaves free; states of frozen layers may stay there."""
    document_limit: DocumentLimit = DocumentLimit(CPU_DOCUMENT_BYTES)
    """Activations that one document may store; a longer one recomputes its lowest trained layers."""

    def __post_init__(self) -> None:
        # heads of the objective train at the rate of the run; a method's factors are for its own parameters
        head_names = self.objective.trainable().keys()

        def rate_factor(name: str) -> float:
            return 1.0 if name in head_names else self.method.learning_rate_factor(name)

        self.optimizer_state = OptimizerState(lambda: self.trainable, self.config.optimizer, rate_factor, self.world)
        if self.world.sharded:
            self.optimizer_state.shard_parameters()
        self.skip_until_step = 0
        """The first step after a rollout that the objective ended early."""
        self.checkpoints = self.folder.path / "checkpoints"
        self.writer = checkpoint.CheckpointWriter(
            *(self.checkpoints, self.config, self.optimizer_state),
            read_progress=self._progress_to_save,
            reference_cache=lambda: self.policy.reference_cache,
        )
        best = self.checkpoints / "best"
        self.early_stopping = EarlyStopping(self.config.patience, best, self.writer.write, self.stop_check)
        self.frozen_cache: FrozenLayerCache | None = None
        self.prefetcher: BatchPrefetcher | None = None
        # log-probabilities of the reference for documents of the data never change during a run; but where layers are
        # sharded all ranks must run them equally often, which a cache filled by one rank would break
        has_cache = self.objective.compares_answers and not self.world.sharded
        self.policy.reference_cache = {} if has_cache else None
        self.share_prefixes = self._can_share_prefixes()
        self.lowest_trained_layer = lowest_trainable_layer(self.policy.model, self.method.trainable())
        if self.method.supports_recompute():
            base, device = self.policy.base, self.policy.device.type
            limit, lowest = self.document_limit, self.lowest_trained_layer
            rule = RecomputeRule(base.shape, limit, base.dtype_name, device, lowest)
            self.policy.layers_to_recompute = rule.layers_to_recompute
            self.policy.layers_to_offload = rule.layers_to_offload

    @property
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Every trained parameter by name: those of the method and those of heads of the objective."""
        return {**self.method.trainable(), **self.objective.trainable()}

    def summary(self) -> Mapping[str, Any]:
        """What run.json says of the steps so far."""
        return progress_summary(self.progress, self.trainable, self.policy.device)

    def set_budget(self, tokens: int) -> None:
        """Compute this many tokens at once from now on, in rollouts too."""
        self.budget = tokens
        if self.rollouts is not None:
            self.rollouts.budget = tokens

    def restore(self) -> bool:
        """Load the newest undamaged checkpoint. Returns False where there is none."""

        def newest_name() -> str | None:
            newest = checkpoint.newest_checkpoint(self.checkpoints, print_status)
            return None if newest is None else newest.name

        # rank 0 decides: ranks that see another state of a shared disk would resume from different steps
        if (name := self.world.on_rank0(newest_name)) is None:
            return False
        folder = self.checkpoints / name
        self.optimizer_state.load(folder)
        self.progress = Progress(**checkpoint.read_progress(folder))
        self.objective.load_state(self.progress.objective or self.objective.state())
        self.method.load_state(self.progress.method)
        if self.policy.reference_cache is not None:
            self.policy.reference_cache.update(checkpoint.read_reference_cache(folder))
        self.folder.trim_log(self.progress.step)
        best_folder = self.early_stopping.best_folder
        if self.world.is_rank0 and not find_damage(best_folder):
            if checkpoint.read_progress(best_folder)["step"] != self.progress.best_step:
                shutil.rmtree(best_folder)  # of a later step than the checkpoint: that step will be taken again
        print_status(f"resumed from {folder.name}")
        return True

    def run(self, train: Sequence[Row], validation: Sequence[Row]) -> Progress:
        """Take every remaining step over the data rows.

        Raises `Interrupted` after saving a checkpoint, `GateError` where a gate fails, `DataError` without rows,
        `NoSignalError` where no step had anything to learn from.
        """
        if not train:
            raise DataError("no training rows are left", hint="look at the counts of: rung data check")
        final_step = total_steps(self.config, len(train), self.steps_per_window)
        # a resumed run whose manifest has the verdict does not check again
        movement = None
        # a gate that failed ended the run before: it is checked again and not passed over
        if all(gate["name"] != "movement" or gate["state"] == "failed" for gate in self.folder.manifest["gates"]):
            movement = MovementGate(self.policy.model, self.optimizer_state.local_parameters, self.world)
        self.objective.take_metrics()  # discard metrics of gates and of the memory trial
        self.first_example = train[0]
        self.policy.model.train()
        self.frozen_cache = self._frozen_layer_cache(train)
        self._open_state_cache(train)
        if self._packs_ahead():
            self.prefetcher = BatchPrefetcher(lambda step: self._pack_share(self.window(train, step)), final_step)
        try:
            sampling = nullcontext() if self.rollouts is None else self.rollouts.sampling()
            with sampling, interruptible() as stopping, ProgressBar("train", final_step, self.progress.step) as bar:
                self.writer.restart_timer()
                self.writer.keep_resume_point()
                stop_reason = self._make_up_validation(validation, final_step)
                while self.progress.step < final_step and not stop_reason:
                    window = self.window(train, self.progress.step // self.steps_per_window)
                    with self.writer.saving_on_error():
                        entry = self._step(window, final_step, movement)
                        stop_reason = self._validate_and_log(validation, entry, final_step)
                    bar.advance(loss=f"{entry['loss']:.4f}", rate=f"{entry['learning_rate']:.1e}")
                    if notice := contention_notice():
                        print_status(notice)
                    is_last = self.progress.step == final_step or stop_reason is not None
                    self._save_where_due(stopping(), is_last=is_last)
                if stop_reason:
                    print_status(f"{stop_reason}: stopped early")
        finally:
            self.policy.model.eval()
            if self.frozen_cache is not None:
                self.folder.update(trunk=self.frozen_cache.summary())
                self.frozen_cache = None  # frees its file too
            if self.prefetcher is not None:
                self.prefetcher.close()
                self.prefetcher = None
        # too few steps for a verdict: run.json says so instead of lacking the gate
        if movement is not None and movement.gate is None:
            reason = f"{self.progress.steps_with_signal} of {self.progress.step} steps had something to learn from"
            self.record_gate(Gate("movement", "not_reached", f"{reason}, and the check needs two", "all, 0"))
        if not self.progress.steps_with_signal:
            raise self._no_signal_error()
        self._keep_best()
        return self.progress

    def _save_where_due(self, stop_requested: bool, *, is_last: bool) -> None:
        """Save a checkpoint where one is due. Raises `Interrupted` after it where the user asked to stop."""
        # a signal reaches the ranks at different steps, and their clocks differ: all do what one has seen
        stop_requested, is_time = self.world.any_each(stop_requested, self.writer.is_time())
        if not self._at_checkpoint_boundary:
            return
        if stop_requested:
            self.writer.save()
            raise Interrupted
        # not after the last step: the artifact is written next
        if not is_last and self._is_due(self.config.checkpoint_steps):
            self.writer.save()
        elif not is_last and is_time:
            self.writer.save_by_time()

    @property
    def steps_per_window(self) -> int:
        """Optimizer steps per window of rows; more than one where a rollout is used for several steps."""
        return 1 if self.rollouts is None else self.rollouts.config.steps

    @property
    def _at_checkpoint_boundary(self) -> bool:
        """Whether the next step starts a new window; a checkpoint then needs no documents of the old rollout."""
        return self.progress.step % self.steps_per_window == 0

    def _is_due(self, every: int | None) -> bool:
        """Whether a multiple of `every` steps was passed within the last window."""
        step = self.progress.step
        # not step % every: with several steps per window the multiple may lie between two window ends
        return every is not None and step // every > (step - self.steps_per_window) // every

    def window(self, train: Sequence[Row], step: int) -> list[Example]:
        """The documents of a window (counted from 0)."""
        row_numbers = row_indices_of_step(step, len(train), self.config.examples_per_step, self.seed)
        return [example for row in row_numbers for example in train[row]]

    def pack(self, examples: Sequence[Example], budget: int) -> list[PackedBatch]:
        """Pack documents into batches as the config says."""
        if self.config.packing == "none":
            return pack_separately(examples, self.policy.device)
        return largest_first(pack(examples, budget, **self._packing_options))

    @property
    def _packing_options(self) -> dict[str, Any]:
        device, boundary = self.policy.device, self.policy.rope_boundary
        return {"share_prefixes": self.share_prefixes, "device": device, "boundary": boundary}

    def _can_share_prefixes(self) -> bool:
        """Whether shared prefixes are computed once; prints the reason where the config asks for it in vain."""
        if self.config.packing != "tree":
            return False
        sharding = "layers are gathered for whole documents" if self.world.sharded else None
        if blocker := sharding or self.method.prefix_sharing_blocker():
            print_status(f"no shared prefixes: {blocker}")
            return False
        return True

    def _repeats_rows(self, train: Sequence[Row]) -> bool:
        """Whether some row comes more than once, so that what is computed for it can be kept."""
        windows = -(-total_steps(self.config, len(train), self.steps_per_window) // self.steps_per_window)
        return windows > -(-len(train) // self.config.examples_per_step)

    def _open_state_cache(self, train: Sequence[Row]) -> None:
        """Let the objective keep states of other models, where documents come again and the disk has room."""
        width = self.objective.cached_state_width()
        if width and self._repeats_rows(train):
            if has_disk_space(train, width, "the teacher's states", lambda example: example.predictions):
                self.objective.open_state_cache()

    def _frozen_layer_cache(self, train: Sequence[Row]) -> FrozenLayerCache | None:
        """A cache for the frozen lower layers, where documents pass them more than once and the disk has room."""
        if self.rollouts is not None or self.world.sharded:
            return None  # rollout documents are new each time; with sharding all ranks must run all layers
        steps_per_epoch, layer = -(-len(train) // self.config.examples_per_step), self.lowest_trained_layer
        if not (self.config.cache_frozen_layers and layer > 0 and self._repeats_rows(train)):
            return None
        width = self.policy.model.config.hidden_size
        store = DeviceStore() if has_device_space(train, width, self.spare_device_bytes) else None
        if store is None and not has_disk_space(train, width, "the states of frozen layers"):
            return None
        print_status(f"layers below {layer} do not move: each document passes them once")
        cache = FrozenLayerCache(self.policy, layer, self.budget, share_prefixes=self.share_prefixes, store=store)
        # a resume replays the first epoch with the same packing, hence the same bits. Several ranks replay every step:
        # in later epochs a rank also receives rows that another rank had in the first
        replayed_steps = steps_per_epoch if self.world.size == 1 else self.progress.step
        for step in range(min(self.progress.step, replayed_steps)):
            cache.fill(self._pack_share(self.window(train, step)))
        return cache

    def _packs_ahead(self) -> bool:
        """Whether batches are packed while the step before is computed: on a card, for documents of the data."""
        return self.rollouts is None and self.policy.device.type == "cuda"

    def _pack_share(self, examples: Sequence[Example]) -> list[PackedBatch]:
        """The batches of this rank for a step over these documents."""
        return self.pack(self.world.split_examples(examples), self.budget)

    def _step(self, window: Sequence[Example], final_step: int, movement: MovementGate | None) -> dict[str, Any]:
        """One optimizer step over a window of documents. Returns its log entry."""
        start = time.perf_counter()
        step, schedule, warmup = self.progress.step, self.config.schedule, self.config.warmup_ratio
        rate = learning_rate_at(step, total=final_step, peak=self.peak_rate, schedule=schedule, warmup=warmup)
        selection = self._select_trainable()
        if self.progress.step < self.skip_until_step:
            self.progress.step += 1
            skipped_step = StepMetrics(self.progress.loss, rate, stop_reason="the rest of the rollout")
            return skipped_step.log_entry(self.progress.step)
        examples, rollout_metrics = self._documents(window)
        batches = self._pack_share(examples) if self.prefetcher is None else self.prefetcher.take(step)
        if self.frozen_cache is not None:
            batches = self.frozen_cache.feed(batches)
        loss, norm = self._gradient(examples, batches)
        is_finite = bool(torch.isfinite(norm) & torch.isfinite(loss))
        stop_reason = self.objective.stop_reason() if is_finite else None
        self.writer.begin_update()
        if is_finite and stop_reason is None:
            self.optimizer_state.step(rate)
            self.progress.skipped = 0
        # the clock stops before gates and logging, which are not part of the speed that users compare
        seconds = time.perf_counter() - start
        tokens = int(self.world.sum_values([sum(batch.document_tokens for batch in batches)])[0])
        self._advance(float(loss), tokens, seconds, stop_reason)
        if self._at_checkpoint_boundary:
            self.writer.keep_resume_point()  # what follows changes no weight
        if not is_finite:
            skip_step(self.folder, self.progress, examples, float(loss), float(norm), rate)
        elif stop_reason is None:
            self._note_signal(movement, selection, examples)
        numbers = (float(loss), rate, float(norm), tokens, seconds)
        metrics = {**rollout_metrics, **self._gathered_metrics()}
        step_metrics = StepMetrics(*numbers, objective=metrics, skipped=not is_finite, stop_reason=stop_reason)
        return step_metrics.log_entry(self.progress.step)

    def _select_trainable(self) -> TrainableSet | None:
        """The parameters that the method trains in this step, with the heads of the objective; None means all."""
        selection = self.method.trainable_at_step(self.progress.step)
        if selection is None:
            return None
        selection = selection._replace(names={*selection.names, *self.objective.trainable()})
        train_only(self.optimizer_state.optimizer, self.trainable, selection)
        if selection.changes_permanently:
            # earlier validation losses are of another model
            self.folder.update(**self.method.statistics())
            self.early_stopping.reset(self.progress, remove=self.world.is_rank0)
            self.writer.keep_resume_point()  # a checkpoint from before would undo the change of the method
        return selection

    def _gradient(self, examples: Sequence[Example], batches: list[PackedBatch]) -> tuple[Tensor, Tensor]:
        """Compute the summed and clipped gradients of the step. Returns the loss and the gradient norm."""
        self.optimizer_state.zero_grad()
        if kl_examples := self.objective.kl_examples(examples):
            # KTO: the reference point is an estimate over the whole step, needed before the first loss
            with torch.no_grad():
                self.objective.prepare(self.policy, self.policy.iterate_batches(self.pack(kl_examples, self.budget)))
        # seeded by the step, so that a resumed run drops the same activations as an uninterrupted one
        self.world.seed_dropout(self.seed, self.progress.step)
        loss = accumulate(self.policy, self.objective, batches, self.world, self.filler_batch)
        return loss, self.optimizer_state.reduce_and_clip(self.config.max_grad_norm)

    def _advance(self, loss: float, tokens: int, seconds: float, stop_reason: str | None) -> None:
        """Update `Progress` after a step."""
        self.progress.step += 1
        if stop_reason is not None:  # skip the remaining steps of this rollout
            self.skip_until_step = -(-self.progress.step // self.steps_per_window) * self.steps_per_window
        self.progress.seconds += seconds
        self.progress.tokens += tokens
        self.progress.loss = loss

    def _note_signal(
        self, movement: MovementGate | None, selection: TrainableSet | None, examples: Sequence[Example]
    ) -> None:
        """Count a step that had something to learn from and show it to gate 3; print that a step had nothing."""
        if not self.objective.has_signal(examples):
            # at powers of two only: a run without a signal would print as many lines as it has steps
            if (count := self.progress.step - self.progress.steps_with_signal) & (count - 1) == 0:
                print_status(f"step {self.progress.step}: all rewards of a group are equal, so it teaches nothing")
            return
        self.progress.steps_with_signal += 1
        if movement is not None:
            self._observe(movement, selection, examples)

    def _no_signal_error(self) -> NoSignalError:
        summary = f"in none of {self.progress.step:,} steps did the rewards of a group differ: nothing was learned"
        hint = (
            "the reward is always the same: take prompts that the model sometimes answers right, a reward with more "
            "steps between wrong and right, more answers per prompt (objective.rollout.num_generations), or train with "
            "objective sft first; log.jsonl has the rewards of every step"
        )
        return NoSignalError(summary, where=str(self.folder.path), hint=hint)

    def _observe(self, movement: MovementGate, selection: TrainableSet | None, examples: Sequence[Example]) -> None:
        """Feed gate 3. Parameters of tasks without a document in this step cannot have received a gradient."""
        method_names = self.method.trainable_for_tasks({example.task for example in examples})
        reachable_names = None if method_names is None else {*method_names, *self.objective.trainable()}
        gate = movement.observe(self.optimizer_state.optimizer, selection, reachable_names)
        if gate is not None:
            self.record_gate(gate)

    def _documents(self, examples: Sequence[Example]) -> tuple[Sequence[Example], dict[str, Any]]:
        """The documents of a step, of the data or of the rollout, and the metrics of generating them."""
        if self.rollouts is None:
            return examples, {}
        documents, metrics = self.rollouts.documents_for_step(examples, self.progress.step)
        if (gate := self.rollouts.gate) is not None:
            self.rollouts.gate = None  # recorded once
            self.record_gate(gate)
        return documents, metrics

    def record_gate(self, gate: Gate) -> None:
        """Record a gate, then enforce it: run.json must hold the gate that ends a run."""
        self.folder.gate(gate)
        print_status(str(gate))
        hint = None
        # parameters that overflow do not move any more either, and nothing in their names says why
        if gate.name == "movement":
            rate, loss = f"{self.peak_rate:g}", f"{self.progress.loss:.4g}"
            hint = f"the learning rate is {rate} and the loss {loss}: if the loss jumped, lower training.learning_rate"
        enforce(gate, hint)

    def _validate_and_log(self, validation: Sequence[Row], entry: dict[str, Any], final_step: int) -> str | None:
        """Measure the validation loss where it is due, and log the step. Returns the reason to end the run, or None."""
        try:
            return self._validate(validation, entry, self.progress.step == final_step)
        finally:
            self.folder.log(entry)  # the step was taken, whatever became of the validation

    def _make_up_validation(self, validation: Sequence[Row], final_step: int) -> str | None:
        """Measure the validation loss of a resumed step whose validation had failed; returns as `_validate`."""
        step = self.progress.step
        if not step or self.progress.validated_step == step:
            return None
        entry = next((e for e in reversed(read_log(self.folder.path)) if e["step"] == step), {"step": step})
        stop_reason = self._validate(validation, entry, step == final_step)
        if self.progress.validated_step == step:
            self.folder.trim_log(step - 1)
            self.folder.log(entry)
        return stop_reason

    def _validate(self, validation: Sequence[Row], entry: dict[str, Any], is_last: bool) -> str | None:
        """Measure the validation loss where it is due. Returns the reason to end the run here, or None."""
        if not validation or not (is_last or (self._at_checkpoint_boundary and self._is_due(self.config.eval_every))):
            return None
        self.policy.model.eval()
        loss, metrics = self._validation_metrics(validation)
        entry.update({f"validation_{name}": number for name, number in metrics.items()})
        self.policy.model.train()
        self.progress.validation, self.progress.validated_step = loss, self.progress.step
        entry["validation_loss"] = loss
        stop_reason = self.early_stopping.update(self.progress, loss)
        if self._at_checkpoint_boundary:
            self.writer.keep_resume_point()
        return stop_reason

    def _validation_metrics(self, validation: Sequence[Row]) -> tuple[float, Mapping[str, float]]:
        """Validation loss and metrics. For rollouts the loss is minus the mean reward of greedy answers."""
        if self.rollouts is not None and self.rollouts.validation is not None:
            metrics = self.rollouts.validate([example for row in validation for example in row])
            return -metrics["reward"], metrics
        validation = self.world.share_of_rank(validation)
        batches: Iterable[PackedBatch]
        if self.config.packing == "none":
            batches = (batch for row in validation for batch in pack_separately(row, self.policy.device))
        else:
            examples = chain.from_iterable(validation)
            batches = pack_lazily(examples, self.budget, **self._packing_options)
        self.objective.take_metrics()  # of the last training step, already in its entry
        return mean_loss(self.policy, self.objective, batches, self.world, self.filler_batch), self._gathered_metrics()

    def _keep_best(self) -> None:
        """With `patience`: load the weights of the lowest validation loss."""
        self.world.barrier()  # rank 0 writes the checkpoint that all ranks read
        folder = self.early_stopping.best_weights(self.progress)
        if folder is None:
            return
        self.optimizer_state.load_weights(folder)
        self.progress.validation = self.progress.best
        print_status(f"kept the weights of step {self.progress.best_step}")

    def filler_batch(self) -> PackedBatch:
        """The first training row as a batch, for a rank that must keep computing without batches of its own."""
        return pack_together(self.first_example, self.budget, share_prefixes=False, device=self.policy.device)[0]

    def _gathered_metrics(self) -> Mapping[str, float]:
        """Metrics of the objective over all ranks."""
        self.objective.batch_metrics = self.world.gather_metrics(self.objective.batch_metrics)
        return self.objective.take_metrics()

    def _progress_to_save(self) -> dict[str, Any]:
        self.progress.objective, self.progress.method = self.objective.state(), self.method.state()
        return asdict(self.progress)
