"""For people who stay with Hugging Face's Trainer: the same phases and gradient norms, unclipped there too.

`on_pre_optimizer_step` fires after clipping, so nothing is read there. `GradientMeasuringTrainer` measures between
backward and clipping; on a plain Trainer, `to_trainer_callback` listens to each tensor's gradient as it is completed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sized

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from transformers import Trainer as HuggingFaceTrainer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from smolora.adapters.tensor_places import locate_tensors, read_anatomy
from smolora.config import DynamicLoRAConfig, PhaseConfig, TrainingConfig
from smolora.errors import ConfigError
from smolora.integrations.hf_arguments import LearningRateCurve
from smolora.training.gradients import GradientNormCallback, measure_norms
from smolora.training.optim import trainable_parameters
from smolora.training.phase_certificate import PhaseCertificate
from smolora.training.phase_plan import build_phase_plan
from smolora.training.phases import DynamicLoRACallback
from smolora.training.plan import StepPlan

_PHASE = "smolora_phase"
"""Where the phase at hand stands in the TrainerState, which is all that callbacks share. It isn't saved with it."""


class _Recorder(TrainerCallback):  # type: ignore[misc]
    """Drives a GradientNormCallback by the events of Hugging Face's Trainer; whoever measures calls `take`."""

    def __init__(self, norms: GradientNormCallback) -> None:
        self.norms = norms
        self.parameters: dict[str, nn.Parameter] = {}
        self._keeps_weights = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: object
    ) -> None:
        self.parameters = trainable_parameters(model)
        if state.global_step == 0:
            self.norms.reset()
        self.norms.begin(model, self.parameters, read_anatomy(model))
        if self.norms.log:
            self.norms.log.cut(state.global_step)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self._keeps_weights = _will_log(args, state)

    def take(self, measured: Mapping[str, Tensor], scaler: torch.amp.GradScaler | None) -> None:
        """Hand over the norms of a whole step, before the update, without the scale that float16 needs."""
        scale = scaler.get_scale() if scaler else 1.0
        self.norms.take({name: norm / scale for name, norm in measured.items()} if scaler else measured)
        if self._keeps_weights:
            self.norms.keep_weights()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if control.should_log:
            self.norms.record(state.global_step, phase=vars(state).get(_PHASE, 0))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.norms.write_summary()


def _will_log(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether the step that begins will be logged, as far as Hugging Face's settings tell."""
    step = state.global_step + 1
    is_first = step == 1 and args.logging_first_step
    return bool(is_first or (args.logging_strategy == IntervalStrategy.STEPS and step % state.logging_steps == 0))


class _Listener(_Recorder):
    """Measures by itself: each tensor's gradient when it is completed, which is before clipping."""

    def __init__(self, norms: GradientNormCallback) -> None:
        super().__init__(norms)
        self._measured: dict[str, Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: object
    ) -> None:
        super().on_train_begin(args, state, control, model=model)
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._listen(name))  # type: ignore[no-untyped-call]
            for name, parameter in self.parameters.items()
        ]

    def _listen(self, name: str) -> Callable[[Tensor], None]:
        def measure(parameter: Tensor) -> None:
            assert parameter.grad is not None, "torch calls this after it has accumulated a gradient"
            self._measured |= measure_norms({name: parameter.grad})

        return measure

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        optimizer: AcceleratedOptimizer,
        **_: object,
    ) -> None:
        self.take(self._measured, optimizer.scaler)
        self._measured = {}

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        super().on_train_end(args, state, control)
        for handle in self._handles:
            handle.remove()


class _Phases(TrainerCallback):  # type: ignore[misc]
    """Switches and certifies phases. Its certificate of a resumed phase begins where the run was resumed."""

    def __init__(self, callback: DynamicLoRACallback) -> None:
        if any(_needs_our_loop(callback.config, phase) for phase in callback.config.phases):
            raise ConfigError(
                "Hugging Face's Trainer keeps its own learning rate, and phases on it can't start at a plateau: "
                "use learning_rate='continue' with starts in steps, fractions or epochs, or smolora's own Trainer."
            )
        self.callback = callback
        self.certificate: PhaseCertificate | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        train_dataloader: Sized,
        **_: object,
    ) -> None:
        anatomy = read_anatomy(model)
        self.parameters = trainable_parameters(model)  # The optimiser has them all by now.
        self.places = locate_tensors(self.parameters, anatomy)
        steps_per_epoch = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
        self.plan = build_phase_plan(
            self.callback.config,
            self.places,
            num_layers=anatomy.num_layers,
            steps=StepPlan(steps_per_epoch, TrainingConfig(max_steps=state.max_steps, per_device_train_batch_size=1)),
            is_evaluated=False,
        )
        if state.global_step == 0:
            self.callback.reset()
        else:
            self.callback.recall(state.global_step)
        self.callback.begin(self.plan)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        optimizer: torch.optim.Optimizer,
        **_: object,
    ) -> None:
        if self.certificate is not None:
            return
        step = state.global_step
        index = self.plan.index_at(step)
        declared = self.plan.tensors[index]
        vars(state)[_PHASE] = index + 1
        self.certificate = PhaseCertificate.begin(index, step, declared, self.parameters)
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in self.certificate.values)
        moments = self.plan.phases[index].moments or self.callback.config.moments
        if self.plan.starts[index] == step and moments == "reset":
            for name in declared:
                optimizer.state.pop(self.parameters[name], None)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        assert self.certificate is not None, "a step has begun"
        self.certificate.check_gradients(self.parameters, state.global_step + 1)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if self.certificate and self.plan.next_start(self.certificate.index) == state.global_step:
            self._close(state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if self.certificate:
            self._close(state.global_step)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)

    def _close(self, step: int) -> None:
        assert self.certificate is not None, "a phase is open"
        certificate, self.certificate = self.certificate, None
        self.callback.close(certificate, self.parameters, self.places, step)


def _needs_our_loop(config: DynamicLoRAConfig, phase: PhaseConfig) -> bool:
    """Whether a phase needs a learning rate of its own, or starts at a plateau."""
    has_plateau = phase.start is not None and phase.start.plateau is not None
    return has_plateau or (phase.learning_rate or config.learning_rate) == "restart"


def to_trainer_callback(callback: GradientNormCallback | DynamicLoRACallback | TrainingConfig) -> TrainerCallback:
    """Return `callback`, or the learning-rate curve of a TrainingConfig, as a callback of a plain Hugging Face Trainer.

    Over several processes its gradient norms are those before the all-reduce; GradientMeasuringTrainer has those after
    it. Its phases are certified in `callback.reports` and at its `report_path`, and both callbacks together log the
    phase of each step.

    Example:
        ```python
        import transformers

        rows = [{"input_ids": input_ids[0], "labels": input_ids[0]}] * 8
        args = transformers.TrainingArguments("out", max_steps=2, logging_steps=1, report_to="none")
        trainer = transformers.Trainer(model=model, args=args, train_dataset=rows)
        trainer.add_callback(to_trainer_callback(GradientNormCallback(GradientNormLog("out"))))
        trainer.train()
        ```

    Raises:
        ConfigError: Phases with a learning rate of their own, or a plateau.
    """
    if isinstance(callback, TrainingConfig):
        return LearningRateCurve(callback)
    return _Phases(callback) if isinstance(callback, DynamicLoRACallback) else _Listener(callback)


class GradientMeasuringTrainer(HuggingFaceTrainer):  # type: ignore[misc]
    """Hugging Face's Trainer with gradient norms of every step, measured between backward and clipping.

    Args:
        *args: As Hugging Face's Trainer takes them.
        gradient_callback: What measures and records; left out, one that keeps its numbers in memory.
        **kwargs: As Hugging Face's Trainer takes them.
    """

    def __init__(self, *args: object, gradient_callback: GradientNormCallback | None = None, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.gradient_callback = gradient_callback or GradientNormCallback()
        self._recorder = _Recorder(self.gradient_callback)
        self.add_callback(self._recorder)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Do one forward and backward pass, and measure where it is the last one of an update."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            present = {name: p.grad for name, p in self._recorder.parameters.items() if p.grad is not None}
            self._recorder.take(measure_norms(present), self.accelerator.scaler)
        return loss
