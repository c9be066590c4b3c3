"""The moments of the loop that others can listen to. Names are Hugging Face's, plus `on_gradients`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from smolora.training.state import StepRecord
    from smolora.training.trainer import Trainer


class Callback:
    """A listener. Override what you need; what `state_dict` returns comes back at resume."""

    def reset(self) -> None:
        """A run is about to begin: forget the one before. What a resumed run has kept comes back after this."""

    def on_train_begin(self, trainer: Trainer) -> None:
        """Model, optimiser and state are ready, restored where a run is resumed."""

    def on_step_begin(self, trainer: Trainer) -> None:
        """An update is about to be computed; `trainer.state.step` updates are done."""

    def on_gradients(self, trainer: Trainer) -> None:
        """Gradients of the whole step are summed over micro-steps and processes, and not clipped yet."""

    def on_optimizer_step(self, trainer: Trainer) -> None:
        """The optimiser has changed the weights, and the gradients (clipped) are still there."""

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        """The update is done. Set `trainer.state.should_stop` to end the run here."""

    def on_log(self, trainer: Trainer, record: StepRecord) -> None:
        """A line was written to metrics.jsonl; where a signal cut its evaluation short, a resumed run will write it."""

    def on_evaluate(self, trainer: Trainer, eval_loss: float) -> None:
        """The held-out rows were evaluated."""

    def on_save(self, trainer: Trainer) -> None:
        """A checkpoint of this step is on disk."""

    def on_finish(self, trainer: Trainer) -> None:
        """The run is complete, by its last step or because a callback ended it. What is raised here fails it."""

    def on_train_end(self, trainer: Trainer) -> None:
        """The loop has ended, whether by its last step, a callback, a signal or an error."""

    @property
    def learning_rate_factor(self) -> float:
        """What the learning rate of the curve is multiplied by, asked before every update."""
        return 1.0

    def state_dict(self) -> Mapping[str, object]:
        """Return what must survive a resume, as JSON can hold it."""
        return {}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take back what `state_dict` returned."""

    def state_tensors(self) -> Mapping[str, Tensor]:
        """Return the tensors that must survive a resume."""
        return {}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `state_tensors` returned."""


def name_callbacks(callbacks: Iterable[Callback]) -> dict[str, Callback]:
    """Return each callback under a name of its own: its class, numbered among its kind."""
    seen: Counter[str] = Counter()
    named = {}
    for callback in callbacks:
        kind = type(callback).__name__
        named[f"{kind}-{seen[kind]}"] = callback
        seen[kind] += 1
    return named
