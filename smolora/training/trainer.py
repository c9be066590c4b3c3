"""The training loop, for pretraining and for tuning: one update at a time, each checked before it is applied.

A step gathers its rows, divides the summed loss by the target tokens of the whole step (so accumulation and several
processes equal one big batch), shows the unclipped gradients to the callbacks, refuses numbers that aren't finite, and
only then updates.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from signal import Signals

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from smolora.adapters.factors import find_waiting
from smolora.config import EvaluationConfig, TrainingConfig
from smolora.config.training import ScheduleName
from smolora.data.collate import Batch
from smolora.data.token_dataset import Example, ExampleDataset
from smolora.errors import BrokenRunError, ConfigError, StoppedBySignal
from smolora.models.bundle import ModelBundle
from smolora.models.structure import without_dropout
from smolora.records.metrics_log import MetricsLog, Scalar
from smolora.records.run_dir import RunDir
from smolora.runtime.seeding import seed_noise
from smolora.runtime.signals import SAVING, StopRequest, deferred_signals, describe_stop, interrupting_signals
from smolora.training.activations import recomputed_activations
from smolora.training.callback import Callback, name_callbacks
from smolora.training.checkpoint import RunIdentity, TrainingSnapshot, load_newest, save_checkpoint
from smolora.training.loss import find_first_nonfinite, require_finite_loss, sum_cross_entropy, target_logits_of
from smolora.training.optim import (
    build_optimizer,
    optimizer_tensors,
    require_gradients,
    require_movement,
    restore_optimizer,
    tensor_checksums,
    trainable_parameters,
)
from smolora.training.plan import StepPlan
from smolora.training.processes import Processes, join_processes
from smolora.training.schedules import ScheduleWindow
from smolora.training.sharding import keep_company, make_whole, sharded_base
from smolora.training.state import StepRecord, TrainerState

logger = logging.getLogger(__name__)

Collator = Callable[[Sequence[Example]], Batch]


class Trainer:
    """Trains whatever of `bundle.model` requires gradients.

    Args:
        bundle: Model and tokenizer; trained in place. Where nothing of it requires gradients, a ConfigError is raised.
        train_dataset: Encoded rows.
        config: The loop's settings.
        collate: Turns examples into a batch; must match what the model's family can take.
        eval_dataset: Held-out rows; without them nothing is evaluated.
        evaluation: Batch size of evaluation.
        run_dir: Where the main process keeps metrics and checkpoints, under a lock of the caller's; left out, nowhere.
        identity: What checkpoints belong to; needed with `run_dir`.
        callbacks: Listeners, called in this order.
        betas: AdamW's decay rates of the two moments.
        plan: Which rows every step sees; left out, all of them, in a seeded order.
        processes: Those that share the run; left out, those that a launcher started.

    Example:
        ```python
        from smolora.data.collate import collate_packed
        state = Trainer(bundle, rows, TrainingConfig(max_steps=100), collate=collate_packed).train()
        ```
    """

    def __init__(
        self,
        bundle: ModelBundle,
        train_dataset: ExampleDataset,
        config: TrainingConfig,
        *,
        collate: Collator,
        eval_dataset: ExampleDataset | None = None,
        evaluation: EvaluationConfig | None = None,
        run_dir: RunDir | None = None,
        identity: RunIdentity | None = None,
        callbacks: Sequence[Callback] = (),
        betas: tuple[float, float] = (0.9, 0.999),
        plan: StepPlan | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.bundle = bundle
        self.config = config
        self.train_dataset = train_dataset
        self.eval_dataset = eval_dataset
        self.evaluation = evaluation or EvaluationConfig()
        self.callbacks = list(callbacks)
        self._first_step = 0
        self._collate = collate
        self._identity = identity
        self._processes = processes or join_processes(bundle.device)
        self._run_dir = run_dir if self._processes.is_main else None
        self.plan = plan or StepPlan(len(train_dataset), config, self._processes.count)
        assert self.plan.num_processes == self._processes.count, "the plan gives every process its own rows"
        self.state = TrainerState(total_steps=self.plan.total_steps)
        self.schedule = ScheduleWindow.over(0, self.state.total_steps, warmup_steps=config.warmup_steps)
        self.parameters = trainable_parameters(bundle.model)
        if not self.parameters:
            raise ConfigError("no tensor of the model requires gradients: attach an adapter, or unfreeze some.")
        self._optimizer = build_optimizer(
            self.parameters, learning_rate=config.learning_rate, weight_decay=config.weight_decay, betas=betas
        )
        self._target_logits = target_logits_of(bundle.model, bundle.task)

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes the records."""
        return self._processes.is_main

    @property
    def run_dir(self) -> RunDir | None:
        """The run's folder, in the main process; None elsewhere, and where nothing is written."""
        return self._run_dir

    @property
    def active_parameters(self) -> dict[str, nn.Parameter]:
        """What the step at hand trains: all of `parameters`, or those of its phase."""
        return {name: parameter for name, parameter in self.parameters.items() if parameter.requires_grad}

    def use_schedule(self, name: ScheduleName, *, warmup_steps: float) -> None:
        """Train along another learning-rate curve; call it before `train`. Warm-up below 1 is a fraction of the run."""
        self.config = self.config.replace(lr_scheduler_type=name, warmup_steps=warmup_steps)
        self.schedule = ScheduleWindow.over(0, self.state.total_steps, warmup_steps=warmup_steps)

    def reset_moments(self, names: Iterable[str]) -> None:
        """Make the optimiser forget what it knows of these tensors."""
        for name in names:
            self._optimizer.state.pop(self.parameters[name], None)

    def will_log(self, step: int) -> bool:
        """Whether update `step` is certain to be logged; a callback that ends the run can have any other one logged."""
        is_evaluated = self.eval_dataset is not None and step % self.plan.eval_steps == 0
        return is_evaluated or step in (1, self.state.total_steps) or step % self.config.logging_steps == 0

    def train(self, *, resume: bool = False) -> TrainerState:
        """Run the loop to its last step, from the newest whole checkpoint where `resume` is set.

        Raises:
            BrokenRunError: Numbers that aren't finite, or trainable tensors without gradient or movement.
            ConfigError: A callback ends the run before its first step.
            StoppedBySignal: SIGINT or SIGTERM; the step was finished, but for its evaluation, and a checkpoint written.
                In the evaluation before the first step they raise KeyboardInterrupt: there is nothing to save.
            FailedElsewhere: Another process of the run failed.
            ModelError, DataError: The checkpoint belongs to another base, tokenizer or data, or none is whole.
        """
        was_training = self.bundle.model.training
        self._start(resume=resume)
        with deferred_signals(SAVING if self._run_dir else "") as stop, ExitStack() as ending:
            ending.callback(self.bundle.model.train, was_training)
            self.bundle.model.train()
            ending.callback(self._tell, lambda callback: callback.on_train_end(self))
            self._tell(lambda callback: callback.on_train_begin(self))
            if resume and self._run_dir:
                self._prune_checkpoints()  # A kill between saving and pruning left one too many.
            if self.config.gradient_checkpointing:
                ending.enter_context(recomputed_activations(self.bundle.model))
            ending.enter_context(sharded_base(self.bundle, self.parameters.values(), self._processes))
            if self.eval_dataset is not None and self.state.step == 0:
                self._evaluate_base()
            self.state.require_a_step()
            if resume and self.state.step:
                words = "the run is finished already, at" if self._is_over else "going on after"
                logger.info("%s step %d of %d", words, self.state.step, self.state.total_steps)
            signal_name = self._evaluate_step(stop) if self.state.unevaluated else None
            while not (self._is_over or signal_name):
                signal_name = self._finish_step(self._train_step(), stop)
            if self._is_over:
                waiting = self.state.waiting
                require_movement(self.active_parameters, self.state.checksums, self.state.step, waiting=waiting)
                self._tell(lambda callback: callback.on_finish(self))
                signal_name = signal_name or self._agree_to_stop(stop)
            if signal_name and (self._run_dir or self.state.unevaluated or not self._is_over):
                folder = self._run_dir.path if self._run_dir else None
                raise StoppedBySignal(describe_stop(signal_name, self.state.step, folder))
        return self.state

    def evaluate(self) -> float:
        """Return the mean loss over the held-out rows' target tokens, in nats; every module gets its mode back.

        Raises:
            ConfigError: There are no held-out rows.
            BrokenRunError: The loss isn't finite, so it could never be compared.
        """
        loss = self._measure_held_out(StopRequest())
        assert loss is not None, "nobody asks it to stop"
        return loss

    def _measure_held_out(self, stop: StopRequest) -> float | None:
        """Return the held-out loss; None where a signal cut it short. Each process asks for one as often."""
        if self.eval_dataset is None:
            raise ConfigError("there are no held-out rows to evaluate on: pass eval_dataset.")
        mine = torch.zeros(2, dtype=torch.float64)
        count, size = self._processes.count, self.evaluation.batch_size
        rows = range(self._processes.index, len(self.eval_dataset), count)
        with without_dropout(self.bundle.model), torch.no_grad():
            for start in range(0, math.ceil(len(self.eval_dataset) / count), size):
                if self._agree_to_stop(stop):
                    return None
                batches = self._batches(self.eval_dataset, list(filter(None, [rows[start : start + size]])))
                with self._processes.inside_model():
                    for batch in batches:
                        loss = sum_cross_entropy(self._target_logits(self.bundle.model, batch), batch.targets)
                        mine += torch.tensor([loss.item(), len(batch.targets)], dtype=torch.float64)
        summed, tokens = self._processes.sum(*mine.tolist())
        require_finite_loss(summed / tokens, self.state.step)
        return summed / tokens

    @property
    def _is_over(self) -> bool:
        return self.state.step >= self.state.total_steps or self.state.should_stop

    def _start(self, *, resume: bool) -> None:
        snapshot = self._processes.from_main(self._read_checkpoint) if resume else None
        if snapshot is not None:
            self._restore(snapshot)
        self._processes.copy_from_main(self.parameters.values())
        if snapshot is None and self.state.step == 0:
            self._tell(lambda callback: callback.reset())
            self.state.checksums = tensor_checksums(self.parameters)
            self.state.waiting = sorted(find_waiting(self.parameters))
        self._first_step = self.state.step
        if self._run_dir:
            # Without a checkpoint the run starts afresh, and so does its curve, the line of step 0 included.
            MetricsLog(self._run_dir.metrics).cut(self.state.step - bool(self.state.unevaluated) if snapshot else -1)

    def _read_checkpoint(self) -> TrainingSnapshot | None:
        if self._run_dir is None:
            return None
        identity, count = self._require_identity(), self._processes.count
        return load_newest(self._run_dir, self.bundle, identity, num_processes=count, total_steps=self.plan.total_steps)

    def _restore(self, snapshot: TrainingSnapshot) -> None:
        restore_optimizer(self._optimizer, self.parameters, snapshot.optimizer)
        self.state.restore(snapshot.state)
        for name, callback in name_callbacks(self.callbacks).items():
            callback.reset()
            if saved := snapshot.callbacks.get(name):
                callback.load_state_dict(saved)
            if tensors := snapshot.callback_tensors.get(name):
                callback.load_state_tensors(tensors)

    def _train_step(self) -> StepRecord:
        started = time.perf_counter()
        self._tell(lambda callback: callback.on_step_begin(self))
        step = self.state.step
        learning_rate = self._set_learning_rate(step)
        seed_noise(self.config.seed, "noise", step, self._processes.index)
        rows_of_passes = self.plan.micro_batches(step, self._processes.index)
        batches = list(self._batches(self.train_dataset, rows_of_passes))
        counts = sum(len(b.targets) for b in batches), sum(b.num_input_tokens for b in batches)
        tokens, input_tokens = map(int, self._processes.sum(*counts))
        loss = self._backward(batches, tokens)
        if step == self._first_step:
            require_gradients(self.active_parameters)
        self._tell(lambda callback: callback.on_gradients(self))
        # The norm comes before clipping, which would spread a NaN to all tensors.
        grad_norm = float(get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None]))
        self._require_finite(loss, grad_norm, batches)
        if self.config.max_grad_norm:
            clip_grads_with_norm_(self.parameters.values(), self.config.max_grad_norm, torch.tensor(grad_norm))
        self._optimizer.step()
        self._tell(lambda callback: callback.on_optimizer_step(self))
        self._optimizer.zero_grad(set_to_none=True)
        self.state.step += 1
        seconds = time.perf_counter() - started
        phase = self.state.phase
        return StepRecord(self.state.step, loss, grad_norm, learning_rate, tokens, input_tokens, seconds, phase)

    def _backward(self, batches: Sequence[Batch], tokens: int) -> float:
        """Accumulate the gradient of the step's token mean over all processes, and return that mean."""
        mean = torch.zeros((), dtype=torch.float64)
        with self._processes.inside_model():
            for batch in batches:
                loss = sum_cross_entropy(
                    self._target_logits(self.bundle.model, batch), batch.targets, weight=1 / tokens
                )
                loss.backward()  # type: ignore[no-untyped-call]
                mean += loss.detach().to("cpu", torch.float64)
        self._processes.sum_gradients(list(self.active_parameters.values()))
        return self._processes.sum(mean.item())[0]

    def _require_finite(self, loss: float, grad_norm: float, batches: Sequence[Batch]) -> None:
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return
        make_whole(self.bundle, self._processes)
        places = self._processes.gather_values(find_first_nonfinite(self.bundle.model, batches, self.bundle.task))
        # A gradient is the sum of all processes', so only the one with the row knows where the number came from.
        place = next((place for place in places if place.startswith(("parameter", "the output"))), places[0])
        raise BrokenRunError(
            f"step {self.state.step + 1}: loss {loss}, gradient norm {grad_norm}; not finite first in {place}. "
            "The update was not applied. Lower the learning rate, use float32, or look at the rows of this step."
        )

    def _finish_step(self, record: StepRecord, stop: StopRequest) -> str | None:
        self._tell(lambda callback: callback.on_step_end(self, record))
        signal_name, best_step = self._agree_to_stop(stop), self.state.best_step
        if self.eval_dataset is not None and (self._is_over or record.step % self.plan.eval_steps == 0):
            self.state.unevaluated = record.to_dict()
            signal_name = self._evaluate_step(stop)
        elif self._is_over or self.will_log(record.step):
            self._write(record.to_dict())
        if self._is_over or self.will_log(record.step):
            self._tell(lambda callback: callback.on_log(self, record))
        is_due = record.step % self.config.save_steps == 0 or record.step in self.state.kept_steps
        if self._is_over or self.state.best_step != best_step or signal_name or is_due:
            self._save()
        return signal_name

    def _agree_to_stop(self, stop: StopRequest) -> str | None:
        """Return the signal that any process got so far, and end the run where any callback asks for it."""
        number = Signals[stop.signal_name] if stop.signal_name else 0
        said = self._processes.gather(number, self.state.should_stop)
        self.state.should_stop = any(should_stop for _, should_stop in said)
        return next((Signals(int(number)).name for number, _ in said if number), None)

    def _evaluate_base(self) -> None:
        """Measure where the run starts, so that what it reaches can be compared."""
        with interrupting_signals():  # There is nothing to save yet.
            base_eval_loss = self.state.base_eval_loss = self.evaluate()
        self._write({"step": 0, "eval_loss": base_eval_loss})
        self._tell(lambda callback: callback.on_evaluate(self, base_eval_loss))

    def _evaluate_step(self, stop: StopRequest) -> str | None:
        """Evaluate the step at hand and write its line; where a signal comes first, return it and leave all that."""
        assert self.state.unevaluated is not None, "a step waits for it"
        if (eval_loss := self._measure_held_out(stop)) is not None:
            self.state.take(eval_loss)
            self._tell(lambda callback: callback.on_evaluate(self, eval_loss))
            self._write({**self.state.unevaluated, "eval_loss": eval_loss})
            self.state.unevaluated = None
            if self.state.step == self._first_step:
                self._save()  # In place of the checkpoint that the run goes on from, which still waits for it.
        return self._agree_to_stop(stop)

    def _write(self, line: Mapping[str, Scalar]) -> None:
        if self._run_dir:
            MetricsLog(self._run_dir.metrics).append(line)

    def _save(self) -> None:
        if not self._run_dir:
            return
        folder = self._run_dir.checkpoint_path(self.state.step)
        named = name_callbacks(self.callbacks)
        snapshot = TrainingSnapshot(
            optimizer_tensors(self._optimizer, self.parameters),
            self.state.to_dict(),
            {name: callback.state_dict() for name, callback in named.items()},
            {name: found for name, callback in named.items() if (found := callback.state_tensors())},
        )
        save_checkpoint(folder, self.bundle, snapshot, self._require_identity(), num_processes=self._processes.count)
        self._prune_checkpoints()
        self._tell(lambda callback: callback.on_save(self))

    def _prune_checkpoints(self) -> None:
        assert self._run_dir is not None, "checkpoints are in a run"
        protected = {*self.state.kept_steps, self.state.best_step}
        self._run_dir.prune_checkpoints(keep=self.config.save_total_limit, protected=protected)

    def _set_learning_rate(self, step: int) -> float:
        factor = self.schedule.factor(self.config.lr_scheduler_type, step)
        factor *= math.prod(callback.learning_rate_factor for callback in self.callbacks)
        for group in self._optimizer.param_groups:
            group["lr"] = self.config.learning_rate * factor
        return self.config.learning_rate * factor

    def _batches(self, dataset: ExampleDataset, rows_of_passes: Sequence[Iterable[int]]) -> Iterator[Batch]:
        """Return a batch for each pass of this process, and those that keep the others company, one by one."""

        def batch(rows: Iterable[int]) -> Batch:
            return self._collate([dataset[int(row)] for row in rows]).to(self.bundle.device)

        missing = self._processes.count_passes(len(rows_of_passes)) - len(rows_of_passes)
        return chain(map(batch, rows_of_passes), (keep_company(batch([0])) for _ in range(missing)))

    def _require_identity(self) -> RunIdentity:
        assert self._identity is not None, "a trainer with a run_dir needs an identity"
        return self._identity

    def _tell(self, event: Callable[[Callback], None]) -> None:
        for callback in self.callbacks:
            event(callback)
