"""What the trainer's tests watch a run with."""

from __future__ import annotations

import os
import signal

from smolora.config import EvaluationConfig
from smolora.training.callback import Callback


class Recorder(Callback):
    """Keeps the records of all steps, and the gradients of the last one."""

    def __init__(self):
        self.records, self.gradients, self.events = [], {}, []

    def on_gradients(self, trainer):
        self.gradients = {name: p.grad.clone() for name, p in trainer.parameters.items()}
        self.events.append("gradients")

    def on_step_end(self, trainer, record):
        self.records.append(record)
        self.events.append("step_end")

    def on_evaluate(self, trainer, eval_loss):
        self.events.append("evaluate")

    @property
    def losses(self):
        return [record.loss for record in self.records]


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.bundle.model.named_parameters()}


def train(make_trainer, *, resume=False, **settings):
    recorder = Recorder()
    trainer = make_trainer(callbacks=[recorder], **settings)
    trainer.train(resume=resume)
    return trainer, recorder


class KillInEvaluation(Callback):
    """Sends SIGTERM in the second pass of the evaluation after `step`, and counts its passes."""

    def __init__(self, step):
        self.step, self.passes = step, 0

    def on_train_begin(self, trainer):
        trainer.evaluation = EvaluationConfig(batch_size=2)
        trainer.bundle.model.register_forward_hook(lambda model, *_: self._count(trainer, model))

    def _count(self, trainer, model):
        if trainer.state.step == self.step and not model.training:
            self.passes += 1
            if self.passes == 2:
                os.kill(os.getpid(), signal.SIGTERM)
