"""AdaLoRA's ranks while a run lasts: peft's allocator is called at its moment, and what it knows survives a resume."""

from __future__ import annotations

from collections.abc import Mapping

import peft
import torch
from peft.tuners.adalora.layer import AdaLoraLayer
from torch import Tensor, nn

from smolora.models.bundle import ModelBundle

_MEANS = ("exp_avg_ipt", "exp_avg_unc")
"""What the allocator keeps of every tensor: the mean of its importance, and how uncertain that is."""


class RankAllocation:
    """The ranks of one AdaLoRA adapter.

    The tensors keep their shape for the whole run: a direction that is taken away is a zero in `lora_E`. So checkpoints
    and the optimiser's state fit at any step, and the saved adapter needs no pattern of ranks to be read.
    """

    def __init__(self, bundle: ModelBundle) -> None:
        """Take the adapter of `bundle`."""
        assert isinstance(bundle.model, peft.PeftModel), "AdaLoRA is an adapter"
        self._tuner = bundle.model.base_model
        self._config = bundle.model.active_peft_config
        self.pattern: dict[str, list[bool]] | None = None
        """What is kept, by parameter; None before the first reallocation."""

    @property
    def last_reallocation(self) -> int:
        """The update with the last reallocation."""
        return int(self._config.total_step - self._config.tfinal)

    def update(self, step: int) -> None:
        """Take away what counts least. Call it after update `step`, while its gradients are still there."""
        self._config.rank_pattern = self.pattern
        self._tuner.update_and_allocate(step)
        # Left there, peft would save a smaller adapter, which no longer fits the one in memory.
        self.pattern, self._config.rank_pattern = self._config.rank_pattern, None

    def count_ranks(self) -> dict[str, int]:
        """Return the rank that each module has left."""
        return {
            path.removeprefix("model."): int(layer.lora_E["default"].count_nonzero())
            for path, layer in self._tuner.named_modules()
            if isinstance(layer, AdaLoraLayer)
        }

    @property
    def start_rank(self) -> int:
        """Rank of every module at the start."""
        return int(self._config.init_r)

    def penalise(self) -> None:
        """Add the gradient of the penalty that keeps P and Q orthogonal: the mean of |A A^T - I| and |B^T B - I|."""
        matrices: list[Tensor] = []
        for layer in self._tuner.modules():
            if isinstance(layer, AdaLoraLayer):
                matrices += [layer.lora_A["default"], layer.lora_B["default"].T]
        with torch.enable_grad():
            norms = [torch.linalg.matrix_norm(m @ m.T - torch.eye(len(m), device=m.device)) for m in matrices]
            penalty = self._config.orth_reg_weight * torch.stack(norms).mean()
            owners = _parameters_of(self._tuner)
            gradients = torch.autograd.grad(penalty, owners)
        for parameter, gradient in zip(owners, gradients, strict=True):
            assert parameter.grad is not None, "every tensor of the adapter is trained"
            parameter.grad.add_(gradient)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return what the allocator knows, as named tensors."""
        allocator = vars(self._tuner)["rankallocator"]
        return {f"{kind}/{name}": tensor for kind in _MEANS for name, tensor in vars(allocator)[kind].items()}

    def restore(self, tensors: Mapping[str, Tensor], pattern: dict[str, list[bool]] | None) -> None:
        """Take back what `to_tensors` and `pattern` gave."""
        allocator = vars(self._tuner)["rankallocator"]
        self.pattern = pattern
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            vars(allocator)[kind][name] = tensor.to(next(self._tuner.parameters()).device)
            allocator.ipt[name] = torch.zeros_like(tensor)  # peft begins anew where it doesn't know a tensor here.


def _parameters_of(tuner: nn.Module) -> list[nn.Parameter]:
    layers = [layer for layer in tuner.modules() if isinstance(layer, AdaLoraLayer)]
    return [matrix for layer in layers for matrix in (layer.lora_A["default"], layer.lora_B["default"])]
