"""Two methods that begin with something other than zero: PiSSA, which takes its start out of the base, and LoftQ."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import peft
import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import Tensor

from smolora.errors import ModelError
from smolora.models.anatomy import PEFT_PREFIX
from smolora.models.quantised import dequantise
from smolora.models.structure import is_quantised, is_stored_transposed
from smolora.models.weight_files import list_weight_files, name_in_files

PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva", "mica")
"""What peft's `init_lora_weights` names and leaves the base as it is."""

REPEATED_STARTS = ("pissa", "olora")
"""What peft takes out of a base again, the same each time, whenever it puts an adapter that began so on it."""


def subtract_start(tensors: Mapping[str, Tensor], taken: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return PiSSA's adapter as one for the base as it was: W - s B0 A0 + s B A = W + s [B, -B0] [A; A0].

    Args:
        tensors: The trained matrices, by their names on disk.
        taken: What they were at the start, and what was taken out of the base.
    """
    joined: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        is_a = name.endswith(".lora_A.weight")
        if not is_a and not name.endswith(".lora_B.weight"):
            joined[name] = tensor  # A head that is trained whole.
            continue
        start = taken[name].to(tensor.device)
        joined[name] = torch.cat((tensor, start if is_a else -start), dim=0 if is_a else 1)
    return joined


def double_rank(config: peft.LoraConfig) -> None:
    """Change PiSSA's configuration to that of the adapter which `subtract_start` returns."""
    config.init_lora_weights = True
    config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha
    config.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
    config.alpha_pattern = {name: 2 * alpha for name, alpha in config.alpha_pattern.items()}


@torch.no_grad()
def start_from_residual(adapted: peft.PeftModel, base_folder: Path) -> None:
    """Give LoRA on quantised layers the largest directions of what quantising lost: s B A is nearest to W - Q(W).

    This is LoftQ's first step (Li et al. 2023, algorithm 1 with T = 1), on the base as it is held. peft's own needs a
    CUDA device, and a base that isn't quantised, whose weights it replaces.

    Raises:
        ModelError: The base's files don't hold a weight.
    """
    place_of: dict[str, Path] = {}
    for file in list_weight_files(base_folder):
        with safe_open(file, framework="pt") as opened:
            place_of |= dict.fromkeys(opened.keys(), file)
    for path, layer in adapted.named_modules():
        if isinstance(layer, LoraLayer) and is_quantised(layer.get_base_layer()):
            _start_one(layer, f"{path.removeprefix(PEFT_PREFIX)}.weight", place_of)


def _start_one(layer: LoraLayer, name: str, place_of: Mapping[str, Path]) -> None:
    stored = next((one for one in name_in_files(name) if one in place_of), None)
    if stored is None:
        raise ModelError(f"the base's files hold no {name}, so what quantising lost of it can't be told.")
    with safe_open(place_of[stored], framework="pt") as opened:
        weight: Tensor = opened.get_tensor(stored).float()
    base = layer.get_base_layer()
    held = dequantise(base, torch.float32)
    residual = (weight.T if is_stored_transposed(base) else weight).to(held.device) - held
    u, s, vh = torch.linalg.svd(residual, full_matrices=False)
    a, b, scaling = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
    rank = min(len(a), len(s))
    root = s[:rank].sqrt()
    a[:rank] = root[:, None] * vh[:rank]
    b[:, :rank] = u[:, :rank] * root / scaling
