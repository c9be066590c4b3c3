"""What the trainer's tests watch a run with."""

from __future__ import annotations

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
