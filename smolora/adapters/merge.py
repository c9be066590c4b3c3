"""Merges a LoRA adapter into a plain model folder: read from the base's files, proved on a probe, whole or not there.

The base's files keep their types, names and shards. peft's own merge loads the model in one type, and with a NaN in
the adapter it either merges the NaN or stops half way.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import peft
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from smolora.adapters.adapter_files import CONFIG_FILE, StoredAdapter, read_adapter
from smolora.adapters.merge_probe import HALF_DTYPES, probe_adapter, verify_merged
from smolora.adapters.merged_weights import Update, match_updates, write_merged_file
from smolora.adapters.store import load_base, refuse_misfit, resolve_base_folder
from smolora.data.prompts import PROMPT_FORMAT_FILE
from smolora.errors import ConfigError, ModelError
from smolora.models.bundle import ModelBundle
from smolora.models.loading import load_model, read_model_settings, resolve_model_folder
from smolora.models.structure import PreTrainedModel, is_quantised, is_stored_transposed, read_shape
from smolora.models.weight_files import INDEX_FILE, StoredTensor, list_weight_files, read_stored_tensors
from smolora.records.staging import staged_folder, write_json

REPORT_FILE = "merge_report.json"

_COPIED = (
    "config.json",
    "generation_config.json",
    INDEX_FILE,
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "LICENSE*",
    "NOTICE*",
)

# What a LoRA config may say and be merged here. Another setting away from its default is refused, also one that peft
# adds later.
_BOOKKEEPING = ("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision")
_PLACES = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out")
_SCALES = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
_UNDERSTOOD = {*_BOOKKEEPING, *_PLACES, *_SCALES, "inference_mode", "lora_dropout", "init_lora_weights"}
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal")  # The others also change the base's weights.


@dataclass(frozen=True)
class MergeReport:
    """What was merged, and how far the merged model is from base and adapter."""

    base: str
    base_fingerprint: str
    adapter: str
    out: str
    dtype: str
    quantization: str
    """How the base was held while the adapter was trained. Such layers are merged as they were held, dequantised: into
    the file's own weights, the adapter would answer for a base that it never saw."""
    num_merged_tensors: int
    """Weights that the adapter changes, and those that only the quantised base does."""
    num_copied_tensors: int
    num_probe_tokens: int
    adapter_effect: float
    """Largest change of a logit by the adapter, on the probe."""
    max_difference: float
    """Largest difference between a merged logit and the adapter's, computed in float32."""
    tolerance: float
    """What `max_difference` was held to."""


def merge_adapter(adapter_folder: Path, out: Path, *, base: str | Path | None = None) -> MergeReport:
    """Write base and adapter as one plain model folder, with merge_report.json.

    Args:
        adapter_folder: The adapter: ours, or plain peft's LoRA.
        out: The new folder; it appears when all is written and verified.
        base: The base's folder or hub id, where the adapter's own record doesn't lead to it.

    Raises:
        ConfigError: `out` exists.
        ModelError: The adapter can't be merged into this base, or the merged model's logits aren't the adapter's.
    """
    if out.exists():
        raise ConfigError(f"{out} exists. Choose another output folder, or remove it first.")
    adapter = read_adapter(adapter_folder)
    _refuse_unmergeable(adapter)
    base_folder = resolve_model_folder(base) if base else resolve_base_folder(adapter)
    _refuse_quantised(base_folder)
    files = list_weight_files(base_folder)
    stored = [tensor for file in files for tensor in read_stored_tensors(file)]
    dtype = _choose_dtype(stored)
    bundle = _open_base(adapter, base, dtype)
    refuse_misfit(adapter, bundle)
    _refuse_partial(adapter, bundle)
    _refuse_tied_head(adapter, bundle)
    updates = _build_updates(adapter, bundle)
    probe = probe_adapter(bundle, updates)
    source, fingerprint = bundle.source, bundle.fingerprint
    del bundle  # Its mapped files, before the merged ones are.
    matched = match_updates(updates, stored)
    dtypes = sorted({tensor.dtype for _, tensor in matched.values()})
    updates_by_tensor = {name: update for name, (update, _) in matched.items()}
    with staged_folder(out) as staging:
        for file in files:
            write_merged_file(file, staging / file.name, updates_by_tensor)
        _copy_settings(base_folder, adapter_folder, staging)
        difference, tolerance = verify_merged(load_model(staging, dtype=dtype), probe, dtypes)
        report = MergeReport(
            base=source,
            base_fingerprint=fingerprint,
            adapter=str(adapter_folder),
            out=str(out),
            dtype=", ".join(dtypes),
            quantization=adapter.quantization,
            num_merged_tensors=len(matched),
            num_copied_tensors=len(stored) - len(matched),
            num_probe_tokens=probe.input_ids.numel(),
            adapter_effect=probe.effect,
            max_difference=difference,
            tolerance=tolerance,
        )
        write_json(staging / REPORT_FILE, asdict(report))
    return report


def read_scaling(config: peft.LoraConfig, module: str) -> float:
    """Return what peft multiplies B A by on one module: alpha / r, or alpha / sqrt(r) with rslora."""
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, module), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.lora_alpha)
    return float(alpha / (math.sqrt(rank) if config.use_rslora else rank))


def _refuse_unmergeable(adapter: StoredAdapter) -> None:
    defaults = peft.LoraConfig().to_dict()
    for name, value in adapter.config.to_dict().items():
        if name not in _UNDERSTOOD and value != defaults[name]:
            raise ModelError(f"{adapter.folder} uses {name}={value!r}, which can't be merged yet. Plain LoRA can.")
    if adapter.config.init_lora_weights not in _PLAIN_STARTS:
        raise ModelError(
            f"{adapter.folder} started with init_lora_weights={adapter.config.init_lora_weights!r}, which changes "
            "the base. Convert it to plain LoRA with peft (path_initial_model_for_weight_conversion), then merge that."
        )
    if len(adapter.tensors) != 2 * len(adapter.pairs):
        raise ModelError(
            f"{adapter.folder} holds tensors that aren't LoRA's A and B, which can't be merged yet. Plain LoRA can."
        )


def _refuse_quantised(folder: Path) -> None:
    if "quantization_config" in read_model_settings(folder):
        raise ModelError(
            f"{folder} is quantised, and merging into rounded weights loses the adapter. Merge into the original."
        )


def _choose_dtype(stored: Iterable[StoredTensor]) -> torch.dtype:
    """Return a type in which every weight of the files can be mapped or widened, so that loading rounds none."""
    halves = {HALF_DTYPES.get(tensor.dtype) for tensor in stored}
    only = halves.pop() if len(halves) == 1 else None
    return only or torch.float32


def _refuse_partial(adapter: StoredAdapter, bundle: ModelBundle) -> None:
    """Raise unless the tensors on disk are those of every module that the adapter's config targets."""
    paths = [path for path, _ in bundle.model.named_modules()] if adapter.config.target_modules else []
    expected = {path for path in paths if check_target_module_exists(adapter.config, path)}
    if different := sorted(expected ^ adapter.pairs.keys()):
        raise ModelError(
            f"{adapter.folder} doesn't hold what its {CONFIG_FILE} promises: {len(different)} modules have matrices "
            f"or are targeted, but not both, first {different[0]}. Copy the adapter again."
        )


def _refuse_tied_head(adapter: StoredAdapter, bundle: ModelBundle) -> None:
    heads = [path for path in adapter.pairs if bundle.anatomy.part_of(f"{path}.weight").group == "head"]
    if heads and isinstance(bundle.model, PreTrainedModel) and bundle.model.config.tie_word_embeddings:
        raise ModelError(
            f"{adapter.folder} adapts {heads[0]}, whose weight is the token embedding's: merged, it would change both."
        )


def _open_base(adapter: StoredAdapter, base: str | Path | None, dtype: torch.dtype) -> ModelBundle:
    if adapter.quantization != "none":
        dtype = torch.float32  # A quantised layer rounds what it dequantises to its own type.
    if base:
        return load_model(base, dtype=dtype, quantization=adapter.quantization)
    return load_base(adapter, dtype=dtype)


def _build_updates(adapter: StoredAdapter, bundle: ModelBundle) -> dict[str, Update]:
    modules = dict(bundle.model.named_modules())
    quantised = {path: module for path, module in modules.items() if is_quantised(module)}
    unchanged = {path: _rank_zero(module) for path, module in quantised.items()}
    return {
        path: Update(
            a,
            b,
            read_scaling(adapter.config, path),
            is_transposed=is_stored_transposed(modules[path]),
            quantization=adapter.quantization if path in quantised else "none",
        )
        for path, (a, b) in {**unchanged, **adapter.pairs}.items()
    }


def _rank_zero(linear: nn.Module) -> tuple[Tensor, Tensor]:
    inputs, outputs = read_shape(linear)
    return torch.zeros(0, inputs), torch.zeros(outputs, 0)


def _copy_settings(base: Path, adapter: Path, target: Path) -> None:
    for pattern in _COPIED:
        for file in base.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)
    for folder in (base, adapter):  # The adapter's own format wins.
        if (folder / PROMPT_FORMAT_FILE).is_file():
            shutil.copyfile(folder / PROMPT_FORMAT_FILE, target / PROMPT_FORMAT_FILE)
