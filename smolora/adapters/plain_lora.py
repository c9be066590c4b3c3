"""LoRA read from an adapter's files and its base's shapes alone: no peft layer is made and no weight of the base read.

For a merge that is what matters: peft takes longer to put its layers on a small model than the merge itself.
"""

from __future__ import annotations

import math

import peft
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from smolora.adapters.adapter_files import StoredAdapter, trains_biases
from smolora.adapters.changes import LowRank
from smolora.adapters.starts import PLAIN_STARTS
from smolora.adapters.state import refuse_other_tensors
from smolora.errors import ModelError
from smolora.models.anatomy import PEFT_PREFIX
from smolora.models.bundle import ModelBundle
from smolora.models.structure import is_linear, read_shape

_SAVED = PEFT_PREFIX + "{}.lora_{}.weight"


def is_plain_lora(adapter: StoredAdapter) -> bool:
    """Whether an adapter on weights that aren't quantised is B A on linear layers, and its files hold nothing else."""
    config = adapter.config
    if not isinstance(config, peft.LoraConfig) or isinstance(config, peft.AdaLoraConfig):
        return False
    if trains_biases(config) or not all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in adapter.tensors):
        return False
    has_more = config.use_dora or config.modules_to_save or config.lora_bias or config.trainable_token_indices
    has_more = has_more or config.target_parameters or config.init_lora_weights not in PLAIN_STARTS
    return not (has_more or adapter.base_copies) and adapter.quantization == "none"


def names_modules(adapter: StoredAdapter, base: ModelBundle) -> bool:
    """Whether all that a LoRA adapter is on are modules of the base; an older transformers had one for each expert."""
    modules = dict(base.model.named_modules())
    return all(key.removeprefix(PEFT_PREFIX).rpartition(".lora_")[0] in modules for key in adapter.tensors)


def read_plain_lora(adapter: StoredAdapter, base: ModelBundle) -> dict[str, LowRank]:
    """Return what a LoRA adapter changes, by the parameter's name in the plain model.

    Args:
        adapter: One that `is_plain_lora`.
        base: The base; its weights may be on "meta".

    Raises:
        ModelError: It was trained on another base, or holds other tensors than its config promises on this one.
    """
    adapter.refuse_other_base(base.fingerprint, base.source)
    config = adapter.config
    assert isinstance(config, peft.LoraConfig), "is_plain_lora"
    modules = dict(base.model.named_modules())
    targets = [path for path in modules if config.target_modules and check_target_module_exists(config, path)]
    if unfit := [path for path in targets if not is_linear(modules[path])]:
        raise ModelError(f"{adapter.folder} doesn't fit this base: {unfit[0]} isn't a linear layer, which LoRA needs.")
    expected: dict[str, tuple[int, ...]] = {}
    for path in targets:
        (inputs, outputs), rank = read_shape(modules[path]), _read_rank(config, path)
        expected |= {_SAVED.format(path, "A"): (rank, inputs), _SAVED.format(path, "B"): (outputs, rank)}
    refuse_other_tensors(adapter, expected)
    sides = {path: [adapter.tensors[_SAVED.format(path, side)] for side in "AB"] for path in targets}
    return {f"{path}.weight": LowRank(a, b, read_scaling(config, path)) for path, (a, b) in sides.items()}


def read_scaling(config: peft.LoraConfig, module: str) -> float:
    """Return what peft multiplies B A by on one module: alpha / r, or alpha / sqrt(r) with rslora."""
    rank = _read_rank(config, module)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.lora_alpha)
    return float(alpha / (math.sqrt(rank) if config.use_rslora else rank))


def _read_rank(config: peft.LoraConfig, module: str) -> int:
    return int(config.rank_pattern.get(get_pattern_key(config.rank_pattern, module), config.r))
