"""`PEFTModelWrapper`: a ModelBundle with an adapter, under the name that older scripts use."""

from __future__ import annotations

from pathlib import Path

import torch

from smolora.adapters.attach import attach_adapter
from smolora.adapters.store import save_adapter
from smolora.config.adapter import LoRAConfig
from smolora.models.wrapper import BaseModelWrapper


class PEFTModelWrapper(BaseModelWrapper):
    """A pretrained model with a fresh adapter on it."""

    def __init__(
        self,
        name_or_path: str,
        config: LoRAConfig | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        super().__init__(name_or_path, dtype=dtype, device=device)
        self.bundle = attach_adapter(self.bundle, config or LoRAConfig(), seed=seed)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapter as a peft folder."""
        save_adapter(self.bundle, Path(folder))
