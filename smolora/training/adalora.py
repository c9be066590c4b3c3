"""AdaLoRA in the loop: ranks move after every update, and a run in which none did is broken.

Elsewhere nothing calls the allocator unless one knows to, and the run ends with the ranks it began with.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from torch import Tensor

from smolora.adapters.rank_allocation import RankAllocation
from smolora.errors import BrokenRunError
from smolora.training.callback import Callback

if TYPE_CHECKING:
    from smolora.training.trainer import Trainer

logger = logging.getLogger(__name__)


class AdaLoRACallback(Callback):
    """Reallocates the ranks of a run's AdaLoRA adapter."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._allocation: RankAllocation | None = None
        self._saved_pattern: dict[str, list[bool]] | None = None
        self._saved_tensors: Mapping[str, Tensor] = {}

    @property
    def allocation(self) -> RankAllocation:
        """The ranks of the run at hand."""
        assert self._allocation is not None, "the run has begun"
        return self._allocation

    def on_train_begin(self, trainer: Trainer) -> None:
        self._allocation = RankAllocation(trainer.bundle)
        self._allocation.restore(self._saved_tensors, self._saved_pattern)

    def on_gradients(self, trainer: Trainer) -> None:
        self.allocation.penalise()

    def on_optimizer_step(self, trainer: Trainer) -> None:
        step = trainer.state.step + 1
        self.allocation.update(step)
        if step == self.allocation.last_reallocation:  # The lowest loss so far was that of an adapter with other ranks.
            trainer.state.best_eval_loss = trainer.state.best_step = None
        if self.allocation.pattern is None:
            return
        for name, parameter in trainer.parameters.items():
            if ".lora_E." in name and not parameter.any():
                # All of it was taken away, so it is what it was at the start, and has moved all the same.
                trainer.state.checksums.pop(name, None)

    def on_finish(self, trainer: Trainer) -> None:
        if trainer.state.step < self.allocation.last_reallocation:
            logger.warning(
                "AdaLoRA: the run ended after %d updates, and ranks were still to be taken away up to update %d, so "
                "modules may have more of them than adapter.target_r asks for. Set a smaller adapter.tinit and a "
                "larger adapter.tfinal, or let nothing stop the run early.",
                trainer.state.step,
                self.allocation.last_reallocation,
            )
            return
        ranks, start = self.allocation.count_ranks(), self.allocation.start_rank
        smaller = sum(rank < start for rank in ranks.values())
        if not smaller:
            raise BrokenRunError(
                f"AdaLoRA took no rank away: all {len(ranks)} modules still have {start}. Lower adapter.tinit, or "
                "train longer."
            )
        logger.info(
            "AdaLoRA: %d of %d modules have fewer directions than %d; %d of %d are left, from %d to %d a module",
            smaller,
            len(ranks),
            start,
            sum(ranks.values()),
            start * len(ranks),
            min(ranks.values()),
            max(ranks.values()),
        )

    def state_dict(self) -> Mapping[str, object]:
        return {"pattern": self.allocation.pattern}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        self._saved_pattern = cast("dict[str, list[bool]] | None", state["pattern"])

    def state_tensors(self) -> Mapping[str, Tensor]:
        return self.allocation.to_tensors()

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self._saved_tensors = tensors
