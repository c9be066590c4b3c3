"""For people who stay with Hugging Face's Trainer: the same gradient norms, and they are unclipped there too.

`on_pre_optimizer_step` fires after clipping, so nothing is read there. `GradientMeasuringTrainer` measures between
backward and clipping; on a plain Trainer, `to_trainer_callback` listens to each tensor's gradient as it is completed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import Trainer as HuggingFaceTrainer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from smolora.adapters.tensor_places import read_anatomy
from smolora.training.gradients import GradientNormCallback, measure_norms
from smolora.training.optim import trainable_parameters


class _Recorder(TrainerCallback):  # type: ignore[misc]
    """Drives a GradientNormCallback by the events of Hugging Face's Trainer; whoever measures calls `take`."""

    def __init__(self, norms: GradientNormCallback) -> None:
        self.norms = norms
        self.parameters: dict[str, nn.Parameter] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: object
    ) -> None:
        self.parameters = trainable_parameters(model)
        self.norms.begin(model, self.parameters, read_anatomy(model))
        if self.norms.log:
            self.norms.log.cut(state.global_step)

    def take(self, measured: Mapping[str, Tensor]) -> None:
        """Hand over the norms of a whole step, before the update."""
        self.norms.take(measured)
        self.norms.keep_weights()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if control.should_log:
            self.norms.record(state.global_step, phase=0)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.norms.write_summary()


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
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self.take(self._measured)
        self._measured = {}

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        super().on_train_end(args, state, control)
        for handle in self._handles:
            handle.remove()


def to_trainer_callback(callback: GradientNormCallback) -> TrainerCallback:
    """Return `callback` as a callback of a plain Hugging Face Trainer.

    Over several processes these are the norms before the all-reduce; GradientMeasuringTrainer has those after it.

    Example:
        ```python
        trainer = transformers.Trainer(model=model, args=args, train_dataset=rows)
        trainer.add_callback(to_trainer_callback(GradientNormCallback(GradientNormLog("out"))))
        ```
    """
    return _Listener(callback)


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
            self._recorder.take(measure_norms(present))
        return loss
