"""The training loop."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from rung.config.training import TrainingConfig
from rung.console import Interrupted, ProgressBar, interruptible, print_status
from rung.errors import DataError
from rung.files import find_damage
from rung.methods.protocol import Method, TrainableSet
from rung.models.layers import layers_of, lowest_trainable_layer
from rung.models.policy import Policy
from rung.models.tree_attention import has_flat_kernel
from rung.objectives.protocol import Objective
from rung.training import checkpoint, fsdp
from rung.training.distributed import SINGLE_PROCESS, World
from rung.training.early_stopping import EarlyStopping
from rung.training.frozen_layer_cache import FrozenLayerCache, has_disk_space
from rung.training.gates import MovementGate, enforce, movement_not_reached, skip_step
from rung.training.micro_batch import layers_to_recompute, longest_document_bytes
from rung.training.optimizer import OptimizerState, learning_rate_at, train_only
from rung.training.packing import largest_first, pack, pack_in_slices, pack_separately, pack_together
from rung.training.rollout import RolloutSource
from rung.training.run_folder import Gate, Progress, RunFolder, StopCheck, never_stop, rows_of_step, total_steps
from rung.training.step import accumulate, mean_loss
from rung.types import Example, PackedBatch

Row = Sequence[Example]
"""The documents of one row of the data."""


@dataclass(frozen=True)
class StepMetrics:
    """What one optimizer step measured."""

    loss: float
    """Per unit of the objective."""
    learning_rate: float
    grad_norm: float = 0.0
    """Before clipping."""
    tokens: int = 0
    """Of all processes, as the user counts them."""
    seconds: float = 0.0
    objective: Mapping[str, float] = field(default_factory=dict)
    """The objective's own numbers."""
    skipped: bool = False
    """Whether loss or gradient was not finite, so that no parameter moved."""
    halted: str | None = None
    """Why the objective ended the rollout here."""

    def log_entry(self, step: int) -> dict[str, Any]:
        """The object that `log.jsonl` holds for this step."""
        return {
            "step": step,
            "loss": self.loss,
            "learning_rate": self.learning_rate,
            "grad_norm": self.grad_norm,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 4),
            **self.objective,
            **({"skipped": True} if self.skipped else {}),
            **({} if self.halted is None else {"halted": self.halted}),
        }


@dataclass
class Trainer:
    """Runs the steps of one run. `peak_rate` is the resolved learning rate, `budget` the resolved micro-batch."""

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
    """Where the documents come from, when the policy makes them itself."""
    world: World = SINGLE_PROCESS
    """The processes that share the steps."""
    in_parts: bool = False
    """Whether each process gives away what others hold, once the gates have passed."""
    first_example: Sequence[Example] = ()
    """The first row of the data."""
    stop_check: StopCheck = never_stop
    """Hears of every validation loss, and says why the run should end there, if it should."""

    def __post_init__(self) -> None:
        owned = self.objective.trainable().keys()
        self.optimizer_state = OptimizerState(
            lambda: self.trainable,
            self.config.optimizer,
            lambda name: 1.0 if name in owned else self.method.learning_rate_factor(name),
            self.world,
        )
        self.halted_until = 0
        """The first step after the rollout that is no longer learned from."""
        self.checkpoints = self.folder.path / "checkpoints"
        self.early_stopping = EarlyStopping(
            self.config.patience, self.checkpoints / "best", self._write, self.stop_check
        )
        self.trunk: FrozenLayerCache | None = None
        self.policy.reference_cache = {} if self.objective.compares_answers else None
        self.sharing = self._share_prefixes()
        self.lowest = lowest_trainable_layer(self.policy.model, self.method.trainable())
        if self.method.supports_recompute():
            self.policy.layers_to_recompute = partial(
                layers_to_recompute,
                self.policy.base.shape,
                lowest=self.lowest,
                limit=longest_document_bytes(self.policy.device),
            )

    @property
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Every parameter that a step may move: the method's, and those of heads that the objective owns."""
        return {**self.method.trainable(), **self.objective.trainable()}

    def set_budget(self, tokens: int) -> None:
        """Compute this many tokens at once from now on, in rollouts too."""
        self.budget = tokens
        if self.rollouts is not None:
            self.rollouts.budget = tokens

    def shard(self) -> None:
        """From here on each process holds a part of the model; what must run alike in all of them does.

        An adapter stays whole, and so is added up as those of replicas are.
        """
        whole = self.method.trainable().values() if self.method.artifact == "adapter" else ()
        fsdp.shard_model(self.policy.model, list(layers_of(self.policy.model)), whole)
        if (other := self.policy.reference) is not None:
            fsdp.shard_model(other.model, list(layers_of(other.model)), ())
        self.optimizer_state.shard_parameters()
        self.world = replace(self.world, sharded=True)
        self.sharing, self.policy.reference_cache = self._share_prefixes(), None
        self.policy.layers_to_recompute = lambda tokens: range(0)

    def gather_model(self) -> None:
        """The first process holds all that moved again; afterwards nothing is trained."""
        if self.world.sharded:
            fsdp.gather_full(self.policy.model, keep=self.world.is_rank0)

    def restore(self) -> bool:
        """Take up the newest checkpoint that verifies, if there is one."""
        name = self.world.on_rank0(
            lambda: getattr(checkpoint.newest_checkpoint(self.checkpoints, print_status), "name", None)
        )
        if name is None:
            return False
        if self.in_parts:
            self.shard()
        found = self.checkpoints / name
        self.optimizer_state.load(found)
        self.progress = Progress(**checkpoint.read_progress(found))
        self.objective.load_state(self.progress.objective or self.objective.state())
        self.method.load_state(self.progress.method)
        if self.policy.reference_cache is not None:
            self.policy.reference_cache.update(checkpoint.read_reference_cache(found))
        self.folder.trim_log(self.progress.step)
        best = self.checkpoints / "best"
        if (
            self.world.is_rank0
            and not find_damage(best)
            and checkpoint.read_progress(best)["step"] != self.progress.best_step
        ):
            shutil.rmtree(best)  # of steps that are taken once more, and may come out otherwise
        print_status(f"resumed from {found.name}")
        return True

    def run(self, train: Sequence[Row], validation: Sequence[Row]) -> Progress:
        """Take every remaining step over the rows of the data.

        Raises `Interrupted` after saving, `GateError` when a gate fails.
        """
        if not train:
            raise DataError("no training rows are left", hint="look at the counts of: rung data check")
        if self.in_parts and not self.world.sharded:
            self.shard()
        total = total_steps(self.config, len(train), self.steps_per_window)
        judged = any(gate["name"] == "movement" for gate in self.folder.manifest["gates"])
        movement = (
            None if judged else MovementGate(self.policy.model, self.optimizer_state.local_parameters, self.world)
        )
        self.objective.take_metrics()  # what was measured before the first step is no part of it
        self.first_example = train[0]
        self.policy.model.train()
        self.trunk = self._frozen_layer_cache(train)
        try:
            sampling = nullcontext() if self.rollouts is None else self.rollouts.sampling()
            with sampling, interruptible() as stopping, ProgressBar("train", total, self.progress.step) as bar:
                while self.progress.step < total:
                    entry = self._step(self.window(train, self.progress.step // self.steps_per_window), total, movement)
                    last = self.progress.step == total
                    enough = self._validate(validation, entry, last)
                    self.folder.log(entry)
                    bar.advance(loss=f"{entry['loss']:.4f}", rate=f"{entry['learning_rate']:.1e}")
                    if self.world.any(stopping()) and self._at_checkpoint_boundary:
                        self._save()
                        raise Interrupted
                    if enough:
                        print_status(f"{enough}: stopped early")
                        break
                    if not last and self._at_checkpoint_boundary and self._is_due(self.config.checkpoint_every):
                        self._save()
        finally:
            self.policy.model.eval()
            if self.trunk is not None:
                self.folder.update(trunk=self.trunk.summary())
                self.trunk = None  # and its file
        if movement is not None and movement.gate is None:
            gate = movement_not_reached()
            self.folder.gate(gate)
            print_status(str(gate))
        self._keep_best()
        return self.progress

    @property
    def steps_per_window(self) -> int:
        """Optimizer steps of one window of rows: more than one where a rollout is learned from several times."""
        return 1 if self.rollouts is None else self.rollouts.steps

    @property
    def _at_checkpoint_boundary(self) -> bool:
        """Whether the next step begins with a rollout of its own: what was made earlier need not be kept then."""
        return self.progress.step % self.steps_per_window == 0

    def _is_due(self, every: int | None) -> bool:
        """Whether so many steps have gone by, some of them since the last window."""
        step = self.progress.step
        return every is not None and step // every > (step - self.steps_per_window) // every

    def window(self, train: Sequence[Row], step: int) -> list[Example]:
        """The documents of a step counted from 0."""
        chosen = rows_of_step(step, len(train), self.config.examples_per_step, self.seed)
        return [e for i in chosen for e in train[i]]

    def pack(self, examples: Sequence[Example], budget: int) -> list[PackedBatch]:
        """The rows of these documents, in the way this run packs."""
        if self.config.packing == "none":
            return pack_separately(examples, self.policy.device)
        return largest_first(pack(examples, budget, share_prefixes=self.sharing, device=self.policy.device))

    def _share_prefixes(self) -> bool:
        """Whether beginnings are computed once; says why not where the config asks for it."""
        if self.config.packing != "tree":
            return False
        if self.world.sharded:
            print_status("no shared prefixes: layers are gathered for whole documents")
            return False
        if reason := self.method.prefix_sharing_blocker():
            print_status(f"no shared prefixes: {reason}")
            return False
        if has_flat_kernel(self.policy.device):
            print_status("variable-length flash attention knows no trees: shared prefixes are unrolled")
            return False
        return True

    def _frozen_layer_cache(self, train: Sequence[Row]) -> FrozenLayerCache | None:
        """A cache of the layers that do not move, where they would run a second time and the disk has room."""
        if self.rollouts is not None or self.world.sharded:
            return None
        first_epoch = -(-len(train) // self.config.examples_per_step)
        if (
            not self.config.cache_frozen_layers
            or self.lowest == 0
            or total_steps(self.config, len(train)) <= first_epoch
        ):
            return None
        if not has_disk_space(train, self.policy.model.config.hidden_size):
            return None
        print_status(f"layers below {self.lowest} do not move: each document passes them once")
        trunk = FrozenLayerCache(self.policy, self.lowest, self.budget, share_prefixes=self.sharing)
        # resumed: rows as they were, so the same bits; in a later epoch a process may meet rows that were another's
        last = first_epoch if self.world.size == 1 else self.progress.step
        for step in range(min(self.progress.step, last)):
            trunk.fill(self.pack(self.world.split_examples(self.window(train, step)), self.budget))
        return trunk

    def _step(self, window: Sequence[Example], total: int, movement: MovementGate | None) -> dict[str, Any]:
        """One optimizer step over a window of documents; its entry in the log."""
        started = time.perf_counter()
        rate = learning_rate_at(
            self.progress.step,
            total=total,
            peak=self.peak_rate,
            schedule=self.config.schedule,
            warmup=self.config.warmup_ratio,
        )
        selection = self._select_trainable()
        if self.progress.step < self.halted_until:
            self.progress.step += 1
            halted_step = StepMetrics(self.progress.loss, rate, halted="the rest of the rollout")
            return halted_step.log_entry(self.progress.step)
        examples, rollout_metrics = self._documents(window)
        batches = self._batches(examples)
        loss, norm = self._gradient(examples, batches)
        finite = bool(torch.isfinite(norm) & torch.isfinite(loss))
        halted = self.objective.stop_reason() if finite else None
        if finite and halted is None:
            self.optimizer_state.step(rate)
            self.progress.skipped = 0
        # the clock stops here: gates and logging are not what a user compares speeds by
        seconds = time.perf_counter() - started
        tokens = int(self.world.sum_values([sum(batch.document_tokens for batch in batches)])[0])
        self._advance(float(loss), tokens, seconds, halted)
        if not finite:
            skip_step(self.folder, self.progress, examples, float(loss), float(norm))
        elif movement is not None and halted is None and self.objective.has_signal(examples):
            self._observe_movement(movement, selection, examples)
        return StepMetrics(
            *(float(loss), rate, float(norm), tokens, seconds),
            objective={**rollout_metrics, **self._gathered_metrics()},
            skipped=not finite,
            halted=halted,
        ).log_entry(self.progress.step)

    def _select_trainable(self) -> TrainableSet | None:
        """What the method trains in this step, with the heads of the objective; None is everything."""
        selection = self.method.at_step(self.progress.step)
        if selection is None:
            return None
        selection = selection._replace(names={*selection.names, *self.objective.trainable()})
        train_only(self.optimizer_state.optimizer, self.trainable, selection)
        if selection.changes_permanently:
            self._reset_best()
        return selection

    def _batches(self, examples: Sequence[Example]) -> list[PackedBatch]:
        """The documents that this process computes, packed, with cached hidden states where there are some."""
        batches = self.pack(self.world.split_examples(examples), self.budget)
        return batches if self.trunk is None else self.trunk.feed(batches)

    def _gradient(self, examples: Sequence[Example], batches: list[PackedBatch]) -> tuple[Tensor, Tensor]:
        """Fill the gradients of the step, summed over processes and clipped; the loss and the gradient norm."""
        self.optimizer_state.zero_grad()
        if kl_examples := self.objective.kl_examples(examples):
            with torch.no_grad():
                self.objective.prepare(self.policy, self.policy.iterate_batches(self.pack(kl_examples, self.budget)))
        # a resumed run must drop what the run that was never stopped drops: the seed follows from the step alone
        self.world.seed_dropout(self.seed, self.progress.step)
        loss = accumulate(self.policy, self.objective, batches, self.world, self.filler_batch)
        return loss, self.optimizer_state.reduce_and_clip(self.config.max_grad_norm)

    def _advance(self, loss: float, tokens: int, seconds: float, halted: str | None) -> None:
        """Count a step as taken."""
        self.progress.step += 1
        if halted is not None:  # what is left of this rollout is not learned from
            self.halted_until = -(-self.progress.step // self.steps_per_window) * self.steps_per_window
        self.progress.seconds += seconds
        self.progress.tokens += tokens
        self.progress.loss = loss

    def _observe_movement(
        self, movement: MovementGate, selection: TrainableSet | None, examples: Sequence[Example]
    ) -> None:
        """Gate 3: parameters of tasks without a document in this step cannot have received a gradient."""
        reached = self.method.trainable_for_tasks({example.task for example in examples})
        names = None if reached is None else {*reached, *self.objective.trainable()}
        gate = movement.observe(self.optimizer_state.optimizer, selection, names)
        if gate is not None:
            self._record_gate(gate)

    def _documents(self, examples: Sequence[Example]) -> tuple[Sequence[Example], dict[str, Any]]:
        """What a step learns from: rows of the data as they are, or what the policy makes of them; what that cost."""
        if self.rollouts is None:
            return examples, {}
        made, told = self.rollouts.documents_for_step(examples, self.progress.step)
        if (gate := self.rollouts.gate) is not None:
            self.rollouts.gate = None
            self._record_gate(gate)
        return made, told

    def _record_gate(self, gate: Gate) -> None:
        """Record a gate, then enforce it."""
        self.folder.gate(gate)
        print_status(str(gate))
        enforce(gate)

    def _reset_best(self) -> None:
        """Start early stopping anew: the method has changed, so earlier losses and weights are of another model."""
        self.folder.update(**self.method.statistics())
        self.early_stopping.reset(self.progress, remove=self.world.is_rank0)

    def _validate(self, validation: Sequence[Row], entry: dict[str, Any], last: bool) -> str | None:
        """Validation loss when it is due; why the run should end here, if it should."""
        if not validation or not (last or (self._at_checkpoint_boundary and self._is_due(self.config.eval_every))):
            return None
        self.policy.model.eval()
        value, found = self._validation_metrics(validation)
        entry.update({f"validation_{name}": number for name, number in found.items()})
        self.policy.model.train()
        self.progress.validation = entry["validation_loss"] = value
        return self.early_stopping.update(self.progress, value)

    def _validation_metrics(self, validation: Sequence[Row]) -> tuple[float, Mapping[str, float]]:
        """The loss on validation rows, of rollouts minus the mean reward of greedy answers, and what else was seen."""
        if self.rollouts is not None and self.rollouts.validation is not None:
            told = self.rollouts.validate([e for row in validation for e in row])
            return -told["reward"], told
        validation = self.world.every_nth(validation)
        batches: Iterable[PackedBatch]
        if self.config.packing == "none":
            batches = (batch for row in validation for batch in pack_separately(row, self.policy.device))
        else:
            every = chain.from_iterable(validation)
            batches = pack_in_slices(every, self.budget, share_prefixes=self.sharing, device=self.policy.device)
        self.objective.take_metrics()  # of the last training step: already in its entry
        return mean_loss(self.policy, self.objective, batches, self.world, self.filler_batch), self._gathered_metrics()

    def _keep_best(self) -> None:
        """With patience the run ends with the weights of the lowest validation loss."""
        self.world.barrier()  # until the first process has written it
        best = self.early_stopping.best_weights(self.progress)
        if best is None:
            return
        self.optimizer_state.load_weights(best)
        self.progress.validation = self.progress.best
        print_status(f"kept the weights of step {self.progress.best_step}")

    def filler_batch(self) -> PackedBatch:
        """The first row of the data, for a process that must compute though it has nothing left to."""
        return pack_together(self.first_example, self.budget, share_prefixes=False, device=self.policy.device)[0]

    def _gathered_metrics(self) -> Mapping[str, float]:
        """What the objective saw, of all processes."""
        self.objective.batch_metrics = self.world.gather_metrics(self.objective.batch_metrics)
        return self.objective.take_metrics()

    def _save(self) -> None:
        self._write(self.checkpoints / f"step-{self.progress.step:08d}")
        if self.world.is_rank0:
            checkpoint.remove_old_checkpoints(self.checkpoints, self.config.save_total_limit)

    def _write(self, folder: Any) -> None:
        known = self.policy.reference_cache
        if self.world.size > 1:
            self.world.assert_equal(self.optimizer_state.replica_digests())
            if known is not None:
                everyone = self.world.gather(list(known.items()))
                known = {key: nats for own in everyone for key, nats in own}
        self.progress.objective, self.progress.method = self.objective.state(), self.method.state()
        checkpoint.write_checkpoint(folder, self.optimizer_state, asdict(self.progress), known)
