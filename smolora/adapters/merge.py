"""Merges an adapter into a plain model folder: tensor by tensor from the base's files, proved, whole or not there.

The base's files keep their types, names and shards. peft's own merge loads the model in one type, and with a NaN in
the adapter it either merges the NaN or stops half way.
"""

from __future__ import annotations

import shutil
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import peft
import torch
from torch import nn

from smolora.adapters.adapter_files import StoredAdapter
from smolora.adapters.changes import Change, Replaced, find_base, find_changes
from smolora.adapters.merge_probe import HALF_DTYPES, LogitProof, probe_adapter
from smolora.adapters.merge_proof import Finding, Proof, WeightProof
from smolora.adapters.merged_weights import DTYPES, Update, match_updates, write_merged_file
from smolora.adapters.plain_lora import is_plain_lora, names_modules, read_plain_lora
from smolora.adapters.starts import PLAIN_STARTS, REPEATED_STARTS
from smolora.adapters.store import load_base, read_on_base, resolve_base_folder
from smolora.adapters.tied_weights import Tied, find_bound, find_tied, settle_tied, write_untied_settings
from smolora.data.prompts import PROMPT_FORMAT_FILE, read_prompt_format
from smolora.errors import ModelError
from smolora.models.anatomy import PEFT_PREFIX
from smolora.models.bundle import ModelBundle
from smolora.models.loading import load_model, read_model_settings
from smolora.models.saving import NAMED_TEMPLATES, save_model, settle_chat_form
from smolora.models.structure import PreTrainedModel, is_quantised, is_stored_transposed
from smolora.models.tasks import HEAD_TASKS
from smolora.models.weight_files import INDEX_FILE, StoredTensor, list_weight_files, name_in_files, read_stored_tensors
from smolora.records.staging import refuse_existing, require_writable, staged_folder, write_json

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
    f"{NAMED_TEMPLATES}/*.jinja",
    "LICENSE*",
    "NOTICE*",
)

_FILE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# What a LoRA config may say and be merged here. Another setting away from its default is refused, also one that peft
# adds later.
_BOOKKEEPING = ("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision")
_PLACES = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters")
_SCALES = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
_MORE = ("bias", "lora_bias", "modules_to_save", "trainable_token_indices", "ensure_weight_tying")
_STATE = ("inference_mode", "lora_dropout", "init_lora_weights", "eva_config", "fan_in_fan_out")
_UNDERSTOOD = {*_BOOKKEEPING, *_PLACES, *_SCALES, *_MORE, *_STATE}
_REFUSED_BY_PEFT = ("layer_replication", "alora_invocation_tokens", "arrow_config")
"""Settings whose adapters peft can't merge either; of repeated layers it makes one weight with the changes of all."""


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
    """Those that are the base's, read back and compared byte by byte."""
    compared: str
    """What the numbers below are of, in float32: of each merged weight (plain LoRA on a base that isn't quantised), or
    of logits of the merged model, beside which each weight of such a base is held to the adapter too."""
    adapter_effect: float
    """Largest change by the adapter of what was compared."""
    max_difference: float
    """Largest difference between what was merged, and base and adapter."""
    tolerance: float
    """What `max_difference` was held to."""


def merge_adapter(adapter_folder: Path, out: Path, *, base: str | Path | None = None) -> MergeReport:
    """Write base and adapter as one plain model folder, with merge_report.json.

    Args:
        adapter_folder: The adapter: ours, or plain peft's.
        out: The new folder; it is a model when all is written and verified.
        base: The base's folder, hub id or run, where the adapter's own record doesn't lead to it.

    Raises:
        ConfigError: `out` exists, and is no empty folder.
        StorageError: `out` can't be written.
        ModelError: The adapter can't be merged into this base, or what was merged isn't base and adapter.
    """
    require_writable(out)
    refuse_existing(out)
    adapter = read_on_base(adapter_folder, base)
    _refuse_unmergeable(adapter)
    base_folder = resolve_base_folder(adapter)
    _refuse_quantised(base_folder)
    files = list_weight_files(base_folder)
    stored = [tensor for file in files for tensor in read_stored_tensors(file)]
    dtype, names = _choose_dtype(stored), {tensor.name for tensor in stored}
    _refuse_new_biases(adapter, names)
    if adapter.task in HEAD_TASKS:
        return _merge_in_memory(adapter, out, _put_on(adapter, torch.float32), dtype)
    opened = _open(adapter, dtype, names)
    if not _are_held(opened, names):
        return _merge_in_memory(adapter, out, opened, dtype)
    settled = settle_tied(opened.updates, opened.tied, opened.bound, names)
    matched = match_updates(settled.updates, stored, settled.untied)
    added = {name: tensor for name, (_, tensor) in matched.items() if name != tensor.name}
    with staged_folder(out, last="config.json") as staging:
        for file in files:
            changed = {name: update for name, (update, tensor) in matched.items() if tensor.file == file}
            further = {name: tensor for name, tensor in added.items() if tensor.file == file}
            write_merged_file(file, staging / file.name, changed, opened.proof.check, further)
        _copy_settings(base_folder, adapter_folder, staging)
        if settled.untied:
            write_untied_settings(staging, added)
        report = _report(
            adapter,
            out,
            opened=opened,
            dtypes=[tensor.dtype for _, tensor in matched.values()],
            num_tensors=len(stored) + len(added),
            found=opened.proof.conclude(staging),
        )
        write_json(staging / REPORT_FILE, asdict(report))
    return report


def _merge_in_memory(adapter: StoredAdapter, out: Path, opened: _Opened, dtype: torch.dtype) -> MergeReport:
    """Merge in memory, and save anew.

    The base's files have no place for a head that was trained with the adapter, or hold its weights under other names
    and in other pieces than the model does (transformers stacks most experts when it loads them).
    """
    plain = load_model(
        opened.source, dtype=dtype, revision=adapter.config.revision, task=adapter.named_task, labels=adapter.labels
    )
    weights = dict(plain.model.named_parameters())
    settled = settle_tied(opened.updates, opened.tied, opened.bound, weights)
    if settled.untied:
        raise ModelError(
            f"{adapter.folder} parts {next(iter(settled.untied))} from the weight that it shares, and the base's files "
            "don't hold their weights as the model does, so none can be added. Keep base and adapter side by side."
        )
    for name, update in settled.updates.items():
        merged = update.apply(weights[name].detach())
        opened.proof.check(name, update, weights[name], merged)
        weights[name].data = merged
    fmt = read_prompt_format(adapter.folder) or plain.prompt_format
    with staged_folder(out, last="config.json") as staging:
        save_model(replace(plain, prompt_format=fmt), staging)
        dtypes = [_FILE_NAMES[weights[name].dtype] for name in settled.updates]
        report = _report(
            adapter,
            out,
            opened=opened,
            dtypes=dtypes,
            num_tensors=len(weights),
            found=opened.proof.conclude(staging),
        )
        write_json(staging / REPORT_FILE, asdict(report))
    return report


def _report(
    adapter: StoredAdapter,
    out: Path,
    *,
    opened: _Opened,
    dtypes: Sequence[str],
    num_tensors: int,
    found: Finding,
) -> MergeReport:
    """Return the report; `dtypes` are those of the merged tensors."""
    return MergeReport(
        base=opened.source,
        base_fingerprint=opened.fingerprint,
        adapter=str(adapter.folder),
        out=str(out),
        dtype=", ".join(sorted(set(dtypes))),
        quantization=adapter.quantization,
        num_merged_tensors=len(dtypes),
        num_copied_tensors=num_tensors - len(dtypes),
        compared=found.compared,
        adapter_effect=found.effect,
        max_difference=found.difference,
        tolerance=found.tolerance,
    )


class _Opened(NamedTuple):
    """What is known of base and adapter before anything is written; weights of the base are mapped no longer."""

    source: str
    fingerprint: str
    tied: Tied
    bound: Tied
    """Those that stay one weight, whatever the adapter makes of them."""
    updates: dict[str, Update]
    """By the name of the parameter in the plain model."""
    proof: Proof


def _open(adapter: StoredAdapter, dtype: torch.dtype, names: Container[str]) -> _Opened:
    """Open base and adapter; `names` are of the tensors in the base's files."""
    base = _open_base(adapter, dtype, device="meta") if is_plain_lora(adapter) else None
    if base and names_modules(adapter, base):
        changes, tied = read_plain_lora(adapter, base), find_tied(base.model)
        modules = dict(base.model.named_modules())
        updates = {
            name: Update(change, is_stored_transposed(modules[name.rpartition(".")[0]]))
            for name, change in changes.items()
        }
        opened = _Opened(base.source, base.fingerprint, tied, [], updates, WeightProof())
        bypassed = tuple(f"{path}.weight" for path in base.anatomy.unadaptable_modules())
        if not any(updates.keys() & set(shared) for shared in (*tied, bypassed)) and _are_held(opened, names):
            return opened
    return _put_on(adapter, dtype)


def _put_on(adapter: StoredAdapter, dtype: torch.dtype) -> _Opened:
    base = _open_base(adapter, dtype, device="cpu")
    assert isinstance(base.model, PreTrainedModel), "adapters are on no other"
    tied, bound = find_tied(base.model), find_bound(base.model)
    adapted, probe = probe_adapter(base, adapter.folder)
    updates, proof = _build_updates(adapter, adapted), LogitProof(probe, dtype)
    return _Opened(base.source, base.fingerprint, tied, bound, updates, proof)


def _are_held(opened: _Opened, names: Container[str]) -> bool:
    """Whether the base's files hold each parameter that changes, or one that it is tied to, as the model does."""
    shared = {name: group for group in opened.tied for name in group}
    return all(
        any(place in names for name in shared.get(path, (path,)) for place in name_in_files(name))
        for path in opened.updates
    )


def _refuse_unmergeable(adapter: StoredAdapter) -> None:
    config = adapter.config
    if config.is_prompt_learning:
        raise ModelError(
            f"{adapter.folder} holds virtual tokens ({config.peft_type.value}), which are no change of weights and "
            "can't be merged. Keep base and adapter side by side."
        )
    if not isinstance(config, peft.LoraConfig) or isinstance(config, peft.AdaLoraConfig):
        return
    if config.init_lora_weights not in (*PLAIN_STARTS, *REPEATED_STARTS):
        raise ModelError(
            f"{adapter.folder} started with init_lora_weights={config.init_lora_weights!r}, which changes the base by "
            "what isn't kept. Convert it to plain LoRA with peft, where its start was saved "
            "(path_initial_model_for_weight_conversion), then merge that."
        )
    defaults = peft.LoraConfig().to_dict()
    for name, value in config.to_dict().items():
        is_set = value or defaults[name]  # peft writes an empty list where a conversion found nothing to name.
        if name not in _UNDERSTOOD and is_set and value != defaults[name]:
            keep = "eep base and adapter side by side."
            raise ModelError(
                f"{adapter.folder} uses {name}={value!r}, and what that makes of the weights isn't known here. "
                + (f"K{keep}" if name in _REFUSED_BY_PEFT else f"Merge it with peft (merge_and_unload), or k{keep}")
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


def _open_base(adapter: StoredAdapter, dtype: torch.dtype, *, device: str) -> ModelBundle:
    if adapter.quantization != "none":
        dtype = torch.float32  # A quantised layer rounds what it dequantises to its own type.
    return load_base(adapter, dtype=dtype, device=device)


def _build_updates(adapter: StoredAdapter, bundle: ModelBundle) -> dict[str, Update]:
    """Return what becomes of each parameter, by its name in the plain model."""
    assert isinstance(bundle.model, peft.PeftModel), "an adapter was put on"
    changes, plain = find_changes(bundle.model), bundle.model.get_base_model()
    layers = {part.name: find_base(plain, part.name) for part in bundle.anatomy.parts}
    if isinstance(adapter.config, peft.LoraConfig) and adapter.config.init_lora_weights in REPEATED_STARTS:
        changes = {name: _include_start(name, change, layers) for name, change in changes.items()}
    held = [f"{path}.weight" for path, layer in layers.items() if is_quantised(layer)]
    return {
        name: Update(
            changes.get(name),
            is_transposed=name.endswith(".weight") and is_stored_transposed(layers[name.rpartition(".")[0]]),
            quantization=adapter.quantization if name in held else "none",
        )
        for name in dict.fromkeys([*held, *changes])
    }


@torch.no_grad()
def _include_start(name: str, change: Change, layers: Mapping[str, nn.Module]) -> Change:
    """Return what becomes of the base's own weight, where peft took the adapter's start out of the one that it has."""
    path, _, own = name.rpartition(".")
    left = layers[path].get_parameter(own)
    return Replaced(change.apply(left.T if own == "weight" and is_stored_transposed(layers[path]) else left))


def _refuse_new_biases(adapter: StoredAdapter, names: Container[str]) -> None:
    for key in adapter.tensors:
        path = key.removeprefix(PEFT_PREFIX).removesuffix(".lora_B.bias")
        if key.endswith(".lora_B.bias") and not any(name in names for name in name_in_files(f"{path}.bias")):
            raise ModelError(
                f"{adapter.folder} adds a bias to {path} (lora_bias), which has none in the base: there is nothing to "
                "merge it into. Keep base and adapter side by side."
            )


def _copy_settings(base: Path, adapter: Path, target: Path) -> None:
    for pattern in _COPIED:
        for file in base.glob(pattern):
            if file.is_file():
                copy = target / file.relative_to(base)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)
    for folder in (base, adapter):  # The adapter's own format wins.
        if (folder / PROMPT_FORMAT_FILE).is_file():
            shutil.copyfile(folder / PROMPT_FORMAT_FILE, target / PROMPT_FORMAT_FILE)
    settle_chat_form(target)
